"""One compilation's part of a step: its graphs played after one another, and the books of that: by parameter, by level, by hop, by owner.

Everything is in bytes that one rank receives and in seconds by the machine's data (zcompile.times). Bytes are those of the graphs'
collectives; the share of a parameter in a message is its closed form, and the shares add up to the message exactly.

A step may consist of several compilations (graph breaks, micro-batches that accumulate and one that synchronises), and one of them may run
several times. Refreshes are launched once, before the first: they are in the books of the model's first compilation alone. So the books
of all add up to the step, as zcompile.ledger counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from zcompile import cost
from zcompile.debug.names import printable
from zcompile.debug.record import Record
from zcompile.layout import ParamSpec
from zcompile.resolved import ResolvedPlan
from zcompile.simulator import begin, refreshes
from zcompile.timeline import Hop, Timeline
from zcompile.wire import COMPUTE_FORMATS

if TYPE_CHECKING:
    from zcompile.program import Program

PHASES = ("refresh", "forward", "backward", "inference")
LOWERED = ("forward", "backward", "inference")


@dataclass
class Step:
    """The graphs of one compilation, as they come.

    Attributes:
        number: of the compilation. specs: of all parameters of the model, in the order of their units.
        trained: names of those that are; the others are not refreshed, and have no gradients and no moments.
        accumulating: whether micro-batches are added up in main gradients.
        refreshing: whether the step's refreshes are in these books.
        runs: how often the graphs run in a step. The first run has the refreshes, further ones find fresh copies and idle lanes.
        programs: what runs, by which `count` knows it.
        kept: names of the parameters whose gathered weights the forward leaves for the backward.
        records: by stage; the joint graph's too.
        timeline: of what was played so far: the refresh of every copy, the forward, the backward.
        broken: what went wrong in the dump, "" as long as nothing has; the books are then not all.
    """

    number: int
    plan: ResolvedPlan
    specs: Sequence[ParamSpec]
    trained: Collection[str] = ()
    accumulating: bool = False
    refreshing: bool = True
    runs: int = 1
    programs: list[Program] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    records: dict[str, Record] = field(default_factory=dict)
    broken: str = ""

    def __post_init__(self) -> None:
        state = cost.step_state(self.specs, self.trained, self.accumulating)
        needed = refreshes(spec for spec in self.specs if spec.name in self.trained) if self.refreshing else []
        self._player = begin(self.plan.topology, needed, state)
        self._further = begin(self.plan.topology, (), state) if needed else self._player
        """Of a run after the first."""
        self._played: set[str] = set()

    @property
    def timeline(self) -> Timeline:
        """Of the first run."""
        return self._player.finish()

    def play(self, gm: GraphModule, stage: str) -> None:
        """A graph after its last pass: its part of the timeline. Of a stage that comes again (another shape) only the first is played."""
        if stage not in self._played:
            self._played.add(stage)
            for player in {id(each): each for each in (self._player, self._further)}.values():
                player.graph(gm.graph, stage)

    def count(self) -> bool:
        """Take how often the graphs have run for how often they run in a step. True if that is something new."""
        before = self.runs
        self.runs = max(1, sum(program.runs for program in self.programs if program.stage != "backward"))
        return self.runs != before

    def _all(self, of: Callable[[Timeline], float]) -> float:
        """A number of all runs together: of the first and of what comes after it."""
        return of(self.timeline) + ((self.runs - 1) * of(self._further.finish()) if self.runs > 1 else 0)

    def _runs(self, hop: Hop) -> int:
        return 1 if hop.phase == "refresh" else self.runs

    # -- the books ---------------------------------------------------------------------------------------------------------------

    def levels(self) -> list[dict[str, Any]]:
        """Per level, fastest first: its data, messages, bytes by transfer, how long its links are busy, and what of it is waited for."""
        seconds, received = self._all(lambda timeline: timeline.seconds), self._received()
        hops, found = self.timeline.hops, []
        for level in self.plan.topology.levels:
            name = level.name
            busy = self._all(lambda timeline, name=name: timeline.busy(name))  # type: ignore[misc]
            exposed = self._all(lambda timeline, name=name: timeline.exposed_by("level").get(name, 0.0))  # type: ignore[misc]
            found.append(
                {
                    "level": level.name,
                    "size": level.size,
                    "bandwidth": level.bandwidth,
                    "latency": level.latency,
                    "messages": sum(self._runs(hop) for hop in hops if hop.level == level.name),
                    "bytes": {t: received.get((level.name, t), 0) for t in cost.LEDGER_TRANSFERS},
                    "busy": busy,
                    "share": busy / seconds if seconds else 0.0,
                    "exposed": exposed,
                }
            )
        return found

    def _received(self) -> cost.Bytes:
        """(level, transfer) -> bytes of all runs."""
        found: cost.Bytes = {}
        for hop in self.timeline.hops:
            cost.add(found, {(hop.level, _ledgers(hop.transfer)): self._runs(hop) * hop.bytes})
        return found

    def hops(self) -> list[dict[str, Any]]:
        """Every hop in the order of launching: what it carries, where it is launched and waited for, what of it is exposed, and why.

        Of the first run. `runs`: how often the hop comes in a step; `wait` is a line of the graph `waiting`.
        """
        begins = next((stage for stage in ("forward", "inference") if stage in self.records), "")
        found = []
        for number, hop in enumerate(self.timeline.hops):
            record = self.records.get(hop.phase)
            launch = record.at(hop.node) if record else -1
            waiting = begins if hop.phase == "refresh" else hop.phase
            wait = self.records[waiting].at(hop.wait) if hop.wait and waiting in self.records else -1
            found.append(
                {
                    "number": number,
                    "phase": hop.phase,
                    "transfer": hop.transfer,
                    "level": hop.level,
                    "wire": hop.wire,
                    "bytes": hop.bytes,
                    "parameters": [printable(name) for name in hop.parameters],
                    "name": record.rows[launch].name if record and launch >= 0 else "",
                    "source": record.rows[launch].source if record and launch >= 0 else "",
                    "launch": launch,
                    "wait": wait,
                    "waiting": waiting,
                    "runs": self._runs(hop),
                    "launched": hop.launched,
                    "begin": hop.begin,
                    "end": hop.end,
                    "waited": hop.waited,
                    "hidden": hop.hidden,
                    "exposed": hop.exposed,
                    "reason": hop.reason,
                    "cause": printable(hop.cause),
                }
            )
        return found

    def parameters(self) -> list[dict[str, Any]]:
        """Every parameter: placements, formats, bytes by phase, transfer and level, its hops, its share of exposed waiting, and why."""
        carries: dict[str, list[int]] = {}
        hops = self.timeline.hops
        for number, hop in enumerate(hops):
            for name in hop.parameters:
                carries.setdefault(name, []).append(number)
        gathered = self._gathered()
        exposed = self.timeline.exposed_by("parameters")
        if self.runs > 1:
            for name, seconds in self._further.finish().exposed_by("parameters").items():
                exposed[name] = exposed.get(name, 0.0) + (self.runs - 1) * seconds
        return [
            self._parameter(spec, [(i, hops[i]) for i in carries.get(spec.name, ())], exposed, gathered)
            for spec in self.specs
        ]

    def _parameter(
        self, spec: ParamSpec, hops: list[tuple[int, Hop]], exposed: dict[str, float], gathered: dict[str, set[str]]
    ) -> dict[str, Any]:
        places = ("whole", *spec.levels)
        received: dict[str, dict[str, int]] = {}
        for _, hop in hops:
            transfer = _ledgers(hop.transfer)
            key = transfer if transfer != "gather" else f"{transfer} {hop.phase}"
            row = received.setdefault(key, {})
            row[hop.level] = row.get(hop.level, 0) + self._runs(hop) * share(spec, hop)
        worst = max((hop for _, hop in hops), key=lambda hop: hop.exposed, default=None)
        return {
            "name": printable(spec.name),
            "shape": list(spec.shape),
            "elements": spec.layout.numel,
            "compute": COMPUTE_FORMATS[spec.compute],
            "weights": places[spec.w],
            "gradients": places[spec.g],
            "optimizer": places[spec.o],
            "bytes": received,
            "total": sum(sum(row.values()) for row in received.values()),
            "backward": self._in_backward(spec, gathered),
            "hops": [number for number, _ in hops],
            "exposed": exposed.get(spec.name, 0.0),
            "reason": worst.reason if worst is not None else "",
        }

    def _gathered(self) -> dict[str, set[str]]:
        """stage -> the parameters that its graph gathers."""
        return {
            stage: {name for row in self.records[stage].rows if row.transfer == "gather" for name in row.parameters}
            for stage in ("forward", "backward")
            if stage in self.records
        }

    def _in_backward(self, spec: ParamSpec, gathered: dict[str, set[str]]) -> str:
        """What becomes of the whole weight between forward and backward."""
        name = printable(spec.name)
        before, again = (name in gathered.get(stage, ()) for stage in ("forward", "backward"))
        if "backward" not in gathered:
            return ""
        if not (before or again):
            return "not read"
        if not cost.transfer_bytes(spec, "gather"):
            return "whole"
        if spec.name in self.kept:
            return "kept"
        return ("gathered again" if before else "gathered") if again else "not needed"

    def memory(self) -> list[dict[str, Any]]:
        return [{"at": each.at, **each.bytes} for each in self.timeline.memory]

    def as_dict(self) -> dict[str, Any]:
        """The ledger file."""
        timeline = self.timeline
        peak = timeline.peak()
        return {
            "compilation": self.number,
            "plan": self.plan.describe().splitlines(),
            "topology": self.plan.topology.key,
            "device": self.plan.topology.device.name,
            "graphs": [self.records[stage].title for stage in LOWERED if stage in self.records],
            "runs": self.runs,
            "seconds": self._all(lambda timeline: timeline.seconds),
            "computing": self._all(lambda timeline: timeline.busy("compute")),
            "exposed": self._all(lambda timeline: timeline.exposed),
            "memory": {"peak": peak.total, "at": peak.at, "owners": peak.bytes},
            "levels": self.levels(),
            "hops": self.hops(),
            "parameters": self.parameters(),
        }


def _ledgers(transfer: str) -> str:
    """A hop's transfer by the ledger's name: the way back of a sync is sync."""
    return "sync" if transfer == "back" else transfer


def share(spec: ParamSpec, hop: Hop) -> int:
    """Bytes of a message that are this parameter's, by the closed form."""
    level = spec.levels.index(hop.level) + 1
    kind = "sync" if hop.transfer == "back" else hop.transfer
    for j, wire, how in cost.transfer_levels(spec, kind):
        if j == level and how == hop.transfer:
            return cost.hop_bytes(spec.layout, level, wire, how)
    return 0
