"""One compilation as a step: its graphs played after one another, and the books of that: by parameter, by level, by hop, by owner.

Everything is in bytes that one rank receives and in seconds by the machine's data (zcompile.times). Bytes are those of the graphs'
collectives; the share of a parameter in a message is its closed form, and the shares add up to the message exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from zcompile import cost
from zcompile.debug.names import printable
from zcompile.debug.record import Record
from zcompile.layout import ParamSpec
from zcompile.plan import ResolvedPlan
from zcompile.simulator import Player, Refresh
from zcompile.timeline import Hop, Timeline
from zcompile.wire import COMPUTE_FORMATS

PHASES = ("refresh", "forward", "backward", "inference")
LOWERED = ("forward", "backward", "inference")


@dataclass
class Step:
    """The graphs of one compilation, as they come.

    Attributes:
        number: of the compilation. specs: of all parameters of the model, in the order of their units.
        records: by stage; the joint graph's too.
        timeline: of what was played so far: the refresh of every copy, the forward, the backward.
        broken: what went wrong in the dump, "" as long as nothing has; the books are then not all.
    """

    number: int
    plan: ResolvedPlan
    specs: Sequence[ParamSpec]
    records: dict[str, Record] = field(default_factory=dict)
    broken: str = ""

    def __post_init__(self) -> None:
        self._player = Player(self.plan.topology)
        self._player.charge("weights", sum(state_bytes(self.specs).values()))
        self._player.refresh(refreshes(self.specs))

    @property
    def timeline(self) -> Timeline:
        return self._player.finish()

    def play(self, gm: GraphModule, stage: str) -> None:
        """A graph after its last pass: its part of the timeline. Of a stage that comes again (another shape) only the first is played."""
        if not any(hop.phase == stage for hop in self._player.timeline.hops):
            self._player.graph(gm.graph, stage)

    # -- the books ---------------------------------------------------------------------------------------------------------------

    def levels(self) -> list[dict[str, Any]]:
        """Per level, fastest first: its data, messages, bytes by transfer, how long its links are busy, and what of it is waited for."""
        timeline, topology = self.timeline, self.plan.topology
        exposed, received = timeline.exposed_by("level"), timeline.received()
        found = []
        for level in topology.levels:
            busy = timeline.busy(level.name)
            found.append(
                {
                    "level": level.name,
                    "size": level.size,
                    "bandwidth": level.bandwidth,
                    "latency": level.latency,
                    "messages": sum(hop.level == level.name for hop in timeline.hops),
                    "bytes": {t: received.get((level.name, t), 0) for t in cost.LEDGER_TRANSFERS},
                    "busy": busy,
                    "share": busy / timeline.seconds if timeline.seconds else 0.0,
                    "exposed": exposed.get(level.name, 0.0),
                }
            )
        return found

    def hops(self) -> list[dict[str, Any]]:
        """Every hop in the order of launching: what it carries, where it is launched and waited for, what of it is exposed, and why."""
        found = []
        for number, hop in enumerate(self.timeline.hops):
            record = self.records.get(hop.phase)
            launch, wait = (record.at(hop.node), record.at(hop.wait)) if record else (-1, -1)
            if hop.phase == "refresh" and hop.wait and "forward" in self.records:
                wait = self.records["forward"].at(hop.wait)
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
        exposed, gathered = self.timeline.exposed_by("parameters"), self._gathered()
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
            transfer = "sync" if hop.transfer == "back" else hop.transfer
            key = transfer if transfer != "gather" else f"{transfer} {hop.phase}"
            row = received.setdefault(key, {})
            row[hop.level] = row.get(hop.level, 0) + share(spec, hop)
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
            "backward": _in_backward(printable(spec.name), gathered),
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
            "seconds": timeline.seconds,
            "computing": timeline.busy("compute"),
            "exposed": timeline.exposed,
            "memory": {"peak": peak.total, "at": peak.at, "owners": peak.bytes},
            "levels": self.levels(),
            "hops": self.hops(),
            "parameters": self.parameters(),
        }


def _in_backward(name: str, gathered: dict[str, set[str]]) -> str:
    """What becomes of the whole weight between forward and backward."""
    if "backward" not in gathered:
        return ""
    before = name in gathered.get("forward", ())
    if name in gathered["backward"]:
        return "gathered again" if before else "gathered"
    return "not needed" if before else "not read"


def refreshes(specs: Iterable[ParamSpec]) -> list[Refresh]:
    """The refresh of each unit, by the closed forms."""
    units: dict[str, list[ParamSpec]] = {}
    for spec in specs:
        units.setdefault(spec.unit, []).append(spec)
    found = []
    for unit in units.values():
        hops: dict[tuple[int, str], int] = {}
        for spec in unit:
            for level, wire, kind in cost.transfer_levels(spec, "refresh"):
                if amount := cost.hop_bytes(spec.layout, level, wire, kind):
                    hops[level, wire.short] = hops.get((level, wire.short), 0) + amount
        if hops:
            levels = unit[0].levels
            ordered = tuple((levels[level - 1], amount, wire) for (level, wire), amount in hops.items())
            found.append(Refresh(tuple(spec.name for spec in unit), ordered))
    return found


def state_bytes(specs: Sequence[ParamSpec]) -> dict[str, int]:
    """Model state on one rank while a step runs, AdamW's moments included: see zcompile.cost.state_bytes."""
    copies = {spec.name: int(spec.has_copy) for spec in specs}
    return {**cost.state_bytes(specs, copies, accumulating=False), "gradient": 0}


def share(spec: ParamSpec, hop: Hop) -> int:
    """Bytes of a message that are this parameter's, by the closed form."""
    level = spec.levels.index(hop.level) + 1
    kind = "sync" if hop.transfer == "back" else hop.transfer
    for j, wire, how in cost.transfer_levels(spec, kind):
        if j == level and how == hop.transfer:
            return cost.hop_bytes(spec.layout, level, wire, how)
    return 0
