"""Code: how a block of values becomes codes and a scale. docs/wire-format.md is the specification in words. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

BITS = {"int8": 8, "int4": 4, "e4m3fn": 8, "e4m3fnuz": 8}
"""Kinds of codes, and bits per value. The two fp8 kinds are OCP's and AMD's (gfx942); a chip has one of them or neither."""
TOP = {"int8": 127.0, "int4": 7.0, "e4m3fn": 448.0, "e4m3fnuz": 240.0}
"""The largest magnitude of a code: what the largest value of a block becomes. Symmetric: -128 and -8 are never sent."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048)
SCALES = {"bf16": 2, "fp32": 4}
"""dtype of a scale, and its bytes."""
ROUNDINGS = ("nearest", "stochastic")
ALIGN = 16
"""A record is padded to a multiple of this many bytes, so that the next one begins where wide loads may begin."""
SMALLEST = 2.0**-80
"""A block whose largest magnitude is below this is a block of zeros: scales, their inverses and sums of products then stay
clear of subnormal numbers, which not every target computes with."""


@dataclass(frozen=True)
class Code:
    """kind: a key of BITS. block: values per scale, one of BLOCKS. scale: a key of SCALES. rounding: one of ROUNDINGS.

    Raises ValueError naming the field, its value and the valid ones.
    """

    kind: str
    block: int = 256
    scale: str = "bf16"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        for field, value, valid in (
            ("kind", self.kind, tuple(BITS)), ("block", self.block, BLOCKS), ("scale", self.scale, tuple(SCALES)),
            ("rounding", self.rounding, ROUNDINGS),
        ):  # fmt: skip
            if isinstance(value, bool) or value not in valid:
                raise ValueError(f"{field}={value!r}: valid: {', '.join(map(str, valid))}")
        if self.rounding == "stochastic" and not self.integer:
            raise ValueError(f"rounding='stochastic': {self.kind} rounds to nearest only; valid with it: int8, int4")

    @property
    def integer(self) -> bool:
        return self.kind in ("int8", "int4")

    @property
    def top(self) -> float:
        return TOP[self.kind]

    @property
    def text(self) -> str:
        """ "int8/256/bf16/nearest": the argument of the kernels; `Code.parse` is its inverse."""
        return f"{self.kind}/{self.block}/{self.scale}/{self.rounding}"

    @staticmethod
    @cache
    def parse(text: str) -> Code:
        kind, block, scale, rounding = text.split("/")
        return Code(kind, int(block), scale, rounding)

    def code_bytes(self, n: int) -> int:
        """Bytes of the codes of n values."""
        return n * BITS[self.kind] // 8

    def scale_bytes(self, n: int) -> int:
        """Bytes of the scales of n values, a multiple of the block."""
        return n // self.block * SCALES[self.scale]

    def record_bytes(self, n: int) -> int:
        """Bytes of one record: codes, scales, and zeros up to a multiple of ALIGN."""
        return aligned(self.code_bytes(n) + self.scale_bytes(n))


LOSSLESS_HEADER = 16
LOSSLESS_SHARE = 16
"""One value in so many of a lossless delta may be an exception, two bytes more: the room for them is an eighth of the codes."""


def lossless_room(n: int) -> int:
    """Exceptions for which the record of n values has room."""
    return -(-n // LOSSLESS_SHARE)


def lossless_bytes(n: int) -> int:
    """Bytes of the record of n values in a lossless delta: header, codes, exceptions."""
    return LOSSLESS_HEADER + aligned(n) + aligned(2 * lossless_room(n))


def aligned(size: int) -> int:
    """Bytes of a part of a record, with the zeros behind it."""
    return -(-size // ALIGN) * ALIGN
