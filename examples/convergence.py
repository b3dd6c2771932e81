"""Does training stay the same when what travels is quantised? Several plans beside native formats, seed by seed.

    python examples/convergence.py --steps 150

The model, data, loop and options of train_gpt.py, on 8 local gloo processes (2x2x2, preset zero_topo, eager). All plans
of a seed start from the same weights and see the same batches, so a plan's difference to native is paired: what one
seed does to both of them is not in it. Even so two runs that differ by one rounding drift apart, so one of the plans is
native formats with the batches handed to other ranks: the same sums in another order, which is what no difference at
all looks like.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import zcompile
from zcompile.ranks import Pool, RanksFailed
from zcompile.reference import Reference

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # with PYTHONSAFEPATH=1 Python does not do so
from gpt import GPT, Batches, Corpus, windows
from train_gpt import (
    adamw,
    add_training_options,
    amount,
    learning_rate,
    positive,
    prepare,
    received,
    shape_of,
    validation_picks,
)

TOPOLOGY, PRESET, RANKS = "2x2x2", "zero_topo", 8
LOSSES = ("train_loss", "validation_loss")


@dataclass(frozen=True)
class Variant:
    """What is compared: fields of the plan beside the preset's.

    shift: by how many ranks the batches are handed on. The global batch of a step stays the same, the order in which
    gradients are added up does not.
    """

    title: str
    fields: dict[str, Any] = field(default_factory=dict)
    shift: int = 0

    def plan(self) -> zcompile.Plan:
        return zcompile.Plan.preset(PRESET, **self.fields)


# Error feedback is the classical one, beta = 0: what quantising lost is sent with the next gradient, all of it and no
# average of several steps, so that there is no further number to choose.
PLANS = {
    "native": Variant("native"),
    "reordered": Variant("native, sums in another order", shift=1),
    "paper": Variant("int8/int4", {"wire": "paper"}),
    "paper-feedback": Variant("int8/int4, error feedback", {"wire": "paper", "error_feedback": 0.0}),
    "paper-delta": Variant("int8/int4, int4-delta refresh", {"wire": "paper", "refresh": "int4-delta"}),
    "paper-delta-feedback": Variant(
        "int8/int4, int4-delta refresh, error feedback",
        {"wire": "paper", "refresh": "int4-delta", "error_feedback": 0.0},
    ),
    "gathers": Variant("int8 gathers and refresh alone", {"gather": "int8"}),
    "reductions": Variant("int4 reductions and sync alone", {"reduce": "int4"}),
    "int8": Variant("int8 everywhere", {"gather": "int8", "reduce": "int8"}),
    "stochastic": Variant(
        "int8/int4, reductions rounded stochastically", {"wire": "paper", "reduce": "int4/256/stochastic"}
    ),
    "small-blocks": Variant("int8/int4, reductions in blocks of 64", {"wire": "paper", "reduce": "int4/64"}),
    "large-blocks": Variant("int8/int4, reductions in blocks of 256", {"wire": "paper", "reduce": "int4/256"}),
}
DEFAULT = list(PLANS)[
    :6
]  # the next three tell where a difference comes from, the last three what blocks and rounding have to do with it


# On the ranks.


@functools.cache
def corpus() -> Corpus:
    return Corpus.standard_library()


def seeds_of(arguments: argparse.Namespace) -> range:
    return range(arguments.first_seed, arguments.first_seed + arguments.seeds)


def train(rank: int, arguments: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """What one plan does with each seed; the same on every rank.

    Each seed has a model of its own: loading new weights into the last seed's would keep its error feedback.
    """
    torch.set_num_threads(1)
    variant, steps = PLANS[name], arguments.steps
    runs = []
    for seed in seeds_of(arguments):
        options = argparse.Namespace(**vars(arguments), seed=seed, topology=TOPOLOGY, eager=not arguments.compile)
        if (
            arguments.compile
        ):  # Dynamo stops compiling a forward that it has compiled often, for models of other plans too
            torch._dynamo.reset()
        begin = time.perf_counter()
        run = prepare(options, variant.plan(), corpus(), torch.device("cpu"))
        run.rank = (rank + variant.shift) % run.ranks
        losses = torch.zeros(steps)
        for step in range(steps):
            losses[step] = run.train_step()
            if rank == 0 and (step + 1) % max(1, steps // 5) == 0:
                seconds = time.perf_counter() - begin
                text = f"step {step + 1} of {steps}, loss {losses[step]:.3f} on rank 0, {seconds:.0f} s"
                print(f"{name}, seed {seed}: {text}", flush=True)
        counted = received(run.model)
        dist.all_reduce(losses)
        curve = (losses / run.ranks).tolist()
        runs.append(
            {
                "seed": seed,
                "train_loss": tail(curve),
                "validation_loss": run.validate(),
                "bytes": counted,
                "seconds": time.perf_counter() - begin,
                "losses": curve,
            }
        )
    return runs


def train_alone(arguments: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """What `train` returns but for the bytes, by the unsharded reference in this process: it has the bits of sharded training."""
    torch.set_num_threads(1)
    variant, shape, runs = PLANS[name], shape_of(arguments), []
    plan = variant.plan().resolve(zcompile.Topology.parse(TOPOLOGY), arguments.dtype)
    micro, size = arguments.accumulate, arguments.micro_batch
    for seed in seeds_of(arguments):
        begin = time.perf_counter()
        torch.manual_seed(seed)
        made: list[torch.optim.AdamW] = []

        def optimizer(masters: Iterable[nn.Parameter], made: list[torch.optim.AdamW] = made) -> torch.optim.AdamW:
            made.append(adamw(masters, arguments.lr))
            return made[0]

        reference = Reference(
            GPT(shape), plan, optimizer, loss=lambda model, batch: model(*batch) / micro,
            compute_dtype=getattr(torch, arguments.dtype),
        )  # fmt: skip
        batches, curve = Batches(corpus().train, shape.context, seed), []
        for step in range(arguments.steps):
            for group in made[0].param_groups:
                group["lr"] = learning_rate(arguments, step)
            taken: list[list[Any]] = [[] for _ in range(RANKS)]
            for _ in range(micro):
                position = batches.position
                for rank in range(RANKS):
                    batches.position = position
                    taken[rank].append(batches.take(size, (rank + variant.shift) % RANKS, RANKS))
            curve.append(float(reference.step(taken).sum(1).mean()))
        print(f"{name}, seed {seed}: {arguments.steps} steps, {time.perf_counter() - begin:.0f} s", flush=True)
        text, model = corpus().validation, reference.current().eval()
        with torch.no_grad():
            picks = validation_picks(arguments, text, shape.context, RANKS).split(size)
            validation = float(torch.stack([model(*windows(text, part, shape.context)) for part in picks]).mean())
        runs.append(
            {
                "seed": seed,
                "train_loss": tail(curve),
                "validation_loss": validation,
                "bytes": {},
                "seconds": time.perf_counter() - begin,
                "losses": curve,
            }
        )
    return runs


# What comes of it.


def tail(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def differences(runs: Sequence[Mapping[str, Any]], native: Sequence[Mapping[str, Any]], loss: str) -> dict[str, float]:
    """Relative differences of a plan's loss to native's under the same seed: mean, smallest and largest."""
    pairs = zip(runs, native, strict=True)
    found = [run[loss] / beside[loss] - 1 for run, beside in pairs if run["seed"] == beside["seed"]]
    if len(found) != len(runs):
        raise ValueError("differences are between runs of the same seeds, in the same order")
    return {"mean": sum(found) / len(found), "min": min(found), "max": max(found)}


def report(
    settings: Mapping[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]], seconds: float
) -> dict[str, Any]:
    """The machine-readable result, from what `train` returned for each plan; native is one of them."""
    plans = {}
    for name, runs in found.items():
        plans[name] = {
            "title": PLANS[name].title,
            "fields": PLANS[name].fields,
            "runs": runs,
            "mean": {loss: sum(run[loss] for run in runs) / len(runs) for loss in LOSSES},
            "difference": {loss: differences(runs, found["native"], loss) for loss in LOSSES},
            "bytes": runs[-1]["bytes"],
            "seconds": sum(run["seconds"] for run in runs),
        }
    return {"topology": TOPOLOGY, "preset": PRESET, "settings": settings, "seconds": seconds, "plans": plans}


def rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each plan; bytes are those of the last step of the last seed."""
    levels = list(result["plans"]["native"]["bytes"])
    headings = ["plan", "train loss", "validation loss", "train, to native", "validation, to native", *levels]
    out = []
    for plan in result["plans"].values():
        paired = [percent(plan["difference"][loss]) for loss in LOSSES]
        losses = [f"{plan['mean'][loss]:.4f}" for loss in LOSSES]
        out.append([plan["title"], *losses, *paired, *(amount(plan["bytes"][level]) for level in levels)])
    return headings, out


def percent(difference: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * difference[key]:+.2f}" for key in ("mean", "min", "max"))
    return f"{mean} % ({low} .. {high})"


def markdown(headings: Sequence[str], texts: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in headings[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (headings, rule, *texts))


# The command.


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--plans", nargs="+", default=DEFAULT, choices=list(PLANS), metavar="PLAN",
           help=f"of {', '.join(PLANS)} (default: the first {len(DEFAULT)}); native is always run")  # fmt: skip
    option("--seeds", type=positive, default=3, metavar="N", help="how many seeds (default: %(default)s)")
    option("--first-seed", type=int, default=0, metavar="S", help="the first of them (default: %(default)s)")
    add_training_options(parser)
    parser.set_defaults(dtype="bfloat16", accumulate=1)
    option("--compile", action="store_true", help="compile (default: eager, which computes the same transfers)")
    option("--reference", action="store_true",
           help="by the unsharded reference, in one process: the same bits, sooner, and no bytes")  # fmt: skip
    option("--json", type=pathlib.Path, metavar="FILE", help="write everything there")
    option("--markdown", type=pathlib.Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args(argv)
    arguments.plans = [name for name in PLANS if name == "native" or name in arguments.plans]
    return arguments


def main() -> int:
    """0: all plans ran; 1: one did not; 2: bad arguments."""
    arguments = parse()
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)  # a file takes the table as it is
    try:
        shape_of(arguments)
    except ValueError as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        return 2
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks are processes of this machine's CPUs, also where it has a GPU
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "markdown")}
    begin, found = time.perf_counter(), {}
    timeout = (
        1200.0 + 60.0 * arguments.seeds * arguments.steps * arguments.accumulate
    )  # for runs that hang, not slow ones
    pool = Pool(RANKS)
    try:
        for name in arguments.plans:
            found[name] = (
                train_alone(arguments, name)
                if arguments.reference
                else pool.run(train, arguments, name, timeout=timeout)[0]
            )
            result = report(settings, found, time.perf_counter() - begin)
            for path, text in (
                (arguments.json, json.dumps(result, indent=1)),
                (arguments.markdown, markdown(*rows(result))),
            ):
                if path is not None:  # after each plan: hours of work are not lost with the last one
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text.rstrip() + "\n")
    except RanksFailed as error:
        console.print(f"[red]error:[/red] plan {name}:")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    finally:
        pool.close()
    headings, texts = rows(result)
    title = f"{arguments.seeds} x {arguments.steps} steps, {result['seconds']:.0f} s; differences: mean (least .. most)"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in texts:
        table.add_row(*row)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
