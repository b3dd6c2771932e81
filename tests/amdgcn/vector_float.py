"""Vector ALU, continued: fp32 arithmetic, conversions and comparisons. See `vector.lanes` for the notation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from amdgcn import floats
from amdgcn.state import State
from amdgcn.vector import lanes

U32, F32 = np.uint32, np.float32

# Arithmetic


@lanes("f<ff", "v_add_f32")
def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return floats.with_nan(a + b, a, b)


@lanes("f<ff", "v_sub_f32")
def subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return floats.with_nan(a - b, a, b)


@lanes("f<ff", "v_mul_f32")
def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return floats.with_nan(a * b, a, b)


lanes("f<ff", "v_subrev_f32")(lambda a, b: subtract(b, a))
lanes("f<ff", "v_max_f32")(floats.maximum)
lanes("f<ff", "v_min_f32")(floats.minimum)
lanes("f<fff", "v_max3_f32")(lambda a, b, c: floats.maximum(floats.maximum(a, b).view(F32), c))
lanes("f<fff", "v_min3_f32")(lambda a, b, c: floats.minimum(floats.minimum(a, b).view(F32), c))
lanes("f<fff", "v_med3_f32")(floats.median)
lanes("f<fff", "v_fma_f32", "v_fmaak_f32", "v_fmamk_f32")(floats.fma)
lanes("f<ff", "v_fmac_f32", old="f")(floats.fma)


@lanes("f<fff", "v_mad_f32", "v_madak_f32", "v_madmk_f32", arches={"gfx90a"})
def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Two roundings, and denormals are flushed on the way in and out. gfx90a still has it; later machines do not."""
    a, b, c = (_flush(each) for each in (a, b, c))
    product = _flush(multiply(a, b).view(F32))
    return _flush(add(product, c).view(F32))


def _flush(a: np.ndarray) -> np.ndarray:
    bits = a.view(U32)
    return np.where(floats.exponent(bits) == 0, bits & floats.SIGN, bits).view(F32)


lanes("fm<fff", "v_div_scale_f32")(floats.division_scale)
lanes("f<fff", "v_div_fmas_f32", vcc=True)(floats.division_fmas)
lanes("f<fff", "v_div_fixup_f32")(floats.division_fixup)
lanes("f<f", "v_rcp_f32", "v_rcp_iflag_f32", state=True)(lambda s, a: floats.reciprocal(a, s.machine.noise))


lanes("f<f", "v_rndne_f32")(lambda a: floats.with_nan(np.rint(a), a))
lanes("f<f", "v_trunc_f32")(lambda a: floats.with_nan(np.trunc(a), a))
lanes("f<f", "v_floor_f32")(lambda a: floats.with_nan(np.floor(a), a))
lanes("f<f", "v_ceil_f32")(lambda a: floats.with_nan(np.ceil(a), a))


@lanes("f<fi", "v_ldexp_f32")
def scale_by_power(a: np.ndarray, power: np.ndarray) -> np.ndarray:
    scaled = np.ldexp(a.astype(np.float64), np.clip(power, -400, 400)).astype(F32)
    return floats.with_nan(scaled, a)


# Conversions

lanes("f<i", "v_cvt_f32_i32")(lambda a: a.astype(F32))
lanes("f<u", "v_cvt_f32_u32")(lambda a: a.astype(F32))
lanes("i<f", "v_cvt_i32_f32")(floats.to_int32)
lanes("u<f", "v_cvt_u32_f32")(floats.to_uint32)
lanes("f<h", "v_cvt_f32_f16")(lambda a: a.astype(F32))
lanes("f<u", "v_cvt_f32_ubyte0")(lambda a: (a & U32(0xFF)).astype(F32))
lanes("f<u", "v_cvt_f32_ubyte1")(lambda a: ((a >> U32(8)) & U32(0xFF)).astype(F32))
lanes("f<u", "v_cvt_f32_ubyte2")(lambda a: ((a >> U32(16)) & U32(0xFF)).astype(F32))
lanes("f<u", "v_cvt_f32_ubyte3")(lambda a: (a >> U32(24)).astype(F32))


def saturates(state: State) -> np.ndarray:
    """FP16_OVFL, bit 23 of MODE, as [waves, 1]."""
    return ((state.mode >> U32(23)) & U32(1)).astype(bool)[:, None]


@lanes("u<f", "v_cvt_f16_f32", state=True)
def to_half(state: State, a: np.ndarray) -> np.ndarray:
    return floats.to_float16(a, saturates(state))


# Comparisons. n in the name negates: nlt is true for NaN, lg is not.

_COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_FLOAT_ONLY = {
    "lg": lambda a, b: (a < b) | (a > b),
    "neq": np.not_equal,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "nlt": lambda a, b: ~(a < b),
}
for _kind, _letter in {"f32": "f", "f16": "h", "f64": "d"}.items():
    for _name, _compare in (_COMPARE | _FLOAT_ONLY).items():
        lanes(f"m<{_letter * 2}", f"v_cmp_{_name}_{_kind}")(_compare)
for _kind, _letter in {"i32": "i", "u32": "u", "i64": "I", "u64": "U", "i16": "x", "u16": "w"}.items():
    for _name, _compare in (_COMPARE | {"ne": np.not_equal}).items():
        lanes(f"m<{_letter * 2}", f"v_cmp_{_name}_{_kind}")(_compare)


@lanes("m<fu", "v_cmp_class_f32")
def has_class(a: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Bits of `classes`: 0 signalling NaN, 1 quiet NaN, 2 -inf, 3 -normal, 4 -denormal, 5 -0, 6 +0, ... 9 +inf."""
    bits = a.view(U32)
    negative, power = (bits >> U32(31)).astype(bool), floats.exponent(bits)
    positive = np.select([power == 255, power > 0, (bits & U32(0x7FFFFFFF)) > 0], [U32(9), U32(8), U32(7)], U32(6))
    index = np.where(negative, U32(11) - positive, positive)
    index = np.where(floats.is_nan(bits), np.where(floats.is_signalling(bits), U32(0), U32(1)), index)
    return ((classes >> index) & U32(1)).astype(bool)
