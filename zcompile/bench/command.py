"""`zcompile bench`: the same model, data and steps with each system in turn, A B C A B C ..., and who is faster.

Without a launcher it starts the ranks on this machine, over loopback or over a network that it shapes itself (`--mbit`: root), a fresh
set of processes for each run. Under a launcher (torchrun, srun) the ranks are the launcher's, and all systems run in them one after the
other.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from zcompile import _torch_compat as compat
from zcompile.bench import network, report, systems
from zcompile.bench.rank import Task, build
from zcompile.cli import exit_on_sigterm, write_json
from zcompile.topology import Topology

MOST_RANKS = 64
TIMEOUT = 900.0
"""Seconds for one run of all ranks, compiling included."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--systems", default=" ".join(systems.DEFAULT), metavar="NAMES",
        help=f"separated by blanks: {', '.join((*systems.PEERS, *systems.OURS))}; zc:PRESET,option=value,...; label=file.py:function "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--model", default="gpt-21m", help="a named shape, or file.py:function (default: %(default)s)")
    parser.add_argument("--topology", default="2x2x2", help="sizes, fastest first (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank and step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a run (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, from 2 on (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, help="runs of each system (default: %(default)s)")
    parser.add_argument(
        "--mbit", metavar="NODE,CLUSTER",
        help="shape a network: Mbit/s of a pair's link and of a node's uplink, 0 for no limit; needs root (default: loopback)",
    )  # fmt: skip
    parser.add_argument(
        "--loss-tolerance", type=float, default=0.005, metavar="PART",
        help="of the loss, by which a system may differ from `ddp` (or the first one) without being named (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the result there; - for standard output")
    parser.add_argument("--chart", metavar="FILE", help="draw bars there (.png, .svg); needs matplotlib")


def refusal(arguments: argparse.Namespace) -> str:
    """What is wrong with the arguments; "" if nothing is."""
    try:
        names = arguments.systems.split()
        for name in names:
            systems.parse(name)
        if not names:
            return "--systems is empty"
        if len({systems.label(name) for name in names}) < len(names):
            return f"--systems {arguments.systems!r}: two of them have one name"
        topology = Topology.parse(arguments.topology)
        if ".py:" not in arguments.model:
            with torch.device("meta"):
                build(arguments.model)
        rates(arguments.mbit)
    except ValueError as error:
        return str(error)
    for name, least in (("batch", 1), ("steps", 1), ("warmup", 2), ("repetitions", 1)):
        if getattr(arguments, name) < least:
            return f"--{name} {getattr(arguments, name)}: must be a number from {least}"
    if not arguments.loss_tolerance >= 0:
        return f"--loss-tolerance {arguments.loss_tolerance}: must be a number from 0"
    if not 1 <= topology.world_size <= MOST_RANKS and not launched():
        return f"topology {topology.key} has {topology.world_size} ranks: a process is started for each; valid: up to {MOST_RANKS}"
    if arguments.mbit and launched():
        return "--mbit shapes a network for ranks that are started here; under a launcher the network is the launcher's"
    if arguments.mbit and len(topology.sizes) != 3:
        return f"--mbit: a shaped network has three levels (pair x node x cluster), topology {topology.key} has {len(topology.sizes)}"
    if arguments.mbit and network.missing():
        return f"--mbit: {network.missing()}"
    return ""


def rates(text: str | None) -> tuple[float, float] | None:
    """ "400,100" -> (400, 100). ValueError if it is something else."""
    if text is None:
        return None
    parts = text.split(",")
    try:
        node, cluster = (float(part) for part in parts)
    except ValueError:
        raise ValueError(f"--mbit {text!r}: must be two numbers, such as 400,100") from None
    if node < 0 or cluster < 0:
        raise ValueError(f"--mbit {text!r}: must not be negative")
    return node, cluster


def launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def machine_rates(
    topology: Topology, mbit: tuple[float, float] | None, model: str, batch: int, say: Callable[[str], Any] = print
) -> dict[str, float]:
    """What is known of the machine, for zcompile's schedule: the shaped links' B/s as each rank has its share of them, and the FLOP/s of
    this model and the B/s of memory on this computer, measured here and divided by the ranks that share its cores."""
    share = min(1.0, (os.cpu_count() or 1) / topology.world_size)
    memory, (flops, why) = share * _memory(), _flops(model, batch)
    if why:
        say(
            f"zcompile schedules by the speed of large products, not of this model, which does not run here alone: {why}"
        )
    found = {"flops": share * flops, "memory": memory}
    if mbit is not None:
        per_pair, per_node = topology.sizes[0], topology.sizes[0] * topology.sizes[1]
        for name, limit, ranks in (("node", mbit[0], per_pair), ("cluster", mbit[1], per_node)):
            if limit:
                found[name] = limit * 1e6 / 8 / ranks
        found["pair"] = memory / 4  # a copy into the socket and one out of it, on both sides
    return found


def _flops(name: str, batch: int, size: int = 512) -> tuple[float, str]:
    """What plain torch reaches in a forward and backward in bf16 on one core: a fraction of what large products alone do. Those, where the
    model's data asks for its ranks; and why."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, data = build(name)
        tokens = data(0, 0, batch)
        model = model.bfloat16()
        with FlopCounterMode(display=False) as counter:
            model(tokens).backward()
        return counter.get_total_flops() / min(_timed(lambda: model(tokens).backward()) for _ in range(3)), ""
    except Exception as error:  # a model of the user's may need its job; what else is wrong with it the ranks will say
        a = torch.randn(size, size).bfloat16()
        return 2 * size**3 / min(_timed(lambda: a @ a) for _ in range(5)), f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)


def _memory(size: int = 1 << 24) -> float:
    a = torch.zeros(size)
    b = torch.empty_like(a)
    return 8 * size / min(_timed(lambda: b.copy_(a)) for _ in range(5))


def _timed(function: Any) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def run_here(arguments: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Start the ranks of every run on this machine."""
    topology, mbit = Topology.parse(arguments.topology), rates(arguments.mbit)
    names = arguments.systems.split()
    scheduled = any(name not in systems.PEERS for name in names)
    known = machine_rates(topology, mbit, arguments.model, arguments.batch, say) if scheduled else {}
    here = network.Shaped(topology.sizes, *mbit) if mbit else network.Local(topology.sizes)
    result = _result(arguments, here.description, names)
    with tempfile.TemporaryDirectory(prefix="zcompile-bench") as folder, here:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        for repetition in range(arguments.repetitions):
            for name in names:
                task = _task(arguments, name, str(out), known)
                command = [sys.executable, "-m", "zcompile.bench.rank", json.dumps(asdict(task))]
                begin, out_of = time.monotonic(), arguments.repetitions
                worked = here.run(command, {"TORCH_CPP_LOG_LEVEL": "ERROR"}, log, TIMEOUT)
                found = json.loads(out.read_text()) if worked else {"system": name, "error": reason(log)}
                out.unlink(missing_ok=True)
                _add(result, found, repetition)
                text = f"{found['seconds']:.3f} s a step" if worked else found["error"]
                say(
                    f"run {repetition + 1} of {out_of}: {systems.label(name)}: {text}, {time.monotonic() - begin:.0f} s in all"
                )
    return result


def reason(log: Path) -> str:
    """The error in the ranks' output that says most: the first that is not about a connection that another rank's death closed, and of its
    trace the line that names it."""
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line.strip()) for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    own = [line for line in errors if "Connection" not in line and "File" not in line]
    named = [line for line in own if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or own or errors or lines or [f"no output, or not over after {TIMEOUT:g} s"])[0][:400]


def run_launched(arguments: argparse.Namespace, say: Any, done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """In the launcher's ranks, one system after the other. The same result on every rank. Where one rank fails alone, `done` is called with
    the result so far, and the process ends."""
    from zcompile.bench.launched import Together, wait_for_report
    from zcompile.bench.rank import measure
    from zcompile.launcher import init_from_launcher

    init_from_launcher()
    store, rank = compat.default_store(), torch.distributed.get_rank()
    names = arguments.systems.split()
    result = _result(arguments, "the launcher's ranks", names)
    repetition, name = 0, ""

    def end(text: str) -> None:
        error = f"{text}; the others waited for it, and nothing more was run"
        _add(result, {"system": name, "error": error}, repetition)
        done(result)
        wait_for_report(store, rank)
        os._exit(1)

    together = Together(end)
    for repetition in range(arguments.repetitions):
        for name in names:
            task = _task(arguments, name, "", {})
            measured, error = together.run(functools.partial(measure, task))
            found = {"system": name, "error": error} if measured is None else {**asdict(task), **measured}
            _add(result, found, repetition)
            say(f"run {repetition + 1} of {arguments.repetitions}: {systems.label(name)}")
    return result


def _task(arguments: argparse.Namespace, name: str, out: str, known: dict[str, float]) -> Task:
    return Task(
        name, arguments.model, arguments.topology, arguments.batch, arguments.steps, arguments.warmup, out, rates=known
    )


def _result(arguments: argparse.Namespace, description: str, names: list[str]) -> dict[str, Any]:
    return {
        "model": arguments.model, "topology": arguments.topology, "network": description, "batch": arguments.batch,
        "steps": arguments.steps, "repetitions": arguments.repetitions, "torch": torch.__version__, "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"), "ranks": Topology.parse(arguments.topology).world_size,
        "loss_tolerance": arguments.loss_tolerance, "order": names, "parameters": 0, "tokens_per_step": 0, "runs": [],
    }  # fmt: skip


def _add(result: dict[str, Any], found: dict[str, Any], repetition: int) -> None:
    result["runs"].append({**found, "repetition": repetition})
    if "parameters" in found:
        result["parameters"], result["tokens_per_step"] = found["parameters"], found["tokens"]


def command(arguments: argparse.Namespace) -> int:
    """0: every system ran; 1: one did not; 2: bad arguments."""
    errors = Console(stderr=True, soft_wrap=True)
    why = refusal(arguments)
    if why:
        errors.print(f"zcompile bench: {why}", style="red", markup=False)
        return 2
    begin, first = time.monotonic(), not launched() or os.environ.get("RANK") == "0"

    def say(text: str) -> None:
        if first:
            errors.print(f"{text} ({time.monotonic() - begin:.0f} s)", style="dim", markup=False)

    def done(result: dict[str, Any]) -> None:
        report.summarise(result)
        result["seconds"] = round(time.monotonic() - begin, 1)
        if first:
            report.show(result, Console(stderr=arguments.json == "-", width=None if sys.stdout.isatty() else 190))
            write_json(result, arguments.json)
            if arguments.chart:
                report.chart([result], Path(arguments.chart))
            sys.stdout.flush()

    exit_on_sigterm()
    try:
        result = run_launched(arguments, say, done) if launched() else run_here(arguments, say)
    except network.NetworkError as error:
        errors.print(f"zcompile bench: {error}", style="red", markup=False)
        return 2
    done(result)
    return 1 if any("error" in row for row in result["systems"].values()) else 0
