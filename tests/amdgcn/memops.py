"""Loads and stores: global_*, buffer_* and s_load_*; for ds_* see `shared`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from amdgcn.errors import Fault, Unsupported
from amdgcn.program import Instruction, Operand
from amdgcn.registry import opcode
from amdgcn.state import State

U32, U64 = np.uint32, np.uint64
CACHE = {"glc", "slc", "sc0", "sc1", "scc", "nt"}
"""Cache policy: no effect on what a single kernel reads and writes."""

WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
NARROW = {"ubyte": (1, False), "sbyte": (1, True), "ushort": (2, False), "sshort": (2, True)}


@contextmanager
def blame(state: State, instruction: Instruction, lanes: np.ndarray | None) -> Iterator[None]:
    """Says of a fault which instruction, wave and lane it was."""
    try:
        yield
    except Fault as fault:
        if lanes is None:
            wave, where = fault.position, ""
        else:
            wave, lane = (int(each[fault.position]) for each in np.nonzero(lanes))
            where = f", lane {lane}"
        place = f"workgroup {state.workgroup[wave]}, wave {state.wave[wave]}{where}"
        raise Fault(f"{instruction}: {place}: {fault.reason}", fault.address, fault.position) from None


def offset_of(instruction: Instruction, key: str = "offset") -> int:
    return int(instruction.modifiers.get(key, "0"), 0)


def _load(
    state: State, instruction: Instruction, target: Operand, kind: str, addresses: np.ndarray, lanes: np.ndarray
) -> None:
    """Loads `kind` in the lanes of `lanes`; active lanes outside of `lanes` get 0."""
    narrow = kind not in WIDTHS
    width, signed = NARROW[kind] if narrow else (WIDTHS[kind], False)
    with blame(state, instruction, lanes):
        words = state.machine.memory.load(addresses[lanes], width)
    if target.count != len(words):
        raise Unsupported(f"{instruction}: {target.text} for {width} bytes")
    for i, word in enumerate(words):
        if signed:
            word = word.astype(np.int8 if width == 1 else np.int16).astype(np.int32).view(U32)
        full = np.zeros(state.exec.shape, U32)
        full[lanes] = word
        state.write_at(target.kind, target.index + i, full)


def _store(
    state: State, instruction: Instruction, data: Operand, kind: str, addresses: np.ndarray, lanes: np.ndarray
) -> None:
    width = WIDTHS.get(kind) or {"byte": 1, "short": 2, "short_d16_hi": 2, "byte_d16_hi": 1}[kind]
    words = registers(state, instruction, data, max(width // 4, 1))
    if kind.endswith("_d16_hi"):
        words = [word >> U32(16) for word in words]
    with blame(state, instruction, lanes):
        state.machine.memory.store(addresses[lanes], [word[lanes] for word in words], width)


def registers(state: State, instruction: Instruction, operand: Operand, count: int) -> list[np.ndarray]:
    if operand.kind not in "va" or operand.count != count:
        raise Unsupported(f"{instruction}: {operand.text} where {count} vector registers are expected")
    file = state.v if operand.kind == "v" else state.a
    return [np.broadcast_to(file[operand.index + i], state.exec.shape) for i in range(count)]


# Global: a 64-bit address in a VGPR pair, or an SGPR pair plus an unsigned 32-bit offset in a VGPR


def _global_address(state: State, instruction: Instruction, vector: Operand, base: Operand) -> np.ndarray:
    offset = U64(offset_of(instruction) % 2**64)  # signed in the text
    if base.text == "off":
        return np.broadcast_to(state.pair(vector, "U") + offset, state.exec.shape)
    address = state.scalar_pair(base)[:, None] + state.bits(vector).astype(U64)
    return np.broadcast_to(address + offset, state.exec.shape)


def _global(kinds: Sequence[str], *, store: bool) -> None:
    for kind in kinds:

        @opcode(f"global_{'store' if store else 'load'}_{kind}", operands=3, modifiers={"offset", *CACHE})
        def execute(state: State, instruction: Instruction, kind: str = kind) -> None:
            first, second, base = instruction.operands
            vector, data = (first, second) if store else (second, first)
            addresses = _global_address(state, instruction, vector, base)
            (_store if store else _load)(state, instruction, data, kind, addresses, state.exec)


_global([*WIDTHS, *NARROW], store=False)
_global([*WIDTHS, "byte", "short", "byte_d16_hi", "short_d16_hi"], store=True)


@opcode(
    *(f"global_load_{kind}{half}" for kind in ("short_d16", "ubyte_d16", "sbyte_d16") for half in ("", "_hi")),
    operands=3,
    modifiers={"offset", *CACHE},
)
def load_half(state: State, instruction: Instruction) -> None:
    """Into one half of the register; the other half is kept."""
    target, vector, base = instruction.operands
    _load_d16(state, instruction, target, _global_address(state, instruction, vector, base), state.exec)


def _load_d16(
    state: State, instruction: Instruction, target: Operand, addresses: np.ndarray, lanes: np.ndarray
) -> None:
    before = state.bits(target)
    kind = instruction.op.split("_")[2]
    _load(state, instruction, target, "ushort" if kind == "short" else kind, addresses, lanes)
    value = state.bits(target) & U32(0xFFFF)
    if instruction.op.endswith("_hi"):
        state.write(target, (before & U32(0xFFFF)) | (value << U32(16)))
    else:
        state.write(target, (before & U32(0xFFFF0000)) | value)


# Buffer: a descriptor in 4 SGPRs


def _buffer_address(
    state: State, instruction: Instruction, vector: Operand, resource: Operand, scalar: Operand, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Addresses, and the active lanes that are inside of num_records.

    The descriptor holds a 48-bit base, a stride (0: a raw buffer, the only kind modelled), num_records in bytes, and
    format bits. The range check is on the unwrapped sum of VGPR offset, constant and SGPR offset.
    """
    if resource.kind != "s" or resource.count != 4:
        raise Unsupported(f"{instruction}: resource {resource.text}")
    low, high, records, word3 = state.s[resource.index : resource.index + 4]
    if (high >> U32(16)).any() or (word3 >> U32(30)).any():
        raise Unsupported(f"{instruction}: descriptor with a stride or of another type than buffer")
    base = low.astype(U64) | (high.astype(U64) << U64(32))
    if ("offen" in instruction.modifiers) == (vector.text == "off"):
        raise Unsupported(f"{instruction}: offen and the address operand disagree")
    offset = np.broadcast_to(state.scalar(scalar).astype(U64)[:, None], state.exec.shape) + U64(offset_of(instruction))
    if vector.text != "off":
        offset = offset + state.bits(vector).astype(U64)
    limit = np.broadcast_to(records.astype(U64)[:, None], state.exec.shape)
    inside = state.exec & (offset + U64(width) <= limit)
    across = state.exec & (offset < limit) & ~inside
    if across.any():
        wave, lane = (int(each[0]) for each in np.nonzero(across))
        place = f"workgroup {state.workgroup[wave]}, wave {state.wave[wave]}, lane {lane}"
        address = int(base[wave] + offset[wave, lane])
        raise Fault(
            f"{instruction}: {place}: address {address:#x} is across num_records {int(limit[wave, lane])}", address
        )
    return base[:, None] + offset, inside


def _buffer(kinds: Sequence[str], *, store: bool) -> None:
    for kind in kinds:

        @opcode(f"buffer_{'store' if store else 'load'}_{kind}", operands=4, modifiers={"offset", "offen", *CACHE})
        def execute(state: State, instruction: Instruction, kind: str = kind) -> None:
            """Beyond num_records loads give 0 and stores are dropped: that is how Triton masks lanes."""
            data, vector, resource, scalar = instruction.operands
            width = WIDTHS.get(kind) or (2 if "short" in kind else 1)
            addresses, lanes = _buffer_address(state, instruction, vector, resource, scalar, width)
            (_store if store else _load)(state, instruction, data, kind, addresses, lanes)


_buffer([*WIDTHS, *NARROW], store=False)
_buffer([*WIDTHS, "byte", "short", "byte_d16_hi", "short_d16_hi"], store=True)


@opcode(
    *(f"buffer_load_{kind}{half}" for kind in ("short_d16", "ubyte_d16", "sbyte_d16") for half in ("", "_hi")),
    operands=4,
    modifiers={"offset", "offen", *CACHE},
)
def load_half_from_buffer(state: State, instruction: Instruction) -> None:
    """As `load_half`."""
    target, vector, resource, scalar = instruction.operands
    width = 2 if "short" in instruction.op else 1
    addresses, lanes = _buffer_address(state, instruction, vector, resource, scalar, width)
    _load_d16(state, instruction, target, addresses, lanes)


# Scalar loads


@opcode(*(f"s_load_dword{n}" for n in ("", "x2", "x4", "x8", "x16")), operands=3, modifiers={"offset", "glc"})
def load_scalar(state: State, instruction: Instruction) -> None:
    """Base pair plus a byte offset: a constant, or an SGPR (unsigned) with or without a constant.

    The hardware drops the two low bits of base and offset each; here they have to be 0, as every load is of dwords.
    """
    target, base, offset = instruction.operands
    if offset.kind == "integer":
        distance = np.broadcast_to(U64(offset.value % 2**64), (state.waves,))
    else:
        distance = state.scalar(offset).astype(U64)
    addresses = state.scalar_pair(base) + distance + U64(offset_of(instruction) % 2**64)
    if target.kind != "s" or target.count != int(instruction.op.removeprefix("s_load_dword").strip("x") or 1):
        raise Unsupported(f"{instruction}: {target.text}")
    if ((addresses | distance) & U64(3)).any():
        raise Fault(f"{instruction}: misaligned scalar load", int(addresses[0]))
    with blame(state, instruction, None):
        words = [state.machine.memory.load(addresses + U64(4 * i), 4)[0] for i in range(target.count)]
    for i, word in enumerate(words):
        state.write_scalar_at(target.index + i, word)
