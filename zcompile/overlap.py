"""How much of the transfers was hidden: read from a profiler's trace of real steps, beside what the schedule expected.

While torch's profiler records, each hop leaves two spans in the trace, `zc launch LEVEL TRANSFER NUMBER` and `zc wait LEVEL TRANSFER
NUMBER` (they show in Chrome's and Perfetto's view too). A hop is *under way* from its launch to the end of its wait; *exposed* is the time
in that wait, *hidden* the rest. Hops of one level may be under way together: the level is *busy* while one of them is, which counts that
time once. A hop that arrives before anybody waits for it is under way until then, so busy is at least the time in which its link works.

Hops of a refresh are waited for on threads of their own: what a forward waits of them is the time in a `wait_tensor` that is no hop's,
which is exposed time of the refresh as a whole.

Spans of waits come from groups that the host waits for (gloo). On others (NCCL, RCCL) it waits for nothing, and there are none: then
nobody knows which wait is whose, `matched` is 0 and no time is anybody's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SPAN = re.compile(r"zc (launch|wait) (\S+) (\S+) (\d+)$")
WAIT = "_c10d_functional::wait_tensor"


@dataclass
class Lane:
    """Seconds of one level's hops of one transfer, and their number. spans: (begin, end) of each hop; under_way: their sum."""

    hops: int = 0
    under_way: float = 0.0
    exposed: float = 0.0
    spans: list[tuple[float, float]] = field(default_factory=list, repr=False)

    @property
    def hidden(self) -> float:
        return self.under_way - self.exposed

    @property
    def busy(self) -> float:
        """Seconds in which at least one hop is under way."""
        total, reached = 0.0, float("-inf")
        for begin, end in sorted(self.spans):
            total += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return total

    def as_dict(self) -> dict[str, Any]:
        return {
            "hops": self.hops, "busy": self.busy, "under_way": self.under_way, "hidden": self.hidden, "exposed": self.exposed
        }  # fmt: skip


@dataclass
class Overlap:
    """lanes: by (level, transfer). refresh_exposed: seconds in waits for copies. waits: seconds in all waits of graphs; matched: part of
    these that belong to hops of known lanes or to a refresh (1 where there are no waits, 0 where no hop is known)."""

    lanes: dict[tuple[str, str], Lane] = field(default_factory=dict)
    refresh_exposed: float = 0.0
    waits: float = 0.0
    matched: float = 1.0

    def level(self, name: str) -> Lane:
        """The sum over a level's transfers; those of a refresh, whose waits are not a graph's, are left out of exposed time."""
        total = Lane()
        for (level, transfer), lane in self.lanes.items():
            if level == name:
                total.hops += lane.hops
                total.under_way += lane.under_way
                total.exposed += 0.0 if transfer in ("refresh", "barrier") else lane.exposed
                total.spans += lane.spans
        return total

    @property
    def known(self) -> bool:
        """False where there were waits and no hop's was seen, so that times of levels mean nothing."""
        return bool(self.lanes) or not self.waits

    def as_dict(self) -> dict[str, Any]:
        rows = {f"{level} {transfer}": lane.as_dict() for (level, transfer), lane in self.lanes.items()}
        levels = {level: self.level(level).as_dict() for level, _ in self.lanes}
        return {
            "lanes": rows, "levels": levels, "refresh_exposed": self.refresh_exposed, "waits": self.waits, "matched": self.matched
        }  # fmt: skip


def measured(profile: Any) -> Overlap:
    """What a `torch.profiler.profile` that has ended saw of this rank's hops. Seconds over everything that it recorded."""
    return from_events(
        (event.name, event.thread, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profile.events()
        if event.name == WAIT or event.name.startswith("zc ")
    )


def from_events(events: Iterable[tuple[str, int, float, float]]) -> Overlap:
    """The same from (name, thread, start, end) in seconds."""
    found = Overlap()
    launches: dict[str, float] = {}
    waits: list[tuple[int, float, float]] = []
    hops: list[tuple[str, str, str, int, float, float]] = []
    for name, thread, start, end in events:
        match = SPAN.match(name)
        if name == WAIT:
            waits.append((thread, start, end))
        elif match and match[1] == "launch":
            launches[match[4]] = start
        elif match:
            hops.append((match[2], match[3], match[4], thread, start, end))
    for level, transfer, number, _, start, end in hops:
        lane = found.lanes.setdefault((level, transfer), Lane())
        lane.hops += 1
        lane.exposed += end - start
        begin = min(start, launches.get(number, start))
        lane.under_way += end - begin
        lane.spans.append((begin, end))
    inside = 0.0
    for thread, start, end in waits:
        found.waits += end - start
        own = [(a, b) for _, _, _, other, a, b in hops if other == thread and start <= a and b <= end]
        inside += sum(b - a for a, b in own)
        if not own and found.lanes and _on_a_graphs_thread(thread, hops):
            found.refresh_exposed += end - start
    found.matched = min(1.0, (inside + found.refresh_exposed) / found.waits) if found.waits else 1.0
    return found


def _on_a_graphs_thread(thread: int, hops: list[tuple[str, str, str, int, float, float]]) -> bool:
    """Threads that only run a refresh's hops wait for nothing else."""
    transfers = {transfer for _, transfer, _, other, _, _ in hops if other == thread}
    return not transfers or not transfers <= {"refresh", "barrier"}
