"""`zcompile calibrate`: measure this machine, and write it as a file that a topology can be made of.

Every rank of a job measures at once, as ranks share cores and links when they train: matrix products of several sizes, a copy of the
memory, the least that an operation takes; then for each level an all-gather and an all-to-all by messages of several sizes, all groups
of the level at the same time. Short hops are timed many in a row: ranks leave a barrier milliseconds apart where they share cores, and
one hop after it would have that for its latency. The slower of the two kinds counts, and of a hop the slowest rank: those that share a
link are served one after another, each time another one last. Without a launcher the ranks are started here, over loopback or over a
network that is shaped (`--mbit`: root); under a launcher they are the launcher's.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from zcompile.bench import network
from zcompile.bench.command import launched, rates
from zcompile.cli import exit_on_sigterm, write_json
from zcompile.layout import role_name
from zcompile.topology import Topology

TIMEOUT = 300.0
PRODUCTS = (32, 64, 128, 256, 512)
MESSAGES = (2**12, 2**15, 2**18, 2**20, 2**22)
"""Bytes that one rank receives."""
REPETITIONS = 5
IN_A_ROW = 0.1
"""Seconds that hops are repeated for between two barriers, if one does not take longer."""


def measure(topology: Topology, device: torch.device, messages: Sequence[int] = MESSAGES) -> dict[str, Any]:
    """On every rank of a job: what the device reaches, the mean over ranks, and what hops over each level take: see `_merged`."""
    from zcompile.runtime import Runtime

    runtime = Runtime.get(topology, timeout=TIMEOUT)
    found: dict[str, Any] = {"products": {}, "levels": {}}
    for dtype in (torch.bfloat16, torch.float32):
        rows = []
        for size in PRODUCTS:
            a = torch.randn(size, size, device=device).to(dtype)
            rows.append((2.0 * size**3, 2.0 * size**3 / _seconds(functools.partial(torch.mm, a, a), device)))
        found["products"][str(dtype).removeprefix("torch.")] = rows
    big = torch.zeros(1 << 22, device=device)
    into = torch.empty_like(big)
    found["memory_bandwidth"] = 2 * big.numel() * 4 / _seconds(lambda: into.copy_(big), device)
    small = torch.zeros(16, device=device)
    found["overhead"] = _seconds(lambda: small.add_(1.0), device)
    for level in topology.levels:
        if level.size > 1:
            found["levels"][level.name] = [(n, _hop(topology.key, level.name, level.size, n, device)) for n in messages]
    del runtime
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return _merged(everyone)


def _seconds(function: Callable[[], Any], device: torch.device, repetitions: int = REPETITIONS) -> float:
    """Of one call: the median of a few batches, each long enough to time."""
    function()
    rounds, times = 1, []
    while True:
        begin = time.perf_counter()
        for _ in range(rounds):
            function()
        _synchronise(device)
        spent = time.perf_counter() - begin
        if spent < 2e-3 and rounds < 1 << 16:
            rounds *= 4
            continue
        times.append(spent / rounds)
        if len(times) == repetitions:
            return sorted(times)[repetitions // 2]


def _hop(key: str, level: str, size: int, received: int, device: torch.device) -> list[list[float]]:
    """Seconds of one hop over a level in which each rank receives so many bytes; all groups of the level at once.

    Returns those of each repetition, the mean of hops in a row, for an all-gather and for an all-to-all.
    """
    functional = torch.ops._c10d_functional
    part = max(received // (size - 1), 1)
    one, many = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (part, part * size))

    def gather() -> Any:
        return functional.wait_tensor(functional.all_gather_into_tensor(one, size, role_name(key, level, "gather")))

    def exchange() -> Any:
        split = [part] * size
        return functional.wait_tensor(functional.all_to_all_single(many, split, split, role_name(key, level, "reduce")))

    found = []
    for function in (gather, exchange):
        _row(function, 1, device)  # makes connections
        longest = torch.tensor(_row(function, 1, device), device=device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        rounds = max(1, min(100, int(IN_A_ROW / float(longest))))
        found.append([_row(function, rounds, device) for _ in range(REPETITIONS)])
    return found


def _row(hop: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Seconds of one of so many hops after a barrier."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(rounds):
        hop()
    _synchronise(device)
    return (time.perf_counter() - begin) / rounds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _merged(everyone: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over ranks. Of a hop, in each repetition the slowest rank's time, of these the median, of the two kinds the slower."""
    count = len(everyone)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / count

    def hop(ranks: Sequence[list[list[float]]]) -> float:
        kinds = ([max(times) for times in zip(*kind, strict=True)] for kind in zip(*ranks, strict=True))
        return max(statistics.median(slowest) for slowest in kinds)

    first = everyone[0]
    return {
        "products": {
            dtype: [(flops, mean([each["products"][dtype][i][1] for each in everyone])) for i, (flops, _) in enumerate(rows)]
            for dtype, rows in first["products"].items()
        },
        "memory_bandwidth": mean([each["memory_bandwidth"] for each in everyone]),
        "overhead": mean([each["overhead"] for each in everyone]),
        "levels": {
            level: [(n, hop([each["levels"][level][i][1] for each in everyone])) for i, (n, _) in enumerate(rows)]
            for level, rows in first["levels"].items()
        },
    }  # fmt: skip


def machine(
    found: dict[str, Any], topology: Topology, source: str, memory: float, shaped: network.Shaped | None = None
) -> dict[str, Any]:
    """The machine's file.

    Args:
        found: what `measure` returns.
        memory: bytes of a rank.
        shaped: the network that was built for it, which says what no hop alone does: those over the outermost level cross the links of the
            one below it, too, and links that have rested let a burst pass.
    """

    def value(number: Any) -> dict[str, Any]:
        return {"value": number, "source": source}

    levels = []
    for level in topology.levels:
        rows = found["levels"].get(level.name)
        if rows is None:  # of one rank: nothing to measure
            rows = [(2**20, 1e-3)]
        latency = rows[0][1]
        largest, seconds = rows[-1]
        bandwidth = largest / max(seconds - latency, 1e-9) if len(rows) > 1 else largest / seconds
        curve = [[n, min(1.0, max(n / bandwidth / max(t - latency, n / bandwidth), 1e-3))] for n, t in rows[1:]]
        levels.append(
            {
                "name": level.name,
                "size": level.size,
                "bandwidth": value(bandwidth),
                "latency": value(latency),
                "curve": value(curve),
            }
        )
        if shaped and (burst := shaped.bursts.get(level.name)):
            levels[-1]["burst"] = {
                "value": burst,
                "source": "the token buckets of the shaped network, divided among ranks",
            }
    between = levels.pop()
    del between["size"]
    if shaped and levels:
        between["via"] = value([levels[-1]["name"]])
    peaks = {dtype: max(rate for _, rate in rows) for dtype, rows in found["products"].items()}
    rows = found["products"]["bfloat16"]
    efficiency = [[flops, min(rate / peaks["bfloat16"], 1.0)] for flops, rate in rows]
    return {
        "name": platform.node() or "this computer",
        "note": f"{topology.key}, {source}",
        "inside": levels,
        "between": between,
        "device": {
            "name": platform.processor() or platform.machine(),
            "chip": "",
            "peak_flops": {dtype: value(rate) for dtype, rate in peaks.items()},
            "memory": value(memory),
            "memory_bandwidth": value(found["memory_bandwidth"]),
            "overhead": value(found["overhead"]),
            "efficiency": value(efficiency),
        },
    }


def measure_here(text: str, mbit: tuple[float, float] | None) -> dict[str, Any]:
    """Start the ranks of a topology on this computer and measure. RuntimeError has the ranks' error."""
    topology = Topology.parse(text)
    here = network.Shaped(topology.sizes, *mbit) if mbit else network.Local(topology.sizes)
    with tempfile.TemporaryDirectory(prefix="zcompile-calibrate") as folder, here:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        command = [sys.executable, "-m", "zcompile.calibrate", json.dumps({"topology": text, "out": str(out)})]
        if not here.run(command, {"TORCH_CPP_LOG_LEVEL": "ERROR"}, log, TIMEOUT):
            from zcompile.bench.command import reason

            raise RuntimeError(f"a rank failed: {reason(log)}")
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def memory_of_a_rank(ranks: int) -> float:
    """Bytes: this host's memory divided among its ranks, or a GPU's."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def calibrate(text: str, mbit: tuple[float, float] | None = None) -> dict[str, Any]:
    """Measure this computer as a topology of ranks; the machine's file."""
    topology = Topology.parse(text)
    limit = f" --mbit {mbit[0]:g},{mbit[1]:g}" if mbit else ""
    source = f"measured by `zcompile calibrate --topology {text}{limit}` on {datetime.date.today()}"
    shaped = network.Shaped(topology.sizes, *mbit) if mbit else None
    return machine(measure_here(text, mbit), topology, source, memory_of_a_rank(topology.world_size), shaped)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology", default="2x2x2", help="ranks to start here, fastest level first (default: %(default)s)"
    )
    parser.add_argument(
        "--mbit",
        metavar="NODE,CLUSTER",
        help="shape a network: Mbit/s of a pair's link and of a node's uplink; needs root",
    )
    parser.add_argument(
        "--out", metavar="FILE", default="machine.json", help="the machine's file (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the machine there too; - for standard output")


def command(arguments: argparse.Namespace) -> int:
    """0: written; 1: a rank failed; 2: bad arguments."""
    errors = Console(stderr=True, soft_wrap=True)
    exit_on_sigterm()
    try:
        topology, mbit = Topology.parse(arguments.topology), rates(arguments.mbit)
        if mbit and len(topology.sizes) != 3:
            raise ValueError(
                f"--mbit: a shaped network has three levels, topology {topology.key} has {len(topology.sizes)}"
            )
        if mbit and network.missing():
            raise ValueError(f"--mbit: {network.missing()}")
        if mbit and launched():
            raise ValueError(
                "--mbit shapes a network for ranks that are started here; under a launcher the network is the launcher's"
            )
        if topology.world_size > 64 and not launched():
            raise ValueError(
                f"topology {topology.key} has {topology.world_size} ranks: a process is started for each; valid: up to 64"
            )
        if not arguments.out.endswith(".json"):
            raise ValueError(f"--out {arguments.out!r}: a machine's file ends in .json")
    except ValueError as error:
        errors.print(f"zcompile calibrate: {error}", style="red", markup=False)
        return 2
    try:
        if launched():
            from zcompile.launcher import init_from_launcher

            init_from_launcher()
            device = (
                torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
            )
            found = measure(topology, device)
            source = f"measured by `zcompile calibrate --topology {arguments.topology}` on {datetime.date.today()}, {dist.get_backend()}"
            data = machine(found, topology, source, memory_of_a_rank(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        else:
            data = calibrate(arguments.topology, mbit)
    except (RuntimeError, network.NetworkError) as error:
        errors.print(f"zcompile calibrate: {error}", style="red", markup=False)
        return 1
    if launched() and dist.get_rank():
        return 0
    Path(arguments.out).write_text(json.dumps(data, indent=1) + "\n")
    if not write_json(data, arguments.json):
        show(Console(highlight=False), data, arguments.out, topology)
    return 0


def show(console: Console, data: dict[str, Any], path: str, topology: Topology) -> None:
    device = data["device"]
    table = Table(title=f"{data['name']}: {data['note']}", title_justify="left", show_edge=False, pad_edge=False)
    for head in ("level", "ranks", "GB/s a rank", "latency us", "part of it by message"):
        table.add_column(head, justify="left" if head == "level" else "right")
    for level in (*data["inside"], {**data["between"], "size": topology.sizes[-1]}):
        curve = ", ".join(f"{int(n) // 1024} KiB {part:.2f}" for n, part in level["curve"]["value"])
        table.add_row(
            level["name"],
            str(level["size"]),
            f"{level['bandwidth']['value'] / 1e9:.3g}",
            f"{level['latency']['value'] * 1e6:.0f}",
            curve,
        )
    console.print(table)
    peaks = ", ".join(f"{dtype} {entry['value'] / 1e9:.1f} GFLOP/s" for dtype, entry in device["peak_flops"].items())
    console.print(
        f"a rank: {peaks}; memory {device['memory_bandwidth']['value'] / 1e9:.2f} GB/s, {device['memory']['value'] / 1e9:.1f} GB; "
        f"an operation takes at least {device['overhead']['value'] * 1e6:.1f} us"
    )
    console.print(f"written to {path}: --topology {path}:{topology.sizes[-1]}")


def main() -> None:
    from zcompile.launcher import init_from_launcher

    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    init_from_launcher()
    found = measure(Topology.parse(task["topology"]), torch.device("cpu"))
    if dist.get_rank() == 0:
        Path(task["out"]).write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
