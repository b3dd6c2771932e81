"""Which collective of this rank is it? What a launch knows of itself: level, transfer, number, parameters, source line.

A process group knows its level and its transfer, and counts. Whose values it carries is known further up: by the graph that runs (its
ordered list), by the eager read, by the refresh. They say so by `about`, of their own thread, and a launch looks there. Nothing here
communicates.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch

_OURS = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    "<",
)
_LIBRARY = os.path.dirname(os.__file__) + os.sep


@dataclass(slots=True)  # not frozen: one is made in every hop, and a frozen one takes five times as long
class Site:
    """One collective of this rank, or (transfer "agreement") one exchange of words, or ("") what `op` says.

    Attributes:
        number: of this transfer over this level since the process groups were made: the same on all ranks.
        members: global ranks that take part, in group order.
        order: of all that this rank launched, refreshes left out (they run beside the rest): the same on all ranks.
        parameters, source, stage: what it carries, the user's line behind it, the graph or the part of a step that it belongs to; empty
            where nobody said.
    """

    level: str
    transfer: str
    op: str
    number: int
    members: tuple[int, ...]
    order: int = 0
    parameters: tuple[str, ...] = ()
    source: str = ""
    stage: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """Equal on two ranks of a group that are at the same collective."""
        return (self.level, self.transfer, self.number)

    def __str__(self) -> str:
        if self.transfer == "agreement":
            return f"agreement number {self.number} of all ranks, `{self.op}`"
        if not self.transfer:
            return self.op
        from zcompile.wording import fold

        of = f", of {fold(self.parameters)}" if self.parameters else ""
        at = f" ({self.source})" if self.source else ""
        stage = f", in {self.stage}" if self.stage else ""
        return f"{self.transfer} {self.op} over {self.level}, number {self.number}{of}{at}{stage}"


class Subject(Protocol):
    """What a thread is at work on."""

    def describe(self, level: str, transfer: str) -> tuple[tuple[str, ...], str, str]:
        """(parameters, source, stage) of the next collective of `transfer` over `level`."""


@dataclass(frozen=True)
class Parameters:
    """Some parameters, outside any graph."""

    names: tuple[str, ...]
    source: str
    stage: str

    def describe(self, level: str, transfer: str) -> tuple[tuple[str, ...], str, str]:
        return self.names, self.source, self.stage


def index(collectives: Iterable[Any]) -> dict[tuple[str, str], list[Any]]:
    """A graph's ordered list of collectives by level and transfer. Peer reads launch nothing."""
    found: dict[tuple[str, str], list[Any]] = {}
    for entry in collectives:
        if entry.op != "peer_read":
            found.setdefault((entry.level, entry.transfer), []).append(entry)
    return found


class Listed:
    """One run of a graph: each launch takes the next entry of its level and transfer in the graph's `index`."""

    def __init__(self, name: str, entries: Mapping[tuple[str, str], Sequence[Any]]):
        self._name = name
        self._entries = entries
        self._taken: dict[tuple[str, str], int] = {}

    def describe(self, level: str, transfer: str) -> tuple[tuple[str, ...], str, str]:
        key = level, transfer
        entries, taken = self._entries.get(key, ()), self._taken.get(key, 0)
        if taken == len(entries):
            return (), "", self._name
        self._taken[key] = taken + 1
        return entries[taken].parameters, entries[taken].source, self._name


_LOCAL = threading.local()


@contextlib.contextmanager
def about(subject: Subject, unless_said: bool = False) -> Iterator[None]:
    """Collectives that this thread launches inside are of `subject`; with `unless_said` only where nobody around has said so already."""
    before = getattr(_LOCAL, "subject", None)
    _LOCAL.subject = before if unless_said and before is not None else subject
    try:
        yield
    finally:
        _LOCAL.subject = before


def subject() -> Subject | None:
    """What this thread is at work on, if anybody said."""
    return getattr(_LOCAL, "subject", None)


def users_place(calls: Iterable[tuple[str, int]]) -> str:
    """The first line that is neither torch's nor ours nor the standard library's, "/home/me/train.py:93"; "" if there is none.

    Args:
        calls: (file, line), innermost first.
    """
    for path, line in calls:
        library = path.startswith(_LIBRARY) and f"{os.sep}site-packages{os.sep}" not in path
        if not library and not path.startswith(_OURS):
            return f"{path}:{line}"
    return ""


def users_line(calls: Iterable[tuple[str, int]]) -> str:
    """The same without the folder: "train.py:93"."""
    return os.path.basename(users_place(calls))


def places(frames: Iterable[tuple[FrameType, int]]) -> Iterator[tuple[str, int]]:
    """(file, line) of frames as traceback.walk_stack and walk_tb give them. Of this thread alone: of others see zcompile.faults.stacks."""
    return ((frame.f_code.co_filename, line) for frame, line in frames)
