"""The registers of a set of waves that stand at the same instruction, as numpy arrays over [waves] or [waves, 64]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from amdgcn.errors import Unsupported
from amdgcn.memory import Memory
from amdgcn.program import EXEC, VCC, Instruction, Operand

LANES = 64
_SGPRS = 128

U32, U64 = np.uint32, np.uint64


@dataclass
class Machine:
    """What all waves share."""

    memory: Memory
    lds: np.ndarray
    """[workgroups, 32-bit words]."""
    lds_bytes: int
    arch: str
    noise: int
    """Chooses what the architecture leaves open: the last bit of reciprocals, and the contents of unwritten registers."""


class State:
    """Arrays are replaced and never written in place, so registers may share them."""

    def __init__(self, machine: Machine, workgroup: np.ndarray, wave: np.ndarray, vgprs: int) -> None:
        self.machine = machine
        self.workgroup = workgroup
        """[waves]: index of the workgroup."""
        self.wave = wave
        """[waves]: index within the workgroup."""
        self.pc = 0
        junk = np.random.default_rng(machine.noise).integers(0, 2**32, vgprs * 2 + _SGPRS, U32)
        waves = len(workgroup)
        vectors = list(np.broadcast_to(junk[: 2 * vgprs, None, None], (2 * vgprs, waves, LANES)))
        self.v, self.a = vectors[:vgprs], vectors[vgprs:]
        self.s = list(np.broadcast_to(junk[2 * vgprs :, None], (_SGPRS, waves)))
        self.scc = np.zeros(waves, bool)
        self.mode = np.zeros(waves, U32)
        """The MODE register; of it only bit 23, FP16_OVFL, has an effect here."""
        self.set_mask(EXEC, np.ones((waves, LANES), bool))

    @property
    def waves(self) -> int:
        return len(self.workgroup)

    # Groups of waves

    def take(self, rows: np.ndarray) -> State:
        """The state of some of the waves."""
        return self._map([self], lambda arrays: arrays[0][rows])

    @classmethod
    def join(cls, states: Sequence[State]) -> State:
        """Several states at one pc as one."""
        return states[0]._map(states, np.concatenate) if len(states) > 1 else states[0]

    def _map(self, states: Sequence[State], function: Callable[[Sequence[np.ndarray]], np.ndarray]) -> State:
        made = object.__new__(State)
        made.machine, made.pc = self.machine, self.pc
        for name in ("v", "a", "s"):
            setattr(made, name, [function(arrays) for arrays in zip(*(getattr(s, name) for s in states), strict=True)])
        for name in ("workgroup", "wave", "scc", "mode", "exec"):
            setattr(made, name, function([getattr(s, name) for s in states]))
        made.full = bool(made.exec.all())
        return made

    # Lane masks

    def mask(self, index: int) -> np.ndarray:
        """The SGPR pair at `index` as booleans [waves, 64]."""
        if index == EXEC:
            return self.exec
        return _unpack(self.s[index], self.s[index + 1])

    def set_mask(self, index: int, lanes: np.ndarray) -> None:
        """Writes booleans [waves, 64] to an SGPR pair."""
        words = np.packbits(lanes, axis=1, bitorder="little").view("<u4")
        self.s[index], self.s[index + 1] = words[:, 0], words[:, 1]
        if index == EXEC:
            self._refresh()

    def _refresh(self) -> None:
        self.exec = _unpack(self.s[EXEC], self.s[EXEC + 1])
        self.full = bool(self.exec.all())

    # Reading operands: arrays that broadcast to [waves, 64]

    def bits(self, operand: Operand) -> np.ndarray:
        """A 32-bit source, without its modifiers. A float constant is its fp32 pattern."""
        if operand.kind in "va" and operand.count == 1:
            return (self.v if operand.kind == "v" else self.a)[operand.index]
        return self.scalar(operand)[:, None]

    def pair(self, operand: Operand, kind: str) -> np.ndarray:
        """A 64-bit source. `kind` (U unsigned or bits, I signed, d double) is how a constant is widened."""
        if operand.kind in "va":
            self._need(operand, 2)
            file = self.v if operand.kind == "v" else self.a
            return _wide(file[operand.index], file[operand.index + 1])
        return self.scalar_pair(operand, kind)[:, None]

    def scalar(self, operand: Operand) -> np.ndarray:
        """A 32-bit scalar source [waves]."""
        if operand.kind == "s":
            self._need(operand, 1)
            return self.s[operand.index]
        if operand.kind == "scc":
            return self.scc.astype(U32)
        if operand.kind == "integer":
            return np.full(self.waves, operand.value & 0xFFFFFFFF, U32)
        if operand.kind == "float":
            return np.full(self.waves, operand.value, np.float32).view(U32)
        raise Unsupported(f"operand {operand.text} as a 32-bit source")

    def scalar_pair(self, operand: Operand, kind: str = "U") -> np.ndarray:
        """A 64-bit scalar source [waves].

        An inline constant (-16 to 64) is sign-extended. A 32-bit literal is zero-extended, or sign-extended where the
        operation is signed, or the high half of a double.
        """
        if operand.kind == "s":
            self._need(operand, 2)
            return _wide(self.s[operand.index], self.s[operand.index + 1])
        if operand.kind == "float":
            return np.broadcast_to(np.float64(operand.value).view(U64), (self.waves,))
        if operand.kind != "integer":
            raise Unsupported(f"operand {operand.text} as a 64-bit source")
        value = operand.value
        if not -16 <= value <= 64:
            value &= 0xFFFFFFFF
            if kind == "d":
                value <<= 32
            elif kind == "I" and value >= 2**31:
                value -= 2**32
        return np.broadcast_to(U64(value % 2**64), (self.waves,))

    @staticmethod
    def _need(operand: Operand, count: int) -> None:
        if operand.count != count:
            raise Unsupported(f"operand {operand.text} where {count} registers are expected")

    # Writing registers

    def write(self, operand: Operand, value: np.ndarray, lanes: np.ndarray | None = None) -> None:
        """Writes 32 bits to a VGPR in the lanes of `lanes` (default: exec)."""
        self._need(operand, 1)
        self.write_at(operand.kind, operand.index, value, lanes)

    def write_at(self, kind: str, index: int, value: np.ndarray, lanes: np.ndarray | None = None) -> None:
        """As `write`, for the register with this number."""
        if kind not in ("v", "a"):
            raise Unsupported(f"vector result to {kind}{index}")
        file = self.v if kind == "v" else self.a
        if value.dtype != U32:
            value = value.view(U32)
        if lanes is None and self.full:
            file[index] = spread(value, self.exec.shape)
        else:
            file[index] = np.where(self.exec if lanes is None else lanes, value, file[index])

    def write_pair(self, operand: Operand, value: np.ndarray, lanes: np.ndarray | None = None) -> None:
        """Writes 64 bits to a VGPR pair."""
        self._need(operand, 2)
        value = value.view(U64)
        self.write_at(operand.kind, operand.index, value.astype(U32), lanes)
        self.write_at(operand.kind, operand.index + 1, (value >> U64(32)).astype(U32), lanes)

    def write_scalar(self, operand: Operand, value: np.ndarray) -> None:
        """Writes 32 bits [waves] to an SGPR."""
        self._need(operand, 1)
        if operand.kind != "s":
            raise Unsupported(f"scalar result to {operand.text}")
        self.write_scalar_at(operand.index, value)

    def write_scalar_at(self, index: int, value: np.ndarray) -> None:
        """As `write_scalar`, for the register with this number."""
        self.s[index] = spread(value.view(U32), (self.waves,))
        if index in (EXEC, EXEC + 1):
            self._refresh()

    def write_scalar_pair(self, operand: Operand, value: np.ndarray) -> None:
        """Writes 64 bits [waves] to an SGPR pair."""
        self._need(operand, 2)
        if operand.kind != "s":
            raise Unsupported(f"scalar result to {operand.text}")
        value = spread(value.view(U64), (self.waves,))
        self.s[operand.index], self.s[operand.index + 1] = value.astype(U32), (value >> U64(32)).astype(U32)
        if operand.index == EXEC:
            self._refresh()

    def condition(self, instruction: Instruction) -> np.ndarray:
        """[waves]: which waves take a conditional branch. vccz and execz look at all 64 bits."""
        name = instruction.op.removeprefix("s_cbranch_")
        if name.startswith("scc"):
            return self.scc if name == "scc1" else ~self.scc
        at = VCC if name.startswith("vcc") else EXEC
        zero = (self.s[at] | self.s[at + 1]) == 0
        return zero if name in ("vccz", "execz") else ~zero


def spread(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """np.broadcast_to, which takes longer than most instructions, where there is something to do."""
    return value if value.shape == shape else np.broadcast_to(value, shape)


def _wide(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(U64) | (high.astype(U64) << U64(32))


def _unpack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    words = np.stack([low, high], axis=1)
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").view(bool)
