"""A timeline as a trace for Perfetto and chrome://tracing: a process for each step, a thread for each lane, memory as counters.

Arrows lead from a hop to the wait for it. Times in the file are microseconds; each event's arguments have bytes, format, parameters and
what the hop was exposed for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zcompile.debug.names import printable
from zcompile.debug.step import Step
from zcompile.timeline import COMPUTE, OWNERS, Hop, Span

_MICRO = 1e6


def trace(steps: Iterable[Step]) -> dict[str, Any]:
    """The file's content."""
    events: list[dict[str, Any]] = []
    for step in steps:
        events += _events(step)
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"producer": "zcompile"}}


def _events(step: Step) -> list[dict[str, Any]]:
    timeline, process = step.timeline, step.number
    device = step.plan.topology.device.name
    title = f"zcompile: compilation {step.number}, {step.plan.plan.name} on {step.plan.topology.key}, as expected of one {device}"
    lanes = [COMPUTE, *step.plan.topology.names]
    out: list[dict[str, Any]] = [{"ph": "M", "pid": process, "name": "process_name", "args": {"name": title}}]
    for number, lane in enumerate(lanes):
        name = lane if lane == COMPUTE else f"{lane} links"
        out.append({"ph": "M", "pid": process, "tid": number, "name": "thread_name", "args": {"name": name}})
        out.append(
            {"ph": "M", "pid": process, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}}
        )
    for span in timeline.spans:
        out.append(_span(step, span, process, lanes.index(span.lane)))
    for number, hop in enumerate(timeline.hops):
        if hop.exposed > 0:
            out += _arrow(hop, process, lanes, number)
    for each in timeline.memory:
        owners = {owner: each.bytes.get(owner, 0) for owner in OWNERS}
        out.append({"ph": "C", "pid": process, "name": "memory by owner", "ts": each.at * _MICRO, "args": owners})
    return out


def _span(step: Step, span: Span, process: int, lane: int) -> dict[str, Any]:
    record = step.records.get(span.phase)
    at = record.at(span.node) if record else -1
    row = record.rows[at] if record and at >= 0 else None
    arguments: dict[str, Any] = {"phase": span.phase}
    if row is not None:
        arguments |= {"node": row.name, "what": row.what, "value": row.value, "source": row.source, "line": at}
    if span.level:
        arguments |= {"level": span.level, "format": span.wire, "bytes": span.bytes}
    if span.parameters:
        arguments["parameters"] = [printable(name) for name in span.parameters]
    return {
        "ph": "X", "pid": process, "tid": lane, "name": printable(span.name), "cat": span.kind, "ts": span.begin * _MICRO,
        "dur": span.seconds * _MICRO, "args": arguments,
    }  # fmt: skip


def _arrow(hop: Hop, process: int, lanes: list[str], number: int) -> list[dict[str, Any]]:
    common = {"pid": process, "name": "waited for", "cat": hop.transfer, "id": f"{process}.{number}"}
    start = {"ph": "s", "tid": lanes.index(hop.level), "ts": hop.begin * _MICRO, **common}
    return [start, {"ph": "f", "bp": "e", "tid": 0, "ts": hop.waited * _MICRO, **common}]
