"""Tiles: which blocks one program of a kernel works on, and where they lie on both sides. No Triton here.

A tile is up to `tile_blocks` consecutive blocks of one record. Inside it everything is affine (values, codes and scales each lie
one behind another), so eight numbers per tile say where a bucket lies, whatever the number of its parameters: one launch does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zcompile.kernels.code import BITS, SCALES, Code
from zcompile.kernels.geometry import Geometry, Piece

COLUMNS = ("source", "own", "joint", "valid", "codes", "scales", "blocks", "slots")
"""source: index of the parameter, or of the rank in a table of peers. own: element in the parameter's own tensor. joint: element in
the one buffer of flat rows or whole parameters. valid: how many values from there on exist, the rest of the tile is zeros. codes,
scales: byte offsets in the message. blocks: how many the tile holds. slots: scales to write, those and the zeros of the padding."""

VALUES = 8192
"""Values of a tile: 32 for each of 256 lanes. Fewer, and the two divisions per block and lane weigh more than the values."""
_LEAST = 8
"""Blocks of a tile at least: eight 2-byte scales are ALIGN bytes, so the padding of a record lies in the slots of its last tile."""
UNIT = 8
"""Values that one lane reads or writes at once, 16 bytes of bf16: starts and lengths that are multiples need no tail."""


def tile_blocks(code: Code) -> int:
    return max(_LEAST, VALUES // code.block)


def tiles(geometry: Geometry, code: Code, ranks: int = 1) -> Tensor:
    """[tiles, len(COLUMNS)] int64 on the CPU, row after row of the message.

    Args:
        ranks: with more than one, the rows of the message are those of `ranks` messages, equally many each: `source` is the rank,
            and `codes` and `scales` count from the beginning of its message.
    """
    if geometry.rows % ranks:
        raise ValueError(f"{geometry.rows} rows are not {ranks} equal messages")
    step = tile_blocks(code)
    records, starts = geometry.records(code), geometry.starts
    row = torch.arange(geometry.rows, dtype=torch.int64)[:, None]
    each = geometry.rows // ranks
    begin = row % each * records[-1]
    columns = []
    for index, piece in enumerate(geometry.pieces):
        count = piece.n // code.block
        first = torch.arange(0, count, step, dtype=torch.int64)[None, :]
        blocks = (count - first).clamp(max=step)
        spans = _spans(piece, geometry.rows)
        own = spans[:, :1] + first * code.block
        codes = begin + records[index]
        end = codes + code.code_bytes(piece.n)
        padded = (records[index + 1] - records[index] - code.code_bytes(piece.n)) // SCALES[code.scale]
        one = (
            row // each if ranks > 1 else torch.full_like(row, index),
            own,
            row * geometry.width + starts[index] + first * code.block if geometry.flat else starts[index] + own,
            (spans[:, 1:] - first * code.block).clamp(min=0).minimum(blocks * code.block),
            codes + first * (code.block * BITS[code.kind] // 8),
            end + first * SCALES[code.scale],
            blocks,
            torch.where(first + step < count, blocks, padded - first),
        )
        shape = (geometry.rows, first.shape[1])
        columns.append(torch.stack([column.expand(shape) for column in one], dim=-1))
    return torch.cat(columns, dim=1).reshape(-1, len(COLUMNS))


def odd(geometry: Geometry) -> bool:
    """Does any parameter begin or end, in any row, where a lane's UNIT values would straddle it?"""
    return any(bool((_spans(piece, geometry.rows) % UNIT).any()) for piece in geometry.pieces)


def _spans(piece: Piece, rows: int) -> Tensor:
    """[rows, 2] int64: (start, valid) of each row."""
    if not piece.spans:
        return torch.stack([torch.arange(rows) * piece.n, torch.full((rows,), piece.n)], dim=1)
    return torch.tensor([piece.span(row) for row in range(rows)], dtype=torch.int64).view(-1, 2)
