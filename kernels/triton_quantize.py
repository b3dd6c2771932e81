"""Kernels between plain values and a message: quantise (with or without an image to subtract), dequantise, apply a delta."""

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


@triton.jit
def quantize_kernel(
    source,
    message,
    tiles,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ODD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Plain values -> message, one program per tile.

    Args:
        source: [rows * width] fp32 or bf16; or, with a DTYPE (the Triton dtype of the values), int64 addresses of a tensor per
            parameter.
        message: uint8.
        tiles: int64, the table of `blocks.tiles`.
    """
    tile = tile_of(tiles, tl.program_id(0))
    if DTYPE is None:
        base = source + element(tile, JOINT, ODD)
    else:
        base = address(source, tl.load(tile + SOURCE), DTYPE, ODD) + element(tile, OWN, ODD)
    x0, x1 = load_values(base, element(tile, VALID, ODD), ROWS, BLOCK, ODD)
    c0, c1, scales = encode(x0, x1, BLOCK // 2, KIND, SCALE, STOCHASTIC)
    store_record(message, tile, c0, c1, scales, ROWS, BLOCK, KIND, SCALE)


@triton.jit
def quantize_delta_kernel(
    source,
    image,
    message,
    tiles,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """source - image -> message; both flat [rows * width], source fp32, image fp32 or bf16."""
    tile = tile_of(tiles, tl.program_id(0))
    at, valid = element(tile, JOINT, False), element(tile, VALID, False)
    x0, x1 = load_values(source + at, valid, ROWS, BLOCK, False)
    y0, y1 = load_values(image + at, valid, ROWS, BLOCK, False)
    c0, c1, scales = encode(x0 - y0, x1 - y1, BLOCK // 2, KIND, SCALE, STOCHASTIC)
    store_record(message, tile, c0, c1, scales, ROWS, BLOCK, KIND, SCALE)


@triton.jit
def dequantize_kernel(
    message,
    out,
    tiles,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ODD: tl.constexpr,
    APPLY: tl.constexpr,
    CONVERT: tl.constexpr,
):
    """Message -> plain values.

    Args:
        message: uint8.
        out: fp32 or bf16, [rows * width], or whole parameters where the geometry has them begin. With APPLY the values are added to
            what is there, in fp32.
        tiles: as above.
    """
    tile = tile_of(tiles, tl.program_id(0))
    c0, c1 = load_codes(message, tile, ROWS, BLOCK, KIND)
    y0, y1 = decode(c0, c1, load_scales(message, tile, ROWS, SCALE), KIND)
    base, valid = out + element(tile, JOINT, ODD), element(tile, VALID, ODD)
    if APPLY:
        x0, x1 = load_values(base, valid, ROWS, BLOCK, ODD)
        y0, y1 = x0 + y0, x1 + y1
    store_values(base, y0, y1, valid, ROWS, BLOCK, ODD, CONVERT)


@triton.jit(do_not_specialize=["first", "count"])
def peer_gather_kernel(
    pointers,
    out,
    tiles,
    first,
    count,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ODD: tl.constexpr,
    CONVERT: tl.constexpr,
):
    """The messages of all ranks of a level, read where they lie -> plain values: a gather and its dequantisation in one.

    Args:
        pointers: [ranks] int64, the address of each rank's message in this device's memory.
        out: as in `dequantize_kernel`.
        tiles: the table of the gathered message, made with `ranks`.
        first, count: the tile to begin with, and how many there are; each rank begins with its own, so that they do not all read one
            rank at once.
    """
    index = tl.program_id(0) + first
    index = tl.where(index >= count, index - count, index)
    tile = tile_of(tiles, index)
    message = address(pointers, tl.load(tile + SOURCE), tl.uint8, False)
    c0, c1 = load_codes(message, tile, ROWS, BLOCK, KIND)
    y0, y1 = decode(c0, c1, load_scales(message, tile, ROWS, SCALE), KIND)
    store_values(out + element(tile, JOINT, ODD), y0, y1, element(tile, VALID, ODD), ROWS, BLOCK, ODD, CONVERT)
