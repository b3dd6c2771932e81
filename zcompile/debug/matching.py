"""Measured beside expected: spans of a torch.profiler trace of real steps, matched to the nodes of a dump's graphs.

While the profiler records, each run of a compiled graph leaves a span "zc graph N STAGE" in the trace. Inside of it:

* launches and waits are the calls of `_c10d_functional` operators, in the graph's order, which the compiler has pinned: the k-th call is
  the k-th node. If their number is another, none of them is matched.
* operations are matched by name and order to the ATen operators that were called; what Inductor has fused has no node of its own, and
  counts as not matched.
* a hop is under way from its launch to the end of its wait; where the trace has the device's kernel of a launch, it is that kernel's time.

Refreshes are launched and waited for outside of graphs: by level and order, where the groups post their own messages (gloo).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zcompile.debug.profile import Event, outermost
from zcompile.overlap import SPAN

GRAPH = re.compile(r"zc graph (\d+) (\w+)$")
COLLECTIVE = re.compile(r"_c10d_functional::(all_gather_into_tensor|all_to_all_single|wait_tensor)$")
_AROUND = ("##", "Torch-Compiled", "zc ")
"""Beginnings of names of spans that torch and we put around whole graphs."""
_NO_THREADS = (
    "no hop of a refresh is in the trace: they run on threads of their own, which torch.profiler records with "
    "experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True)"
)
_AHEAD = 50
"""Calls that may be passed over to find one."""
LITTLE = 0.5
"""Of the launches and waits: a smaller part that was matched is said loudly."""


@dataclass
class Measured:
    """Of one compilation: the last step in the trace.

    Attributes:
        seconds: from the beginning of the first graph to the end of the last.
        spans: columns as in the page's step data.
        hops, matched_hops: launches and waits in the graphs that ran; those of them that were found.
        operations, matched_operations: other nodes that take time; those of them that were found.
        time, matched_time: seconds inside the graphs' spans; those of them in spans that have a node.
        notes: what was not matched, and why.
    """

    number: int
    seconds: float = 0.0
    spans: dict[str, list[Any]] = field(default_factory=dict)
    hops: int = 0
    matched_hops: int = 0
    operations: int = 0
    matched_operations: int = 0
    time: float = 0.0
    matched_time: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Part of the graphs' time that was matched."""
        return min(1.0, self.matched_time / self.time) if self.time else 0.0

    @property
    def little(self) -> bool:
        """Whether the measured lanes are not to be read as this program's: by its hops, whose order is pinned. What code generation has
        fused says nothing about that; only where a graph has no hop, an operation has to be found."""
        return self.matched_hops < LITTLE * self.hops if self.hops else not self.matched_operations

    def as_dict(self) -> dict[str, Any]:
        return {
            "compilation": self.number, "seconds": self.seconds, "hops": self.hops, "matched_hops": self.matched_hops,
            "operations": self.operations, "matched_operations": self.matched_operations, "little": self.little, "time": self.time,
            "matched_time": self.matched_time, "share": self.share, "notes": self.notes, "spans": self.spans,
        }  # fmt: skip


def match(events: Sequence[Event], step: Mapping[str, Any], graphs: Mapping[str, Mapping[str, Any]]) -> Measured:
    """The last step of a compilation in the trace.

    Args:
        step, graphs: as in the page's data (`zcompile.debug.page.step_data`, and `graph_data` by stage).
    """
    found = Measured(step["number"])
    runs = _runs(events, step["number"])
    if not runs:
        found.notes.append(
            f"no run of graph {step['number']} in the trace: was it recorded in the job that the dump is of, after its first step?"
        )
        return found
    match_ = _Match(events, step, found, min(run.begin for run in runs.values()))
    for stage, run in runs.items():
        if stage in graphs:
            match_.graph(stage, run, graphs[stage]["rows"])
    if first := runs.get("forward") or runs.get("inference"):
        match_.refreshes(first)
    for column in ("begin", "end"):
        found.spans[column] = [round(at - match_.start, 9) for at in found.spans[column]]
    found.seconds = max(run.end for run in runs.values()) - match_.start
    return found


def _runs(events: Iterable[Event], number: int) -> dict[str, Event]:
    """stage -> its span in the last step that has all the stages that there are."""
    runs: dict[str, list[Event]] = {}
    for event in events:
        graph = GRAPH.match(event.name)
        if graph and int(graph[1]) == number:
            runs.setdefault(graph[2], []).append(event)
    if "backward" in runs and "forward" in runs:
        last = runs["backward"][-1]
        before = [run for run in runs["forward"] if run.end <= last.begin]
        if before:
            return {"forward": before[-1], "backward": last}
    return {stage: each[-1] for stage, each in runs.items()}


class _Match:
    def __init__(self, events: Sequence[Event], step: Mapping[str, Any], found: Measured, start: float) -> None:
        self.events, self.step, self.found, self.start = events, step, found, start
        self.kernels = {event.link: event for event in events if event.kind == "kernel" and event.link is not None}
        self.hop_of = {
            (hop["phase"], hop["launch"]): number for number, hop in enumerate(step["hops"]) if hop["launch"] >= 0
        }
        self.parameter_of = {row["name"]: number for number, row in enumerate(step["parameters"])}
        names = ("lane", "name", "begin", "end", "kind", "phase", "row", "hop", "bytes", "wire", "parameters")
        found.spans = {name: [] for name in names}

    def graph(self, stage: str, run: Event, rows: Mapping[str, Any]) -> None:
        inside = outermost(
            [
                e
                for e in self.events
                if e.kind == "cpu_op"
                and not e.name.startswith(_AROUND)
                and e.thread == run.thread
                and run.begin <= e.begin
                and e.end <= run.end
            ]
        )
        calls = [event for event in inside if COLLECTIVE.match(event.name)]
        hops = [
            row
            for row, kind in enumerate(rows["kind"])
            if kind in ("gather", "reduce", "sync", "back", "wait")
            and rows["operation"][row] != "zcompile_kernels.peer_gather"
        ]
        self.found.time += run.end - run.begin
        self._hops(stage, rows, hops, calls)
        self._operations(stage, rows, [event for event in inside if not COLLECTIVE.match(event.name)])

    def _hops(self, stage: str, rows: Mapping[str, Any], hops: list[int], calls: list[Event]) -> None:
        self.found.hops += len(hops)
        kinds = [
            "wait_tensor" if rows["kind"][row] == "wait" else rows["operation"][row].rpartition(".")[2] for row in hops
        ]
        called = [COLLECTIVE.match(event.name)[1] for event in calls]  # type: ignore[index]
        if kinds != called:
            self.found.notes.append(
                f"{stage}: {len(kinds)} launches and waits in the graph, {len(called)} in the trace, or in another order: none is matched"
            )
            return
        at = dict(zip(hops, calls, strict=True))
        self.found.matched_hops += len(hops)
        for row, call in at.items():
            self.found.matched_time += call.end - call.begin
            hop = self.hop_of.get((stage, row), self.hop_of.get((stage, rows["partner"][row]), -1))
            if rows["kind"][row] == "wait":
                self._add("compute", f"wait: {rows['name'][row]}", call, "wait", stage, row, hop, rows)
            elif (end := at.get(rows["partner"][row])) is not None:
                under_way = self.kernels.get(call.link) or Event(call.name, "", call.thread, call.begin, end.end)
                self._add(rows["level"][row], rows["name"][row], under_way, rows["kind"][row], stage, row, hop, rows)

    def _operations(self, stage: str, rows: Mapping[str, Any], events: list[Event]) -> None:
        """By name and order; a node may be called what it decomposes into, so only equal names count."""
        nodes = [
            row
            for row, kind in enumerate(rows["kind"])
            if kind in ("compute", "quantize") and rows["operation"][row] != "getitem"
        ]
        names = [rows["operation"][row].rpartition(".")[2] for row in nodes]
        called = [event.name.rpartition("::")[2] for event in events]
        self.found.operations += len(nodes)
        pairs = [(nodes[i], events[j]) for i, j in _in_order(names, called)]
        self.found.matched_operations += len(pairs)
        taken = {id(event) for _, event in pairs}
        for row, event in pairs:
            self.found.matched_time += event.end - event.begin
            self._add(
                "compute",
                rows["operation"][row],
                self.kernels.get(event.link, event),
                rows["kind"][row],
                stage,
                row,
                -1,
                rows,
            )
        for event in events:
            if id(event) not in taken:
                self._add("compute", event.name, event, "unmatched", stage, -1, -1, None)

    def refreshes(self, forward: Event) -> None:
        """Those of the step: launched since the backward before, matched by level and order."""
        before = max(
            (
                e.end
                for e in self.events
                if (g := GRAPH.match(e.name)) and g[2] == "backward" and e.end <= forward.begin
            ),
            default=0.0,
        )
        launches: dict[str, list[tuple[Event, str]]] = {}
        ends: dict[str, float] = {}
        for event in self.events:
            hop_ = SPAN.match(event.name)
            if hop_ and hop_[3] == "refresh" and before <= event.begin <= forward.end:
                if hop_[1] == "launch":
                    launches.setdefault(hop_[2], []).append((event, hop_[4]))
                else:
                    ends[hop_[4]] = event.end
        self.start = min([self.start, *(event.begin for each in launches.values() for event, _ in each)])
        expected: dict[str, list[int]] = {}
        for number, hop in enumerate(self.step["hops"]):
            if hop["phase"] == "refresh":
                expected.setdefault(hop["level"], []).append(number)
        if expected and not launches:
            self.found.notes.append(_NO_THREADS)
        for level, hops in expected.items():
            seen = launches.get(level, [])
            if len(seen) != len(hops):
                if seen:
                    self.found.notes.append(
                        f"refresh over {level}: {len(hops)} hops expected, {len(seen)} in the trace: none is matched"
                    )
                continue
            for hop, (launch, key) in zip(hops, seen, strict=True):
                span = Event(launch.name, "", launch.thread, launch.begin, ends.get(key, launch.end))
                self._add(
                    level,
                    f"refresh {self.step['hops'][hop]['parameters'][0]}",
                    span,
                    "refresh",
                    "refresh",
                    -1,
                    hop,
                    None,
                )

    def _add(
        self,
        lane: str,
        name: str,
        event: Event,
        kind: str,
        phase: str,
        row: int,
        hop: int,
        rows: Mapping[str, Any] | None,
    ) -> None:
        carried = self.step["hops"][hop]["parameters"] if hop >= 0 else rows["parameters"][row] if rows else []
        values = (
            lane, name, event.begin, event.end, kind, phase, row, hop, self.step["hops"][hop]["bytes"] if hop >= 0 else 0,
            self.step["hops"][hop]["wire"] if hop >= 0 else "", [self.parameter_of[each] for each in carried if each in self.parameter_of],
        )  # fmt: skip
        for column, value in zip(self.found.spans.values(), values, strict=True):
            column.append(value)


def _in_order(names: Sequence[str], called: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of equal names, in order: each takes the next call of its name, unless that is far ahead of where the others are."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(called):
        places.setdefault(name, []).append(number)
    found, at = [], 0
    for number, name in enumerate(names):
        own = places.get(name, [])
        next_ = bisect.bisect_left(own, at)
        if next_ < len(own) and own[next_] - at <= _AHEAD:
            found.append((number, own[next_]))
            at = own[next_] + 1
    return found
