"""Geometry: where the values of a bucket's parameters lie in plain tensors, and where their records lie in a message. No torch.

A message has `rows` rows; a row holds one record per parameter (codes, scales, padding: see Code), side by side. On the side of
the plain values there are two arrangements:

    flat     one tensor [rows, sum of n], the parameters' pieces side by side in each row
    whole    one tensor per parameter, of `numel` values; row r of the message holds values [start, start + valid) of `spans[r]`
             and zeros up to n. Without spans, values [r n, (r + 1) n).

Spans of shards are a `Cut`, whose size does not grow with the number of rows: a machine of 75,264 ranks has as many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import overload

from zcompile.kernels.code import Code

LANE = 64
"""A parameter begins at a multiple of this many values in a buffer that holds several whole ones."""


def chunk(rows: int, parts: int, index: int) -> tuple[int, int]:
    """(start, length) of chunk `index` as `torch.chunk` cuts `rows` into `parts` (later chunks may be short or empty)."""
    size = -(-rows // parts)
    start = min(index * size, rows)
    return start, min(size, rows - start)


def nested(rows: int, sizes: tuple[int, ...], index: int) -> tuple[int, int]:
    """(first row, rows) of piece `index` of `rows` cut into chunks, each of them into chunks, and so on: `sizes[0]` is the first cut."""
    start, left = 0, math.prod(sizes)
    for size in sizes:
        left //= size
        inner, rows = chunk(rows, size, index // left % size)
        start += inner
    return start, rows


@dataclass(frozen=True)
class Cut(Sequence[tuple[int, int]]):
    """Spans by closed form: `rows` rows of `row` values, cut into nested chunks of `sizes`, each of those into `parts` stretches of n
    values, the last of which may be short or empty."""

    n: int
    rows: int
    row: int
    parts: int
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return self.parts * math.prod(self.sizes)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[int, int], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | tuple[tuple[int, int], ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        if not 0 <= index < len(self):
            raise IndexError(f"stretch {index} of {len(self)}")
        shard, part = divmod(index, self.parts)
        first, rows = nested(self.rows, self.sizes, shard)
        length = rows * self.row
        begin = min(part * self.n, length)
        return first * self.row + begin, min(length - begin, self.n)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Piece:
    """One parameter: n values in each row, a multiple of the block; numel values in its plain tensor; spans as above."""

    n: int
    numel: int
    spans: tuple[tuple[int, int], ...] | Cut = ()

    def span(self, row: int) -> tuple[int, int]:
        """(start, valid) of a row."""
        return self.spans[row] if self.spans else (row * self.n, self.n)


@dataclass(frozen=True)
class Geometry:
    rows: int
    pieces: tuple[Piece, ...]
    flat: bool

    @staticmethod
    def of_rows(rows: int, widths: tuple[int, ...]) -> Geometry:
        """A flat one: `widths` are the n of the parameters."""
        return Geometry(rows, tuple(Piece(n, rows * n) for n in widths), True)

    @cached_property
    def text(self) -> str:
        """The argument of the kernels; `Geometry.parse` is its inverse."""
        return json.dumps(
            [self.rows, int(self.flat), [_numbers(piece) for piece in self.pieces]], separators=(",", ":")
        )

    @staticmethod
    @cache
    def parse(text: str) -> Geometry:
        rows, flat, pieces = json.loads(text)
        return Geometry(rows, tuple(_piece(*numbers) for numbers in pieces), bool(flat))

    @cached_property
    def width(self) -> int:
        """Values of one row."""
        return sum(piece.n for piece in self.pieces)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each parameter's values begin: column of a flat row, or element of the buffer that holds all whole ones."""
        out, at = [], 0
        for piece in self.pieces:
            out.append(at)
            at += piece.n if self.flat else -(-piece.numel // LANE) * LANE
        return (*out, at)

    @property
    def size(self) -> int:
        """Elements of the plain side in one buffer: flat rows, or the whole parameters one after another."""
        return self.rows * self.width if self.flat else self.starts[-1]

    def records(self, code: Code) -> tuple[int, ...]:
        """Byte offsets of the records in a row, and the bytes of a row at the end."""
        out = [0]
        for piece in self.pieces:
            out.append(out[-1] + code.record_bytes(piece.n))
        return tuple(out)

    def message_bytes(self, code: Code) -> int:
        return self.rows * self.records(code)[-1]


def _numbers(piece: Piece) -> list[int | list[int]]:
    """[n, numel], and the spans: one after another, or a list of a cut's numbers."""
    if isinstance(cut := piece.spans, Cut):
        return [piece.n, piece.numel, [cut.rows, cut.row, cut.parts, *cut.sizes]]
    return [piece.n, piece.numel, *(value for span in piece.spans for value in span)]


def _piece(n: int, numel: int, *rest: int | list[int]) -> Piece:
    if rest and isinstance(rest[0], list):
        rows, row, parts, *sizes = rest[0]
        return Piece(n, numel, Cut(n, rows, row, parts, tuple(sizes)))
    return Piece(n, numel, tuple(zip(rest[::2], rest[1::2], strict=True)))  # type: ignore[arg-type]
