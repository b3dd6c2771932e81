"""Would the tests notice a wrong kernel? Deletes one instruction at a time and looks whether any result changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from amdgcn.errors import AsmError
from amdgcn.launch import bytes_of, launch
from amdgcn.program import NOT_EXECUTED, Program, parse

EQUIVALENT = NOT_EXECUTED | {"s_endpgm", "s_branch"}
"""Not deleted, with all s_cbranch_*: waits and no-ops do nothing here, and control flow either skips work that would have
no effect (execz), or falls through to what is next in the text anyway."""


@dataclass(frozen=True)
class Case:
    """One set of data."""

    name: str
    grid: tuple[int, ...]
    arguments: Callable[[], list[Any]]
    """Makes new arguments, always the same ones."""
    seed: int = 0
    addresses: Mapping[str, int] | None = None
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Survivor:
    """A deleted instruction that no case noticed."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Report:
    """What a deletion run found."""

    tried: int = 0
    detected: dict[str, int] = field(default_factory=dict)
    """By the first case that noticed."""
    survivors: list[Survivor] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The part of the deletions that some case noticed."""
        return sum(self.detected.values()) / self.tried if self.tried else 1.0


def delete_each(compiled: Any, cases: Sequence[Case], *, every: int = 1) -> Report:
    """Deletes each instruction (each `every`-th) and runs the cases until one notices.

    A deletion is noticed if the program raises, executes far more instructions than before, or leaves other bytes in
    any array of the arguments.
    """
    program = parse(compiled.text)
    wanted = [_run(compiled, program, case, 10_000_000) for case in cases]
    report = Report()
    for index, instruction in enumerate(program.instructions):
        if instruction.op in EQUIVALENT or instruction.op.startswith("s_cbranch") or index % every:
            continue
        report.tried += 1
        mutant = program.without(index)
        for case, (steps, outputs) in zip(cases, wanted, strict=True):
            if _differs(compiled, mutant, case, steps, outputs):
                report.detected[case.name] = report.detected.get(case.name, 0) + 1
                break
        else:
            report.survivors.append(Survivor(instruction.line, instruction.text))
    return report


def _run(compiled: Any, program: Program, case: Case, limit: int) -> tuple[int, list[bytes]]:
    arguments = case.arguments()
    run = launch(
        compiled,
        case.grid,
        arguments,
        seed=case.seed,
        addresses=case.addresses,
        extra=case.extra,
        program=program,
        limit=limit,
    )
    return run.instructions, [bytes_of(each).tobytes() for each in _flatten(arguments)]


def _differs(compiled: Any, mutant: Program, case: Case, steps: int, outputs: list[bytes]) -> bool:
    try:
        return _run(compiled, mutant, case, 4 * steps + 1000)[1] != outputs
    except AsmError:
        return True


def _flatten(arguments: Sequence[Any]) -> list[Any]:
    """The arrays and tensors among the arguments, those inside of tables too."""
    found = []
    for each in arguments:
        if isinstance(each, (list, tuple)):
            found += _flatten(each)
        elif hasattr(each, "shape") and not isinstance(each, np.generic):
            found.append(each)
    return found
