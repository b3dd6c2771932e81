"""The ledger as tables: levels, memory, hops that were not hidden and why, parameters. For terminals, and for ledger.txt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from zcompile.cost import LEDGER_TRANSFERS
from zcompile.timeline import OWNERS, REASONS
from zcompile.wording import fold, size

ALL = 1_000_000
SORTS = ("exposed", "bytes", "name")


def seconds(value: float) -> str:
    """For people: "3.2 us", "41 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            amount = value / scale
            return (
                f"{amount:.0f} {unit}"
                if amount >= 100
                else f"{amount:.1f} {unit}"
                if amount >= 10
                else f"{amount:.2f} {unit}"
            )
    raise AssertionError


def ledger(step: dict[str, Any], most: int = 20, sort: str = "exposed") -> Group:
    """All tables of one step (`Step.as_dict`). most: hops and parameters that are shown. sort: one of SORTS, of the parameters."""
    parts: list[RenderableType] = [_heading(step), levels(step), memory(step)]
    exposed = [hop for hop in step["hops"] if hop["exposed"] > 0]
    if exposed:
        parts.append(why(exposed, most, step["runs"]))
    parts.append(parameters(step, most, sort))
    return Group(*(part for each in parts for part in (each, "")))


def as_text(found: Sequence[dict[str, Any]]) -> str:
    """Every table of every step, whole, for a file."""
    out = io.StringIO()
    console = Console(file=out, width=200, color_system=None, highlight=False)
    for step in found:
        console.print(ledger(step, ALL))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _heading(step: dict[str, Any]) -> Text:
    share = step["exposed"] / step["seconds"] if step["seconds"] else 0.0
    plan = step["plan"][0]
    graphs = title(step)
    return Text(
        f"{plan}\n{graphs}: {seconds(step['seconds'])} by the data of one {step['device']}, "
        f"{seconds(step['computing'])} computing, {seconds(step['exposed'])} ({100 * share:.0f} %) waiting for transfers"
    )


def title(step: dict[str, Any]) -> str:
    """Of the graphs of one compilation: what they are called, and how often they run in a step."""
    return ", ".join(step["graphs"]) + (f", {step['runs']} times" if step["runs"] > 1 else "")


def together(steps: Sequence[dict[str, Any]]) -> Table:
    """Bytes by level of all compilations: of the whole step."""
    table = _table(
        f"the step, {len(steps)} compilations: bytes that one rank receives", "level", *LEDGER_TRANSFERS, "waited for"
    )
    for rows in zip(*(step["levels"] for step in steps), strict=True):
        received = (sum(row["bytes"][transfer] for row in rows) for transfer in LEDGER_TRANSFERS)
        exposed = seconds(sum(row["exposed"] for row in rows))
        table.add_row(rows[0]["level"], *(size(amount) if amount else "-" for amount in received), exposed)
    return table


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    return table


def levels(step: dict[str, Any]) -> Table:
    table = _table(
        "levels: bytes that one rank receives", "level", "ranks", "messages", *LEDGER_TRANSFERS, "links busy", "of the step", "waited for"
    )  # fmt: skip
    for row in step["levels"]:
        received = [size(row["bytes"][transfer]) if row["bytes"][transfer] else "-" for transfer in LEDGER_TRANSFERS]
        busy, share, exposed = seconds(row["busy"]), f"{100 * row['share']:.0f} %", seconds(row["exposed"])
        table.add_row(row["level"], str(row["size"]), str(row["messages"]), *received, busy, share, exposed)
    return table


def memory(step: dict[str, Any]) -> Table:
    peak = step["memory"]
    table = _table(f"memory at its peak, {seconds(peak['at'])} into the step", *OWNERS, "together", left=0)
    table.add_row(*(size(peak["owners"].get(owner, 0)) for owner in OWNERS), size(peak["peak"]))
    return table


def why(hops: Sequence[dict[str, Any]], most: int = 20, runs: int = 1) -> Group:
    """The hops that were not hidden, the longest waiting first, and what the reasons mean."""
    ordered = sorted(hops, key=lambda hop: (-hop["exposed"], hop["number"]))
    total = sum(hop["exposed"] for hop in hops)
    where = f" in the first of {runs} runs" if runs > 1 else ""
    title = f"{len(hops)} hops that were not hidden{where}, {seconds(total)} together" + (
        f"; the longest {most}" if most < len(hops) else ""
    )
    table = _table(
        title, "hop", "phase", "level", "format", "bytes", "launch", "wait", "exposed", "hidden", "why", left=4
    )
    for hop in ordered[:most]:
        reason = hop["reason"] + (f": {hop['cause']}" if hop["cause"] else "")
        places = [str(at) if at >= 0 else "" for at in (hop["launch"], hop["wait"])]
        what = f"{hop['transfer']} {fold(hop['parameters'])}"
        table.add_row(
            escape(what if len(what) <= 64 else what[:61] + "..."), hop["phase"], hop["level"], hop["wire"], size(hop["bytes"]), *places,
            seconds(hop["exposed"]), seconds(hop["hidden"]), Text(reason),
        )  # fmt: skip
    table.columns[-1].justify = "left"
    met = [reason for reason in REASONS if any(hop["reason"] == reason for hop in hops)]
    return Group(table, *(Text(f"  {reason}: {REASONS[reason]}", style="dim") for reason in met))


def parameters(step: dict[str, Any], most: int = 20, sort: str = "exposed") -> Table:
    keys: dict[str, Any] = {
        "exposed": lambda row: (-row["exposed"], -row["total"], row["name"]),
        "bytes": lambda row: (-row["total"], row["name"]),
        "name": lambda row: row["name"],
    }
    rows = sorted(step["parameters"], key=keys[sort])
    names = [level["level"] for level in step["levels"]]
    title = f"{len(rows)} parameters" + (f"; the first {most} by {sort}" if most < len(rows) else f", by {sort}")
    table = _table(
        title,
        "parameter",
        "shape",
        "W",
        "G",
        "O",
        "in backward",
        *(f"{name} B" for name in names),
        "waited for",
        "why",
        left=6,
    )
    table.columns[-1].justify = "left"
    for row in rows[:most]:
        received = [sum(by.get(name, 0) for by in row["bytes"].values()) for name in names]
        shape = "x".join(map(str, row["shape"])) or "scalar"
        places = (row["weights"], row["gradients"], row["optimizer"])
        table.add_row(
            escape(row["name"]), f"{shape} {row['compute']}", *places, row["backward"], *(size(b) if b else "-" for b in received),
            seconds(row["exposed"]) if row["exposed"] else "-", row["reason"],
        )  # fmt: skip
    return table
