"""`zcompile kernel-bench`: the quantisers against a copy of the same values, eager torch and Inductor, measured in turn in one run.

GB/s are bytes of the plain side (bf16 where a value is quantised or comes back, fp32 where it is a sum) per second, whatever else is
read and written; the ratio is that to a copy of those bytes in the same repeat. On a GPU the same with the Triton kernels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from zcompile.cli import write_json
from zcompile.kernel_operations import BLOCK, Operation, layer, operations
from zcompile.kernels import cpu
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry

IN_CACHE, IN_MEMORY = 1 << 19, 1 << 24
"""Elements. What is in cache is compared by the best repeat: memory of a shared machine is too noisy for that."""
GPU_BYTES = 256 << 20
"""Bytes of the plain side of a bucket on a GPU."""


def measure(operation: Operation, repeats: int, device: torch.device) -> dict[str, Any]:
    """All ways of an operation in turn, `repeats` times over, after one turn that is not counted.

    What fits in a cache is to lie there whoever came before: a turn is then the fastest of three calls, after one more.

    Raises:
        RuntimeError: the kernels and the reference differ.
    """
    if not operation.check():
        raise RuntimeError(f"{operation.name}, {operation.code.text}: the kernels and the reference differ")
    clock = _device_clock if device.type == "cuda" else _clock
    cached = device.type == "cpu" and operation.elements <= IN_CACHE
    turns: dict[str, list[float]] = {name: [] for name in operation.ways}
    for turn in range(repeats + 1):
        for name, way in operation.ways.items():
            seconds = min([clock(way) for _ in range(4)][1:]) if cached else clock(way)
            if turn:
                turns[name].append(seconds)
    copies, found = turns["copy"], {}
    for name, taken in turns.items():
        rates = [operation.size / seconds / 1e9 for seconds in taken]
        ratios = _ratios(copies, taken)
        found[name] = {
            "gb_per_s": _spread(rates),
            "of_copy": _spread(ratios) | {"best_of_both": min(copies) / min(taken)},
        }
    # Of the memory's bandwidth: bytes read and written a second, beside those of the copy, which reads and writes the plain side.
    bandwidth = [operation.moved / (2 * operation.size) * ratio for ratio in _ratios(copies, turns["zcompile"])]
    found["zcompile"]["of_bandwidth"] = _spread(bandwidth)
    return {
        "operation": operation.name, "code": operation.code.text, "elements": operation.elements, "plain_bytes": operation.size,
        "moved_bytes": operation.moved,
        "repeats": repeats, "ways": found,
    }  # fmt: skip


def _ratios(copies: Sequence[float], taken: Sequence[float]) -> list[float]:
    return [copy / seconds for copy, seconds in zip(copies, taken, strict=True)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _clock(way: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def _device_clock(way: Callable[[], Any]) -> float:
    """Seconds on the device alone: it is kept busy while the call is launched, so that no launch is waited for."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # cycles: a millisecond
    begin.record()
    way()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def call_overhead(calls: int = 1000) -> float:
    """Microseconds of one call of the C++ kernels on a bucket of one block, the fastest of some hundreds."""
    geometry, code, x = Geometry.of_rows(1, (BLOCK,)), Code("int8", BLOCK), torch.ones(BLOCK)
    return min(_clock(lambda: cpu.quantize([x], geometry, code)) for _ in range(calls)) * 1e6


def bench(
    kinds: Sequence[str] = ("int8", "int4"),
    elements: Sequence[int] = (IN_CACHE, IN_MEMORY),
    repeats: int = 40,
    inductor: bool = True,
    done: Callable[[dict[str, Any]], None] = lambda result: None,
    devices: Sequence[str] = ("cpu", "gpu"),
) -> dict[str, Any]:
    """Everything that this machine can run, on those of its `devices` that are asked for. `done` gets each result as it comes.

    Returns:
        cpu: results, and what the C++ kernels are (`compiled`, False if the reference stands in for them); gpu: results, or why not.
    """
    found: dict[str, Any] = {
        "cpu": _cpu(kinds, elements, repeats, inductor, done) if "cpu" in devices else {"skipped": "not asked for"},
        "gpu": _gpu(kinds, repeats, inductor, done) if "gpu" in devices else {"skipped": "not asked for"},
    }
    return found


def _cpu(
    kinds: Sequence[str], elements: Sequence[int], repeats: int, inductor: bool, done: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    try:
        device = torch.device("cpu")
        for size in elements:
            few = repeats if size <= IN_CACHE else max(repeats // 8, 3)
            for kind in kinds:
                results += _measured(operations(kind, size, device, cpu, inductor), few, device, done)
        for kind in kinds:
            results += _measured([layer(kind, 512, device, cpu)], max(repeats // 4, 3), device, done)
        return {"compiled": cpu.available(), "call_microseconds": call_overhead(), "results": results}
    finally:
        torch.set_num_threads(threads)


def _measured(
    listed: Sequence[Operation], repeats: int, device: torch.device, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    found = []
    for operation in listed:
        found.append({"device": device.type, **measure(operation, repeats, device)})
        done(found[-1])
    torch.compiler.reset()  # the next size is another graph, not a dynamic shape
    return found


def _gpu(kinds: Sequence[str], repeats: int, inductor: bool, done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA or HIP device"}
    from zcompile.kernels import gpu

    device, results = torch.device("cuda"), []
    for kind in kinds:
        listed = [*operations(kind, GPU_BYTES // 2, device, gpu, inductor), layer(kind, 4096, device, gpu)]
        results += _measured(listed, repeats, device, done)
        del listed
        torch.cuda.empty_cache()
    return {"name": torch.cuda.get_device_name(device), "results": results}


def table(results: Sequence[dict[str, Any]], title: str) -> Table:
    """For people: one row per operation, a column per way: GB/s, the median of all repeats, and the best over the best copy."""
    ways = list(dict.fromkeys(name for result in results for name in result["ways"]))
    out = Table(
        "operation", "format", "elements", *ways, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left"
    )
    for result in results:
        cells = []
        for name in ways:
            if name not in result["ways"]:
                cells.append("-")
                continue
            rate, ratio = result["ways"][name]["gb_per_s"], result["ways"][name]["of_copy"]["best_of_both"]
            text = f"{rate['median']:.1f} ({rate['min']:.1f}-{rate['max']:.1f})"
            if "of_bandwidth" in result["ways"][name] and result["device"] == "cuda":
                text += f" {result['ways'][name]['of_bandwidth']['median']:.0%} of the bandwidth,"
            cells.append(text if name == "copy" else f"{text} {ratio:.2f}x")
        out.add_row(result["operation"], result["code"].removesuffix("/nearest"), f"{result['elements']:,}", *cells)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kinds", nargs="+", default=["int8", "int4"], choices=["int8", "int4"], help="(default: both)"
    )
    parser.add_argument("--elements", nargs="+", type=int, default=[IN_CACHE, IN_MEMORY], metavar="N",
                        help=f"sizes of a bucket on the CPU, multiples of {BLOCK} (default: {IN_CACHE} {IN_MEMORY})")  # fmt: skip
    parser.add_argument("--devices", nargs="+", default=["cpu", "gpu"], choices=["cpu", "gpu"], help="(default: both)")
    parser.add_argument(
        "--repeats", type=int, default=40, help="turns of all ways; fewer beyond the cache (default: %(default)s)"
    )
    parser.add_argument(
        "--no-inductor", dest="inductor", action="store_false", help="without torch.compile, which takes minutes"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there as JSON; - for standard output")


def command(arguments: argparse.Namespace) -> int:
    """0: measured; 1: kernels and reference differ; 2: an argument is wrong."""
    console = Console(stderr=arguments.json == "-", soft_wrap=True)
    wrong = [size for size in arguments.elements if size < BLOCK or size % BLOCK]
    if wrong or arguments.repeats < 1:
        why = (
            f"--elements {wrong[0]}: valid: multiples of {BLOCK}"
            if wrong
            else f"--repeats {arguments.repeats}: valid: 1 or more"
        )
        console.print(f"zcompile kernel-bench: {why}", style="red", markup=False)
        return 2

    def done(result: dict[str, Any]) -> None:
        rate = result["ways"]["zcompile"]["gb_per_s"]["median"]
        console.print(
            f"{result['device']} {result['code']} {result['operation']}: {rate:.1f} GB/s", style="dim", markup=False
        )

    try:
        found = bench(
            arguments.kinds, arguments.elements, arguments.repeats, arguments.inductor, done, arguments.devices
        )
    except RuntimeError as error:
        console.print(f"zcompile kernel-bench: {error}", style="red", markup=False)
        return 1
    note = "GB/s of the plain side: median (slowest-fastest), and the fastest as a part of the fastest copy"
    if "skipped" in found["cpu"]:
        console.print(f"CPU: skipped, {found['cpu']['skipped']}")
    else:
        compiled = "C++" if found["cpu"]["compiled"] else "the torch reference, as the C++ kernels could not be built"
        console.print(table(found["cpu"]["results"], f"CPU, one thread, zcompile = {compiled}. {note}"))
        console.print(f"one call on one block: {found['cpu']['call_microseconds']:.1f} us")
    if "skipped" in found["gpu"]:
        console.print(f"GPU: skipped, {found['gpu']['skipped']}")
    else:
        console.print(table(found["gpu"]["results"], f"{found['gpu']['name']}. {note}"))
    write_json(found, arguments.json)
    return 0
