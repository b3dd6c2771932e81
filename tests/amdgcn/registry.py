"""Which function executes an opcode. The opcode files fill the table when they are imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from amdgcn.errors import Unsupported
from amdgcn.program import Instruction

Execute = Callable[[Any, Instruction], None]
_TABLE: dict[str, tuple[Execute, frozenset[str], int | None, frozenset[str]]] = {}

SDWA = {"dst_sel", "dst_unused", "src0_sel", "src1_sel"}
DPP = {"row_mask", "bank_mask", "bound_ctrl", "quad_perm", "row_shl", "row_shr", "row_ror", "row_mirror"}
DPP |= {"row_half_mirror", "row_bcast", "row_newbcast", "wave_shl", "wave_shr", "wave_rol", "wave_ror"}
ARCHES = frozenset({"gfx90a", "gfx942", "gfx950"})


def opcode(
    *names: str, operands: int | None, modifiers: Collection[str] = (), arches: Collection[str] = ARCHES
) -> Callable[[Execute], Execute]:
    """Registers a function as the meaning of opcodes.

    Args:
        operands: How many an instruction has to have; None leaves that to the function.
        modifiers: Those that the function honours; any other one is an error. SDWA and DPP modifiers are allowed to
            instructions of those encodings by `lookup` and need not be named.
        arches: Where the opcode exists.
    """

    def register(function: Execute) -> Execute:
        for name in names:
            assert name not in _TABLE, name
            _TABLE[name] = function, frozenset(modifiers), operands, frozenset(arches)
        return function

    return register


def lookup(instruction: Instruction, arch: str) -> Execute:
    """The function that executes an instruction, after a check of everything that the text alone can show."""
    _fill()
    if instruction.op not in _TABLE:
        raise Unsupported(f"{instruction}: unknown opcode")
    function, allowed, operands, arches = _TABLE[instruction.op]
    if arch not in arches:
        raise Unsupported(f"{instruction}: {instruction.op} does not exist on {arch}")
    if operands is not None and len(instruction.operands) != operands:
        raise Unsupported(f"{instruction}: expected {operands} operands")
    encoded = {"sdwa": SDWA, "dpp": DPP}.get(instruction.encoding, set())
    unknown = set(instruction.modifiers) - allowed - encoded
    if unknown:
        raise Unsupported(f"{instruction}: modifiers {sorted(unknown)}")
    return function


def known() -> list[str]:
    """All opcodes that are modelled."""
    _fill()
    return sorted(_TABLE)


@cache
def _fill() -> None:
    """Imports the opcode files; they import this one, so it cannot be done above."""
    for name in ("lanes", "memops", "packed", "scalar", "shared", "vector", "vector_float"):
        importlib.import_module(f"amdgcn.{name}")
