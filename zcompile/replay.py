"""`zcompile verify --replay N`: the same steps again and again from one state, with hops disturbed, must give the same bits.

Two optimizer steps of two micro-batches are run once as they are, then N times with random sleeps, on each rank and in each replay others,
before hops are launched and before they are waited for, over some of the machine's levels. What a hop will write holds NaN until it
arrives: memory of the same place may still hold what it held in the replay before, and a read that came too early would find the right
bits there. Losses, gradients and masters are compared bit for bit, in all replays, on all ranks.
"""

from __future__ import annotations

import contextlib
import io
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table
from torch import Tensor, nn

from zcompile._torch_compat import storage_key
from zcompile.plan import Plan
from zcompile.ranks import RanksFailed
from zcompile.topology import Topology
from zcompile.trial import MODES
from zcompile.wrap import hierarchical_zero

LONGEST = 0.005
"""Seconds of the longest sleep."""
OFTEN = 0.25
"""Part of the launches and waits over a disturbed level that sleep."""
STEPS, MICRO_BATCHES = 2, 2
MODE = {"graph": "overlap", "code": "overlapped code", "eager": "eager"}
"""Of `zcompile verify` -> the key of zcompile.trial.MODES: hops are under way while the graph computes, where there is one."""
QUANTISED = {
    "zero_topo, int8/int4": Plan.preset("zero_topo", gather="int8/32", reduce="int4/32"),
    "zero_topo, int4-delta": Plan.preset("zero_topo", gather="int8/32", reduce="int4/32", refresh="int4-delta/32"),
    "zero_topo, int4-delta, peers": Plan.preset(
        "zero_topo", gather="int8/32", reduce="int4/32", refresh="int4-delta/32", peer_gather=True
    ),
}
"""Replayed beside zero_topo. Copies that others read in memory are not filled with NaN; those of a step before would be seen."""


class Net(nn.Module):
    """[4, 40] -> loss: matrices of rows that no number of ranks divides, large enough for blocks of codes; a norm; a weight read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.norm = nn.Linear(40, 53), nn.Linear(53, 53, bias=False), nn.LayerNorm(53)
        self.last = nn.Linear(53, 37)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        loss: Tensor = self.last(self.norm(torch.tanh(self.cell(self.cell(x))))).square().mean()
        return loss


class Sleeps:
    """A zcompile.groups.Disturb: sleeps by chance, and NaN where a hop will write.

    Attributes:
        number: of sleeps so far.
    """

    def __init__(self, chance: random.Random, levels: Sequence[str], longest: float = LONGEST):
        self._chance, self._longest = chance, longest
        self._levels = set(chance.sample(list(levels), chance.randint(1, len(levels)))) if levels else set()
        self._lock = threading.Lock()
        self.number = 0

    def launch(self, level: str, output: Any, sent: Any) -> None:
        if isinstance(output, Tensor) and output.dim() and output.is_contiguous():
            within = isinstance(sent, Tensor) and storage_key(sent) == storage_key(output)
            kept = sent.clone() if within else None
            output.view(torch.uint8).fill_(255)  # NaN in every format, and no codes that anybody sent
            if kept is not None:  # a gather in place
                sent.copy_(kept)
        self._sleep(level)

    def wait(self, level: str) -> None:
        self._sleep(level)

    def _sleep(self, level: str) -> None:
        with self._lock:
            sleeps = level in self._levels and self._chance.random() < OFTEN
            seconds = self._chance.uniform(0, self._longest)
            self.number += sleeps
        if sleeps:
            time.sleep(seconds)


def replay(rank: int, topology: str, plan: Plan, mode: str, times: int, seed: int = 0) -> dict[str, Any]:
    """On this rank: {"differences": texts, the first of each kind; "sleeps": how many there were; "seconds"}."""
    begin = time.perf_counter()
    torch._dynamo.reset()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = Net()
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    with contextlib.redirect_stderr(io.StringIO()):  # how the plan resolved
        model: Any = hierarchical_zero(plain, topology=topology, plan=plan, **MODES[mode])
    runtime = model.zero.runtime
    levels = [level.name for level in runtime.topology.levels if level.size > 1]
    expected = _steps(model, start)
    differences: dict[str, str] = {}
    sleeps = 0
    for number in range(times):
        disturb = Sleeps(random.Random(f"{seed} {number} {rank}"), levels)
        with runtime.disturbed(disturb):
            found = _steps(model, start)
            model.zero.refresher.drain()
        sleeps += disturb.number
        for name, value in found.items():
            if not torch.equal(value.view(torch.int32), expected[name].view(torch.int32)):
                differences.setdefault(name, f"replay {number}: {name} differs")
    return {"differences": list(differences.values()), "sleeps": sleeps, "seconds": time.perf_counter() - begin}


def _steps(model: Any, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> bits of what the steps from `start` give on this rank."""
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        for k in range(MICRO_BATCHES):
            model.set_requires_gradient_sync(k == MICRO_BATCHES - 1)
            generator = torch.Generator().manual_seed(1000 * step + 100 * k + dist.get_rank())
            loss = model(torch.randn(4, 40, generator=generator))
            loss.backward()
            found[f"loss {k} of step {step}"] = loss.detach().clone()
        for name, parameter in model.named_parameters():
            found[f"gradient of {name} in step {step}"] = parameter.grad.to_local().clone()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            found[f"{name} after step {step}"] = parameter.to_local().detach().clone()
    return found


@dataclass
class Replayed:
    """One plan on one topology. status: "pass"; "fail": bits differ; "error": it did not run to its end."""

    plan: str
    topology: str
    mode: str
    replays: int
    sleeps: int = 0
    status: str = "error"
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def cells(plans: Sequence[str], topologies: Sequence[str], mode: str, times: int) -> list[Replayed]:
    """Plans that resolve to equal ones on a topology are replayed once, under the first name."""
    found = []
    for topology in topologies:
        seen: set[object] = set()
        for name in (*plans, *(QUANTISED if "zero_topo" in plans else ())):
            resolved = plan_of(name).resolve(Topology.parse(topology), "float32")
            alike = name if name in QUANTISED else (resolved.weights, resolved.gradients, resolved.optimizer)
            if alike not in seen:
                seen.add(alike)
                found.append(Replayed(name, topology, mode, times))
    return found


def plan_of(name: str) -> Plan:
    return QUANTISED.get(name) or Plan.parse(name)


def run(wanted: Sequence[Replayed], pool: Any, done: Callable[[Replayed], None] = lambda cell: None) -> None:
    """Fill in the cells on a pool of ranks; `done` is called with each."""
    for cell in wanted:
        try:
            ranks = pool.run(
                replay,
                cell.topology,
                plan_of(cell.plan),
                MODE[cell.mode],
                cell.replays,
                timeout=900.0 + 10 * cell.replays,
            )
        except RanksFailed as error:
            rank, failure = error.cause
            cell.failures.append(f"rank {rank}: {failure.type}: {failure.message}\n{failure.trace}".rstrip())
        else:
            cell.failures = [f"rank {rank}, {text}" for rank, mine in enumerate(ranks) for text in mine["differences"]][
                :10
            ]
            cell.sleeps = sum(mine["sleeps"] for mine in ranks)
            cell.seconds = max(mine["seconds"] for mine in ranks)
            cell.status = "fail" if cell.failures else "pass"
        done(cell)


def report(found: Sequence[Replayed], seconds: float) -> dict[str, Any]:
    """The machine-readable result; `ok` only if there are cells and all of them passed."""
    return {
        "ok": bool(found) and all(cell.status == "pass" for cell in found),
        "cells": len(found),
        "passed": sum(cell.status == "pass" for cell in found),
        "steps": STEPS,
        "micro_batches": MICRO_BATCHES,
        "longest_sleep": LONGEST,
        "seconds": round(seconds, 1),
        "results": [asdict(cell) for cell in found],
    }


def table(found: Sequence[Replayed]) -> Table:
    out = Table("topology", "plan", "replays", "sleeps", "seconds", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for cell in found:
        out.add_row(
            cell.topology, cell.plan, str(cell.replays), str(cell.sleeps), f"{cell.seconds:.1f}",
            {"pass": "[green]pass", "fail": "[red]fail", "error": "[red]error"}[cell.status],
        )  # fmt: skip
    return out
