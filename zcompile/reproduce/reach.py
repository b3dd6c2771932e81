"""What zcompile's best plan is predicted to give from one node to the whole of Frontier, beside what others do there.

Presets and best plans are simulated (zcompile.planner): skeletons through the schedule pass. `compute only` is the limit: the same
operations without a transfer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zcompile.plan import Plan
from zcompile.planner import plots
from zcompile.planner.search import PAPER, NothingFits, Request, search
from zcompile.planner.skeleton import Skeleton
from zcompile.planner.step import Result, of_skeleton, play
from zcompile.planner.workload import of_text
from zcompile.reproduce.report import Report
from zcompile.topology import Topology

MACHINES = {
    8: "frontier:1", 32: "frontier:4", 128: "frontier:16", 384: "frontier:48", 1024: "frontier:128", 8192: "frontier:128x8",
    75_264: "frontier:64x147",
}  # fmt: skip
"""GCDs -> topology: beyond a dragonfly group of 128 nodes in four levels. 75,264 are 9,408 nodes, which groups of 128 do not divide."""

PRESETS = {
    "ZeRO-3": ("zero3", {}),
    "ZeRO++": ("zeropp", {"wire": "paper"}),
    "HSDP": ("hsdp", {}),
    "three levels": ("zero_topo", {"wire": "paper"}),
}
SAMPLES = {"gpt-neox-20b": 2, "gpt-175b": 1}
"""Micro-batch by model: what fits beside the three-level preset's state."""


def run(model: str = "gpt-neox-20b", micro_batch: int = 0, allowed: tuple[str, ...] = PAPER, plot: str = "") -> Report:
    """The curves of one model. allowed: formats of the best plan."""
    workload = of_text(
        model, micro_batch=micro_batch or SAMPLES.get(model, 1), compute_dtype=torch.bfloat16, recompute=True
    )
    report = Report(
        f"{model} on Frontier, TFLOP/s per GCD (exposed share; GB at the peak)",
        ["GCDs", *PRESETS, "best plan", "its plan", "compute only"],
    )
    curves: dict[str, list[tuple[int, float]]] = {}
    best: dict[int, Result] = {}
    ceiling = 0.0
    for ranks, text in MACHINES.items():
        topology = Topology.parse(text)
        limit = Request().limit(topology)
        ceiling = workload.flops / workload.clock(topology.device)[-1] / 1e12
        row: list[Any] = [f"{ranks:,}"]
        for name, (preset, fields) in PRESETS.items():
            plan = Plan.preset(preset, **fields)
            found = play(of_skeleton(Skeleton(workload, plan.resolve(topology, "bfloat16"), 2)))
            row.append(_cell(found, limit))
            curves.setdefault(name, []).append((ranks, found.tflops))
        try:
            answer = search(workload, topology, Request(allowed=allowed, overlaps=(4,)), quick=True)
        except NothingFits as error:
            row += ["nothing fits", str(error).split(":", 1)[1].split(",")[0].strip()]
        else:
            assert answer.best.result is not None
            best[ranks] = answer.best.result
            row += [_cell(answer.best.result, limit), answer.best.label]
            curves.setdefault("best plan", []).append((ranks, answer.best.result.tflops))
        report.rows.append([*row, f"{ceiling:.1f}"])
    _checks(report, model, best, curves)
    if plot:
        paths = plots.scaling(curves, ceiling, f"{model} on Frontier", Path(plot))
        report.data["plots"] = [str(path) for path in paths]
    report.data["curves"] = curves
    report.notes = [
        f"Micro-batch {workload.tokens} tokens, K = 1, activations recomputed, {', '.join(allowed) or 'native formats'} allowed to the "
        "best plan; presets with overlap 2; ZeRO++ and three levels with int8 gathers and int4 reductions, both as zcompile runs them.",
        "ZeRO-3 here is zcompile's: its hops go level by level and overlap; what DeepSpeed's flat rings give is in `reproduce paper`.",
        "'!': more memory than a GCD has. Products at 47.5 % of the peak (LUMI's Llama figure); all GCDs equally fast, no other job's "
        "traffic on the links.",
        "Not measured: no run of zcompile on Frontier stands behind these numbers.",
    ]  # fmt: skip
    return report


def _cell(found: Result, limit: float) -> str:
    return f"{found.tflops:.1f} ({found.share:.1%}; {found.bytes / 1e9:.0f}{'!' if found.bytes > limit else ''})"


def _checks(report: Report, model: str, best: dict[int, Result], curves: dict[str, list[tuple[int, float]]]) -> None:
    if 384 not in best:
        return
    report.check("best plan at 384: exposed share", best[384].share, 0.03)
    smallest = min(best)
    report.check(
        f"best plan at 384: loss of efficiency against {smallest} GCDs",
        1 - best[384].tflops / best[smallest].tflops,
        0.03,
    )
    scheme = dict(curves["three levels"])[384]
    report.data["best / three levels at 384"] = best[384].tflops / scheme
    report.data["best / ZeRO-3 at 384"] = best[384].tflops / dict(curves["ZeRO-3"])[384]
