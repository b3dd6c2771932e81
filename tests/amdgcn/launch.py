"""Runs a compiled kernel: places its buffers, fills its argument segment and initial registers, and schedules its waves."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from amdgcn.errors import Endless, Unsupported
from amdgcn.memory import Buffer, Memory
from amdgcn.program import NOT_EXECUTED, Program, parse
from amdgcn.state import LANES, Machine, State

U32 = np.uint32
_SCALARS = {"i1": "<?", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q"}
_SCALARS |= {"u64": "<Q", "fp32": "<f", "fp64": "<d"}
_EXPECTED = {"float_round_mode_32": 0, "float_round_mode_16_64": 0, "float_denorm_mode_32": 3, "ieee_mode": 1}
_EXPECTED |= {"float_denorm_mode_16_64": 3, "dx10_clamp": 1, "tg_split": 0}
_ALIGNMENT = 256


@dataclass(frozen=True)
class Run:
    """What a launch did."""

    instructions: int
    """Executed, one instruction of many waves at once counting once."""
    addresses: dict[str, int]


def launch(
    compiled: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    *,
    seed: int = 0,
    addresses: Mapping[str, int] | None = None,
    extra: Mapping[str, Any] | None = None,
    program: Program | None = None,
    limit: int = 1_000_000,
) -> Run:
    """Runs a kernel over a grid; arrays are modified in place.

    Args:
        compiled: Has `text`, `signature` (name to Triton type) and `metadata` (num_warps, shared).
        arguments: In the order of the signature. For a pointer: a numpy array, a torch tensor, a list of those (and of
            integers), which becomes a table of int64 addresses, an integer address, or None. For a scalar: a number.
        seed: Chooses the order of the waves between barriers, and all that the architecture leaves open.
        addresses: Where buffers lie, by argument name, `name[i]` for the entries of a table. By default each lies
            across a multiple of 4 GiB, so that a lost carry is seen.
        extra: Buffers that only `addresses` reach.
        program: Executed in place of `compiled.text`.
        limit: Executed instructions, after which the launch is given up.

    Raises:
        Fault: An access outside of every buffer, or a misaligned one.
        Unsupported: Something that is not modelled.
        Endless: `limit` was reached.
    """
    program = program or _parsed(compiled.text)
    if len(arguments) != len(compiled.signature):
        raise ValueError(f"{len(arguments)} arguments for {list(compiled.signature)}")
    for key, value in _EXPECTED.items():
        if program.descriptor.get(key, value) != value:
            raise Unsupported(f"descriptor: {key} {program.descriptor[key]}")
    layout = _Layout(dict(addresses or {}))
    values = []
    for (name, kind), argument in zip(compiled.signature.items(), arguments, strict=True):
        values.append(layout.pointer(name, argument) if kind.startswith("*") else argument)
    for name, array in (extra or {}).items():
        layout.place(name, array)
    layout.place("kernel arguments", _segment(program, list(compiled.signature.values()), values), writable=False)
    memory = Memory(layout.buffers)

    dimensions = [*grid, 1, 1][:3]
    workgroups, waves = int(np.prod(dimensions)), int(compiled.metadata.num_warps)
    generator = np.random.default_rng(seed)
    shared = int(compiled.metadata.shared)
    lds = generator.integers(0, 2**32, (workgroups, -(-shared // 4) + 1), U32)
    machine = Machine(memory, lds, shared, program.arch, noise=int(generator.integers(2**31)))
    order = np.argsort(generator.random((workgroups, waves)), axis=1)
    groups = [[_start(machine, program, order[:, j], dimensions, layout.at["kernel arguments"])] for j in range(waves)]
    executed = 0
    with np.errstate(all="ignore"):
        while groups:
            running, groups = groups, []
            for j in generator.permutation(len(running)):
                stopped, steps = _until_barrier(program, running[j], limit - executed)
                executed += steps
                if stopped:
                    groups.append(stopped)
    memory.flush()
    return Run(executed, dict(layout.at))


@lru_cache(maxsize=64)
def _parsed(text: str) -> Program:
    return parse(text)


# Scheduling


def _until_barrier(program: Program, states: list[State], budget: int) -> tuple[list[State], int]:
    """Runs waves of different workgroups until each is at a barrier or at its end.

    Waves that branch differently part, the ones that are behind go on first, and waves that meet again run together.
    No two waves of one workgroup are in `states`: their order is what the caller chooses.
    """
    waiting, steps = [], 0
    while states:
        lowest = min(state.pc for state in states)
        here = State.join([state for state in states if state.pc == lowest])
        states = [state for state in states if state.pc != lowest]
        stop = min((state.pc for state in states), default=len(program.instructions))
        while True:
            if here.pc >= len(program.instructions):
                raise Unsupported("the program runs past its end")
            instruction = program.instructions[here.pc]
            steps += 1
            if steps > budget:
                raise Endless(f"given up at {instruction}")
            here.pc += 1
            if instruction.execute is not None:
                instruction.execute(here, instruction)
            elif instruction.op == "s_endpgm":
                break
            elif instruction.op == "s_barrier":
                waiting.append(here)
                break
            elif instruction.op not in NOT_EXECUTED:
                parts = _branch(here, instruction)
                if len(parts) > 1:
                    states += parts
                    break
            if here.pc >= stop or here.pc < lowest:
                states.append(here)
                break
    return waiting, steps


def _branch(state: State, instruction: Any) -> list[State]:
    """Sets the pc of the waves that take a branch; two states if only some take it."""
    taken = np.ones(state.waves, bool) if instruction.op == "s_branch" else state.condition(instruction)
    if taken.all():
        state.pc = instruction.target
        return [state]
    if not taken.any():
        return [state]
    jumped = state.take(np.flatnonzero(taken))
    jumped.pc = instruction.target
    return [jumped, state.take(np.flatnonzero(~taken))]


# Initial registers


def _start(machine: Machine, program: Program, wave: np.ndarray, dimensions: list[int], arguments: int) -> State:
    """One wave of every workgroup, at the first instruction.

    That is the entry for hardware without argument preloading: the code there loads the arguments itself.
    """
    descriptor = program.descriptor
    workgroup = np.arange(len(wave))
    state = State(machine, workgroup, wave, descriptor.get("next_free_vgpr", 256))
    at = 0
    for key, count in (
        ("private_segment_buffer", 4),
        ("dispatch_ptr", 2),
        ("queue_ptr", 2),
        ("kernarg_segment_ptr", 2),
    ):
        if not descriptor.get(f"user_sgpr_{key}", 0):
            continue
        if key == "kernarg_segment_ptr":
            state.write_scalar_at(at, np.full(len(wave), arguments & 0xFFFFFFFF, U32))
            state.write_scalar_at(at + 1, np.full(len(wave), arguments >> 32, U32))
        at += count
    at = descriptor["user_sgpr_count"]
    x, y, _ = dimensions
    for axis, index in (("x", workgroup % x), ("y", workgroup // x % y), ("z", workgroup // (x * y))):
        if descriptor.get(f"system_sgpr_workgroup_id_{axis}", axis == "x"):
            state.write_scalar_at(at, index.astype(U32))
            at += 1
    state.write_at("v", 0, (wave[:, None] * LANES + np.arange(LANES)).astype(U32))
    return state


# Buffers and arguments


class _Layout:
    """Gives each buffer an address."""

    def __init__(self, wanted: dict[str, int]) -> None:
        self.wanted = wanted
        self.at: dict[str, int] = {}
        self.buffers: list[Buffer] = []
        self._seen: dict[tuple[int, int], int] = {}

    def pointer(self, name: str, argument: Any) -> int:
        """The address to pass for a pointer argument."""
        if argument is None:
            return 0
        if isinstance(argument, (int, np.integer)):
            return int(argument)
        if isinstance(argument, (list, tuple)):
            entries = [self.pointer(f"{name}[{i}]", each) for i, each in enumerate(argument)]
            return self.place(name, np.array(entries, np.int64))
        return self.place(name, argument)

    def place(self, name: str, array: Any, *, writable: bool = True) -> int:
        """Adds a buffer. An array that was placed before under another name keeps its one address."""
        data = bytes_of(array)
        key = (data.ctypes.data, data.nbytes)
        if key not in self._seen or not data.nbytes:
            half = -(-data.nbytes // 2 // _ALIGNMENT) * _ALIGNMENT
            address = self.wanted.get(name, (len(self.buffers) * 2 + 2) * 2**32 - half)
            self._seen[key] = address
            self.buffers.append(Buffer(name, data, address, writable))
        self.at[name] = self._seen[key]
        return self._seen[key]


def bytes_of(array: Any) -> np.ndarray:
    """A flat view of the bytes of an array or tensor."""
    if hasattr(array, "untyped_storage"):
        import torch

        if not array.is_contiguous():
            raise ValueError("a tensor that is not contiguous")
        return array.detach().reshape(-1).view(torch.uint8).numpy()
    if not array.flags.c_contiguous:
        raise ValueError("an array that is not contiguous")
    return array.reshape(-1).view(np.uint8)


def _segment(program: Program, kinds: list[str], values: list[Any]) -> np.ndarray:
    """The argument segment, as the metadata lays it out. Triton appends pointers to scratch memory: they are null."""
    places = program.arguments
    if len(places) < len(kinds):
        raise Unsupported(f"{len(kinds)} arguments, of which the text has {len(places)}")
    size = max((place.offset + place.size for place in places), default=0)
    data = bytearray(-(-size // 8) * 8 + 128)  # loads of arguments are as wide as convenient and may pass the end
    for place, kind, value in zip(places, kinds, values, strict=False):
        packed = struct.pack("<Q" if kind.startswith("*") else _SCALARS[kind], value)
        if len(packed) != place.size:
            raise Unsupported(f"argument of type {kind} in {place.size} bytes")
        data[place.offset : place.offset + place.size] = packed
    for place in places[len(kinds) :]:
        if place.kind != "global_buffer":
            raise Unsupported(f"argument of kind {place.kind}")
    return np.frombuffer(bytes(data), np.uint8)
