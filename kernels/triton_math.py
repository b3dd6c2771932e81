"""From values to codes and back, for Triton: what `reference.encode` and `decode` do to a tile. docs/wire-format.md is the spec.

A tile is two halves [blocks, block / 2] each, the first and the second half of every block, for every kind of code: an int4 byte
holds one value of either, so no value ever changes lanes, and one set of kernels serves all kinds. Compile with fusion off
(`enable_fp_fusion=False`): every operation is rounded on its own.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from triton import knobs

from zcompile.kernels.code import SMALLEST, TOP

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""Triton's interpreter truncates where compiled code rounds (fp32 -> bf16, fp32 -> fp8): there, integers do it."""
FINITE = tl.constexpr(0x7F800000)
"""Bit patterns of magnitudes below this are finite."""
NAN = tl.constexpr(0x7FC00000)
SMALL = tl.constexpr(struct.unpack("<I", struct.pack("<f", SMALLEST))[0])
"""The bit pattern of SMALLEST."""
MAGIC = tl.constexpr(12582912.0)
"""1.5 2^23: adding it to a number below 2^22 rounds that to an integer, to nearest even, and leaves the integer's two's complement
in the low bits. No conversion, so nothing is undefined, and none of libdevice, which the interpreter lacks."""
MAGIC_BITS = tl.constexpr(0x4B400000)
TOP_INT8, TOP_INT4 = tl.constexpr(TOP["int8"]), tl.constexpr(TOP["int4"])
LIMIT_INT8, LIMIT_INT4 = tl.constexpr(int(TOP["int8"])), tl.constexpr(int(TOP["int4"]))
TOP_E4M3FN, TOP_E4M3FNUZ = tl.constexpr(TOP["e4m3fn"]), tl.constexpr(TOP["e4m3fnuz"])


@triton.jit
def top(KIND: tl.constexpr):
    if KIND == "int8":  # noqa: SIM116 (Triton has no dictionaries)
        return TOP_INT8
    elif KIND == "int4":
        return TOP_INT4
    elif KIND == "e4m3fn":
        return TOP_E4M3FN
    else:
        return TOP_E4M3FNUZ


@triton.jit
def bf16_bits(bits):
    """Bit patterns of fp32 numbers, uint32 -> those of bf16 in the low half, to nearest even; NaN must be NAN."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def to_bf16(x, CONVERT: tl.constexpr):
    """fp32 -> bf16, to nearest even. CONVERT: does the chip have an instruction for it?

    Without one, integers do it in half as many operations as the compiler's conversion, which looks for NaN in every value. It
    need not: a NaN here comes from a bf16 number or is NAN, so its low half is zero and rounding adds nothing to the high one.
    """
    if CONVERT and not INTERPRETED:
        return x.to(tl.bfloat16)
    else:
        return bf16_bits(x.to(tl.uint32, bitcast=True)).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_fp32(x):
    """bf16 or fp32 -> fp32. By bits: the interpreter's own conversion is wrong for subnormal numbers."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def magnitude(x):
    """Bit patterns of |x|, int32: they order like the numbers, and NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, KIND: tl.constexpr, SCALE: tl.constexpr):
    """Largest magnitudes [R] -> (scales as they are stored, uint16 or uint32 [R]; 1 / scale or 0, fp32 [R]; is it a good block [R])."""
    finite = largest < FINITE
    good = finite & (largest >= SMALL)
    amax = tl.where(good, largest, FINITE - (1 << 23)).to(tl.float32, bitcast=True)
    bits = tl.div_rn(amax, top(KIND)).to(tl.uint32, bitcast=True)
    if SCALE == "bf16":
        # Where the block is good the inverse is that of the rounded scale: sender and receiver use the same number.
        bits = bf16_bits(bits) << 16
    inverse = tl.where(good, tl.div_rn(1.0, bits.to(tl.float32, bitcast=True)), 0.0)
    stored = tl.where(good, bits, tl.where(finite, 0, NAN).to(tl.uint32))
    if SCALE == "bf16":
        return (stored >> 16).to(tl.uint16), inverse, good
    else:
        return stored, inverse, good


@triton.jit
def noise(x, place):
    """A hash of the value's bits and its place in the block -> fp32 in [0, 1)."""
    h = x.to(tl.uint32, bitcast=True) ^ (place.to(tl.uint32) * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    return (h >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def rounded(x, scaled, place, OFFSET: tl.constexpr, KIND: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Scaled values -> integers, uint32 whose low byte is code + OFFSET.

    To nearest needs no clamp: the bf16 scale may be smaller than amax / top by a factor of 1 - 2^-8, and
    127 (1 + 2^-8) < 127.5. OFFSET is even, so ties go the same way with it.
    """
    if STOCHASTIC:
        # Down, as to nearest less what that went up: NVIDIA's floor takes a negative subnormal number for zero.
        y = scaled + noise(x, place)
        near = y + MAGIC
        down = near.to(tl.int32, bitcast=True) - (near - MAGIC > y).to(tl.int32)
        limit: tl.constexpr = LIMIT_INT8 if KIND == "int8" else LIMIT_INT4
        down = tl.minimum(tl.maximum(down, MAGIC_BITS - limit), MAGIC_BITS + limit)
        return (down + OFFSET).to(tl.uint32, bitcast=True)
    else:
        return (scaled + (MAGIC + OFFSET)).to(tl.uint32, bitcast=True)


@triton.jit
def to_fp8(x, KIND: tl.constexpr):
    """fp32 below 1.01 top -> codes, uint8: to nearest even. No clamp: what is that near to the top rounds to it."""
    if INTERPRETED:
        # The exponent of the smallest normal code; below it codes are multiples of 2^(EDGE - 3).
        EDGE: tl.constexpr = -6 if KIND == "e4m3fn" else -7
        bits = magnitude(x)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 + EDGE - 1) << 3)
        step: tl.constexpr = 2.0 ** (3 - EDGE)
        below = (bits.to(tl.float32, bitcast=True) * step + MAGIC).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(bits < ((127 + EDGE) << 23), below, normal)
        sign = (x.to(tl.uint32, bitcast=True) >> 24).to(tl.int32) & 0x80
        if KIND == "e4m3fn":
            return (code | sign).to(tl.uint8)
        else:
            return tl.where(code == 0, 0, code | sign).to(tl.uint8)
    elif KIND == "e4m3fn":
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return x.to(tl.float8e4b8).to(tl.uint8, bitcast=True)


@triton.jit
def encode(x0, x1, H: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Halves [R, H] fp32 -> (codes of both halves, uint8 [R, H], the same one twice for int4; scales as they are stored [R])."""
    largest = tl.maximum(tl.max(magnitude(x0), axis=1), tl.max(magnitude(x1), axis=1))
    scales, inverse, good = scale_of(largest, KIND, SCALE)
    # Not `x * 0` for a block that is not good: a NaN must not reach the codes.
    y0 = tl.where(good[:, None], x0 * inverse[:, None], 0.0)
    y1 = tl.where(good[:, None], x1 * inverse[:, None], 0.0)
    place = tl.arange(0, H)[None, :]
    if KIND == "int8":
        c0 = rounded(x0, y0, place, 0, KIND, STOCHASTIC).to(tl.uint8)
        c1 = rounded(x1, y1, place + H, 0, KIND, STOCHASTIC).to(tl.uint8)
    elif KIND == "int4":
        low = rounded(x0, y0, place, 8, KIND, STOCHASTIC)
        c0 = (low | (rounded(x1, y1, place + H, 8, KIND, STOCHASTIC) << 4)).to(tl.uint8)
        c1 = c0
    else:
        c0, c1 = to_fp8(y0, KIND), to_fp8(y1, KIND)
    return c0, c1, scales


@triton.jit
def decode_half(codes, KIND: tl.constexpr):
    """uint8 codes -> fp32 multiples of the scale; not for int4."""
    if KIND == "int8":
        return codes.to(tl.int8, bitcast=True).to(tl.float32)
    elif INTERPRETED:
        # Exponent and mantissa where fp32 has them; the factor makes up for the difference of the biases. No code is a NaN.
        bias: tl.constexpr = 7 if KIND == "e4m3fn" else 8
        word = codes.to(tl.uint32)
        size = ((word & 0x7F) << 20).to(tl.float32, bitcast=True) * (2.0 ** (127 - bias))
        return (size.to(tl.uint32, bitcast=True) | ((word & 0x80) << 24)).to(tl.float32, bitcast=True)
    elif KIND == "e4m3fn":
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return codes.to(tl.float8e4b8, bitcast=True).to(tl.float32)


@triton.jit
def decode(c0, c1, scales, KIND: tl.constexpr):
    """What `encode` made, scales widened to fp32 [R] -> halves [R, H] fp32."""
    if KIND == "int4":
        # The nibbles, where they are, become the last bits of 2^23 + n and of 2^19 + n: no shift, no conversion.
        word = c0.to(tl.uint32)
        q0 = ((word & 0x0F) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 8.0)
        q1 = ((word & 0xF0) | 0x49000000).to(tl.float32, bitcast=True) - (524288.0 + 8.0)
    else:
        q0, q1 = decode_half(c0, KIND), decode_half(c1, KIND)
    return q0 * scales[:, None], q1 * scales[:, None]
