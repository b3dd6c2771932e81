"""A sum of int4 messages that is quantised to int4 again, on whole words: no nibble leaves its place.

It is the one kernel that arithmetic limits, not memory: eight values are a word here, whose nibbles are taken out where they are, and put
back there. The bits are those of `requantize_kernel`, which goes byte by byte. A block of 2 H values is words of eight: nibble 2 b of
word w is value 4 w + b, nibble 2 b + 1 is value H + 4 w + b.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zcompile.kernels.triton_math import MAGIC_BITS, rounded, scale_of
from zcompile.kernels.triton_tile import BLOCKS, CODES, load_scales, store_scales, tile_of

EMPTY = tl.constexpr(0x88888888)
"""Eight codes of zero."""
OFFSETS = tl.constexpr(sum(MAGIC_BITS.value << 4 * k for k in range(8)) & 0xFFFFFFFF)
"""What MAGIC_BITS leaves in a word, summed at all places."""


@triton.jit
def words_of(base, tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers [ROWS, BLOCK / 8] to the words of the codes, and which of them are there."""
    start = (base + tl.multiple_of(tl.load(tile + CODES), 16)).to(tl.pointer_type(tl.uint32))
    row = tl.arange(0, ROWS)[:, None]
    return start + (row * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]), row < tl.load(tile + BLOCKS)


@triton.jit
def nibble(word, zero, INDEX: tl.constexpr):
    """Nibble INDEX of each word -> the code it stands for, fp32.

    The nibble becomes the last bits of a power of two plus n, as in `decode`. `zero` is 0, which the compiler must not know: where it
    knows all constants, NVIDIA's takes two instructions for one, and a shift for each nibble.
    """
    # From the fifth nibble on the mantissa's 23 bits are not enough: the word is shifted by five.
    at: tl.constexpr = INDEX % 5
    power: tl.constexpr = 2.0 ** (23 - 4 * at)
    exponent: tl.constexpr = 0x4B000000 - at * 0x02000000
    bits = ((word if INDEX < 5 else word >> (zero + 20)) & (0xF << (4 * at))) | (zero + exponent)
    return bits.to(tl.float32, bitcast=True) - (power + 8.0)


@triton.jit
def plus(total, word, zero, scale, INDEX: tl.constexpr, SCALE: tl.constexpr):
    """total + code * scale. With a bf16 scale the product has twelve bits and is exact, so one rounding is what two would be."""
    code = nibble(word, zero, INDEX)
    if SCALE == "bf16":
        return tl.fma(code, scale, total)
    else:
        return total + code * scale


@triton.jit
def added(
    s0, s1, s2, s3, s4, s5, s6, s7, message, tile, zero, ROWS: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr
):
    """The sums of each nibble, and another part."""
    at, mask = words_of(message, tile, ROWS, BLOCK)
    word, scale = tl.load(at, mask=mask, other=0), load_scales(message, tile, ROWS, SCALE)[:, None]
    s0, s1 = plus(s0, word, zero, scale, 0, SCALE), plus(s1, word, zero, scale, 1, SCALE)
    s2, s3 = plus(s2, word, zero, scale, 2, SCALE), plus(s3, word, zero, scale, 3, SCALE)
    s4, s5 = plus(s4, word, zero, scale, 4, SCALE), plus(s5, word, zero, scale, 5, SCALE)
    s6, s7 = plus(s6, word, zero, scale, 6, SCALE), plus(s7, word, zero, scale, 7, SCALE)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit(do_not_specialize=["parts", "stride"])
def requantize_words_kernel(
    message,
    out,
    tiles,
    out_tiles,
    parts,
    stride,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`requantize_kernel` from int4 to int4; its arguments."""
    index = tl.program_id(0)
    tile, step, zero = tile_of(tiles, index), stride.to(tl.int64) * 16, (parts >> 31).to(tl.uint32)
    at, mask = words_of(message, tile, ROWS, BLOCK)
    word, scale = tl.load(at, mask=mask, other=0), load_scales(message, tile, ROWS, SCALE)[:, None]
    s0, s1 = nibble(word, zero, 0) * scale, nibble(word, zero, 1) * scale
    s2, s3 = nibble(word, zero, 2) * scale, nibble(word, zero, 3) * scale
    s4, s5 = nibble(word, zero, 4) * scale, nibble(word, zero, 5) * scale
    s6, s7 = nibble(word, zero, 6) * scale, nibble(word, zero, 7) * scale
    if PARTS > 0:
        for each in tl.static_range(1, PARTS):
            s0, s1, s2, s3, s4, s5, s6, s7 = added(
                s0, s1, s2, s3, s4, s5, s6, s7, message + step * each, tile, zero, ROWS, BLOCK, SCALE
            )
    else:
        for _ in tl.range(1, parts, num_stages=1):  # one stage: see triton_reduce
            message += step
            s0, s1, s2, s3, s4, s5, s6, s7 = added(
                s0, s1, s2, s3, s4, s5, s6, s7, message, tile, zero, ROWS, BLOCK, SCALE
            )
    largest = tl.max(largest_of(s0, s1, s2, s3, s4, s5, s6, s7), axis=1)
    scales, inverse, good = scale_of(largest, "int4", OUT_SCALE)
    inverse, place = inverse[:, None], tl.arange(0, BLOCK // 8)[None, :] * 4
    word = coded(s0, inverse, place, 0, BLOCK, STOCHASTIC) + coded(s1, inverse, place, 1, BLOCK, STOCHASTIC)
    word += coded(s2, inverse, place, 2, BLOCK, STOCHASTIC) + coded(s3, inverse, place, 3, BLOCK, STOCHASTIC)
    word += coded(s4, inverse, place, 4, BLOCK, STOCHASTIC) + coded(s5, inverse, place, 5, BLOCK, STOCHASTIC)
    word += coded(s6, inverse, place, 6, BLOCK, STOCHASTIC) + coded(s7, inverse, place, 7, BLOCK, STOCHASTIC)
    # Here and not in each value: a NaN must not reach the codes, and of a block that is not good all are zero.
    word = tl.where(good[:, None], word - OFFSETS, EMPTY)
    tile = tile_of(out_tiles, index)
    at, mask = words_of(out, tile, ROWS, BLOCK)
    tl.store(at, word, mask=mask)
    store_scales(out, tile, scales, ROWS, OUT_SCALE)


@triton.jit
def largest_of(s0, s1, s2, s3, s4, s5, s6, s7):
    """The bit pattern of the largest magnitude, int32; NaN is the largest. Positive numbers order like signed integers, negative ones like
    unsigned ones, above all positive ones: two instructions with three operands for two values, and no sign to take off each."""
    return tl.maximum(
        tl.maximum(most(s0, s1, s2, s3, s4, s5, s6, s7, tl.int32), 0),
        (most(s0, s1, s2, s3, s4, s5, s6, s7, tl.uint32) & 0x7FFFFFFF).to(tl.int32, bitcast=True),
    )


@triton.jit
def most(s0, s1, s2, s3, s4, s5, s6, s7, TYPE: tl.constexpr):
    s0, s1, s2, s3 = (
        s0.to(TYPE, bitcast=True),
        s1.to(TYPE, bitcast=True),
        s2.to(TYPE, bitcast=True),
        s3.to(TYPE, bitcast=True),
    )
    s4, s5, s6, s7 = (
        s4.to(TYPE, bitcast=True),
        s5.to(TYPE, bitcast=True),
        s6.to(TYPE, bitcast=True),
        s7.to(TYPE, bitcast=True),
    )
    found = tl.maximum(tl.maximum(s0, s1), s2)
    found = tl.maximum(tl.maximum(found, s3), s4)
    found = tl.maximum(tl.maximum(found, s5), s6)
    return tl.maximum(found, s7)


@triton.jit
def coded(x, inverse, place, INDEX: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Values -> their codes at their nibble's place, with what OFFSETS takes away."""
    within: tl.constexpr = INDEX // 2 + (INDEX % 2) * (BLOCK // 2)
    return rounded(x, x * inverse, place + within, 8, "int4", STOCHASTIC) << (4 * INDEX)
