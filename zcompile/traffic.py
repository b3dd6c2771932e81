"""The ledger's books: what a step should have received, what its graphs say, what the process groups saw.

Three columns from three sources: *predicted* adds the closed form of every semantic op that ran, *compiled* the sizes of the
collective nodes in the graphs that ran, *counted* what the process groups were asked to do. They must agree exactly.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zcompile import cost, refresh
from zcompile.cost import Bytes
from zcompile.layout import ParamSpec
from zcompile.params import Unit
from zcompile.runtime import Runtime

if TYPE_CHECKING:
    from zcompile.engine import Engine

COLUMNS = ("predicted", "compiled", "counted")


@dataclass
class Tally:
    """Bytes one rank received, per column and (level, transfer); `forwards` and `backwards` that were added up."""

    predicted: Bytes = field(default_factory=dict)
    compiled: Bytes = field(default_factory=dict)
    counted: Bytes = field(default_factory=dict)


class _Counted:
    """What one runtime's groups have counted, and up to where it is booked. Models that share a topology share its groups: what was
    counted since the last look belongs to the model that began a forward or a backward last."""

    def __init__(self) -> None:
        self.mark: Bytes = {}
        self.owner: weakref.ref[Traffic] | None = None


_COUNTED: weakref.WeakKeyDictionary[Runtime, _Counted] = weakref.WeakKeyDictionary()


class Traffic:
    """Adds up the step in progress (everything since the last synchronising backward) and keeps the last whole one.

    Forwards without gradient are tallied apart (`evaluation`), but a refresh that one of them sets off belongs to the step.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.step = Tally()
        self.last: Tally | None = None
        self.evaluation = Tally()
        self._active = self.step
        self._refreshes: dict[tuple[Unit, bool], tuple[Bytes, Bytes]] = {}
        self._counted = _COUNTED.setdefault(engine.runtime, _Counted())
        self._own()

    def start(self, evaluation: bool) -> None:
        """A forward or a backward begins."""
        self._own()
        self._active = self.evaluation if evaluation else self.step

    def stop(self, step: bool = False) -> None:
        """It has ended; `step`: and with it the step."""
        self._settle()
        self._active = self.step
        if step:
            self.last, self.step = self.step, Tally()
            self._active = self.step

    def op(self, transfer: str, spec: ParamSpec) -> None:
        """An eager transfer of one parameter: what it asks of the groups is its closed form."""
        amount = cost.transfer_bytes(spec, transfer)
        cost.add(self._active.predicted, amount)
        cost.add(self._active.compiled, amount)

    def refreshed(self, units: Collection[Unit], full: Collection[Unit]) -> None:
        for column in (self.step.predicted, self.step.compiled):
            cost.add(column, refresh.barriers(units))
        for unit in units:
            predicted, sent = self._refresh(unit, unit in full)
            cost.add(self.step.predicted, predicted)
            cost.add(self.step.compiled, sent)

    def _refresh(self, unit: Unit, full: bool) -> tuple[Bytes, Bytes]:
        """Of one refresh of a unit: by the closed forms, and by its messages."""
        found = self._refreshes.get((unit, full))
        if found is None:
            predicted: Bytes = {}
            for spec in unit.specs:
                cost.add(predicted, cost.full_refresh_bytes(spec) if full else cost.transfer_bytes(spec, "refresh"))
            levels = unit.first.levels
            sent = {(levels[level - 1], "refresh"): received for level, received in refresh.sent(unit, full).items()}
            found = self._refreshes[unit, full] = (predicted, sent)
        return found

    def program(self, program: Any) -> None:
        """A compiled graph runs."""
        cost.add(self._active.predicted, program.predicted)
        cost.add(self._active.compiled, program.compiled)

    def _own(self) -> None:
        """Book what was counted so far to the model it belongs to, and what is counted from here on to this one."""
        owner = None if self._counted.owner is None else self._counted.owner()
        if owner is None:
            self._counted.mark = self._now()
        else:
            owner._settle()
        self._counted.owner = weakref.ref(self)

    def _now(self) -> Bytes:
        return {key: bytes_ for key, (_, bytes_) in self._engine.runtime.snapshot().items()}

    def _settle(self) -> None:
        now = self._now()
        for (level, transfer), bytes_ in now.items():
            delta = bytes_ - self._counted.mark.get((level, transfer), 0)
            if delta:
                tally = self.step if transfer in ("refresh", "barrier") else self._active
                cost.add(tally.counted, {(level, "sync" if transfer == "back" else transfer): delta})
        self._counted.mark = now


def report(engine: Engine) -> dict[str, Any]:
    """`zcompile.ledger(model)`: the last whole step's bytes, {"levels": {level: {transfer: {column: bytes}}}}; zero rows included."""
    tally = engine.traffic.last or Tally()
    met = any(transfer == "barrier" for column in COLUMNS for _, transfer in getattr(tally, column))
    levels = {
        level: {
            transfer: {column: getattr(tally, column).get((level, transfer), 0) for column in COLUMNS}
            for transfer in (*cost.LEDGER_TRANSFERS, *(("barrier",) if met else ()))
        }
        for level in engine.plan.topology.names
    }
    overhead = {level: {"padding": 0, "scales": 0} for level in engine.plan.topology.names}
    for unit in engine.units:
        for spec in unit.specs:
            for transfer in cost.LEDGER_TRANSFERS:
                for level, wire, kind in cost.transfer_levels(spec, transfer):
                    padding, scales = cost.overhead_bytes(spec.layout, level, wire, kind)
                    overhead[spec.levels[level - 1]]["padding"] += padding
                    overhead[spec.levels[level - 1]]["scales"] += scales
    return {
        "levels": levels,
        "overhead_of_one_transfer_each": overhead,
        "memory": engine.memory(),
        "schedule": {p.name: {"runs": p.runs, **p.expected} for p in engine.programs if p.expected},
        "plan": engine.plan.plan.name,
        "skipped_steps": engine.skipped,
    }
