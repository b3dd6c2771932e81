"""Floating-point arithmetic as the hardware does it, on numpy arrays: fp32 bits in, fp32 bits out.

Rounding is to nearest even and denormals are kept, as the kernel descriptors of Triton ask (a launch checks that).
"""

from __future__ import annotations

import numpy as np

U32, U64, F32, F64 = np.uint32, np.uint64, np.float32, np.float64
QUIET, NAN, SIGN = U32(0x00400000), U32(0x7FC00000), U32(0x80000000)
INFINITY = U32(0x7F800000)


def is_nan(bits: np.ndarray) -> np.ndarray:
    return (bits & U32(0x7FFFFFFF)) > INFINITY


def is_signalling(bits: np.ndarray) -> np.ndarray:
    return is_nan(bits) & ((bits & QUIET) == 0)


def exponent(bits: np.ndarray) -> np.ndarray:
    """The biased exponent: 0 for zero and denormals, 255 for infinities and NaN."""
    return ((bits >> U32(23)) & U32(0xFF)).astype(np.int32)


def with_nan(result: np.ndarray, *sources: np.ndarray) -> np.ndarray:
    """Gives NaN results the bits that the GPU gives them; x86 has other ones.

    An operation without NaN sources produces 0x7fc00000, one with NaN sources the first of these, quiet.
    """
    bits = result.view(U32)
    nan = is_nan(bits)
    if not nan.any():
        return bits
    value: np.ndarray | np.uint32 = NAN
    for source in reversed(sources):
        source = source.view(U32)
        value = np.where(is_nan(source), source | QUIET, value)
    return np.where(nan, value, bits)


def _odd_sum(product: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """product + addend in fp64, rounded to odd, so that rounding again to fp32 gives what one rounding would.

    Plain fp64 rounds twice: a sum just off a tie of fp32 can become that tie. With 53 bits >= 2 * 24 + 2, an odd last
    bit wherever the sum is inexact is enough to prevent it.
    """
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    fix = (error != 0) & np.isfinite(total) & ((total.view(U64) & U64(1)) == 0)
    if not fix.any():
        return total
    # Away from zero if the error points away from zero, else towards it: one step of the bit pattern.
    step = np.where((error > 0) == (total > 0), U64(1), U64(2**64 - 1))
    return np.where(fix, total.view(U64) + step, total.view(U64)).view(F64)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """a * b + c (times `scale`, a power of two) with one rounding."""
    total = _odd_sum(a.astype(F64) * b.astype(F64), c.astype(F64))  # the product of two fp32 is exact in fp64
    if scale is not None:
        total = total * scale
    return with_nan(total.astype(F32), a, b, c)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """v_max_f32 in IEEE mode.

    A signalling NaN comes out quiet; else the operand that is no NaN, and +0 is larger than -0. np.fmax does neither.
    """
    return _select(a, b, larger=True)


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """v_min_f32 in IEEE mode: see `maximum`."""
    return _select(a, b, larger=False)


def _select(a: np.ndarray, b: np.ndarray, *, larger: bool) -> np.ndarray:
    x, y = a.view(U32), b.view(U32)
    kx, ky = _order(x), _order(y)
    result = np.where((kx >= ky) if larger else (kx <= ky), x, y)
    nx, ny = is_nan(x), is_nan(y)
    if nx.any() or ny.any():
        result = np.where(ny, x, result)
        result = np.where(nx, y, result)
        result = np.where(is_signalling(y), y | QUIET, result)
        result = np.where(is_signalling(x), x | QUIET, result)
    return result


def _order(bits: np.ndarray) -> np.ndarray:
    """Signed integers in the order of the floats, with -0 just below +0."""
    signed = bits.view(np.int32)
    return np.where(signed < 0, signed ^ np.int32(0x7FFFFFFF), signed)


def median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """v_med3_f32: the median, but the minimum of the numbers as soon as one operand is NaN.

    So a clamp of NaN, med3(NaN, low, high), gives low.
    """
    x, y, z = a.view(U32), b.view(U32), c.view(U32)
    low, high = minimum(a, b), maximum(a, b)
    result = maximum(low.view(F32), minimum(high.view(F32), c))
    nan = is_nan(x) | is_nan(y) | is_nan(z)
    return np.where(nan, minimum(low.view(F32), c), result) if nan.any() else result


def reciprocal(a: np.ndarray, noise: int) -> np.ndarray:
    """v_rcp_f32: within one unit in the last place, and denormals flushed on both sides.

    Which neighbour the hardware gives is not specified, so `noise` chooses one for each input: code that is exact by
    specification, such as the division sequence, has to give the same bits for every choice. Powers of two are exact.
    """
    bits = a.view(U32)
    flushed = np.where(exponent(bits) == 0, bits & SIGN, bits).view(F32)
    result = (F32(1) / flushed).view(U32)
    hashed = (bits ^ U32(noise & 0xFFFFFFFF)) * U32(0x9E3779B1)
    wobble = ((hashed ^ (hashed >> U32(15))) % U32(3)) - U32(1)
    inexact = (bits & U32(0x007FFFFF)) != 0
    normal = (exponent(result) > 0) & (exponent(result) < 255)
    result = np.where(inexact & normal, result + wobble, result)
    result = np.where(exponent(result) == 0, result & SIGN, result)
    return with_nan(result, a)


def division_scale(value: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v_div_scale_f32: brings numerator and denominator into a range where the refinement neither over- nor underflows.

    Returns:
        `value` (one of the two, told apart by its value) scaled by 2^+-64, and the flag for v_div_fmas: the quotient
        has to be scaled back.

    The published pseudo-code scales the denominator *up* where both the reciprocal and the quotient are denormal; that
    would overflow, so it is scaled down here, the one choice that v_div_fmas can undo.
    """
    v, d, n = value.view(U32), denominator.view(U32), numerator.view(U32)
    shape = np.broadcast_shapes(v.shape, d.shape, n.shape)
    wide_d, wide_n = np.abs(denominator.astype(F64)), np.abs(numerator.astype(F64))
    smallest = F64(2.0**-126)
    zero = (wide_d == 0) | (wide_n == 0)
    far = exponent(n) - exponent(d) >= 96
    denormal = (wide_d < smallest) & (wide_d > 0)
    tiny_reciprocal = (1 / wide_d < smallest) & np.isfinite(wide_d)
    tiny_quotient = (wide_n / wide_d < smallest) & np.isfinite(wide_d)
    is_denominator, is_numerator = value == denominator, value == numerator
    cases = [zero, far, denormal, tiny_reciprocal & tiny_quotient, tiny_reciprocal, tiny_quotient, exponent(n) <= 23]
    up, down, same = F32(2.0**64), F32(2.0**-64), F32(1)
    factors = [
        same,
        np.where(is_denominator, up, same),
        up,
        np.where(is_denominator, down, same),
        down,
        np.where(is_numerator, up, same),
        up,
    ]
    cases = [np.broadcast_to(case, shape) for case in cases]
    factor = np.select(cases, [np.broadcast_to(each, shape) for each in factors], same)
    flags = [np.broadcast_to(np.bool_(i in (1, 3, 5)), shape) for i in range(7)]
    scaled = np.where(factor == same, v, (value * factor).view(U32))
    return np.where(zero, NAN, scaled), np.select(cases, flags, False)


def division_fmas(a: np.ndarray, b: np.ndarray, c: np.ndarray, flag: np.ndarray) -> np.ndarray:
    """v_div_fmas_f32: fma, and where `flag` is set times 2^64 or 2^-64 within the same rounding.

    The published pseudo-code has 2^32, which undoes neither scaling of v_div_scale. Which of the two it is follows from
    the size of the estimate `c`: large quotients were scaled down, small ones up.
    """
    if not flag.any():
        return fma(a, b, c)
    scale = np.where(exponent(c.view(U32)) > 127, F64(2.0**64), F64(2.0**-64))
    return fma(a, b, c, np.where(flag, scale, F64(1)))


def division_fixup(quotient: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> np.ndarray:
    """v_div_fixup_f32: the special cases of a division, and the sign.

    Where the estimate overflowed before it was scaled, its refinement is inf - inf = NaN; the quotient is infinite then.
    """
    q, d, n = quotient.view(U32), denominator.view(U32), numerator.view(U32)
    sign = (d ^ n) & SIGN
    size_d, size_n = d & ~SIGN, n & ~SIGN
    cases = [
        (is_nan(n), n | QUIET),
        (is_nan(d), d | QUIET),
        ((size_d == 0) & (size_n == 0), SIGN | NAN),
        ((size_d == INFINITY) & (size_n == INFINITY), SIGN | NAN),
        ((size_d == 0) | (size_n == INFINITY), sign | INFINITY),
        ((size_d == INFINITY) | (size_n == 0), sign),
        (exponent(n) - exponent(d) < -150, sign),
        (is_nan(q), sign | INFINITY),
    ]
    shape = np.broadcast_shapes(q.shape, d.shape, n.shape)
    conditions = [np.broadcast_to(condition, shape) for condition, _ in cases]
    return np.select(conditions, [np.broadcast_to(value, shape) for _, value in cases], (q & ~SIGN) | sign)


def to_int32(a: np.ndarray) -> np.ndarray:
    """v_cvt_i32_f32: towards zero, saturating, NaN gives 0. A plain cast of a large float is undefined."""
    return np.where(np.isnan(a), 0, np.clip(np.trunc(a.astype(F64)), -(2.0**31), 2.0**31 - 1)).astype(np.int32)


def to_uint32(a: np.ndarray) -> np.ndarray:
    """v_cvt_u32_f32: as `to_int32`; negative numbers give 0."""
    return np.where(np.isnan(a), 0, np.clip(np.trunc(a.astype(F64)), 0, 2.0**32 - 1)).astype(U32)


def to_bfloat16(a: np.ndarray) -> np.ndarray:
    """The upper 16 bits of fp32 after rounding to nearest even; NaN stays NaN and becomes quiet."""
    bits = a.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(is_nan(bits), (bits | QUIET) >> U32(16), rounded)


def to_float16(a: np.ndarray, saturate: np.ndarray) -> np.ndarray:
    """fp32 to fp16 bits; with FP16_OVFL a finite number that overflows becomes the largest one, not infinity."""
    bits = a.astype(np.float16).view(np.uint16).astype(U32)
    overflowed = ((bits & U32(0x7FFF)) == 0x7C00) & np.isfinite(a) & saturate
    return np.where(overflowed, (bits & U32(0x8000)) | U32(0x7BFF), bits)


def to_fp8(a: np.ndarray, saturate: np.ndarray, *, fnuz: bool) -> np.ndarray:
    """fp32 to e4m3 codes, nearest even. Overflow gives NaN, or with FP16_OVFL (`saturate`) the largest number.

    fnuz (gfx942): bias 8, largest 240, one zero, one NaN (0x80). Else OCP e4m3fn (gfx950): bias 7, largest 448, NaN 0x7f.
    Neither has infinities; an infinity is treated as an overflow, which for FP16_OVFL is not documented.
    """
    lowest, largest = (-7, 0x7F) if fnuz else (-6, 0x7E)
    size = np.abs(a.astype(F64))
    finite = np.where(np.isfinite(size), size, 0.0)
    power = np.where(finite == 0, lowest, np.maximum(np.frexp(finite)[1] - 1, lowest))  # frexp(0) says 0
    steps = np.rint(np.ldexp(finite, 3 - power))  # 8 to 16, or 0 to 8 for the denormals of the format
    code = ((power - lowest) * 8 + steps).astype(np.int64)
    over = (code > largest) | np.isinf(size)
    sign = np.signbit(a).astype(U32) << U32(7)
    nan = np.isnan(a) | (over & ~saturate)
    code = np.where(over, largest, code).astype(U32)
    if fnuz:
        return np.where(nan, U32(0x80), np.where(code == 0, code, code | sign))
    return np.where(nan, U32(0x7F) | sign, code | sign)


def from_fp8(code: np.ndarray, *, fnuz: bool) -> np.ndarray:
    """e4m3 codes to fp32, exactly: see `to_fp8`."""
    lowest = -7 if fnuz else -6
    field, fraction = ((code >> U32(3)) & U32(15)).astype(np.int32), (code & U32(7)).astype(F32)
    value = np.ldexp(np.where(field > 0, fraction + 8, fraction), np.maximum(field - 1, 0) + lowest - 3)
    value = np.where(code & U32(0x80), -value, value).astype(F32)
    nan = code == 0x80 if fnuz else (code & U32(0x7F)) == 0x7F
    return np.where(nan, NAN, value.view(U32))
