"""`zcompile plan`: which placements, formats and buckets, and what a step costs, on a machine that need not be here."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from rich.console import Console

from zcompile.cli import write_json
from zcompile.plan import ALLOWED, PRESETS, Plan
from zcompile.planner import plots, report
from zcompile.planner.search import PAPER, NothingFits, Request, search
from zcompile.planner.skeleton import Skeleton
from zcompile.planner.step import of_skeleton, play
from zcompile.planner.workload import MODELS, Workload, of_text
from zcompile.shapes import SHAPES
from zcompile.simulator import Noise
from zcompile.topology import Topology

_ALIASES = {"fsdp": "zero3", "mics": "hsdp"}
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="gpt-neox-20b", help=f"{', '.join(SHAPES)}; or {MODELS} (default: %(default)s)"
    )
    parser.add_argument(
        "--topology", default="frontier:48",
        help="a machine and its nodes (frontier:48; frontier:64x147 in four levels), a .json file, or sizes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seq", type=int, help="tokens per sample (default: the model's)")
    parser.add_argument(
        "--micro-batch", type=int, default=1, help="samples per rank and micro-batch (default: %(default)s)"
    )
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step (default: %(default)s)")
    parser.add_argument("--recompute", action="store_true", help="backward computes each block's activations again")
    parser.add_argument("--memory", metavar="SIZE", help="of a device, as in 64GB (default: the machine's, less 4 %%)")
    parser.add_argument(
        "--allow", metavar="FORMATS", default="",
        help=f"wire formats that plans may use beyond native ones, with commas: {', '.join(ALLOWED)}; `paper`: {', '.join(PAPER)} "
        "(default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--compute", default="bf16", choices=("bf16", "fp32"), help="dtype of gathered weights (default: %(default)s)"
    )
    parser.add_argument(
        "--jitter", type=float, default=0.0, help="standard deviation of an operation's time, as a part of it"
    )
    parser.add_argument("--straggler", type=float, default=1.0, help="factor on the times of one slow rank")
    parser.add_argument("--explain", action="store_true", help="the formulas, and their numbers for the best plan")
    parser.add_argument(
        "--trace", nargs="?", const="best", choices=("best", *PRESETS), metavar="PRESET",
        help="put the graphs of the best plan, or of a preset with native formats, through every pass, verify and simulate them",
    )  # fmt: skip
    parser.add_argument(
        "--plot", metavar="FOLDER", help="draw scaling, levels and memory there, as PNG and SVG; needs matplotlib"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there; - for standard output")


def size(text: str | None) -> int:
    """ "64GB" -> bytes; 0 for None. ValueError otherwise."""
    if text is None:
        return 0
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"--memory {text!r}: must be a size such as 64GB or 60GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def allowed(text: str) -> tuple[str, ...]:
    """ "bf16,int8" -> the names; `paper` stands for its two."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(dict.fromkeys(each for name in names for each in (PAPER if name == "paper" else (name,))))


def command(arguments: argparse.Namespace) -> int:
    """0: a plan was found; 1: nothing fits, or the graphs do not verify; 2: bad arguments."""
    import torch

    console = Console(stderr=arguments.json == "-", width=None if sys.stdout.isatty() else 200, highlight=False)
    compute = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.compute]
    try:
        topology = Topology.parse(arguments.topology)
        request = Request(
            arguments.micro_batches, size(arguments.memory), allowed(arguments.allow),
            noise=Noise(arguments.jitter, arguments.straggler),
        )  # fmt: skip
        if arguments.plot:
            plots.pyplot()
        workload = of_text(arguments.model, arguments.seq, arguments.micro_batch, compute, arguments.recompute)
        name = str(compute).removeprefix("torch.")
        answer = search(workload, topology, request, name)
    except NothingFits as error:
        print(f"zcompile plan: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"zcompile plan: {error}", file=sys.stderr)
        return 2
    found = report.result(workload, topology, arguments.topology, request, answer)
    report.show(console, workload, topology, arguments.topology, request, answer)
    if arguments.explain:
        report.explain(console, workload, topology, request, answer, name)
    if arguments.plot:
        found["plots"] = [str(path) for path in _plots(arguments, workload, topology, request, answer, name)]
        console.print("drawn: " + ", ".join(found["plots"]))
    if arguments.trace:
        from zcompile.planner.traced import simulate

        chosen = (
            answer.best if arguments.trace == "best" else answer.presets[_ALIASES.get(arguments.trace, arguments.trace)]
        )
        try:
            real, found["traced"] = simulate(workload, chosen.plan, chosen.overlap, topology, request, compute)
        except RuntimeError as error:
            print(f"zcompile plan: --trace: {error}", file=sys.stderr)
            return 1
        done, skeleton = found["traced"], chosen.result
        console.print(
            f"real graphs of {chosen.label}: {done['nodes']:,} nodes, {done['collectives']:,} collectives; through every pass and "
            f"verified in {done['seconds']:.1f} s, {done['peak_bytes'] / 1e9:.2f} GB of this process; simulated {real.seconds:.4g} s a "
            f"step, {real.share:.1%} exposed, {real.bytes / 1e9:.1f} GB (skeleton: {skeleton.seconds if skeleton else 0:.4g} s)"
        )
    write_json(found, arguments.json)
    return 0


def _plots(
    arguments: argparse.Namespace,
    workload: Workload,
    topology: Topology,
    request: Request,
    answer: object,
    compute: str,
) -> list[Path]:
    folder = Path(arguments.plot)
    from zcompile.planner.search import Answer

    assert isinstance(answer, Answer)
    candidates = {**answer.presets, "best": answer.best}
    paths = plots.memory(candidates, request.limit(topology), folder) + plots.roofline(topology, folder)
    machine, _, count = arguments.topology.rpartition(":")
    if machine and count.isdigit():
        curves: dict[str, list[tuple[int, float]]] = {}
        nodes = sorted({*(2**k for k in range(int(count).bit_length())), int(count)})
        for n in nodes:
            smaller = Topology.parse(f"{machine}:{n}")
            for name in ("zero3", "hsdp", "zeropp", "zero_topo", "best"):
                plan = answer.best.plan if name == "best" else Plan.preset(name)
                skeleton = Skeleton(workload, plan.resolve(smaller, compute), answer.best.overlap)
                found = play(of_skeleton(skeleton, request.micro_batches), request.micro_batches)
                curves.setdefault(name, []).append((smaller.world_size, found.tflops))
        ceiling = workload.flops / workload.clock(topology.device)[-1] / 1e12
        paths += plots.scaling(curves, ceiling, f"{workload.name} on {machine}", folder)
    return paths
