"""Predicted against measured on this machine: every preset on a network shaped by `zcompile bench`, two regimes.

The machine is what `zcompile calibrate` measures on the same network, before the presets run; nothing is fitted to their steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zcompile.bench import network
from zcompile.bench.command import reason
from zcompile.bench.rank import Task
from zcompile.calibrate import calibrate
from zcompile.plan import PRESETS, Plan
from zcompile.planner.skeleton import Skeleton
from zcompile.planner.step import of_skeleton, play
from zcompile.planner.workload import of_text
from zcompile.reproduce.report import Report
from zcompile.topology import Topology

REGIMES = ((400.0, 100.0), (100.0, 25.0))
"""Mbit/s of a pair's link and of a node's uplink."""
SIZES = "2x2x2"
TIMEOUT = 600.0
NAMES = tuple(name for name in PRESETS if name not in ("fsdp", "mics"))


def run(
    model: str = "gpt-4m",
    steps: int = 3,
    overlap: int = 0,
    regimes: Sequence[tuple[float, float]] = REGIMES,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Calibrate, predict and measure, on each of the regimes in turn. NetworkError without root or iproute2."""
    lack = network.missing()
    if lack:
        raise network.NetworkError(lack)
    workload = of_text(model, compute_dtype=torch.bfloat16)
    report = Report(
        f"{model} on {SIZES}, seconds a step",
        ["Mbit/s, preset", "measured", "predicted", "predicted / measured", "exposed, predicted"],
    )
    for mbit in regimes:
        data = calibrate(SIZES, mbit)
        say(f"{mbit[0]:g},{mbit[1]:g} Mbit/s: calibrated")
        measured, predicted = {}, {}
        with tempfile.TemporaryDirectory(prefix="zcompile-local") as folder:
            path = Path(folder) / "machine.json"
            path.write_text(json.dumps(data))
            topology = Topology.parse(f"{path}:{SIZES.rpartition('x')[2]}")
            for name in NAMES:
                skeleton = Skeleton(workload, Plan.preset(name).resolve(topology, "bfloat16"), overlap)
                predicted[name] = play(of_skeleton(skeleton))
            with network.Shaped(topology.sizes, *mbit) as here:
                for name in NAMES:
                    measured[name] = _measure(here, name, model, steps, overlap, Path(folder))
                    say(f"{name}: {measured[name]:.3f} s measured, {predicted[name].seconds:.3f} s predicted")
        for name in NAMES:
            ratio = predicted[name].seconds / measured[name]
            label = f"{mbit[0]:g}, {mbit[1]:g}, {name}"
            report.rows.append(
                [label, measured[name], predicted[name].seconds, f"{ratio:.3f}", f"{predicted[name].share:.1%}"]
            )
            report.check(label, abs(ratio - 1), 0.15)
        real, model_order = (
            sorted(NAMES, key=lambda n: table[n]) for table in (measured, {n: predicted[n].seconds for n in NAMES})
        )
        swapped = sum(
            _swapped(a, b, real, measured)
            for a in model_order
            for b in model_order
            if model_order.index(a) < model_order.index(b)
        )
        text = f"{mbit[0]:g}, {mbit[1]:g}: pairs of presets in another order (measured times within 5 % of each other are ties)"
        report.checks.append((text, str(swapped), "0", swapped == 0))
        report.data[f"{mbit[0]:g},{mbit[1]:g}"] = {
            "machine": data,
            "measured": measured,
            "predicted": {n: r.as_dict() for n, r in predicted.items()},
        }
    report.notes = [
        f"overlap {overlap}, batch 1 a rank, {steps} steps after 2 of warm-up; bf16 compute, fp32 reductions; one run each.",
        "Not in the prediction: Python between the graphs (guards, autograd, hooks), which all ranks share two cores for.",
    ]
    return report


def _swapped(first: str, second: str, order: list[str], measured: dict[str, float]) -> bool:
    """Whether `second`, predicted to be slower, was measured to be faster by more than a tie."""
    return order.index(second) < order.index(first) and measured[second] < 0.95 * measured[first]


def _measure(here: network.Shaped, name: str, model: str, steps: int, overlap: int, folder: Path) -> float:
    out, log = folder / "out.json", folder / "log"
    system = f"zc:{name},overlap={overlap}"
    task = Task(system, model, SIZES, 1, steps, 2, str(out))
    command = [sys.executable, "-m", "zcompile.bench.rank", json.dumps(asdict(task))]
    if not here.run(command, {"TORCH_CPP_LOG_LEVEL": "ERROR"}, log, TIMEOUT):
        raise RuntimeError(f"{name}: {reason(log)}")
    found: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return float(found["seconds"])
