"""Vector ALU: what each opcode computes in one lane.

`@lanes("f<ff", "v_mul_f32")` reads: result types, then source types (letters: see `sources`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from amdgcn import floats
from amdgcn.errors import Unsupported
from amdgcn.program import VCC, Instruction
from amdgcn.registry import ARCHES, opcode
from amdgcn.sources import read, write
from amdgcn.state import State

U32, U64, F32 = np.uint32, np.uint64, np.float32
Lanes = Callable[..., object]


def lanes(
    types: str, *names: str, old: str = "", vcc: bool = False, state: bool = False, arches: Collection[str] = ARCHES
) -> Callable[[Lanes], Lanes]:
    """Registers a function of arrays as the meaning of vector opcodes.

    Args:
        types: Result and source letters, for example "um<uum".
        old: A letter: the former value of the destination is passed as well, after the sources.
        vcc: vcc as a lane mask is passed as well, as the text does not name it.
        state: The `State` is passed as well, first.
    """
    results, sources = types.split("<")

    def register(function: Lanes) -> Lanes:
        def execute(machine: State, instruction: Instruction) -> None:
            operands = instruction.operands
            values: list[object] = [machine] if state else []
            for i, letter in enumerate(sources):
                values.append(read(machine, instruction, operands[len(results) + i], letter, i))
            if old:
                values.append(machine.bits(operands[0]).view(F32 if old == "f" else U32))
            if vcc:
                values.append(machine.mask(VCC))
            made = function(*values)
            made = made if isinstance(made, tuple) else (made,)
            if "clamp" in instruction.modifiers:
                made = (_clamp(made[0], values, results, instruction),)
            for operand, letter, value in zip(operands, results, made, strict=False):
                write(machine, instruction, operand, letter, value)

        opcode(*names, operands=len(results) + len(sources), modifiers={"clamp"}, arches=arches)(execute)
        return function

    return register


def _clamp(value: np.ndarray, sources: list[Any], results: str, instruction: Instruction) -> np.ndarray:
    """clamp on an fp32 result: to 0..1, NaN to 0 (DX10_CLAMP). On integers it saturates: modelled for unsigned differences alone."""
    if instruction.op == "v_sub_u32":
        return np.where(sources[0] < sources[1], U32(0), value)
    if results != "f":
        raise Unsupported(f"{instruction}: clamp")
    return floats.minimum(floats.maximum(value.view(F32), F32(0)).view(F32), F32(1))


def _shift(amount: np.ndarray) -> np.ndarray:
    """Shift counts use their low 5 bits."""
    return amount & U32(31)


# Moves and selects

lanes("u<u", "v_mov_b32", "v_accvgpr_read_b32", "v_accvgpr_write_b32", "v_accvgpr_mov_b32")(lambda a: a)
lanes("U<U", "v_mov_b64", arches={"gfx942", "gfx950"})(lambda a: a)
lanes("b<bbm", "v_cndmask_b32")(lambda a, b, m: np.where(m, b, a))
lanes("u<u", "v_not_b32")(lambda a: ~a)


@lanes("u<u", "v_bfrev_b32")
def reverse_bits(a: np.ndarray) -> np.ndarray:
    swapped = np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1, bitorder="little")
    return np.packbits(swapped[..., ::-1], axis=-1, bitorder="little").view(U32)[..., 0]


# 32-bit bits and shifts. The "rev" shifts take the amount first.

lanes("u<uu", "v_and_b32")(lambda a, b: a & b)
lanes("u<uu", "v_or_b32")(lambda a, b: a | b)
lanes("u<uu", "v_xor_b32")(lambda a, b: a ^ b)
lanes("u<uu", "v_xnor_b32")(lambda a, b: ~(a ^ b))
lanes("u<uu", "v_lshlrev_b32")(lambda a, b: b << _shift(a))
lanes("u<uu", "v_lshrrev_b32")(lambda a, b: b >> _shift(a))
lanes("i<ui", "v_ashrrev_i32")(lambda a, b: b >> _shift(a).astype(np.int32))
lanes("u<uuu", "v_and_or_b32")(lambda a, b, c: (a & b) | c)
lanes("u<uuu", "v_or3_b32")(lambda a, b, c: a | b | c)
lanes("u<uuu", "v_bfi_b32")(lambda a, b, c: (a & b) | (~a & c))
lanes("u<uuu", "v_lshl_or_b32")(lambda a, b, c: (a << _shift(b)) | c)
lanes("u<uuu", "v_lshl_add_u32")(lambda a, b, c: (a << _shift(b)) + c)
lanes("u<uuu", "v_add_lshl_u32")(lambda a, b, c: (a + b) << _shift(c))
lanes("u<uuu", "v_xad_u32")(lambda a, b, c: (a ^ b) + c)
lanes("U<uU", "v_lshlrev_b64")(lambda a, b: b << (a & U32(63)).astype(U64))
lanes("U<uU", "v_lshrrev_b64")(lambda a, b: b >> (a & U32(63)).astype(U64))
lanes("I<uI", "v_ashrrev_i64")(lambda a, b: b >> (a & U32(63)).astype(np.int64))
lanes("U<UuU", "v_lshl_add_u64", arches={"gfx942", "gfx950"})(lambda a, b, c: (a << (b & U32(7)).astype(U64)) + c)
lanes("w<ww", "v_lshlrev_b16")(lambda a, b: b << (a & np.uint16(15)))
lanes("w<ww", "v_lshrrev_b16")(lambda a, b: b >> (a & np.uint16(15)))
lanes("u<uu", "v_bfm_b32")(lambda a, b: ((U32(1) << _shift(a)) - U32(1)) << _shift(b))


@lanes("u<uuu", "v_bfe_u32")
def extract_unsigned(a: np.ndarray, offset: np.ndarray, width: np.ndarray) -> np.ndarray:
    """`width` bits from bit `offset`; width uses 5 bits, so 32 means 0 and gives 0."""
    return (a >> _shift(offset)) & ((U32(1) << _shift(width)) - U32(1))


@lanes("u<uuu", "v_bfe_i32")
def extract_signed(a: np.ndarray, offset: np.ndarray, width: np.ndarray) -> np.ndarray:
    """As `extract_unsigned`, sign-extended from the last bit taken; width 0 gives 0."""
    field = extract_unsigned(a, offset, width)
    sign = np.where(_shift(width) == 0, U32(0), U32(1) << _shift(_shift(width) - U32(1)))
    return (field ^ sign) - sign


@lanes("u<uuu", "v_alignbit_b32")
def align_bits(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a is the upper, b the lower half of 64 bits."""
    wide = (a.astype(U64) << U64(32)) | b.astype(U64)
    return (wide >> _shift(c).astype(U64)).astype(U32)


@lanes("u<uuu", "v_alignbyte_b32")
def align_bytes(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return align_bits(a, b, (c & U32(3)) * U32(8))


@lanes("u<uuu", "v_perm_b32")
def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each byte of the selector: 0-3 a byte of *b*, 4-7 one of *a*, 8-11 a sign (of b.1, b.3, a.1, a.3) eight times,
    12 gives 0x00 and everything above it 0xff."""
    wide = (a.astype(U64) << U64(32)) | b.astype(U64)
    result = U32(0)
    for i in range(4):
        choice = (selector >> U32(8 * i)) & U32(0xFF)
        byte = (wide >> (np.minimum(choice, U32(7)).astype(U64) * U64(8))).astype(U32) & U32(0xFF)
        if (choice > 7).any():
            # Bit 15, 31, 47 or 63 of the 64 bits.
            at = np.clip(choice.astype(np.int64) - 8, 0, 3).astype(U64) * U64(16) + U64(15)
            sign = ((wide >> at) & U64(1)).astype(U32) * U32(0xFF)
            byte = np.select([choice <= 7, choice <= 11, choice == 12], [byte, sign, U32(0)], U32(0xFF))
        result = result | (byte << U32(8 * i))
    return result


@lanes("u<u", "v_ffbh_u32")
def leading_zeros(a: np.ndarray) -> np.ndarray:
    """The number of zeros above the highest one; -1 for 0."""
    return np.where(a == 0, U32(0xFFFFFFFF), (32 - np.frexp(a.astype(np.float64))[1]).astype(U32))


@lanes("u<u", "v_ffbl_b32")
def trailing_zeros(a: np.ndarray) -> np.ndarray:
    return np.where(a == 0, U32(0xFFFFFFFF), (np.frexp((a & -a).astype(np.float64))[1] - 1).astype(U32))


lanes("u<uu", "v_bcnt_u32_b32")(lambda a, b: np.bitwise_count(a).astype(U32) + b)

# 32-bit integers, modulo 2^32

lanes("u<uu", "v_add_u32", "v_add_i32")(lambda a, b: a + b)
lanes("u<uu", "v_sub_u32", "v_sub_i32")(lambda a, b: a - b)
lanes("u<uu", "v_subrev_u32")(lambda a, b: b - a)
lanes("u<uuu", "v_add3_u32")(lambda a, b, c: a + b + c)
lanes("u<uu", "v_mul_lo_u32")(lambda a, b: a * b)
lanes("u<uu", "v_mul_hi_u32")(lambda a, b: ((a.astype(U64) * b.astype(U64)) >> U64(32)).astype(U32))
lanes("i<ii", "v_mul_hi_i32")(lambda a, b: ((a.astype(np.int64) * b.astype(np.int64)) >> 32).astype(np.int32))
lanes("u<uu", "v_min_u32")(np.minimum)
lanes("u<uu", "v_max_u32")(np.maximum)
lanes("i<ii", "v_min_i32")(np.minimum)
lanes("i<ii", "v_max_i32")(np.maximum)
lanes("i<iii", "v_min3_i32")(lambda a, b, c: np.minimum(np.minimum(a, b), c))
lanes("i<iii", "v_max3_i32")(lambda a, b, c: np.maximum(np.maximum(a, b), c))
lanes("u<uuu", "v_min3_u32")(lambda a, b, c: np.minimum(np.minimum(a, b), c))
lanes("u<uuu", "v_max3_u32")(lambda a, b, c: np.maximum(np.maximum(a, b), c))
lanes("w<ww", "v_add_u16")(lambda a, b: a + b)
lanes("w<ww", "v_sub_u16")(lambda a, b: a - b)
lanes("w<ww", "v_mul_lo_u16")(lambda a, b: a * b)
lanes("w<ww", "v_max_u16")(np.maximum)
lanes("w<ww", "v_min_u16")(np.minimum)
lanes("x<xx", "v_max_i16")(np.maximum)
lanes("x<xx", "v_min_i16")(np.minimum)
lanes("x<wx", "v_ashrrev_i16")(lambda a, b: b >> (a & np.uint16(15)).astype(np.int16))


@lanes("i<iii", "v_med3_i32")
@lanes("u<uuu", "v_med3_u32")
def median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def _low24(a: np.ndarray) -> np.ndarray:
    return a & U32(0xFFFFFF)


def _signed24(a: np.ndarray) -> np.ndarray:
    return (a << np.int32(8)) >> np.int32(8)


lanes("u<uu", "v_mul_u32_u24")(lambda a, b: _low24(a) * _low24(b))
lanes("i<ii", "v_mul_i32_i24")(lambda a, b: _signed24(a) * _signed24(b))
lanes("u<uuu", "v_mad_u32_u24")(lambda a, b, c: _low24(a) * _low24(b) + c)
lanes("i<iii", "v_mad_i32_i24")(lambda a, b, c: _signed24(a) * _signed24(b) + c)


@lanes("um<uu", "v_add_co_u32")
def add_carry_out(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    return total, total < a


@lanes("um<uum", "v_addc_co_u32")
def add_with_carry(a: np.ndarray, b: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a.astype(U64) + b.astype(U64) + carry
    return total.astype(U32), total > 0xFFFFFFFF


lanes("um<uu", "v_sub_co_u32")(lambda a, b: (a - b, b > a))
lanes("um<uu", "v_subrev_co_u32")(lambda a, b: (b - a, a > b))


@lanes("um<uum", "v_subb_co_u32")
def subtract_with_borrow(a: np.ndarray, b: np.ndarray, borrow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return a - b - borrow.astype(U32), b.astype(U64) + borrow > a


lanes("um<uum", "v_subbrev_co_u32")(lambda a, b, m: subtract_with_borrow(b, a, m))


@lanes("Um<uuU", "v_mad_u64_u32")
def multiply_add_wide(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    product = a.astype(U64) * b.astype(U64)
    return product + c, (product + c) < product


@lanes("Im<iiI", "v_mad_i64_i32")
def multiply_add_wide_signed(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask is bit 64 of the exact sum: its sign."""
    product = a.astype(np.int64) * b.astype(np.int64)
    total = product + c
    return total, np.where((product < 0) == (c < 0), product < 0, total < 0)
