"""Geometry: where the values of a bucket's parameters lie in plain tensors, and where their records lie in a message. No torch.

A message has `rows` rows; a row holds one record per parameter (codes, scales, padding: see Code), side by side. On the side of
the plain values there are two arrangements:

    flat     one tensor [rows, sum of n], the parameters' pieces side by side in each row
    whole    one tensor per parameter, of `numel` values; row r of the message holds values [start, start + valid) of `spans[r]`
             and zeros up to n. Without spans, values [r n, (r + 1) n).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property

from zcompile.kernels.code import Code

LANE = 64
"""A parameter begins at a multiple of this many values in a buffer that holds several whole ones."""


@dataclass(frozen=True)
class Piece:
    """One parameter: n values in each row, a multiple of the block; numel values in its plain tensor; spans as above."""

    n: int
    numel: int
    spans: tuple[tuple[int, int], ...] = ()

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
        pieces = [[piece.n, piece.numel, *(value for span in piece.spans for value in span)] for piece in self.pieces]
        return json.dumps([self.rows, int(self.flat), pieces], separators=(",", ":"))

    @staticmethod
    @cache
    def parse(text: str) -> Geometry:
        rows, flat, pieces = json.loads(text)
        made = [Piece(n, numel, tuple(zip(rest[::2], rest[1::2], strict=True))) for n, numel, *rest in pieces]
        return Geometry(rows, tuple(made), bool(flat))

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
