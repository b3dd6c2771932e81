"""What can go wrong in a program: each is an error of the program under test, or something that is not modelled."""

from __future__ import annotations


class AsmError(Exception):
    """Base of all errors of this interpreter."""


class Unsupported(AsmError):
    """An opcode, modifier or operand that is not modelled. Nothing is ever guessed."""


class Fault(AsmError):
    """A memory access outside every buffer, across the end of one, misaligned, or a store to a read-only buffer."""

    def __init__(self, reason: str, address: int, position: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.address = address
        self.position = position
        """Which of the addresses that were passed together."""


class Endless(AsmError):
    """More instructions were executed than the caller allows."""
