"""What `zcompile bench` found, as a table and as a bar chart; the JSON is the result itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zcompile.bench.systems import label


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Adds to `result` one row per system: over its repetitions the mean of the mean step, the spread, the ratio to the best.

    result["systems"]: label -> {"seconds": mean, "spread": [lowest, highest repetition], "ratio": of the fastest system's seconds,
    "tokens_per_second", "tokens_per_second_per_rank", "cpu_seconds" and "page_faults" (all ranks, a step), "peak_bytes" and "rest_bytes"
    (in a step and between two, of the rank with the most), "bytes" (level -> a step, all ranks) and "bytes_at" ("interfaces", "process
    groups", "": unknown), "messages" (level ->
    {"messages", "bytes", "mean_bytes", "peer_read_bytes"} of one step, all ranks), "loss" (after the last step), "loss_difference" (to the
    reference's, as a part of it), "exposed" (of zcompile's: level or "refresh" -> seconds of rank 0 in waits, in a step under the
    profiler; None: not known), "setup_seconds", "runs", "error" (of a system that did not run)}; result["fastest"];
    result["reference"]: whose losses the others are compared with, `ddp` or else the first that ran.
    """
    rows: dict[str, Any] = {}
    for name in result["order"]:
        runs = [run for run in result["runs"] if run["system"] == name and "error" not in run]
        failures = [run["error"] for run in result["runs"] if run["system"] == name and "error" in run]
        if not runs:
            rows[label(name)] = {"runs": 0, "error": failures[0] if failures else "did not run"}
            continue
        seconds = [run["seconds"] for run in runs]
        mean = statistics.fmean(seconds)
        rows[label(name)] = {
            "seconds": mean,
            "spread": [min(seconds), max(seconds)],
            "tokens_per_second": result["tokens_per_step"] / mean,
            "tokens_per_second_per_rank": result["tokens_per_step"] / mean / result["ranks"],
            "cpu_seconds": statistics.fmean(run["cpu_seconds"] for run in runs),
            "page_faults": statistics.fmean(run["page_faults"] for run in runs),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "rest_bytes": max(run["rest_bytes"] for run in runs),
            "bytes": {level: statistics.fmean(run["bytes"][level] for run in runs) for level in runs[0]["bytes"]},
            "bytes_at": runs[0]["bytes_at"],
            "messages": runs[-1]["messages"],
            "exposed": {level: _mean(run["exposed"][level] for run in runs) for level in runs[0]["exposed"]},
            "loss": runs[-1]["losses"][-1],
            "setup_seconds": statistics.fmean(run["setup_seconds"] for run in runs),
            "runs": len(runs),
            **({"error": failures[0]} if failures else {}),
        }
    timed = {name: row["seconds"] for name, row in rows.items() if "seconds" in row}
    best = min(timed.values(), default=0.0)
    for name, seconds in timed.items():
        rows[name]["ratio"] = seconds / best
    reference = "ddp" if "ddp" in timed else next(iter(timed), "")
    result["reference"] = reference or None
    for name in timed:
        there = rows[reference]["loss"]
        rows[name]["loss_difference"] = (rows[name]["loss"] - there) / abs(there) if there else 0.0
    result["systems"] = rows
    result["fastest"] = min(timed, key=lambda name: timed[name]) if timed else None
    return result


def _mean(values: Iterable[float | None]) -> float | None:
    """None if one is not known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if len(known) == len(found) else None


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence: who is fastest, and by how much, whoever it is; with what the spread allows to say."""
    rows, first = result["systems"], result["fastest"]
    others = {name: row for name, row in rows.items() if "seconds" in row and name != first}
    if first is None:
        return "no system ran"
    if not others:
        return f"{first} ran alone"
    second = min(others, key=lambda name: others[name]["seconds"])
    lead = others[second]["seconds"] / rows[first]["seconds"]
    apart = others[second]["spread"][0] > rows[first]["spread"][1]
    doubt = "" if apart else "; their spreads overlap: take it as a draw"
    if rows[first]["runs"] == 1:
        doubt = "; one run each, so nothing is known of the spread"
    return f"{first} is fastest: {lead:.2f} times as fast as {second}{doubt}"


def losses(result: Mapping[str, Any]) -> str:
    """One sentence: whose loss differs from the reference's by more than the tolerance, after the last step."""
    rows, reference, limit = result["systems"], result["reference"], result["loss_tolerance"]
    others = {
        name: row["loss_difference"] for name, row in rows.items() if "loss_difference" in row and name != reference
    }
    if not others:
        return "no losses to compare"
    apart = [
        f"{name} ({100 * part:+.2f} %)" if math.isfinite(part) else f"{name} (not a number)"
        for name, part in others.items()
        if not abs(part) <= limit
    ]
    if apart:
        return f"losses after the last step differ from that of {reference} by more than {100 * limit:g} %: {', '.join(apart)}"
    return f"losses after the last step are within {100 * limit:g} % of that of {reference}"


def _messages(row: Mapping[str, Any]) -> str:
    sizes = [
        f"{level} {found['messages']} of {found['mean_bytes'] / 1e3:.1f} kB"
        + (f" and {found['peer_read_bytes'] / 1e6:.1f} MB read in memory" if found["peer_read_bytes"] else "")
        for level, found in row["messages"].items()
        if found["messages"] or found["peer_read_bytes"]
    ]
    return ", ".join(sizes) or "none"


def show(result: Mapping[str, Any], console: Console) -> None:
    levels = next((list(row["bytes"]) for row in result["systems"].values() if row.get("bytes")), [])
    table = Table(title=_title(result), title_justify="left")
    table.add_column("system")
    for column in (
        "step s",
        "spread",
        "x",
        "tokens/s",
        "a rank",
        *(f"{level} MB" for level in levels),
        "rest MiB",
        "peak MiB",
        "CPU s",
        "loss",
    ):
        table.add_column(column, justify="right")
    for name, row in sorted(result["systems"].items(), key=lambda item: item[1].get("seconds", float("inf"))):
        if "seconds" not in row:
            table.add_row(name, "did not run", *[""] * (len(table.columns) - 2))
            continue
        low, high = row["spread"]
        table.add_row(
            name, f"{row['seconds']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['ratio']:.2f}", f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second_per_rank']:.0f}",
            *(f"{row['bytes'][level] / 1e6:.1f}" if level in row["bytes"] else "?" for level in levels), f"{row['rest_bytes'] / 2**20:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['cpu_seconds']:.2f}", f"{row['loss']:.4f}",
        )  # fmt: skip
    console.print(table)
    for name, row in result["systems"].items():
        if "error" in row:
            console.print(f"{name}: {row['error']}", style="red", markup=False)
    where = {row["bytes_at"] for row in result["systems"].values() if row.get("bytes_at")}
    if where == {"interfaces"}:
        console.print("bytes: of a step, at the interfaces of all ranks, headers included", markup=False)
    elif where:
        console.print(
            "bytes: of a step, received by all ranks as their process groups are asked, without headers", markup=False
        )
    for name, row in result["systems"].items():
        if row.get("messages"):
            console.print(f"{name} messages of a step, all ranks: {_messages(row)}", markup=False, highlight=False)
    for name, row in result["systems"].items():
        if row.get("exposed"):
            console.print(f"{name} {waiting(row['exposed'])}", markup=False, highlight=False)
    console.print(losses(result), markup=False)
    console.print(verdict(result), markup=False)


def waiting(exposed: Mapping[str, float | None]) -> str:
    """A row's "exposed" in words."""
    if None in exposed.values():
        return "waits: unknown, as this backend's works leave no trace on the host"
    waits = ", ".join(f"{level} {seconds:.3f} s" for level, seconds in exposed.items())
    return f"waits for {waits} (rank 0, a step under torch's profiler)"


def _title(result: Mapping[str, Any]) -> str:
    return (
        f"{result['model']}, {result['parameters']:,} parameters, {result['topology']} ({result['network']}), batch {result['batch']} "
        f"a rank, {result['steps']} steps, {result['repetitions']} run(s) each, interleaved"
    )


def chart(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds of a step by system, spread as whiskers, one panel per result. The format is that of the name (.png, .svg).

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("--chart needs matplotlib: pip install 'zcompile[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(6.5 * len(results), 4), squeeze=False)
    for panel, result in zip(panels[0], results, strict=True):
        rows = [(name, row) for name, row in result["systems"].items() if "seconds" in row]
        rows.sort(key=lambda item: -item[1]["seconds"])
        seconds = [row["seconds"] for _, row in rows]
        below = [row["seconds"] - row["spread"][0] for _, row in rows]
        above = [row["spread"][1] - row["seconds"] for _, row in rows]
        ours = ["tab:orange" if name.startswith("zc") else "tab:blue" for name, _ in rows]
        panel.barh([name for name, _ in rows], seconds, xerr=[below, above], color=ours, capsize=3)
        panel.set_xlabel("seconds a step (mean; whiskers: lowest and highest run)")
        panel.set_title(f"{result['model']}, {result['network']}, batch {result['batch']} a rank", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
