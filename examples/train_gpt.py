"""Train a small GPT on the bytes of Python's standard library, with hierarchical ZeRO.

    torchrun --nproc-per-node 8 examples/train_gpt.py --topology 2x2x2 --plan zero_topo
    torchrun --nproc-per-node 8 examples/train_gpt.py --topology 2x2x2 --plan zero_topo --dtype bfloat16 --wire paper

The model and the data (gpt.py) are plain PyTorch and so is the loop: zcompile appears where the model is wrapped
(`prepare`) and where its books are read (`received`, `zero3_traffic`, `memory_per_rank`). Runs on CPUs (gloo) and GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor

import zcompile
from zcompile.cost import transfer_bytes
from zcompile.layout import ParamSpec
from zcompile.overlap import Lane, Overlap, measured

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # with PYTHONSAFEPATH=1 Python does not do so
from gpt import GPT, Batches, Corpus, Shape, bigram_entropy, windows

WIRE_OPTIONS = ("wire", "gather", "reduce", "sync", "refresh", "error_feedback")
WARM_UP, DECAY = 0.1, 0.6  # of all steps: the learning rate rises over the first tenth and falls over the last 60 %


# What zcompile says about a run.


def received(model: nn.Module) -> dict[str, int]:
    """Bytes that this rank received over each level in the last optimizer step, counted at the process groups."""
    levels = zcompile.ledger(model)["levels"]
    return {level: sum(row["counted"] for row in transfers.values()) for level, transfers in levels.items()}


def zero3_traffic(model: nn.Module, topology: zcompile.Topology, compute: str, micro_steps: int) -> dict[str, float]:
    """Bytes that one rank would receive over each level in one optimizer step under the `zero3` preset, padding included.

    zcompile's closed form of each transfer, times how often it runs: gathers in each forward and again in each
    backward, but for embeddings, whose backward does not read them; reductions once a micro-step; syncs (of parameters
    with fewer rows than ranks, whose replicas meet) once a step.
    """
    resolved = zcompile.Plan.preset("zero3").resolve(topology, compute)
    traffic = dict.fromkeys(topology.names, 0.0)
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        places = resolved.placement(name, shape[0] if shape else 1, parameter.numel(), len(shape))
        found = resolved.wires(name, shape)
        wires: dict[str, Any] = {key: tuple(wire.text for wire in each) for key, each in vars(found).items()}
        spec = ParamSpec(
            name, shape, topology.sizes, topology.names, topology.key, *places, compute, **wires,
            unit="", offset=0, unit_shard=0,
        )  # fmt: skip
        gathers = micro_steps if isinstance(owners[id(parameter)], nn.Embedding) else 2 * micro_steps
        for transfer, times in (("gather", gathers), ("reduce", micro_steps), ("sync", 1)):
            for (level, _), amount in transfer_bytes(spec, transfer).items():
                traffic[level] += times * amount
    return traffic


def memory_per_rank(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes on this rank, by owner, and the peak resident set of its process."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in states]
    owners = {f"model: {owner}": int(size) for owner, size in model.zero.memory().items()}
    owners["optimizer state"] = sum(value.nbytes for value in local if isinstance(value, Tensor))
    owners["process peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return owners


# The run.


def learning_rate(arguments: argparse.Namespace, step: int) -> float:
    """Linear warm-up, a plateau, and a linear way down to zero."""
    warm = (step + 1) / (WARM_UP * arguments.steps)
    left = (1 - step / arguments.steps) / DECAY
    return float(arguments.lr * min(1.0, warm, left))


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """Weight decay is for matrices."""
    held = list(parameters)
    groups = [
        {"params": [p for p in held if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in held if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def validation_picks(arguments: argparse.Namespace, text: Tensor, context: int, ranks: int) -> Tensor:
    """Windows spread evenly over the validation bytes, equally many for each rank."""
    size = arguments.micro_batch * ranks
    count = max(1, arguments.validation_windows // size) * size
    return torch.linspace(0, (len(text) - 1) // context - 1, count).long()


@dataclass
class Run:
    arguments: argparse.Namespace
    model: Any  # what hierarchical_zero made of the GPT: an nn.Module with `no_sync` and `zero`
    optimizer: torch.optim.Optimizer
    topology: zcompile.Topology
    device: torch.device
    corpus: Corpus
    batches: Batches
    rank: int
    ranks: int
    step: int = 0
    overlap: Overlap | None = None
    """Of the last step, on this rank."""

    def __post_init__(self) -> None:
        micro_step = self.ranks * self.arguments.micro_batch * self.batches.context
        self.tokens_per_step = micro_step * self.arguments.accumulate

    def train_step(self) -> Tensor:
        """One optimizer step over `accumulate` micro-batches; returns this rank's mean loss."""
        micro_steps = self.arguments.accumulate
        loss = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.arguments, self.step)
        for micro in range(micro_steps):
            x, y = self.batches.take(self.arguments.micro_batch, self.rank, self.ranks)
            last = micro == micro_steps - 1
            with contextlib.nullcontext() if last else self.model.no_sync():
                part = self.model(x.to(self.device), y.to(self.device)) / micro_steps
                part.backward()
            loss += part.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss

    def watched_step(self) -> Tensor:
        """A step under torch's profiler: how much of the transfers did it hide?"""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = self.train_step()
        self.overlap = measured(profile)
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over windows spread evenly over the validation bytes, the same for all ranks."""
        size = self.arguments.micro_batch
        text, context = self.corpus.validation, self.batches.context
        picks = validation_picks(self.arguments, text, context, self.ranks)[self.rank :: self.ranks]
        self.model.eval()
        losses = [self.model(*(t.to(self.device) for t in windows(text, part, context))) for part in picks.split(size)]
        self.model.train()
        return mean_over_ranks(torch.stack(losses).mean())

    def save(self, asynchronous: bool = False) -> None:
        """With what an exact resume needs: random states, and whatever the plan keeps beside the weights."""
        extra = {"step": self.step, "position": self.batches.position}
        folder = self.arguments.checkpoint / f"step-{self.step:06d}"
        zcompile.save(self.model, self.optimizer, folder, extra, asynchronous=asynchronous)

    def set_aside(self) -> None:
        """Move an earlier run's checkpoints out of the way of a run that starts afresh."""
        folder: pathlib.Path = self.arguments.checkpoint
        if self.rank == 0 and any(folder.glob("step-*")):
            folder.rename(folder.with_name(f"{folder.name}-until-{time.strftime('%Y%m%d-%H%M%S')}"))

    def resume(self) -> None:
        """Go on from the newest complete checkpoint, which another number of ranks or another plan may have written."""
        newest = zcompile.latest_checkpoint(self.arguments.checkpoint)
        if newest is None:
            raise ValueError(
                f"--resume: no checkpoint in {self.arguments.checkpoint}; train without --resume first, or set --checkpoint"
            )
        found = zcompile.load(self.model, self.optimizer, newest)
        self.step, self.batches.position = found.extra["step"], found.extra["position"]
        if self.step >= self.arguments.steps:
            raise ValueError(f"--resume: {newest} is at step {self.step}; ask for more than that with --steps")


def mean_over_ranks(value: Tensor) -> float:
    total = value.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def plan_of(arguments: argparse.Namespace) -> zcompile.Plan:
    """The preset, with the wire formats that were asked for."""
    asked = {option: value for option in WIRE_OPTIONS if (value := getattr(arguments, option)) is not None}
    return zcompile.Plan.preset(arguments.plan, **asked)


def shape_of(arguments: argparse.Namespace) -> Shape:
    shape = Shape(arguments.layers, arguments.hidden, arguments.heads, arguments.context)
    if shape.hidden % (2 * shape.heads):
        raise ValueError(f"--hidden {shape.hidden} is not a multiple of twice --heads {shape.heads}")
    return shape


def prepare(arguments: argparse.Namespace, plan: zcompile.Plan, corpus: Corpus, device: torch.device) -> Run:
    """A model that starts from --seed, sharded by `plan`, with its optimizer and its batches."""
    shape = shape_of(arguments)
    torch.manual_seed(arguments.seed)
    with zcompile.deferred_init():  # no memory yet: the weights are made shard by shard
        plain = GPT(shape)
    model: Any = zcompile.hierarchical_zero(
        plain,
        topology=arguments.topology,
        plan=plan,
        compute_dtype=getattr(torch, arguments.dtype),
        device=device,
        compile=not arguments.eager,
        overlap=arguments.overlap,
        tokens=arguments.micro_batch * shape.context,
    )
    optimizer = adamw(model.parameters(), arguments.lr)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = Batches(corpus.train, shape.context, arguments.seed)
    if batches.count < ranks * arguments.micro_batch:
        raise ValueError(f"--micro-batch {arguments.micro_batch} on {ranks} ranks: there are {batches.count} windows")
    return Run(arguments, model, optimizer, model.zero.plan.topology, device, corpus, batches, rank, ranks)


def setup(arguments: argparse.Namespace) -> Run:
    """Everything that can be wrong with the command line is found here; a bad plan before the ranks look for each other."""
    plan = plan_of(arguments)
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    device = torch.device("cpu")
    if torch.cuda.is_available():  # with one visible device per process each of them is device 0
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    run = prepare(arguments, plan, Corpus.standard_library(), device)
    if arguments.resume:
        run.resume()
    else:
        run.set_aside()
    return run


# What a person sees.


def amount(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


@contextlib.contextmanager
def progress_bar(run: Run, console: Console) -> Iterator[tuple[Progress, Any]]:
    columns = BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=run.rank != 0 or not console.is_terminal) as progress:
        yield progress, progress.add_task("train", total=run.arguments.steps, completed=run.step, text="compiling")


def train(run: Run, console: Console, metrics: IO[str] | None) -> tuple[float, float]:
    """All steps; returns the seconds they took, and those of the first one, which compiles."""
    options = run.arguments
    started = mark = time.perf_counter()
    marked_step, first = run.step, 0.0
    with progress_bar(run, console) as (progress, task):
        while run.step < options.steps:
            watched = run.step == options.steps - 1 and run.rank == 0
            loss = run.watched_step() if watched else run.train_step()
            progress.advance(task)
            first = first or time.perf_counter() - started
            if options.save_every and run.step % options.save_every == 0 and run.step < options.steps:
                run.save(asynchronous=True)  # it is written while the next steps run
            if run.step % options.report_every and run.step < options.steps:
                continue
            mean = mean_over_ranks(loss)
            now, counted = time.perf_counter(), received(run.model)
            speed = (run.step - marked_step) * run.tokens_per_step / (now - mark)
            wire = "  ".join(f"{level} {amount(size)}" for level, size in counted.items())
            text = f"loss {mean:.3f}  {speed:,.0f} tokens/s  {wire}"
            progress.update(task, text=text)
            if run.rank == 0:
                console.print(f"step {run.step:5d}  {text} a step", highlight=False, soft_wrap=True)
            write(
                metrics,
                step=run.step,
                loss=mean,
                learning_rate=learning_rate(options, run.step),
                tokens_per_second=speed,
                seconds=now - started,
                received=counted,
            )
            mark, marked_step = now, run.step
    return time.perf_counter() - started, first


def write(metrics: IO[str] | None, **values: Any) -> None:
    if metrics is not None:
        metrics.write(json.dumps(values) + "\n")
        metrics.flush()


def waiting(overlap: Overlap | None) -> str:
    if overlap is None:
        return "no step was watched"
    if not overlap.lanes:
        return "no hop was found in the trace: nothing is known"
    return f"waiting for refreshes: {1e3 * overlap.refresh_exposed:.0f} ms; {overlap.matched:.0%} of all waiting is accounted for"


def expected_waiting(model: Any, steps: int) -> dict[str, float]:
    """Seconds of a step in which rank 0 waits for a level's hops ("refresh": for copies), expected by the topology's data."""
    found: dict[str, float] = {}
    for name, graph in zcompile.ledger(model)["schedule"].items():
        for what, seconds in graph.items():
            if what.startswith("exposed ") and not name.endswith("inference"):
                level = what.removeprefix("exposed ")
                found[level] = found.get(level, 0.0) + seconds * graph["runs"] / steps
    return found


def formats_table(found: dict[str, dict[str, int]]) -> Table:
    """What is kept, computed and sent in which format."""
    out = Table("what", title="formats, and how many parameters have them")
    for name in dict.fromkeys(name for row in found.values() for name in row):
        out.add_column(name, justify="right")
    for what, row in found.items():
        out.add_row(what, *(f"{row[column.header]:,}" if column.header in row else "" for column in out.columns[1:]))  # type: ignore[index]
    return out


def report(
    run: Run, console: Console, metrics: IO[str] | None, seconds: float, first: float, validation: float
) -> None:
    """The tables at the end, and the last line of the metrics."""
    bigram = bigram_entropy(run.corpus.validation)
    counted = received(run.model)
    flat = zero3_traffic(run.model, run.topology, run.arguments.dtype, run.arguments.accumulate)
    memory: list[Any] = [None] * run.ranks
    dist.all_gather_object(memory, memory_per_rank(run.model, run.optimizer))
    if run.rank != 0:
        return
    traffic = Table("level", title="bytes that one rank receives per optimizer step")
    for heading in (f"{run.arguments.plan} (counted)", "zero3 (closed form)", "zero3 / this plan"):
        traffic.add_column(heading, justify="right")
    for level, size in counted.items():
        traffic.add_row(level, amount(size), amount(flat[level]), f"{flat[level] / size:.2f}" if size else "-")
    owners = Table("memory", title="bytes per rank")
    owners.add_column("smallest", justify="right")
    owners.add_column("largest", justify="right")
    for owner in memory[0]:
        sizes = [rank[owner] for rank in memory]
        owners.add_row(owner, amount(min(sizes)), amount(max(sizes)))
    hidden = Table(
        "level", title="hops of rank 0 in the last step, from a profiler's trace", caption=waiting(run.overlap)
    )
    for heading in ("hops", "busy", "under way", "hidden", "exposed", f"expected on {run.topology.key}"):
        hidden.add_column(heading, justify="right")
    expected = expected_waiting(run.model, run.step)
    for level in counted:
        lane = run.overlap.level(level) if run.overlap else Lane()
        times = (lane.busy, lane.under_way, lane.hidden, lane.exposed, expected.get(level, 0.0))
        hidden.add_row(level, str(lane.hops), *(f"{1e3 * t:.3g} ms" for t in times))
    formats = formats_table(zcompile.precision(run.model, run.optimizer))
    summary = Table("summary", "", title=f"{run.step} steps of {run.tokens_per_step} bytes on {run.ranks} ranks")
    summary.add_row("time", f"{seconds:.0f} s, of which {first:.0f} s until the first step was done")
    summary.add_row("validation loss", f"{validation:.4f} nats per byte")
    summary.add_row("bigram entropy", f"{bigram:.4f} nats per byte, of the validation data")
    verdict = "[green]below bigram entropy" if validation < bigram else "[yellow]not below bigram entropy"
    summary.add_row("verdict", verdict)
    for table in (traffic, owners, formats, hidden, summary):
        console.print(table)
    write(
        metrics,
        final=True,
        step=run.step,
        seconds=seconds,
        first_step_seconds=first,
        validation_loss=validation,
        bigram_entropy=bigram,
        received=counted,
        zero3=flat,
        memory=memory,
        overlap=run.overlap.as_dict() if run.overlap else None,
        expected_waiting=expected,
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Those of the model and its training, which convergence.py has too."""
    option = parser.add_argument
    option("--dtype", default="float32", choices=["float32", "bfloat16"], help="compute dtype (default: %(default)s)")
    option("--steps", type=positive, default=200, help="optimizer steps (default: %(default)s)")
    option(
        "--overlap",
        type=int,
        default=2,
        metavar="BUCKETS",
        help="transfers under way while it computes (default: %(default)s)",
    )
    option("--micro-batch", type=positive, default=2, help="windows per rank and micro-step (default: %(default)s)")
    option("--accumulate", type=positive, default=2, help="micro-steps per optimizer step (default: %(default)s)")
    option("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    for name in ("layers", "hidden", "heads", "context"):
        option(f"--{name}", type=positive, default=getattr(Shape, name), help="(default: %(default)s)")
    option("--validation-windows", type=positive, default=256, help="(default: %(default)s)")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--topology", help='levels of the machine, fastest first: "2x2x2", "frontier", "mi300x" (default: detected)')
    option(
        "--plan", default="zero_topo", help="placements: ddp, zero1, zero3, hsdp, zeropp, ... (default: %(default)s)"
    )
    option("--wire", metavar="NAME", help="formats of all transfers: paper is int8 gathers and int4/128 reductions")
    for transfer, what in (
        ("gather", "of weights, in forward and backward"),
        ("reduce", "of gradients, each micro-step"),
        ("sync", "of gradients, once a step (default: as --reduce)"),
        ("refresh", "of weights, once a step, int4-delta too (default: as --gather)"),
    ):
        option(f"--{transfer}", metavar="FORMAT", help=f"native, fp32, bf16, int8, int4, ...: {what}")
    option("--error-feedback", type=float, metavar="BETA", help="add what quantising a gradient lost to the next one")
    add_training_options(parser)
    option("--eager", action="store_true", help="run without compiling")
    option("--seed", type=int, default=0)
    option("--report-every", type=positive, default=10, metavar="STEPS", help="(default: %(default)s)")
    build = pathlib.Path("build/train")
    option("--checkpoint", type=pathlib.Path, default=build / "checkpoint", help="folder (default: %(default)s)")
    option("--save-every", type=int, default=0, metavar="STEPS", help="as well as at the end (default: never)")
    option("--resume", action="store_true", help="go on from the newest checkpoint in --checkpoint")
    option("--metrics", type=pathlib.Path, default=build / "metrics.jsonl", help="JSON lines (default: %(default)s)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def refuse(console: Console, rank: int, error: Exception) -> NoReturn:
    """End every rank in the same way; one of them says why."""
    if rank == 0:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(2)


def main() -> None:
    arguments = parse()
    console = Console()
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        run = setup(arguments)
    except (ValueError, FileNotFoundError, PermissionError, zcompile.CheckpointError) as error:
        refuse(console, rank, error)
    metrics = None
    if run.rank == 0:
        console.print(run.model.zero.plan.describe(), highlight=False)
        console.print(f"data: {run.corpus.files} files, {len(run.corpus.train):,} bytes to train on", highlight=False)
        arguments.metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics = arguments.metrics.open("a" if arguments.resume else "w")
    seconds, first = train(run, console, metrics)
    validation = run.validate()
    run.save()
    report(run, console, metrics, seconds, first, validation)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
