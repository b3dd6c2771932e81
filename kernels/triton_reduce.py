"""Kernels of a reduction: the sum of several messages, to plain values, into the mains, or to another message.

The order is y_0 + y_1 + ... in fp32, as in the reference: the bits depend on nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zcompile.kernels.triton_math import decode, encode
from zcompile.kernels.triton_tile import (
    JOINT,
    OWN,
    SOURCE,
    VALID,
    address,
    element,
    load_codes,
    load_scales,
    load_values,
    store_record,
    store_values,
    tile_of,
)

UNROLL = 16
"""Up to this many parts the sum is unrolled: all loads are under way before the first addition. Beyond it is a loop."""


@triton.jit
def part(message, tile, ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr):
    c0, c1 = load_codes(message, tile, ROWS, BLOCK, KIND)
    return decode(c0, c1, load_scales(message, tile, ROWS, SCALE), KIND)


@triton.jit
def total(
    message,
    tile,
    parts,
    stride,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Halves [ROWS, BLOCK / 2] fp32 of the sum over the parts, which lie 16 `stride` bytes apart. PARTS: 0, or as `parts`."""
    step = stride.to(tl.int64) * 16
    sum0, sum1 = part(message, tile, ROWS, BLOCK, KIND, SCALE)
    if PARTS > 0:
        for index in tl.static_range(1, PARTS):
            y0, y1 = part(message + step * index, tile, ROWS, BLOCK, KIND, SCALE)
            sum0, sum1 = sum0 + y0, sum1 + y1
    else:
        # One stage: pipelined loops were miscompiled for gfx950 by some releases, and there is little to gain.
        for _ in tl.range(1, parts, num_stages=1):
            message += step
            y0, y1 = part(message, tile, ROWS, BLOCK, KIND, SCALE)
            sum0, sum1 = sum0 + y0, sum1 + y1
    return sum0, sum1


@triton.jit(do_not_specialize=["parts", "stride"])
def reduce_kernel(
    message,
    mains,
    out,
    tiles,
    parts,
    stride,
    PARTS: tl.constexpr,
    MAINS: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ODD: tl.constexpr,
):
    """The sum of `parts` messages -> plain fp32.

    Args:
        message: [parts * 16 stride] uint8.
        mains: int64, with MAINS: addresses of a tensor per parameter, [rows * n] fp32, to which the sum is added.
        out: [rows * width] fp32; None writes the result to the mains instead.
        tiles: the table of one part; flat.
        ODD: the mains may begin anywhere; everything else is aligned.
    """
    tile = tile_of(tiles, tl.program_id(0))
    valid = element(tile, VALID, False)
    sum0, sum1 = total(message, tile, parts, stride, PARTS, ROWS, BLOCK, KIND, SCALE)
    if MAINS:
        base = address(mains, tl.load(tile + SOURCE), tl.float32, ODD) + element(tile, OWN, False)
        x0, x1 = load_values(base, valid, ROWS, BLOCK, ODD)
        sum0, sum1 = x0 + sum0, x1 + sum1
    if out is None:
        store_values(base, sum0, sum1, valid, ROWS, BLOCK, ODD, False)
    else:
        store_values(out + element(tile, JOINT, False), sum0, sum1, valid, ROWS, BLOCK, False, False)


@triton.jit(do_not_specialize=["parts", "stride"])
def requantize_kernel(
    message,
    out,
    tiles,
    out_tiles,
    parts,
    stride,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    OUT_KIND: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of `parts` messages -> one message of it, in another code of the same block.

    Args:
        out: [row bytes of the other code * rows] uint8.
        out_tiles: the table of the other code: the same tiles, other places.
        STOCHASTIC: of the other code.
    """
    index = tl.program_id(0)
    sum0, sum1 = total(message, tile_of(tiles, index), parts, stride, PARTS, ROWS, BLOCK, KIND, SCALE)
    c0, c1, scales = encode(sum0, sum1, BLOCK // 2, OUT_KIND, OUT_SCALE, STOCHASTIC)
    store_record(out, tile_of(out_tiles, index), c0, c1, scales, ROWS, BLOCK, OUT_KIND, OUT_SCALE)
