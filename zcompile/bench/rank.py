"""What one rank of `zcompile bench` does: build the model, train it with one system, measure.

    python -m zcompile.bench.rank '{"system": ..., "out": ...}'

A step's time is taken from one barrier to another over all measured steps, the wait for what runs over the last one included: a step
that leaves work to the next is charged for it. Memory is the peak over the measured steps, from a mark that is reset after warm-up.
Messages are counted in one more step after these, and so is what zcompile waits for, under torch's profiler.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zcompile.bench import counting, systems
from zcompile.bench.memory import Memory
from zcompile.bench.network import read_counters
from zcompile.launcher import init_from_launcher
from zcompile.machines import Device
from zcompile.overlap import Overlap, measured
from zcompile.shapes import SHAPES, Decoder, Shape
from zcompile.times import EFFICIENCY
from zcompile.topology import Topology

Data = Callable[[int, int, int], Tensor]
"""(step, rank, sequences) -> tokens [sequences, T + 1] int64"""


@dataclass(frozen=True)
class Task:
    """One run of all ranks. `system`: see zcompile.bench.systems.parse; `model`: a name of zcompile.shapes, or file.py:function
    that returns (module, data); `out`: where rank 0 writes the result; `rates`: of the machine (see `machine`), or none."""

    system: str
    model: str
    topology: str
    batch: int
    steps: int
    warmup: int
    out: str
    learning_rate: float = 1e-3
    rates: dict[str, float] = field(default_factory=dict)


def machine(sizes: str, rates: Mapping[str, float]) -> Topology:
    """The topology with the rates that are known: level name -> B/s that a rank receives; "flops": FLOP/s of a rank; "memory": B/s."""
    found = Topology.parse(sizes)
    levels = tuple(replace(level, bandwidth=rates.get(level.name, level.bandwidth)) for level in found.levels)
    device = found.device
    if "flops" in rates:
        peaks = tuple((dtype, rates["flops"] / EFFICIENCY) for dtype in ("float32", "bfloat16"))
        device = Device("this machine", peaks, device.memory, rates.get("memory", device.memory_bandwidth))
    return Topology(levels, device, found.order)


def build(name: str, seed: int = 0) -> tuple[nn.Module, Data]:
    """The model and its data; the same on every rank. ValueError names the valid models."""
    if ".py:" in name:
        make = systems.load("model", name)
        torch.manual_seed(seed)
        made: tuple[nn.Module, Data] = make()
        return made
    if name not in SHAPES:
        raise ValueError(f"model {name!r}: valid: {', '.join(SHAPES)}, or file.py:function")
    shape = SHAPES[name]
    torch.manual_seed(seed)
    return Decoder(shape), lambda step, rank, sequences: batch(shape, step, rank, sequences)


def batch(shape: Shape, step: int, rank: int, sequences: int) -> Tensor:
    """Noisy arithmetic progressions: there is something to learn, so that losses can be compared."""
    generator = torch.Generator().manual_seed(1_000_003 * step + rank + 1)
    v, t = shape.vocabulary, shape.sequence + 1
    start = torch.randint(v, (sequences, 1), generator=generator)
    stride = torch.randint(1, 4, (sequences, 1), generator=generator)
    noise = (torch.rand(sequences, t, generator=generator) < 0.05) * torch.randint(
        v, (sequences, t), generator=generator
    )
    return (start + stride * torch.arange(t) + noise) % v


def measure(task: Task) -> dict[str, Any]:
    """Train with the task's system; the same report on every rank. A process group must be there."""
    device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")
    rank, world = dist.get_rank(), dist.get_world_size()
    memory = Memory(device)
    model, data = build(task.model)
    model = model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = [data(step, rank, task.batch).to(device) for step in range(task.warmup + task.steps)]
    length = max(t.numel() for t in tokens)
    setting = systems.Setting(machine(task.topology, task.rates), task.learning_rate, task.batch, device, length)
    begin = time.perf_counter()
    trainer = systems.parse(task.system)(model, setting)
    losses = []
    for step in range(task.warmup):
        if step == task.warmup - 1:
            memory.release()
        losses.append(float(trainer.step(tokens[step])))
    trainer.finish()
    setup = time.perf_counter() - begin
    memory.reset()
    _synchronise(device)
    dist.barrier()
    before = read_counters() if rank == 0 else {}
    dist.barrier()
    faults, cpu, start = page_faults(), time.process_time(), time.perf_counter()
    found: list[Tensor] = []
    marks = [start]
    for step in range(task.warmup, task.warmup + task.steps):
        found.append(trainer.step(tokens[step]))
        marks.append(time.perf_counter())
    trainer.finish()
    _synchronise(device)
    seconds, cpu, faults = time.perf_counter() - start, time.process_time() - cpu, page_faults() - faults
    peak, rest = memory.peak(), memory.rest()
    dist.barrier()
    after = read_counters() if rank == 0 else {}
    waits, counted, uncounted = _one_more(trainer, tokens[-1], setting.topology)
    mine = {
        "counted": counted,
        "seconds": seconds / task.steps,
        "cpu": cpu / task.steps,
        "page_faults": faults / task.steps,
        "peak": peak,
        "rest": rest,
        "losses": losses + [float(loss) for loss in found],
    }
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    known = all(each["counted"] is not None for each in everyone)
    messages = counting.total([each["counted"] for each in everyone]) if known else {}
    at_interfaces = {level: (after[level] - before[level]) / task.steps for level in before}
    return {
        "parameters": parameters,
        "tokens": world * sum(t.numel() - t.shape[0] for t in tokens[-1:]),
        "seconds": statistics.fmean(each["seconds"] for each in everyone),
        "steps": [round(b - a, 5) for a, b in itertools.pairwise(marks)],
        "setup_seconds": setup,
        "cpu_seconds": sum(each["cpu"] for each in everyone),
        "page_faults": sum(each["page_faults"] for each in everyone),
        "peak_bytes": max(each["peak"] for each in everyone),
        "rest_bytes": max(each["rest"] for each in everyone),
        "losses": [statistics.fmean(loss) for loss in zip(*(each["losses"] for each in everyone), strict=True)],
        "bytes": at_interfaces or {level: float(row["bytes"]) for level, row in messages.items()},
        "bytes_at": "interfaces" if at_interfaces else "process groups" if messages else "",
        "messages": messages,
        "uncounted": uncounted,
        "exposed": waits,
    }


def _one_more(
    trainer: systems.Trainer, tokens: Tensor, topology: Topology
) -> tuple[dict[str, float | None], counting.Counted | None, str]:
    """One more step: (what `exposed` says, of zcompile's; what was counted; "" or why nothing was)."""
    if trainer.ours:
        recording = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with counting.counting(topology, trainer.model) as counted, recording as profile:
            trainer.step(tokens)
            trainer.finish()
        return exposed(measured(profile), topology.names), counted, ""
    try:
        with counting.counting(topology) as counted:
            trainer.step(tokens)
            trainer.finish()
    except Exception as error:  # of a system that does not run while it is watched: its times stand
        return {}, None, f"{type(error).__name__}: {error}"[:200]
    return {}, counted, ""


def exposed(found: Overlap, levels: Sequence[str]) -> dict[str, float | None]:
    """Seconds in waits for each level's hops, and for refreshes. None: not known, as with NCCL, where the host waits for nothing."""
    if not found.known:
        return dict.fromkeys((*levels, "refresh"))
    return {**{level: found.level(level).exposed for level in levels}, "refresh": found.refresh_exposed}


def page_faults() -> int:
    """Pages that this process has got so far: memory that is given back and asked for again costs each of them again."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _on_gpu() -> bool:
    return torch.cuda.is_available() and str(dist.get_backend()) == "nccl"


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    init_from_launcher()
    result = {**asdict(task), **measure(task)}
    if dist.get_rank() == 0:
        Path(task.out).write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # no system's shutdown is part of the comparison


if __name__ == "__main__":
    main()
