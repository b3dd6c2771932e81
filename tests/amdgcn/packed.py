"""Packed arithmetic (two values per operand, chosen by op_sel), conversions to packed formats, and v_bitop3."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from amdgcn import floats
from amdgcn.errors import Unsupported
from amdgcn.program import Instruction, Operand
from amdgcn.registry import opcode
from amdgcn.sources import read
from amdgcn.state import State
from amdgcn.vector import lanes
from amdgcn.vector_float import saturates

U32, F32 = np.uint32, np.float32


def _bits_of(instruction: Instruction, key: str, count: int, default: int) -> list[int]:
    """A list modifier such as op_sel:[0,1]."""
    if key not in instruction.modifiers:
        return [default] * count
    values = [int(each) for each in instruction.modifiers[key].strip("[]").split(",")]
    if len(values) != count or not set(values) <= {0, 1}:
        raise Unsupported(f"{instruction}: {key}")
    return values


def _plain(instruction: Instruction, operand: Operand) -> None:
    if operand.negate or operand.absolute or operand.sign_extend:
        raise Unsupported(f"{instruction}: modifier of {operand.text}")


# Two fp32 in a register pair


def _half_of_pair(state: State, instruction: Instruction, operand: Operand, high: int) -> np.ndarray:
    """The lower or upper register. A constant has one value only: asking for its upper half is not modelled."""
    _plain(instruction, operand)
    if operand.kind in ("integer", "float"):
        if high and operand.value != 0:
            raise Unsupported(f"{instruction}: upper half of the constant {operand.text}")
        return state.bits(operand)
    if operand.count != 2:
        raise Unsupported(f"{instruction}: {operand.text} is no register pair")
    index = operand.index + high
    return {"v": state.v, "a": state.a}[operand.kind][index] if operand.kind in "va" else state.s[index][:, None]


def _packed_f32(name: str, sources: int, function: Callable[..., np.ndarray]) -> None:
    @opcode(name, operands=1 + sources, modifiers={"op_sel", "op_sel_hi", "neg_lo", "neg_hi"})
    def execute(state: State, instruction: Instruction) -> None:
        """op_sel chooses the halves that make the lower result, op_sel_hi (default 1) those of the upper one."""
        results = []
        for select, negate, default in (("op_sel", "neg_lo", 0), ("op_sel_hi", "neg_hi", 1)):
            halves = _bits_of(instruction, select, sources, default)
            signs = _bits_of(instruction, negate, sources, 0)
            values = []
            for operand, high, sign in zip(instruction.operands[1:], halves, signs, strict=True):
                bits = _half_of_pair(state, instruction, operand, high)
                values.append((bits ^ U32(sign << 31)).view(F32))
            results.append(function(*values))
        _write_pair(state, instruction.operands[0], results)


def _write_pair(state: State, operand: Operand, results: list[np.ndarray]) -> None:
    """Both results were computed before either is written: the destination may be a source."""
    if operand.count != 2:
        raise Unsupported(f"{operand.text} is no register pair")
    for i, result in enumerate(results):
        state.write_at(operand.kind, operand.index + i, result)


_packed_f32("v_pk_mul_f32", 2, lambda a, b: floats.with_nan(a * b, a, b))
_packed_f32("v_pk_add_f32", 2, lambda a, b: floats.with_nan(a + b, a, b))
_packed_f32("v_pk_fma_f32", 3, floats.fma)


@opcode("v_pk_mov_b32", operands=3, modifiers={"op_sel", "op_sel_hi"})
def move_pair(state: State, instruction: Instruction) -> None:
    """The lower result from source 0, the upper from source 1; op_sel alone chooses the halves of both."""
    target, *sources = instruction.operands
    halves = _bits_of(instruction, "op_sel", 2, 0)
    _write_pair(state, target, [_half_of_pair(state, instruction, s, h) for s, h in zip(sources, halves, strict=True)])


# Two 16-bit values in one register


def _packed_16(name: str, kind: type, sources: int, function: Callable[..., np.ndarray]) -> None:
    @opcode(name, operands=1 + sources, modifiers={"op_sel", "op_sel_hi", "neg_lo", "neg_hi"})
    def execute(state: State, instruction: Instruction) -> None:
        halves = []
        for select, negate, default in (("op_sel", "neg_lo", 0), ("op_sel_hi", "neg_hi", 1)):
            chosen = _bits_of(instruction, select, sources, default)
            signs = _bits_of(instruction, negate, sources, 0)
            values = []
            for operand, high, sign in zip(instruction.operands[1:], chosen, signs, strict=True):
                _plain(instruction, operand)
                if operand.kind in ("integer", "float") and operand.value != 0:
                    raise Unsupported(f"{instruction}: constant {operand.text} in packed 16-bit arithmetic")
                half = (state.bits(operand) >> U32(16 * high)).astype(np.uint16)
                values.append((half ^ np.uint16(sign << 15)).view(kind))
            halves.append(function(*values).view(np.uint16).astype(U32))
        state.write(instruction.operands[0], halves[0] | (halves[1] << U32(16)))


for _kind, _type in {"u16": np.uint16, "i16": np.int16}.items():
    _packed_16(f"v_pk_max_{_kind}", _type, 2, np.maximum)
    _packed_16(f"v_pk_min_{_kind}", _type, 2, np.minimum)
    _packed_16(f"v_pk_add_{'u16' if _type is np.uint16 else 'i16'}", _type, 2, np.add)
    _packed_16(f"v_pk_sub_{'u16' if _type is np.uint16 else 'i16'}", _type, 2, np.subtract)
_packed_16("v_pk_mul_lo_u16", np.uint16, 2, np.multiply)
_packed_16("v_pk_lshlrev_b16", np.uint16, 2, lambda a, b: b << (a & np.uint16(15)))
_packed_16("v_pk_lshrrev_b16", np.uint16, 2, lambda a, b: b >> (a & np.uint16(15)))
_packed_16("v_pk_ashrrev_i16", np.int16, 2, lambda a, b: b >> (a & np.int16(15)))

lanes("u<ww", "v_pack_b32_f16")(lambda a, b: a.astype(U32) | (b.astype(U32) << U32(16)))

# Conversions


@lanes("u<ff", "v_cvt_pk_bf16_f32", arches={"gfx950"})
def to_bfloat16_pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return floats.to_bfloat16(a) | (floats.to_bfloat16(b) << U32(16))


@lanes("u<ff", "v_cvt_pk_f16_f32", state=True, arches={"gfx950"})
def to_float16_pair(state: State, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return floats.to_float16(a, saturates(state)) | (floats.to_float16(b, saturates(state)) << U32(16))


def _e4m3(state: State) -> bool:
    """Whether e4m3 is the fnuz variant of gfx942 rather than the OCP one of gfx950."""
    return state.machine.arch == "gfx942"


@opcode("v_cvt_pk_fp8_f32", operands=3, modifiers={"op_sel"}, arches={"gfx942", "gfx950"})
def to_fp8_pair(state: State, instruction: Instruction) -> None:
    """Two codes into one half of the destination (op_sel:[0,0,1]: the upper one); the other half is kept."""
    high = "op_sel" in instruction.modifiers and _upper(instruction, 3)
    _store_codes(state, instruction, instruction.operands[1:], high)


@opcode("v_cvt_scalef32_pk_fp8_f32", operands=4, modifiers={"op_sel"}, arches={"gfx950"})
def to_scaled_fp8_pair(state: State, instruction: Instruction) -> None:
    """As `to_fp8_pair` after a division by a power of two, of which only 1.0 is modelled. op_sel:[0,0,0,1]: upper."""
    _unit_scale(instruction, instruction.operands[3])
    high = "op_sel" in instruction.modifiers and _upper(instruction, 4)
    _store_codes(state, instruction, instruction.operands[1:3], high)


def _upper(instruction: Instruction, count: int) -> bool:
    *rest, last = _bits_of(instruction, "op_sel", count, 0)
    if any(rest):
        raise Unsupported(f"{instruction}: op_sel of a source")
    return bool(last)


def _unit_scale(instruction: Instruction, operand: Operand) -> None:
    if operand.value != 1.0:
        raise Unsupported(f"{instruction}: scale {operand.text}")


def _store_codes(state: State, instruction: Instruction, sources: tuple[Operand, ...], high: bool) -> None:
    a, b = (read(state, instruction, source, "f", i) for i, source in enumerate(sources))
    fnuz, saturate = _e4m3(state), saturates(state)
    codes = floats.to_fp8(a, saturate, fnuz=fnuz) | (floats.to_fp8(b, saturate, fnuz=fnuz) << U32(8))
    shift = U32(16 if high else 0)
    target = instruction.operands[0]
    state.write(target, (state.bits(target) & ~(U32(0xFFFF) << shift)) | (codes << shift))


@lanes("f<u", "v_cvt_f32_fp8", state=True, arches={"gfx942", "gfx950"})
def from_fp8(state: State, a: np.ndarray) -> np.ndarray:
    """The byte is chosen by SDWA (src0_sel), the lowest by default."""
    return floats.from_fp8(a & U32(0xFF), fnuz=_e4m3(state))


@opcode("v_cvt_pk_f32_fp8", operands=2, arches={"gfx942", "gfx950"})
def from_fp8_pair(state: State, instruction: Instruction) -> None:
    """Two codes of one half (SDWA src0_sel:WORD_1: the upper one) to a register pair."""
    codes = read(state, instruction, instruction.operands[1], "u", 0)
    _expand(state, instruction, codes)


@opcode("v_cvt_scalef32_pk_f32_fp8", operands=3, modifiers={"op_sel"}, arches={"gfx950"})
def from_scaled_fp8_pair(state: State, instruction: Instruction) -> None:
    """As `from_fp8_pair` times a power of two, of which only 1.0 is modelled. op_sel:[1,0,0] takes the upper half."""
    _unit_scale(instruction, instruction.operands[2])
    high, *rest = _bits_of(instruction, "op_sel", 3, 0)
    if any(rest):
        raise Unsupported(f"{instruction}: op_sel")
    codes = read(state, instruction, instruction.operands[1], "u", 0) >> U32(16 * high)
    _expand(state, instruction, codes)


def _expand(state: State, instruction: Instruction, codes: np.ndarray) -> None:
    fnuz = _e4m3(state)
    pair = [floats.from_fp8((codes >> U32(8 * i)) & U32(0xFF), fnuz=fnuz) for i in range(2)]
    _write_pair(state, instruction.operands[0], pair)


# Any function of three bits


def _truth_table(instruction: Instruction, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Bit 4a + 2b + c of the table is the result for the source bits a, b, c."""
    if "bitop3" not in instruction.modifiers:
        raise Unsupported(f"{instruction}: no table")
    table = int(instruction.modifiers["bitop3"], 0)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), U32)
    for row in range(8):
        if table >> row & 1:
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return result


@opcode("v_bitop3_b32", operands=4, modifiers={"bitop3"}, arches={"gfx950"})
def any_function(state: State, instruction: Instruction) -> None:
    """See `_truth_table`."""
    sources = [read(state, instruction, each, "u", i) for i, each in enumerate(instruction.operands[1:])]
    state.write(instruction.operands[0], _truth_table(instruction, *sources))


@opcode("v_bitop3_b16", operands=4, modifiers={"bitop3"}, arches={"gfx950"})
def any_function_16(state: State, instruction: Instruction) -> None:
    """As `any_function` on the low halves; the upper half of the destination is kept."""
    target, *sources = instruction.operands
    bits = [read(state, instruction, each, "u", i) for i, each in enumerate(sources)]
    result = _truth_table(instruction, *bits)
    state.write(target, (state.bits(target) & U32(0xFFFF0000)) | (result & U32(0xFFFF)))
