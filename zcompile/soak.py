"""`zcompile soak`: a short job started again and again, each time from what the one before has saved.

Users of large machines see a good part of their restarts fail. Here every restart is a fresh set of processes that finds the last
checkpoint, takes a few steps and saves; at the end the weights must be those of a run that was never stopped, to the bit. With a command
after `--` it is that command which is started, and its exit code that counts: a job step on a cluster, say.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from zcompile import checkpoint, ranks
from zcompile.cli import write_json
from zcompile.plan import Plan
from zcompile.shapes import SHAPES, Decoder
from zcompile.storage import latest_checkpoint
from zcompile.topology import Topology

KEPT = 2
"""Checkpoints that stay beside each other."""
TAIL = 2000
"""Characters of a failure's text that are kept."""


def job(rank: int, folder: str, topology: str, plan: str, steps: int, compiled: bool, save: bool) -> dict[str, Any]:
    """One start: the last checkpoint, `steps` steps, a checkpoint. What rank 0 says of it is the same on all ranks."""
    from zcompile.api import full_state_dict
    from zcompile.wrap import hierarchical_zero

    torch.manual_seed(0)
    model: Any = hierarchical_zero(Decoder(SHAPES["tiny"]), topology=topology, plan=plan, compile=compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1000 + rank)
    at, last = 0, latest_checkpoint(folder)
    if last is not None:
        found = checkpoint.load(model, model.zero, optimizer, last, False)
        if not found.exact:
            raise RuntimeError(f"{last} was not restored exactly: {'; '.join(found.notices)}")
        at = found.extra["step"]
    loss = torch.zeros(())
    for _ in range(steps):
        tokens = torch.randint(
            0, SHAPES["tiny"].vocabulary, (2, SHAPES["tiny"].sequence + 1)
        )  # from this rank's own random state
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    at += steps
    if save:
        checkpoint.save(model, model.zero, optimizer, Path(folder, f"step-{at:06d}"), {"step": at}, None, False)
        if rank == 0:
            for old in sorted(Path(folder).glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
    digest = hashlib.sha256()
    for name, value in full_state_dict(model).items():
        digest.update(name.encode() + value.numpy().tobytes())
    dist.barrier()
    return {"step": at, "loss": loss.item(), "weights": digest.hexdigest()}


def soak(restarts: int, start: Callable[[], Any], told: Callable[[int, str], None]) -> dict[str, Any]:
    """Call `start` so many times; it raises where a start fails. `told` hears of each: its number and what went wrong, or ""."""
    failures, seconds = [], []
    last: Any = None
    for number in range(restarts):
        begin, error = time.monotonic(), ""
        try:
            last = start()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"[-TAIL:]
            failures.append({"restart": number, "error": error})
        seconds.append(time.monotonic() - begin)
        told(number, error)
    return {
        "restarts": restarts,
        "passed": restarts - len(failures),
        "failures": failures,
        "seconds": {"least": min(seconds), "median": statistics.median(seconds), "most": max(seconds), "all": sum(seconds)},
        "last": last,
    }  # fmt: skip


def local(arguments: argparse.Namespace, told: Callable[[int, str], None]) -> dict[str, Any]:
    """The job of this module on local processes, and beside it the run that is never stopped."""
    world = Topology.parse(arguments.topology).world_size
    settings = (arguments.topology, arguments.plan, arguments.steps, not arguments.eager)

    def start(folder: str, steps: int, save: bool, timeout: float) -> Any:
        topology, plan, _, compiled = settings
        return ranks.run(job, world, folder, topology, plan, steps, compiled, save, timeout=timeout)[0]

    with tempfile.TemporaryDirectory(prefix="zcompile-soak-") as temporary:
        folder = str(arguments.folder or temporary)
        Path(folder).mkdir(parents=True, exist_ok=True)
        if any(Path(folder).iterdir()):
            raise ValueError(f"--folder {folder} is not empty: a soak begins afresh")
        result = soak(arguments.restarts, lambda: start(folder, arguments.steps, True, arguments.timeout), told)
        if result["last"] is not None:
            whole = start(folder + "-none", result["last"]["step"], False, arguments.timeout * arguments.restarts)
            result["uninterrupted"] = whole
            result["same_bits"] = whole == result["last"]
            result["lost_steps"] = max(0, arguments.steps * result["passed"] - result["last"]["step"])
    return result


def run_command(command: list[str], timeout: float) -> int:
    """Start `command` in a session of its own. RuntimeError with the end of its output if it fails or is late; all of it is then killed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL))
        said = output.read().decode(errors="replace")
    if code != 0:
        raise RuntimeError(f"exit code {code}\n{said}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--restarts", type=int, default=100, help="(default: %(default)s)")
    option("--steps", type=int, default=2, help="optimizer steps of each start (default: %(default)s)")
    option(
        "--topology",
        default="2x2",
        metavar="SIZES",
        help="of the local processes, fastest first (default: %(default)s)",
    )
    option("--plan", default="zero_topo", help="a preset (default: %(default)s)")
    option("--eager", action="store_true", help="without a compiler")
    option(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="that one start may take (default: %(default)s)"
    )
    option("--folder", type=Path, help="for the checkpoints, new or empty (default: a temporary one)")
    option("--json", metavar="FILE", help="write the result there as JSON; - for standard output")
    option("job", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="start this instead, and count its exit codes")


def refusal(arguments: argparse.Namespace) -> str:
    """What is wrong with the arguments, "" if nothing is."""
    if arguments.restarts < 1 or arguments.steps < 1 or not arguments.timeout > 0:
        return "--restarts, --steps and --timeout must be positive"
    try:
        Plan.parse(arguments.plan).resolve(Topology.parse(arguments.topology), "float32")
    except ValueError as error:
        return str(error)
    if arguments.job and shutil.which(arguments.job[0]) is None:
        return f"{arguments.job[0]}: no such command"
    return ""


def table(result: dict[str, Any]) -> Table:
    out = Table("soak", "", box=box.SIMPLE_HEAD, pad_edge=False)
    passed, all_of_them = result["passed"], result["restarts"]
    out.add_row("passed", f"[{'green' if passed == all_of_them else 'red'}]{passed} of {all_of_them}")
    seconds = result["seconds"]
    out.add_row("seconds a start", f"{seconds['least']:.1f} to {seconds['most']:.1f}, median {seconds['median']:.1f}")
    if "same_bits" in result:
        verdict = "[green]the same bits" if result["same_bits"] else "[red]other bits"
        out.add_row("beside a run without a stop", f"{verdict} after step {result['last']['step']}")
    if result.get("lost_steps"):
        out.add_row(
            "lost", f"[red]{result['lost_steps']} steps of starts that passed: a start did not find the last checkpoint"
        )
    return out


def command(arguments: argparse.Namespace) -> int:
    """0: every start passed, and the weights are those of a run that was not stopped; 1: not so; 2: a bad argument."""
    console = Console(stderr=arguments.json == "-", soft_wrap=True)
    arguments.job = arguments.job[1:] if arguments.job[:1] == ["--"] else arguments.job
    wrong = refusal(arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if not wrong:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("soak", total=arguments.restarts)

            def told(number: int, error: str) -> None:
                progress.update(task, advance=1)
                if error:
                    progress.console.print(f"restart {number}: {error}", style="red", markup=False)

            try:
                if arguments.job:
                    result = soak(arguments.restarts, lambda: run_command(arguments.job, arguments.timeout), told)
                else:
                    result = local(arguments, told)
            except ValueError as error:
                wrong = str(error)
    if wrong:
        console.print(f"zcompile soak: {wrong}", style="red", markup=False)
        return 2
    result["ok"] = not result["failures"] and result.get("same_bits", True) and not result.get("lost_steps")
    console.print(table(result))
    write_json(result, arguments.json)
    return 0 if result["ok"] else 1
