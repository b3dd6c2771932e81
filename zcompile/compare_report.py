"""The report of `zcompile bytes`: targets and how they were met, and tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from zcompile.cost import LEDGER_TRANSFERS

WIDTH = 132
"""Columns of the printed report, wherever it is printed."""

BASE = "zero_topo, all bf16"
"""The native plan that quantised ones are compared with."""
PAPER = "paper"
"""The plan that says which parameters are the quantised ones."""

PARTS = {"gathers": ("gather",), "reductions": ("reduce", "sync"), "refresh": ("refresh",)}
TARGETS = ((PAPER, "gathers", 0.52), (PAPER, "reductions", 0.27), ("paper, int4-delta", "refresh", 0.27))
"""(plan, part, at most): bytes of the quantised parameters over all levels, of those under BASE."""

ZERO3 = ("zero3", "zero3, all bf16")
OUTERMOST = (
    (PAPER, "paper, embedding too", 0.26),
    ("paper, int4-delta", "int4-delta, embedding too", 0.18),
)
"""(plan, its variant that quantises the embedding too, at most): bytes of the whole model over the outermost level, of those of ZERO3."""


def quantised_bytes(row: Mapping[str, Any], part: str) -> int:
    """Bytes of the quantised parameters that one rank receives over all levels."""
    levels = row["levels_of_quantised_parameters"].values()
    return sum(transfers[transfer] for transfers in levels for transfer in PARTS[part])


def received(row: Mapping[str, Any], level: str, *, quantised: bool = False) -> int:
    """Bytes that one rank receives over a level in all transfers; `quantised`: of the quantised parameters alone."""
    if quantised:
        return sum(row["levels_of_quantised_parameters"][level].values())
    return sum(columns["counted"] for columns in row["levels"][level].values())


def checks(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target: {"name", "value", "target", "pass", "note"}. `pass` is None where it does not apply; the note says why, and why a
    target was missed. Targets whose plans were not run are left out."""
    rows, out = result["rows"], []
    for plan, part, target in TARGETS:
        if plan in rows:
            base = quantised_bytes(rows[BASE], part)
            value = quantised_bytes(rows[plan], part) / base if base else None
            name = f"{plan}: {part} of the quantised parameters / {BASE}"
            out.append(_check(name, value, target, "" if base else f"{BASE} sends none on this topology"))
    level = result["levels"][-1]
    for plan, variant, target in OUTERMOST:
        for which in (plan, variant):
            for zero3 in ZERO3:
                if which in rows and zero3 in rows:
                    out.append(_outermost(result, level, which, variant, zero3, target))
    return out


def _outermost(
    result: Mapping[str, Any], level: str, plan: str, variant: str, zero3: str, target: float
) -> dict[str, Any]:
    rows = result["rows"]
    value = received(rows[plan], level) / received(rows[zero3], level)
    name = f"{plan}: {level}, whole model / {zero3}"
    if result["micro_batches"] != 1:
        return _check(name, value, None, f"the target of {target} is for one micro-batch")
    note = ""
    if value > target:
        native = 1 - rows[plan]["quantised_parameters"] / result["parameters"]
        note = f"misses by {value - target:.4f}; {native:.1%} of the parameters stay native"
        if plan != variant:
            alone = received(rows[plan], level, quantised=True)
            note += (
                f", most of them the embedding: {1 - alone / received(rows[plan], level):.1%} of these bytes (fp32 gradients included). "
                f"Over the quantised parameters alone it is {alone / received(rows[zero3], level, quantised=True):.4f}"
            )
        if plan != variant and variant in rows:
            note += f", with the embedding quantised too {received(rows[variant], level) / received(rows[zero3], level):.4f}"
    return _check(name, value, target, note)


def _check(name: str, value: float | None, target: float | None, note: str) -> dict[str, Any]:
    passed = None if value is None or target is None else value <= target
    return {"name": name, "value": value, "target": target, "pass": passed, "note": note}


def show(result: Mapping[str, Any], console: Console) -> None:
    """For people: by level and transfer, sums over the ranks beside the peers, the peers' collectives, ratios, targets, faults."""
    for table in (_by_transfer, _sums, _collectives, _ratios, _checks):
        console.print(table(result))
    for check in result["checks"]:
        if check["note"]:
            console.print(f"{check['name']}: {check['note']}\n", markup=False, highlight=False)
    for name, row in result["rows"].items():
        for fault in row["faults"]:
            console.print(f"{name}: {fault}", style="red", markup=False)
    console.print(_summary(result), markup=False, highlight=False)


def _by_transfer(result: Mapping[str, Any]) -> Table:
    out = _table(
        "MB that one rank receives in a step (predicted = compiled = counted)",
        "plan",
        "level",
        *LEDGER_TRANSFERS,
        "all",
    )
    for name, row in result["rows"].items():
        for level in result["levels"]:
            cells = [_mb(row["levels"][level][transfer]["counted"]) for transfer in LEDGER_TRANSFERS]
            first, last = level == result["levels"][0], level == result["levels"][-1]
            out.add_row(name if first else "", level, *cells, _mb(received(row, level)), end_section=last)
    return out


def _sums(result: Mapping[str, Any]) -> Table:
    levels, rows = result["levels"], result["rows"]
    last, zero3 = levels[-1], [name for name in ZERO3 if name in rows]
    heads = [f"{last} / {name}" for name in zero3]
    out = _table("MB that all ranks together receive in a step", "", *levels, f"{last}, busiest rank", *heads)
    for name, row in rows.items():
        amounts = row["sum_over_ranks"]
        ratios = [f"{amounts[last] / rows[other]['sum_over_ranks'][last]:.3f}" for other in zero3]
        busiest = received(row, last)
        out.add_row(
            name, *(_mb(amounts[level]) for level in levels), _mb(busiest), *ratios, end_section=name == list(rows)[-1]
        )
    for name, found in result["peers"].items():
        amounts = {level: found["levels"][level]["sum"] for level in levels}
        ratios = [f"{amounts[last] / rows[other]['sum_over_ranks'][last]:.3f}" for other in zero3]
        busiest = found["levels"][last]["most_on_one_rank"]
        out.add_row(f"{name} *", *(_mb(amounts[level]) for level in levels), _mb(busiest), *ratios)
    out.caption = (
        "* a flat ring in rank order: a rank's bytes belong to the outermost level between it and the rank before it"
    )
    return out


def _collectives(result: Mapping[str, Any]) -> Table:
    out = _table("MB that one rank receives in a step, by collective of the peers", "", "collective", "calls", "MB")
    for name, found in result["peers"].items():
        for collective, row in found["collectives"].items():
            low, high = min(row["received_by_rank"]), max(row["received_by_rank"])
            out.add_row(name, collective, str(row["calls"]), _mb(low) if low == high else f"{_mb(low)} to {_mb(high)}")
    return out


def _ratios(result: Mapping[str, Any]) -> Table:
    rows = result["rows"]
    share = f"{result['quantised_parameters']:,} of {result['parameters']:,} parameters are quantised"
    out = _table(f"{share}: their bytes over all levels, / {BASE}", "plan", *PARTS)
    for name, row in rows.items():
        if row["placements"] == rows[BASE]["placements"]:
            pairs = [(quantised_bytes(row, part), quantised_bytes(rows[BASE], part)) for part in PARTS]
            out.add_row(name, *(f"{mine / base:.4f}" if base else "-" for mine, base in pairs))
    return out


def _checks(result: Mapping[str, Any]) -> Table:
    out = _table("Targets", "", "value", "at most", "")
    for check in result["checks"]:
        said = {True: "[green]pass", False: "[red]misses", None: "-"}[check["pass"]]
        value, target = (f"{x:.4f}" if x is not None else "-" for x in (check["value"], check["target"]))
        out.add_row(check["name"], value, target, said)
    return out


def _summary(result: Mapping[str, Any]) -> str:
    """One line."""
    consistent = sum(not row["faults"] for row in result["rows"].values())
    judged = [check["pass"] for check in result["checks"] if check["pass"] is not None]
    return (
        f"{consistent} of {len(result['rows'])} rows are consistent, {sum(judged)} of {len(judged)} targets are met; "
        f"{result['parameters']:,} parameters on {result['topology']}, {result['micro_batches']} micro-batch"
        f"{'es' * (result['micro_batches'] > 1)} per step, {result['seconds']:.0f} s"
    )


def _table(title: str, *heads: str) -> Table:
    out = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
    )
    for number, head in enumerate(heads):
        out.add_column(head, justify="left" if number == 0 or head in ("level", "collective", "") else "right")
    return out


def _mb(amount: int) -> str:
    return f"{amount / 1e6:.3f}" if amount else "-"
