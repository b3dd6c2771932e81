"""Where a program's tile lies and how it is read and written; `blocks.py` says what a row of the table holds.

Values, codes and scales move in 16-byte pieces per lane wherever the layout allows it; only scales may be narrower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zcompile.kernels.blocks import COLUMNS, UNIT
from zcompile.kernels.triton_math import to_bf16, to_fp32

WIDTH = tl.constexpr(len(COLUMNS))
HINT = tl.constexpr(UNIT)
SOURCE, OWN, JOINT, VALID, CODES, SCALES, BLOCKS, SLOTS = (tl.constexpr(i) for i in range(len(COLUMNS)))


@triton.jit
def tile_of(tiles, index):
    """Pointer to row `index` of the table."""
    return tiles + index.to(tl.int64) * WIDTH


@triton.jit
def element(tile, COLUMN: tl.constexpr, ODD: tl.constexpr):
    """Column OWN, JOINT or VALID."""
    found = tl.load(tile + COLUMN)
    if not ODD:
        found = tl.multiple_of(found, HINT)
    return found


@triton.jit
def address(table, index, DTYPE: tl.constexpr, ODD: tl.constexpr):
    """Entry `index` of a table of addresses -> pointer; a multiple of 16 unless ODD."""
    found = tl.load(table + index).to(tl.pointer_type(DTYPE))
    if not ODD:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def rounded_down(base):
    """`base` as a multiple of 16 that the compiler knows to be one. A hint on `base` itself would hold on the other branch too."""
    return tl.multiple_of((base.to(tl.int64) // 16 * 16).to(base.dtype), 16)


@triton.jit
def load_values(base, valid, ROWS: tl.constexpr, BLOCK: tl.constexpr, ODD: tl.constexpr):
    """Halves [ROWS, BLOCK / 2] fp32 of the values from `base` on; zeros beyond `valid`."""
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK // 2)[None, :]
    if ODD:
        if (valid == ROWS * BLOCK) & (base.to(tl.int64) % 16 == 0):
            wide = rounded_down(base)
            x0 = tl.load(wide + at)
            x1 = tl.load(wide + (at + BLOCK // 2))
        else:
            x0 = tl.load(base + at, mask=at < valid, other=0.0)
            x1 = tl.load(base + (at + BLOCK // 2), mask=at + BLOCK // 2 < valid, other=0.0)
    else:
        x0 = tl.load(base + at, mask=at < valid, other=0.0)
        x1 = tl.load(base + (at + BLOCK // 2), mask=at + BLOCK // 2 < valid, other=0.0)
    return to_fp32(x0), to_fp32(x1)


@triton.jit
def store_values(
    base, y0, y1, valid, ROWS: tl.constexpr, BLOCK: tl.constexpr, ODD: tl.constexpr, CONVERT: tl.constexpr
):
    """The counterpart of `load_values`; rounds to the dtype of `base`."""
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK // 2)[None, :]
    if base.dtype.element_ty == tl.bfloat16:
        y0, y1 = to_bf16(y0, CONVERT), to_bf16(y1, CONVERT)
    if ODD:
        if (valid == ROWS * BLOCK) & (base.to(tl.int64) % 16 == 0):
            wide = rounded_down(base)
            tl.store(wide + at, y0)
            tl.store(wide + (at + BLOCK // 2), y1)
        else:
            tl.store(base + at, y0, mask=at < valid)
            tl.store(base + (at + BLOCK // 2), y1, mask=at + BLOCK // 2 < valid)
    else:
        tl.store(base + at, y0, mask=at < valid)
        tl.store(base + (at + BLOCK // 2), y1, mask=at + BLOCK // 2 < valid)


@triton.jit
def scale_pointer(message, offset, SCALE: tl.constexpr):
    if SCALE == "bf16":
        return (message + offset).to(tl.pointer_type(tl.uint16))
    else:
        return (message + offset).to(tl.pointer_type(tl.uint32))


@triton.jit
def load_codes(message, tile, ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """Codes of both halves, uint8 [ROWS, BLOCK / 2], those of int4 twice."""
    base = message + tl.multiple_of(tl.load(tile + CODES), 16)
    row = tl.arange(0, ROWS)[:, None]
    mask = row < tl.load(tile + BLOCKS)
    if KIND == "int4":
        c0 = tl.load(base + (row * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]), mask=mask, other=0)
        c1 = c0
    else:
        at = row * BLOCK + tl.arange(0, BLOCK // 2)[None, :]
        c0 = tl.load(base + at, mask=mask, other=0)
        c1 = tl.load(base + (at + BLOCK // 2), mask=mask, other=0)
    return c0, c1


@triton.jit
def load_scales(message, tile, ROWS: tl.constexpr, SCALE: tl.constexpr):
    """fp32 [ROWS]."""
    row = tl.arange(0, ROWS)
    base = scale_pointer(message, tl.load(tile + SCALES), SCALE)
    found = tl.load(base + row, mask=row < tl.load(tile + BLOCKS), other=0).to(tl.uint32)
    if SCALE == "bf16":
        found = found << 16
    return found.to(tl.float32, bitcast=True)


@triton.jit
def store_record(
    message, tile, c0, c1, scales, ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr
):
    """Codes, scales and, as scales of blocks of zeros, the padding."""
    base = message + tl.multiple_of(tl.load(tile + CODES), 16)
    row = tl.arange(0, ROWS)[:, None]
    mask = row < tl.load(tile + BLOCKS)
    if KIND == "int4":
        tl.store(base + (row * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]), c0, mask=mask)
    else:
        at = row * BLOCK + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(base + at, c0, mask=mask)
        tl.store(base + (at + BLOCK // 2), c1, mask=mask)
    store_scales(message, tile, scales, ROWS, SCALE)


@triton.jit
def store_scales(message, tile, scales, ROWS: tl.constexpr, SCALE: tl.constexpr):
    """Those of the blocks, and of the padding."""
    row = tl.arange(0, ROWS)
    tl.store(scale_pointer(message, tl.load(tile + SCALES), SCALE) + row, scales, mask=row < tl.load(tile + SLOTS))
