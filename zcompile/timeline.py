"""What a simulated graph or step did, and when: spans on lanes, hops with what was exposed of them and why, memory by owner. Plain data.

Lanes are "compute" and one per level of the machine, under the level's name. Every hop of ours receives as much as it sends, so both
directions of a link are busy for the same time and one lane stands for the two. Times are seconds from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

COMPUTE = "compute"

KINDS = ("compute", "optimizer", "wait", "gather", "reduce", "sync", "back", "refresh")
"""Of a span: on the lane "compute" an operation, the optimizer's step, or exposed waiting; on a level's lane the transfer of a hop."""

OWNERS = ("weights", "activations", "gathered", "gradients", "wire")
"""Of memory: model state (masters, copies, moments); what forward keeps for backward and temporaries; gathered weights; gradients, whole,
reduced and accumulated; messages."""

REASONS = {
    "lane busy": "other hops had the level's links when it was launched",
    "budget": "its input was there, and the overlap that the options allow kept it from being launched",
    "dependency": "what it sends was computed, or had arrived, just before it was needed",
    "nothing to hide behind": "nothing was left to compute between its input and its need",
}
"""Why a hop was not hidden -> what that means."""


@dataclass(frozen=True)
class Span:
    """One thing on one lane.

    Attributes:
        lane: "compute" or a level's name.
        name: what to call it: an operation's name, or the hop and its parameters.
        begin, end: seconds.
        node: name of the FX node ("" for what stands in no graph: refreshes, the optimizer).
        kind: one of KINDS.
        phase: of the step: "forward", "backward", "optimizer", "refresh"; with several micro-batches "forward 2", from 1 on.
        level, wire, bytes: of a hop: its level, the wire format (or dtype), the bytes that one rank receives. Of a wait: those of the hop.
        parameters: names of the parameters that it carries.
    """

    lane: str
    name: str
    begin: float
    end: float
    node: str = ""
    kind: str = "compute"
    phase: str = ""
    level: str = ""
    wire: str = ""
    bytes: int = 0
    parameters: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Hop:
    """One hop from launch to wait.

    Attributes:
        node, wait: names of the FX nodes that launch it and wait for it.
        phase, level, transfer, wire, bytes, parameters: as in Span.
        ready: when what it sends could first have been there.
        launched: when the graph launched it.
        begin, end: when it had its level's lane.
        waited: when the graph came to its wait.
        reason: one of REASONS where it is exposed, else "".
        cause: the hop that had the lane before it, where that is the reason.
    """

    node: str
    wait: str
    phase: str
    level: str
    transfer: str
    wire: str
    bytes: int
    parameters: tuple[str, ...]
    ready: float
    launched: float
    begin: float
    end: float
    waited: float
    reason: str = ""
    cause: str = ""

    @property
    def exposed(self) -> float:
        """Seconds that the graph stood still for it."""
        return max(0.0, self.end - self.waited)

    @property
    def hidden(self) -> float:
        """Seconds from its launch on that something was computed beside it, or another hop waited for."""
        return max(0.0, min(self.end, self.waited) - self.launched)


@dataclass(frozen=True)
class Memory:
    """Bytes by owner from time `at` on."""

    at: float
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass
class Timeline:
    """Spans and hops in the order in which they begin, memory as steps, and the seconds that all of it takes."""

    spans: list[Span] = field(default_factory=list)
    hops: list[Hop] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    seconds: float = 0.0
    flops: float = 0.0
    """Of the operations with FLOPs, on one device."""

    @property
    def lanes(self) -> list[str]:
        """ "compute", then the levels in the order of their first hop."""
        return list(dict.fromkeys([COMPUTE, *(span.lane for span in self.spans)]))

    def lane(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.lane == name]

    def busy(self, lane: str) -> float:
        """Seconds in which the lane works; for "compute" without its waits."""
        return sum(span.seconds for span in self.spans if span.lane == lane and span.kind != "wait")

    @property
    def exposed(self) -> float:
        """Seconds in which computing stands still for transfers."""
        return sum(span.seconds for span in self.spans if span.kind == "wait")

    def exposed_by(self, what: str) -> dict[str, float]:
        """Exposed seconds by "level", "phase", or "parameters": a wait for several is shared among them equally."""
        found: dict[str, float] = {}
        for span in self.spans:
            if span.kind == "wait":
                value: Any = getattr(span, what)
                keys: Iterable[str] = value if isinstance(value, tuple) else (value,)
                keys = list(keys) or [""]
                for key in keys:
                    found[key] = found.get(key, 0.0) + span.seconds / len(keys)
        return found

    def peak(self) -> Memory:
        """The moment with the most bytes; no bytes at 0 where there is no memory."""
        return max(self.memory, key=lambda each: each.total, default=Memory(0.0, {}))

    def received(self) -> dict[tuple[str, str], int]:
        """(level, transfer) -> bytes that one rank receives; a sync's way back counts as sync, as in the ledger."""
        found: dict[tuple[str, str], int] = {}
        for hop in self.hops:
            key = (hop.level, "sync" if hop.transfer == "back" else hop.transfer)
            found[key] = found.get(key, 0) + hop.bytes
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "seconds": self.seconds,
            "flops": self.flops,
            "exposed": {"seconds": self.exposed, "levels": self.exposed_by("level"), "phases": self.exposed_by("phase")},
            "busy": {lane: self.busy(lane) for lane in self.lanes},
            "peak": asdict(self.peak()),
            "spans": [asdict(span) for span in self.spans],
            "hops": [{**asdict(hop), "exposed": hop.exposed} for hop in self.hops],
            "memory": [asdict(each) for each in self.memory],
        }  # fmt: skip
