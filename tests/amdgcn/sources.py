"""Vector operands: types, source modifiers, and the SDWA and DPP encodings, which pick parts of registers and lanes.

A type letter says how the bits of an operand are read or written:

    u i f   32 bits: unsigned, signed, float          b   32 bits where neg and abs act on the sign bit (v_cndmask)
    w h     the low 16 bits: unsigned, half float     x   the low 16 bits, signed
    U I d   64 bits: unsigned, signed, double         m   a lane mask in an SGPR pair
"""

from __future__ import annotations

import re

import numpy as np
from amdgcn.errors import Unsupported
from amdgcn.program import Instruction, Operand
from amdgcn.state import LANES, State

U32 = np.uint32
_LANE = np.arange(LANES)
_ROW, _IN_ROW = _LANE // 16, _LANE % 16
_VIEWS = {"u": U32, "b": U32, "i": np.int32, "f": np.float32, "U": np.uint64, "I": np.int64, "d": np.float64}


def read(state: State, instruction: Instruction, operand: Operand, letter: str, position: int) -> np.ndarray:
    """Source number `position` of an instruction as an array of the type of `letter`."""
    if letter == "m":
        return _mask(state, operand)
    if letter in "UId":
        values = state.pair(operand, letter)
        _no_modifiers(instruction, operand, letter == "d")
        values = values.view(_VIEWS[letter])
        values = np.abs(values) if operand.absolute else values
        return -values if operand.negate else values
    if operand.kind == "float" and letter in "hwx":
        bits = np.full((1, 1), np.float16(operand.value).view(np.uint16), U32)
    else:
        bits = state.bits(operand)
    if instruction.encoding == "dpp" and position == 0:
        bits = _shuffle(state, instruction, bits)[0]
    if instruction.encoding == "sdwa":
        bits = _part(bits, instruction.modifiers.get(f"src{position}_sel", "DWORD"), operand.sign_extend)
    elif operand.sign_extend:
        raise Unsupported(f"{instruction}: sext outside of SDWA")
    if operand.absolute or operand.negate:
        _no_modifiers(instruction, operand, letter in "fhb")
        sign = U32(0x8000 if letter == "h" else 0x80000000)
        bits = bits & ~sign if operand.absolute else bits
        bits = bits ^ sign if operand.negate else bits
    if letter in "hwx":
        half = (bits & U32(0xFFFF)).astype(np.uint16)
        return {"h": half.view(np.float16), "x": half.view(np.int16), "w": half}[letter]
    return bits.view(_VIEWS[letter])


def write(state: State, instruction: Instruction, operand: Operand, letter: str, value: np.ndarray) -> None:
    """Writes a result. SDWA may write a part of the register, DPP some of the lanes only."""
    enabled = lanes_written(state, instruction) if instruction.encoding == "dpp" else None
    if letter == "m":
        if operand.kind != "s" or operand.count != 2 or enabled is not None:
            raise Unsupported(f"{instruction}: lane mask to {operand.text}")
        # Bits of inactive lanes become 0.
        state.set_mask(operand.index, np.broadcast_to(value, state.exec.shape) & state.exec)
    elif letter in "UId":
        state.write_pair(operand, value, enabled)
    else:
        if letter in "hwx":
            # 16-bit operations of these machines clear the upper half of the register.
            value = value.view(np.uint16).astype(U32)
        value = value.view(U32)
        if instruction.encoding == "sdwa":
            value = _merge(state, instruction, operand, value)
        state.write(operand, value, enabled)


def _mask(state: State, operand: Operand) -> np.ndarray:
    if operand.kind == "s" and operand.count == 2:
        return state.mask(operand.index)
    if operand.kind == "integer" and operand.value in (0, -1):
        return np.full((1, 1), operand.value == -1)
    raise Unsupported(f"lane mask {operand.text}")


def _no_modifiers(instruction: Instruction, operand: Operand, allowed: bool) -> None:
    if not allowed and (operand.absolute or operand.negate or operand.sign_extend):
        raise Unsupported(f"{instruction}: modifier of {operand.text}")


# SDWA: sub-dword addressing


def _part(bits: np.ndarray, select: str, sign_extend: bool) -> np.ndarray:
    """A byte or word of a source, zero-extended or (sext) sign-extended. It comes before neg and abs."""
    found = re.fullmatch(r"(BYTE|WORD)_(\d)", select)
    if not found:
        return bits
    width = 8 if found[1] == "BYTE" else 16
    bits = (bits >> U32(width * int(found[2]))) & U32((1 << width) - 1)
    sign = U32(1 << (width - 1))
    return (bits ^ sign) - sign if sign_extend else bits


def _merge(state: State, instruction: Instruction, operand: Operand, value: np.ndarray) -> np.ndarray:
    """dst_sel: the low bits of a result go to a byte or word; dst_unused says what becomes of the other bits."""
    found = re.fullmatch(r"(BYTE|WORD)_(\d)", instruction.modifiers.get("dst_sel", "DWORD"))
    if not found:
        return value
    width = 8 if found[1] == "BYTE" else 16
    shift = U32(width * int(found[2]))
    field = U32((1 << width) - 1)
    placed = (value & field) << shift
    unused = instruction.modifiers.get("dst_unused")
    if unused == "UNUSED_PAD":
        return placed
    if unused == "UNUSED_PRESERVE":
        return placed | (state.bits(operand) & ~(field << shift))
    if unused == "UNUSED_SEXT":
        sign = U32(1 << (width - 1))
        return (((value & field) ^ sign) - sign) << shift
    raise Unsupported(f"{instruction}: dst_unused {unused}")


# DPP: data-parallel primitives


def _pattern(instruction: Instruction) -> tuple[np.ndarray, np.ndarray]:
    """For each lane the lane that it reads, and whether there is one. A row is 16 lanes, a bank 4 of them."""
    modifiers, all_lanes = instruction.modifiers, np.ones(LANES, bool)
    kinds = set(modifiers) - {"row_mask", "bank_mask", "bound_ctrl"}
    if len(kinds) != 1:
        raise Unsupported(f"{instruction}: DPP pattern {sorted(kinds)}")
    kind = kinds.pop()
    if kind == "quad_perm":
        order = np.array([int(each) for each in modifiers[kind].strip("[]").split(",")])
        return (_LANE & ~3) | order[_LANE & 3], all_lanes
    if kind == "row_mirror":
        return _ROW * 16 + 15 - _IN_ROW, all_lanes
    if kind == "row_half_mirror":
        return _LANE ^ 7, all_lanes
    n = int(modifiers[kind])
    if kind == "row_shr":  # data moves to higher lanes
        return _LANE - n, n <= _IN_ROW
    if kind == "row_shl":
        return _LANE + n, _IN_ROW + n < 16
    if kind == "row_ror":
        return _ROW * 16 + (_IN_ROW - n) % 16, all_lanes
    if kind == "row_newbcast":  # lane n of each row, to that row
        return _ROW * 16 + n, all_lanes
    if kind == "row_bcast" and n in (15, 31):  # the last lane of the 16 or 32 lanes before
        return _LANE // (n + 1) * (n + 1) - 1, n < _LANE
    if kind in ("wave_shr", "wave_shl") and n == 1:
        source = _LANE - 1 if kind == "wave_shr" else _LANE + 1
        return source, (source >= 0) & (source < LANES)
    if kind in ("wave_ror", "wave_rol") and n == 1:
        return (_LANE - 1 if kind == "wave_ror" else _LANE + 1) % LANES, all_lanes
    raise Unsupported(f"{instruction}: DPP pattern {kind}:{n}")


def _shuffle(state: State, instruction: Instruction, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source 0 as each lane gets it, and where it is valid: the source lane exists and is active.

    Invalid lanes read 0; whether they are written is for `lanes_written`. All lanes read before any lane writes.
    """
    lanes, exists = _pattern(instruction)
    lanes = np.clip(lanes, 0, LANES - 1)
    valid = exists & state.exec[:, lanes]
    return np.where(valid, np.broadcast_to(bits, state.exec.shape)[:, lanes], U32(0)), valid


def lanes_written(state: State, instruction: Instruction) -> np.ndarray:
    """The lanes that a DPP instruction writes.

    row_mask and bank_mask take destination lanes out, whatever bound_ctrl says, and do not restrict what is read.
    A lane whose source is invalid keeps its old value, unless bound_ctrl is given (as 1, in old texts as 0: both mean
    the bit is set): it is written then, from a source of 0.
    """
    rows, banks = (int(instruction.modifiers.get(key, "0xf"), 0) for key in ("row_mask", "bank_mask"))
    selected = ((rows >> _ROW) & (banks >> (_IN_ROW // 4)) & 1).astype(bool)
    lanes = state.exec & selected
    if "bound_ctrl" not in instruction.modifiers:
        lanes = lanes & _shuffle(state, instruction, np.zeros((1, 1), U32))[1]
    return lanes
