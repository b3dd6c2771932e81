"""Loads and stores of a workgroup's shared memory: ds_read_* and ds_write_*."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from amdgcn.errors import Fault, Unsupported
from amdgcn.memops import blame, offset_of, registers
from amdgcn.program import Instruction, Operand
from amdgcn.registry import opcode
from amdgcn.state import State

U32 = np.uint32


def _places(state: State, instruction: Instruction, address: Operand, offset: int, width: int) -> np.ndarray:
    """Byte addresses of the active lanes in the LDS of all workgroups together, checked against one workgroup's share."""
    local = (np.broadcast_to(state.bits(address), state.exec.shape)[state.exec]).astype(np.int64) + offset
    size, unit = state.machine.lds_bytes, min(width, 4)
    bad = (local + width > size) | (local % unit != 0)
    if bad.any():
        position = int(np.flatnonzero(bad)[0])
        reason = f"{width} bytes at LDS address {int(local[position])}, of {size} bytes, in units of {unit}"
        with blame(state, instruction, state.exec):
            raise Fault(reason, int(local[position]), position)
    share = state.machine.lds.shape[1] * 4
    return local + (np.broadcast_to(state.workgroup[:, None], state.exec.shape)[state.exec]).astype(np.int64) * share


def _read_lds(state: State, instruction: Instruction, target: Operand, offsets: Sequence[int], width: int) -> None:
    """Reads `width` bytes at each offset into consecutive registers."""
    words = []
    for offset in offsets:
        places = _places(state, instruction, instruction.operands[1], offset, width)
        flat = state.machine.lds.reshape(-1)
        if width < 4:
            words.append(flat.view({1: np.uint8, 2: np.uint16}[width])[places // width].astype(U32))
        else:
            words += [flat[places // 4 + i] for i in range(width // 4)]
    if target.count != len(words):
        raise Unsupported(f"{instruction}: {target.text} for {len(words)} words")
    for i, word in enumerate(words):
        full = np.zeros(state.exec.shape, U32)
        full[state.exec] = word
        state.write_at(target.kind, target.index + i, full)


def _write_lds(state: State, instruction: Instruction, data: Operand, offset: int, width: int, shift: int = 0) -> None:
    places = _places(state, instruction, instruction.operands[0], offset, width)
    flat = state.machine.lds.reshape(-1)
    for i, word in enumerate(registers(state, instruction, data, max(width // 4, 1))):
        word = word[state.exec] >> U32(shift)
        if width < 4:
            view = flat.view({1: np.uint8, 2: np.uint16}[width])
            view[places // width] = word.astype(view.dtype)
        else:
            flat[places // 4 + i] = word


def _accesses(width: int) -> None:
    @opcode(f"ds_read_b{8 * width}" if width >= 4 else f"ds_read_u{8 * width}", operands=2, modifiers={"offset"})
    def read(state: State, instruction: Instruction) -> None:
        _read_lds(state, instruction, instruction.operands[0], [offset_of(instruction)], width)

    @opcode(f"ds_write_b{8 * width}", operands=2, modifiers={"offset"})
    def write(state: State, instruction: Instruction) -> None:
        _write_lds(state, instruction, instruction.operands[1], offset_of(instruction), width)

    if width not in (4, 8):
        return
    for stride, scale in (("", width), ("st64", 64 * width)):

        @opcode(f"ds_read2{stride}_b{8 * width}", operands=2, modifiers={"offset0", "offset1"})
        def read2(state: State, instruction: Instruction, scale: int = scale) -> None:
            """Two values; the offsets count values, or with st64 64 values."""
            offsets = [offset_of(instruction, key) * scale for key in ("offset0", "offset1")]
            _read_lds(state, instruction, instruction.operands[0], offsets, width)

        @opcode(f"ds_write2{stride}_b{8 * width}", operands=3, modifiers={"offset0", "offset1"})
        def write2(state: State, instruction: Instruction, scale: int = scale) -> None:
            for data, key in zip(instruction.operands[1:], ("offset0", "offset1"), strict=True):
                _write_lds(state, instruction, data, offset_of(instruction, key) * scale, width)


for _width in (1, 2, 4, 8, 12, 16):
    _accesses(_width)


@opcode("ds_read_i8", "ds_read_i16", operands=2, modifiers={"offset"})
def read_signed(state: State, instruction: Instruction) -> None:
    """Sign-extended."""
    target, width = instruction.operands[0], 1 if instruction.op.endswith("8") else 2
    _read_lds(state, instruction, target, [offset_of(instruction)], width)
    state.write(target, state.bits(target).astype(np.int8 if width == 1 else np.int16).astype(np.int32))


@opcode("ds_write_b16_d16_hi", "ds_write_b8_d16_hi", operands=2, modifiers={"offset"})
def write_upper(state: State, instruction: Instruction) -> None:
    """The upper half of the register."""
    width = 1 if "_b8_" in instruction.op else 2
    _write_lds(state, instruction, instruction.operands[1], offset_of(instruction), width, shift=16)


@opcode(
    *(f"ds_read_{kind}_d16{half}" for kind in ("u16", "u8") for half in ("", "_hi")), operands=2, modifiers={"offset"}
)
def read_half(state: State, instruction: Instruction) -> None:
    """Into one half of the register; the other half is kept."""
    target = instruction.operands[0]
    before = state.bits(target)
    _read_lds(state, instruction, target, [offset_of(instruction)], 1 if "_u8_" in instruction.op else 2)
    value = state.bits(target)
    high = instruction.op.endswith("_hi")
    kept, shift = (U32(0xFFFF), U32(16)) if high else (U32(0xFFFF0000), U32(0))
    state.write(target, (before & kept) | (value << shift))
