"""`zcompile verify`: is sharded training right, bit for bit, under every preset on every shape of machine?

Each *cell* is a preset on a topology with K micro-batches, on real gloo processes that the command starts once. It passes if, over the
steps of one run with AdamW and one with SGD,

    loss        the loss under AdamW is that of torch's DDP, within 1e-6 relative
    parameters  the parameters under SGD are those of DDP, within 1e-6
    bits        parameters and losses are those of the unsharded reference that sums in the same order (zcompile.reference), exactly
    bytes       predicted, compiled and counted bytes agree exactly after every step, and beyond the gradients' level K micro-batches
                send what one does
    replicas    all ranks that hold the same shard hold the same bits of it, after every step

Presets that resolve to equal plans on a topology are run once and reported under each name. With `--replay N` steps are replayed with
hops disturbed instead, and must give the same bits: see zcompile.replay.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from zcompile import replay, trial
from zcompile.cli import write_json
from zcompile.plan import PRESETS, Plan
from zcompile.ranks import Pool, RanksFailed
from zcompile.topology import Topology

TOPOLOGIES = ("8", "2x4", "4x2", "2x2x2", "1x2x4", "2x1x4")
MICRO_BATCHES = (1, 4)
STEPS = 20
TOLERANCE = 1e-6

DOZEN = (
    ("ddp", "2x2x2", 4), ("zero1", "4x2", 1), ("zero2", "2x1x4", 4), ("zero3", "8", 4), ("fsdp", "2x4", 1), ("hsdp", "1x2x4", 1),
    ("mics", "4x2", 4), ("zeropp", "2x2x2", 1), ("zero_topo", "2x2x2", 1), ("zero_topo", "2x2x2", 4), ("zero_topo", "2x4", 4),
    ("zero_topo", "2x1x4", 1),
)  # fmt: skip
"""The cells that are compiled with Inductor: every preset, every topology, both K."""
EXACT = (("zero_topo", "2x2x2"), ("mics", "4x2"))
"""Those of them that compile a second model too, zcompile.trial.Pointwise, to compare bits: in the first one fusion changes them."""


@dataclass
class Cell:
    """One preset on one topology with K micro-batches, and what came of it.

    Attributes:
        plan, topology, micro_batches, mode: what was asked (mode: a key of zcompile.trial.MODES).
        placements: the levels that weights, gradients and optimizer state resolved to.
        run_as: the preset whose run this is: another one where both resolve to equal plans.
        status: "pass", "fail" (a check failed), "error" (it did not run to its end).
        failures: one line per failed check.
        loss_error, parameter_error: largest differences to DDP, relative and absolute; None if it did not run, or is not a number.
        bit_equal, loss_bit_equal: to the reference; None where code generation may change them (see EXACT).
        bytes: level -> transfer -> bytes that one rank received in the last step.
        bytes_above_gradients: of these, those of gradients beyond the gradients' level.
        seconds: of this cell's two runs, compilation included.
    """

    plan: str
    topology: str
    micro_batches: int
    mode: str
    placements: tuple[str, ...] = ()
    run_as: str = ""
    status: str = "error"
    failures: list[str] = field(default_factory=list)
    loss_error: float | None = None
    parameter_error: float | None = None
    bit_equal: bool | None = None
    loss_bit_equal: bool | None = None
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    bytes_above_gradients: int = 0
    seconds: float = 0.0


def cells(
    plans: Sequence[str] = tuple(PRESETS), topologies: Sequence[str] = TOPOLOGIES, mode: str = "graph"
) -> list[Cell]:
    """The matrix, or with mode "code" the part of DOZEN that lies in it."""
    if mode == "code":
        return [Cell(p, t, k, mode) for p, t, k in DOZEN if p in plans and t in topologies]
    return [Cell(plan, topology, k, mode) for topology in topologies for plan in plans for k in MICRO_BATCHES]


def verify(
    wanted: Iterable[Cell], pool: Any, *, steps: int = STEPS, done: Callable[[Cell], None] = lambda cell: None
) -> list[Cell]:
    """Run the cells on a pool of ranks and fill them in; `done` is called with each.

    Args:
        pool: has `run(function, *arguments, timeout=)` as zcompile.ranks.Pool.
    """
    wanted = list(wanted)
    groups: dict[object, list[Cell]] = {}
    for cell in wanted:
        resolved = Plan.parse(cell.plan).resolve(Topology.parse(cell.topology), "float32")
        places = (resolved.weights, resolved.gradients, resolved.optimizer)
        cell.placements = tuple(("whole", *resolved.topology.names)[place] for place in places)
        groups.setdefault((cell.topology, cell.mode, places), []).append(cell)
    for group in groups.values():
        _run(group, pool, steps)
        for cell in group:
            done(cell)
    return wanted


def _run(group: list[Cell], pool: Any, steps: int) -> None:
    """Cells that differ in nothing but K and the name of their plan: one sharded model for all of them."""
    first = group[0]
    micro_batches = tuple(sorted({cell.micro_batches for cell in group}))
    for cell in group:
        cell.run_as = first.plan

    def run(model: str) -> list[list[trial.Outcome]]:
        found: list[list[trial.Outcome]] = pool.run(
            trial.run, model, first.topology, Plan.parse(first.plan), first.mode, micro_batches, steps, timeout=900.0
        )
        return found

    try:
        ranks = run("awkward")
        exact = ranks
        if first.mode == "code":
            exact = run("pointwise") if (first.plan, first.topology) in EXACT else []
    except RanksFailed as error:
        rank, failure = error.cause
        for cell in group:
            cell.failures.append(f"rank {rank}: {failure.type}: {failure.message}\n{failure.trace}".rstrip())
        return
    for cell in group:
        judge(cell, ranks, exact)


def judge(cell: Cell, ranks: list[list[trial.Outcome]], exact: list[list[trial.Outcome]]) -> None:
    """Fill in a cell from what each rank saw.

    Args:
        ranks: outcomes[rank], of all K that were run.
        exact: those whose bits must be the reference's; of a model of its own where code is generated, or [].
    """
    mine = [out for outcomes in ranks for out in outcomes if out.micro_batches == cell.micro_batches]
    loss = trial.worst(out.loss_error for out in mine if out.optimizer == "adamw")
    parameters = trial.worst(out.parameter_error for out in mine if out.optimizer == "sgd")
    cell.loss_error, cell.parameter_error = (None if math.isnan(error) else error for error in (loss, parameters))
    if not loss <= TOLERANCE:
        cell.failures.append(f"loss under AdamW is {loss:.2g} from DDP's (relative)")
    if not parameters <= TOLERANCE:
        cell.failures.append(f"parameters under SGD are {parameters:.2g} from DDP's")
    bits = [(r, out) for r, outcomes in enumerate(exact) for out in outcomes if out.micro_batches == cell.micro_batches]
    cell.bit_equal = not any(out.bits for _, out in bits) if bits else None
    cell.failures += [f"reference, {out.optimizer}, rank {r}: {out.bits}" for r, out in bits if out.bits][:3]
    if cell.mode != "code":
        cell.loss_bit_equal = not any(out.loss_bits for _, out in bits)
        cell.failures += [f"reference, {out.optimizer}, rank {r}: {out.loss_bits}" for r, out in bits if out.loss_bits][
            :3
        ]
    cell.failures += sorted({f"replicas, {out.optimizer}: {out.replicas}" for out in mine if out.replicas})
    cell.failures += sorted({f"ledger, {out.optimizer}: {out.ledger}" for out in mine if out.ledger})[:3]
    cell.bytes = mine[0].levels
    cell.bytes_above_gradients = sum(row["sync"] for row in cell.bytes.values())
    for out in mine:
        if out.levels != cell.bytes:
            cell.failures.append(f"ranks received different amounts: {out.levels} and {cell.bytes}")
            break
    for out in ranks[0]:
        if out.micro_batches == 1 != cell.micro_batches:
            cell.failures += [f"bytes, {out.optimizer}: {text}" for text in once(out, _same_optimizer(mine, out))]
    cell.seconds = sum(out.seconds for out in mine[:2])
    cell.status = "fail" if cell.failures else "pass"


def _same_optimizer(outcomes: list[trial.Outcome], like: trial.Outcome) -> trial.Outcome:
    return next(out for out in outcomes if out.optimizer == like.optimizer)


def once(one: trial.Outcome, many: trial.Outcome) -> list[str]:
    """What keeps K micro-batches from crossing the levels above G once: differences to one micro-batch, as text."""
    wrong = []
    for level, rows in one.levels.items():
        for transfer, amount in rows.items():
            factor = many.micro_batches if transfer in ("gather", "reduce") else 1
            found = many.levels[level][transfer]
            if found != factor * amount:
                wrong.append(f"{transfer} over {level} is {found} bytes instead of {factor} x {amount}")
    for key, calls in one.calls.items():
        if not key.endswith(("gather", "reduce")) and many.calls[key] != calls:
            wrong.append(f"{many.calls[key]} collectives of {key} instead of {calls}")
    return wrong


def report(found: Sequence[Cell], steps: int, seconds: float) -> dict[str, Any]:
    """The machine-readable result; `ok` only if there are cells and all of them passed."""
    return {
        "ok": bool(found) and all(cell.status == "pass" for cell in found),
        "cells": len(found),
        "passed": sum(cell.status == "pass" for cell in found),
        "runs": len({(cell.run_as, cell.topology, cell.micro_batches) for cell in found}),
        "steps": steps,
        "tolerance": TOLERANCE,
        "max_loss_error": max((cell.loss_error for cell in found if cell.loss_error is not None), default=None),
        "max_parameter_error": max((c.parameter_error for c in found if c.parameter_error is not None), default=None),
        "seconds": round(seconds, 1),
        "results": [asdict(cell) for cell in found],
    }


def table(found: Sequence[Cell]) -> Table:
    """For people: one row per cell."""
    headings = ("topology", "plan", "K", "loss", "parameters", "bits", "above G", "seconds", "")
    out = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for number, cell in enumerate(found):
        last = number + 1 == len(found) or found[number + 1].topology != cell.topology
        bits = {True: "equal", False: "differ", None: "-"}[cell.bit_equal]
        out.add_row(
            cell.topology, cell.plan, str(cell.micro_batches), _short(cell.loss_error),
            _short(cell.parameter_error), bits, f"{cell.bytes_above_gradients} B",
            f"{cell.seconds:.1f}" if cell.run_as == cell.plan else f"as {cell.run_as}",
            {"pass": "[green]pass", "fail": "[red]fail", "error": "[red]error"}[cell.status], end_section=last,
        )  # fmt: skip
    return out


def _short(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result there as JSON; - for standard output")
    parser.add_argument("--plans", nargs="+", default=list(PRESETS), choices=list(PRESETS), metavar="PLAN",
                        help=f"of {', '.join(PRESETS)} (default: all)")  # fmt: skip
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), metavar="SIZES",
                        help=f"sizes of equally many ranks (default: {' '.join(TOPOLOGIES)})")  # fmt: skip
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of each run (default: {STEPS})")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--codegen", dest="mode", action="store_const", const="code", default="graph",
                     help="a covering dozen of the cells, through Inductor (without: Dynamo and all passes only)")  # fmt: skip
    how.add_argument("--eager", dest="mode", action="store_const", const="eager", help="without a compiler")
    parser.add_argument(
        "--replay", type=int, metavar="N", help="instead: two steps N times from one state, hops delayed, must give the same bits"
    )  # fmt: skip


def command(arguments: argparse.Namespace) -> int:
    """0: every cell passed; 1: one did not; 2: nothing to run."""
    console = Console(stderr=arguments.json == "-", soft_wrap=True)
    try:
        worlds = {Topology.parse(text).world_size for text in arguments.topologies}
    except ValueError as error:
        console.print(f"zcompile verify: {error}", style="red", markup=False)
        return 2
    replays: int | None = arguments.replay
    wanted: Sequence[Any] = cells(arguments.plans, arguments.topologies, arguments.mode)
    if replays is not None:
        wanted = replay.cells(arguments.plans, arguments.topologies, arguments.mode, replays)
    why = ""
    if not wanted:
        why = "no cell is left"
    elif len(worlds) != 1 or arguments.steps < 1:
        why = "the topologies must have equally many ranks, and --steps at least 1"
    elif replays is not None and replays < 1:
        why = f"--replay {replays}: must be at least 1"
    if why:
        console.print(f"zcompile verify: {why}", style="red", markup=False)
        return 2
    begin = time.monotonic()
    pool = Pool(worlds.pop())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("verify", total=len(wanted))

            def done(cell: Any) -> None:
                where = f"{cell.plan} on {cell.topology}"
                progress.update(task, advance=1, description=where)
                for line in cell.failures:
                    k = "" if replays else f", K={cell.micro_batches}"
                    progress.console.print(f"{where}{k}: {line}", markup=False)

            if replays is not None:
                replay.run(wanted, pool, done)
            else:
                verify(wanted, pool, steps=arguments.steps, done=done)
    finally:
        pool.close()
    seconds = time.monotonic() - begin
    if replays is not None:
        result = replay.report(wanted, seconds)
        console.print(replay.table(wanted))
        console.print(f"{result['passed']} of {result['cells']} pass in {seconds:.0f} s: {replays} replays each")
    else:
        result = report(wanted, arguments.steps, seconds)
        console.print(table(wanted))
        console.print(
            f"{result['passed']} of {result['cells']} cells pass ({result['runs']} runs of {arguments.steps} steps under each optimizer) "
            f"in {result['seconds']:.0f} s; largest differences to DDP: loss {_short(result['max_loss_error'])}, "
            f"parameters {_short(result['max_parameter_error'])}"
        )
    write_json(result, arguments.json)
    return 0 if result["ok"] else 1
