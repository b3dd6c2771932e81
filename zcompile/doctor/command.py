"""`zcompile doctor`: look at a job before it trains. Run it in the job's place, with the job's launcher and variables.

srun ... zcompile doctor --topology frontier        all ranks look, rank 0 prints, every rank ends with the exit code
zcompile doctor --recording job.json                judge a recorded job, anywhere
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from zcompile import _torch_compat as compat
from zcompile.cli import write_json
from zcompile.doctor import communicators, launch, network, versions
from zcompile.doctor.findings import STATUSES, Finding
from zcompile.doctor.recording import Recording, assemble, look

RULES: tuple[Callable[[Recording], Iterator[Finding]], ...] = (
    launch.launcher, launch.binding, launch.devices, network.plugin, network.variables, network.interfaces, network.rendezvous,
    network.caches, versions.versions, versions.equal,
)  # fmt: skip
COLOURS = {"bad": "red", "warn": "yellow", "ok": "green", "skip": "dim"}


def judge(recording: Recording, declared: str | None = None) -> list[Finding]:
    """Every rule on a recording.

    Args:
        declared: the topology that the job will ask for, as text.
    """
    found = list(launch.topology(recording, declared))
    for rule in RULES:
        found += rule(recording)
    return sorted(found, key=lambda finding: STATUSES.index(finding.status))


def report(found: Sequence[Finding]) -> dict[str, Any]:
    """The machine-readable result."""
    counts = {status: sum(finding.status == status for finding in found) for status in STATUSES}
    return {"ok": not counts["bad"], "counts": counts, "findings": [finding.to_json() for finding in found]}


def show(found: Sequence[Finding], console: Console) -> None:
    """The table, worst first, then what to do."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "check", "seen", "right"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "check")
    for finding in found:
        colour = COLOURS[finding.status]
        table.add_row(
            f"[{colour}]{finding.status}", *(_plain(text) for text in (finding.check, finding.seen, finding.right))
        )
    console.print(table)
    for finding in found:
        if finding.advice:
            console.print(
                f"{finding.status}: {finding.check}: {finding.advice}", style=COLOURS[finding.status], markup=False
            )
            if finding.source:
                console.print(f"     {finding.source}", style="dim", markup=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology",
        metavar="TEXT",
        help='what the job will ask for ("frontier", "2x4x2", ...); without: what is found',
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there as JSON; - for standard output")
    parser.add_argument("--recording", metavar="FILE", help="judge this recorded job instead of the one that runs here")
    parser.add_argument("--record", metavar="FILE", help="write down what was looked at, for --recording")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds for each communicator (default: 60)"
    )
    parser.add_argument(
        "--no-communicators", action="store_true", help="look at variables and hosts alone; the ranks still meet"
    )


def command(arguments: argparse.Namespace) -> int:
    """0: nothing is known to be bad; 1: something is; 2: bad arguments. The same on every rank."""
    try:
        if not arguments.timeout > 0:
            raise ValueError(f"--timeout {arguments.timeout:g}: must be a positive number of seconds")
        if arguments.recording:
            if arguments.record:
                raise ValueError("--recording and --record: one reads, the other writes what was looked at")
            return _finish(judge(Recording.read(arguments.recording), arguments.topology), arguments)
    except (OSError, ValueError) as error:
        print(f"zcompile doctor: {error}", file=sys.stderr)
        return 2
    return _job(arguments)


def _finish(found: list[Finding], arguments: argparse.Namespace, writes: bool = True) -> int:
    result = report(found)
    show(found, Console(stderr=arguments.json == "-", soft_wrap=True))
    if writes:
        write_json(result, arguments.json)
    return 0 if result["ok"] else 1


def _alone(found: Finding, arguments: argparse.Namespace, rank: int) -> int:
    """The ranks have not met: each shows what it has seen itself, and rank 0 writes the result."""
    try:
        return _finish([found], arguments, writes=rank == 0)
    except OSError as error:
        print(f"zcompile doctor: {error}", file=sys.stderr)
        return 2


def _unwritable(arguments: argparse.Namespace) -> str:
    """What keeps rank 0 from writing --json and --record, "" if nothing does: asked before anybody begins."""
    for target in (arguments.json, arguments.record):
        if target and target != "-":
            try:
                Path(target).open("a").close()
            except OSError as error:
                return str(error)
    return ""


def _job(arguments: argparse.Namespace) -> int:
    """In a job: every rank looks and tests its communicators; rank 0 collects by the store, which needs none of them, and judges."""
    import torch
    import torch.distributed as dist

    from zcompile.launcher import init_from_launcher, read_launch

    try:
        begun = read_launch()
    except ValueError as error:
        said = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        wanted = "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, or srun"
        return _alone(Finding("launcher", "bad", str(error), wanted), arguments, int(said) if said.isdigit() else 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        init_from_launcher(device, timeout=arguments.timeout)
    except (RuntimeError, ValueError) as error:
        advice = "all ranks must be started, and reach that address: look for one that is missing, and at MASTER_ADDR and MASTER_PORT"
        missed = Finding("rendezvous", "bad", f"rank {begun.rank}: {error}", "all ranks meet", advice)
        return _alone(missed, arguments, begun.rank)
    rank, world, store = dist.get_rank(), dist.get_world_size(), compat.default_store()
    if rank == 0:
        store.set("zc/doctor/unwritable", _unwritable(arguments))
    wrong = bytes(store.get("zc/doctor/unwritable")).decode()
    if wrong and rank:
        store.set(f"zc/doctor/end/{rank}", "")
        return 2
    if wrong:
        print(f"zcompile doctor: {wrong}", file=sys.stderr)
        return _end(store, 2, world, arguments.timeout)
    store.set(f"zc/doctor/look/{rank}", json.dumps(look(rank, begun.local_rank)))
    if rank:
        return _as_told(store, _tests(arguments, device, store), rank, world, arguments.timeout)
    looks = _collect(store, "look", world, arguments.timeout)
    missing = [number for number in range(world) if number not in looks]
    found = [Finding("ranks", "bad", f"no word from ranks {missing[:8]}", "all ranks look")] if missing else []
    recording = assemble([json.loads(looks[number]) for number in sorted(looks)])
    if arguments.record:
        Path(arguments.record).write_text(json.dumps(recording.to_json(), indent=1) + "\n")
    found += judge(recording, arguments.topology)
    found += _merged([_tests(arguments, device, store), *_others_tests(store, world, arguments.timeout)])
    code = _finish(sorted(found, key=lambda finding: STATUSES.index(finding.status)), arguments)
    return _end(store, code, world, arguments.timeout)


def _end(store: compat.Store, code: int, world: int, timeout: float) -> int:
    """Rank 0 says how all end, and waits for them: the store is in its process."""
    store.set("zc/doctor/code", str(code))
    _collect(store, "end", world, timeout, own=False)
    return code


def _tests(arguments: argparse.Namespace, device: Any, store: compat.Store) -> list[Finding]:
    """This rank's communicators; stops where another rank's have failed, as that one goes no further."""
    import torch.distributed as dist

    from zcompile.launcher import topology_of_job

    world = dist.get_world_size()
    if world == 1:
        return [Finding("communicators", "skip", "one rank")]
    if arguments.no_communicators:
        return [Finding("communicators", "skip", "--no-communicators")]
    try:
        topology = topology_of_job(arguments.topology, device, world)
        topology.check_world(world)
    except (ValueError, RuntimeError) as error:
        return [Finding("communicators", "bad", f"no topology: {error}", "a topology that fits the job")]
    return list(communicators.check(topology, device, arguments.timeout))


def _merged(of_ranks: list[list[Finding]]) -> list[Finding]:
    """What all ranks found of their communicators: each kind once, as the first rank has it that found fault with it. What comes after
    the first kind that failed was not reached by all, and says nothing.
    """
    order = list(dict.fromkeys(finding.check for found in of_ranks for finding in found))
    merged: list[Finding] = []
    for check in order:
        all_of = [finding for found in of_ranks for finding in found if finding.check == check]
        merged.append(next((finding for finding in all_of if finding.status == "bad"), all_of[0]))
        if merged[-1].status == "bad":
            merged += [
                Finding(later, "skip", f"not reached: {check} failed") for later in order[order.index(check) + 1 :]
            ]
            break
    return merged


def _others_tests(store: compat.Store, world: int, timeout: float) -> list[list[Finding]]:
    said = _collect(store, "tests", world, 4 * timeout, own=False)
    silent = [rank for rank in range(1, world) if rank not in said]
    found = [[Finding(**finding) for finding in json.loads(text)] for text in said.values()]
    if silent:
        found.append(
            [
                Finding(
                    "communicators", "bad", f"no word from ranks {silent[:8]}", "all ranks come to the end of the tests"
                )
            ]
        )
    return found


def _as_told(store: compat.Store, found: list[Finding], rank: int, world: int, timeout: float) -> int:
    store.set(f"zc/doctor/tests/{rank}", json.dumps([finding.to_json() for finding in found]))
    deadline = time.monotonic() + 5 * timeout
    while not store.check(["zc/doctor/code"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    code = int(store.get("zc/doctor/code")) if store.check(["zc/doctor/code"]) else 1
    store.set(f"zc/doctor/end/{rank}", "")
    return code


def _collect(store: compat.Store, what: str, world: int, timeout: float, own: bool = True) -> dict[int, bytes]:
    """What the ranks have set under `what`, by rank; those that have not done so within `timeout` seconds are left out."""
    found: dict[int, bytes] = {}
    deadline = time.monotonic() + timeout
    wanted = range(0 if own else 1, world)
    while len(found) < len(wanted) and time.monotonic() < deadline:
        for rank in wanted:
            if rank not in found and store.check([f"zc/doctor/{what}/{rank}"]):
                found[rank] = bytes(store.get(f"zc/doctor/{what}/{rank}"))
        time.sleep(0.02)
    return dict(sorted(found.items()))
