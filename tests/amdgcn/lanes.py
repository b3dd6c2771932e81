"""Exchange between lanes, and between lanes and scalars, apart from DPP (see `sources`) and shared memory."""

from __future__ import annotations

import re

import numpy as np
from amdgcn.errors import Unsupported
from amdgcn.program import Instruction
from amdgcn.registry import opcode
from amdgcn.sources import read
from amdgcn.state import LANES, State

U32 = np.uint32
_LANE = np.arange(LANES)


@opcode("v_readfirstlane_b32", operands=2)
def read_first_lane(state: State, instruction: Instruction) -> None:
    """The value of the lowest active lane; of lane 0 if none is active."""
    target, source = instruction.operands
    values = np.broadcast_to(state.bits(source), state.exec.shape)
    state.write_scalar(target, values[np.arange(state.waves), state.exec.argmax(axis=1)])


@opcode("v_readlane_b32", operands=3)
def read_lane(state: State, instruction: Instruction) -> None:
    """The value of one lane, active or not."""
    target, source, lane = instruction.operands
    values = np.broadcast_to(state.bits(source), state.exec.shape)
    state.write_scalar(target, values[np.arange(state.waves), state.scalar(lane) & U32(63)])


@opcode("v_writelane_b32", operands=3)
def write_lane(state: State, instruction: Instruction) -> None:
    """Writes a scalar to one lane, active or not."""
    target, source, lane = instruction.operands
    chosen = (state.scalar(lane) & U32(63))[:, None] == _LANE
    state.write(target, state.scalar(source)[:, None], chosen)


@opcode("ds_swizzle_b32", operands=2, modifiers={"offset"})
def swizzle(state: State, instruction: Instruction) -> None:
    """A fixed pattern within each 32 lanes (or each quad); inactive source lanes give 0.

    In the 32-lane mode the source is ((lane & and) | or) ^ xor on the low 5 bits.
    """
    text = instruction.modifiers.get("offset", "0")
    if found := re.fullmatch(r"swizzle\(SWAP,(\d+)\)", text):
        source = _LANE ^ int(found[1])
    elif found := re.fullmatch(r"swizzle\(REVERSE,(\d+)\)", text):
        source = _LANE ^ (int(found[1]) - 1)
    elif found := re.fullmatch(r"swizzle\(BROADCAST,(\d+),(\d+)\)", text):
        source = _LANE // int(found[1]) * int(found[1]) + int(found[2])
    elif found := re.fullmatch(r"swizzle\(QUAD_PERM,(\d),(\d),(\d),(\d)\)", text):
        source = (_LANE & ~3) | np.array([int(each) for each in found.groups()])[_LANE & 3]
    elif re.fullmatch(r"0x[0-9a-f]+|\d+", text) and not int(text, 0) & 0x8000:
        code = int(text, 0)
        low = (((_LANE & 31) & (code & 31)) | (code >> 5 & 31)) ^ (code >> 10 & 31)
        source = (_LANE & 32) | low
    else:
        raise Unsupported(f"{instruction}: pattern {text}")
    values = np.broadcast_to(state.bits(instruction.operands[1]), state.exec.shape)
    state.write(instruction.operands[0], np.where(state.exec[:, source], values[:, source], U32(0)))


@opcode("ds_bpermute_b32", operands=3, modifiers={"offset"})
def gather_lanes(state: State, instruction: Instruction) -> None:
    """Each lane reads the lane that its address names (in bytes: lane * 4); inactive source lanes give 0."""
    target, address, data = instruction.operands
    offset = int(instruction.modifiers.get("offset", "0"), 0)
    source = (np.broadcast_to(state.bits(address) + U32(offset), state.exec.shape) >> U32(2)) & U32(63)
    values = np.where(state.exec, np.broadcast_to(state.bits(data), state.exec.shape), U32(0))
    state.write(target, np.take_along_axis(values, source.astype(np.int64), axis=1))


@opcode("v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32", operands=3)
def count_lower_lanes(state: State, instruction: Instruction) -> None:
    """Counts the bits of a mask half that belong to lower lanes, and adds source 1."""
    mask, addend = (read(state, instruction, each, "u", i) for i, each in enumerate(instruction.operands[1:]))
    first = 0 if "_lo_" in instruction.op else 32
    below = np.array([(1 << min(max(lane - first, 0), 32)) - 1 for lane in _LANE], U32)
    state.write(instruction.operands[0], np.bitwise_count(mask & below).astype(U32) + addend)


@opcode("v_permlane32_swap_b32", "v_permlane16_swap_b32", operands=2, arches={"gfx950"})
def swap_rows(state: State, instruction: Instruction) -> None:
    """Exchanges rows of 32 or 16 lanes: the odd rows of the first register with the even rows of the second."""
    first, second = instruction.operands
    if not state.full:
        raise Unsupported(f"{instruction}: with inactive lanes")
    width = 32 if "32_swap" in instruction.op else 16
    odd = (_LANE // width % 2).astype(bool)
    a, b = (np.broadcast_to(state.bits(each), state.exec.shape) for each in (first, second))
    state.write(first, np.where(odd, b[:, (_LANE - width) % LANES], a))
    state.write(second, np.where(odd, b, a[:, (_LANE + width) % LANES]))
