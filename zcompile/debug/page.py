"""report.html: one file that needs no network. The charts are bokeh's, whose JavaScript comes out of the installed package.

What the page shows is packed as JSON, compressed, beside the scripts of zcompile/debug/web, which unpack a graph's programs only when they
are looked at: a model of thousands of nodes opens at once.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from zcompile.debug import tables
from zcompile.debug.names import printable
from zcompile.debug.record import Record
from zcompile.debug.step import LOWERED, Step
from zcompile.timeline import COMPUTE, OWNERS, REASONS

SCRIPTS = ("data.js", "timeline.js", "graph.js", "programs.js", "tables.js", "main.js")
STAGES = ("joint", *LOWERED)


def page(steps: Sequence[Step]) -> str:
    """The page of these steps."""
    return render(
        [step_data(step) for step in steps], [graph_data(record) for step in steps for record in records(step)]
    )


def render(steps: Sequence[Mapping[str, Any]], graphs: Sequence[Mapping[str, Any]]) -> str:
    """The page of what `step_data` and `graph_data` say.

    Raises:
        ImportError: bokeh is not installed.
    """
    from bokeh.resources import INLINE

    from zcompile.debug.charts import charts

    web = files("zcompile.debug") / "web"
    head = {"steps": [_head(step) for step in steps], "graphs": [_head(graph) for graph in graphs], "reasons": REASONS}
    parts = {
        "title": html.escape(f"zcompile: {', '.join(dict.fromkeys(str(step['plan'][0]) for step in steps))}"),
        "style": (web / "page.css").read_text(encoding="utf-8"),
        "bokeh": "\n".join(f"<script>{source}</script>" for source in INLINE.js_raw[:1]),
        "head": _script("head", json.dumps(head)),
        "charts": _script("charts", json.dumps(charts())),
        "data": "\n".join(_packed(f"step-{i}", step) for i, step in enumerate(steps))
        + "\n".join(_packed(f"graph-{i}", graph) for i, graph in enumerate(graphs)),
        "scripts": "\n".join(f"<script>{(web / name).read_text(encoding='utf-8')}</script>" for name in SCRIPTS),
    }
    out = (web / "page.html").read_text(encoding="utf-8")
    for name, content in parts.items():
        before, _, after = out.partition(f"<!-- {name} -->")
        out = before + content + after
    return out


def _head(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs to know of a part before it unpacks it."""
    return {key: data[key] for key in ("title", "stage", "step", "number") if key in data}


def _script(name: str, text: str) -> str:
    """JSON in the page; no text of a model can end its script."""
    return f'<script type="application/json" id="{name}">{text.replace("<", chr(92) + "u003c")}</script>'


def _packed(name: str, data: Mapping[str, Any]) -> str:
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode("utf-8", "replace"), 6, mtime=0)
    return f'<script type="application/gzip" id="{name}">{base64.b64encode(packed).decode()}</script>'


def records(step: Step) -> Iterable[Record]:
    return (step.records[stage] for stage in STAGES if stage in step.records and step.records[stage].rows)


def step_data(step: Step) -> dict[str, Any]:
    """The ledger, and the timeline in columns; parameters, rows and hops by number."""
    data, timeline = step.as_dict(), step.timeline
    number_of = {row["name"]: number for number, row in enumerate(data["parameters"])}
    hop_of = {(hop.phase, hop.node): number for number, hop in enumerate(timeline.hops) if hop.node}
    wait_of = {(hop.phase, hop.wait): number for number, hop in enumerate(timeline.hops) if hop.wait}
    refresh_of = {(hop.level, hop.begin): number for number, hop in enumerate(timeline.hops) if not hop.node}
    columns: dict[str, list[Any]] = {
        key: []
        for key in ("lane", "name", "begin", "end", "kind", "phase", "row", "hop", "bytes", "wire", "parameters")
    }
    for span in timeline.spans:
        record = step.records.get(span.phase)
        hop = hop_of.get((span.phase, span.node), wait_of.get((span.phase, span.node), -1)) if span.node else -1
        if not span.node and span.lane != COMPUTE:
            hop = refresh_of.get((span.lane, span.begin), -1)
        if hop < 0 and span.kind == "wait":  # for a copy: the refresh's hop says who waits for it
            hop = next((i for i, each in enumerate(timeline.hops) if each.wait == span.node and not each.node), -1)
        columns["lane"].append(span.lane)
        columns["name"].append(printable(span.name))
        columns["begin"].append(_short(span.begin))
        columns["end"].append(_short(span.end))
        columns["kind"].append(span.kind)
        columns["phase"].append(span.phase)
        columns["row"].append(record.at(span.node) if record else -1)
        columns["hop"].append(hop)
        columns["bytes"].append(span.bytes)
        columns["wire"].append(span.wire)
        columns["parameters"].append(
            [number_of[printable(name)] for name in span.parameters if printable(name) in number_of]
        )
    title = tables.title(data) or f"compilation {step.number}"
    memory = {owner: [each.bytes.get(owner, 0) for each in timeline.memory] for owner in OWNERS}
    return {
        **data,
        "title": title,
        "number": step.number,
        "lanes": [COMPUTE, *step.plan.topology.names],
        "spans": columns,
        "owners": {"at": [_short(each.at) for each in timeline.memory], **memory},
    }


def graph_data(record: Record) -> dict[str, Any]:
    """The nodes in columns, the modules, and each pass's program as numbers of lines in one table of different lines."""
    from zcompile.debug.modules import tree

    table: dict[str, int] = {}

    def numbers(lines: Iterable[str]) -> list[int]:
        return [table.setdefault(line, len(table)) for line in lines]

    programs = [
        {
            "name": program.name,
            "notes": program.notes,
            "seconds": program.seconds,
            "lines": numbers(program.lines),
            "changes": numbers(program.changes),
        }
        for program in record.programs
    ]
    names = ("name", "kind", "operation", "module", "backward", "value", "what", "source", "code", "inputs", "transfer", "level", "wire",
             "bytes", "parameters", "partner", "users")  # fmt: skip
    return {
        "title": record.title,
        "stage": record.stage,
        "step": record.number,
        "code": record.code,
        "rows": {name: [getattr(row, name) for row in record.rows] for name in names},
        "modules": tree(record.rows),
        "programs": programs,
        "table": list(table),
    }


def _short(seconds: float) -> float:
    """To a nanosecond's hundredth: shorter numbers, smaller file."""
    return round(seconds, 11)
