"""What one rank of `zcompile verify` runs: a small model of awkward shapes, sharded, beside DDP and beside the reference.

All of it is deterministic: any rank can make any rank's batch, so the reference needs no communication, and what two trials share
(DDP's trajectories, the reference's for plans that sum alike) is computed once per process pool.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zcompile.api import full_state_dict, ledger
from zcompile.plan import Plan
from zcompile.reference import MakeOptimizer, Reference
from zcompile.resolved import ResolvedPlan
from zcompile.topology import Topology
from zcompile.wrap import hierarchical_zero

VOCABULARY, HIDDEN = 37, 10

MODES: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "graph": {"codegen": False, "overlap": 0},
    "overlap": {"codegen": False, "overlap": 2},
    "code": {"codegen": True, "overlap": 0},
    "overlapped code": {"codegen": True, "overlap": 2},
}
"""No compiler; Dynamo and every pass, the graph run node by node, without and with overlap; the same with Inductor's code."""

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, foreach=True),
}


class Awkward(nn.Module):
    """[2, 7] tokens -> loss. Rows 37, 13, 10 and 1, none of which 8 divides; one weight is tied, one read twice, one is a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.cell = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 13)
        self.down = nn.Linear(13, HIDDEN, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        x = self.norm(x + torch.tanh(self.cell(self.cell(x))))
        x = x + self.scale * self.down(F.relu(self.up(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


class Pointwise(nn.Module):
    """[2, 7] tokens -> loss, of bias-free matrices and element-wise functions that are exact or one operation alone.

    Inductor leaves matrix products to the library and computes these functions as eager torch does, so compiled code has the bits of
    the reference in every parameter. `Awkward` has sums over rows (bias gradients, LayerNorm, softmax), which Inductor adds up in an
    order of its own: equal to rounding. So is the loss itself, here too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13, bias=False)
        self.second = nn.Linear(13, 37, bias=False)
        self.third = nn.Linear(37, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.relu(self.first(tokens.to(self.first.weight.dtype) / VOCABULARY))
        loss: Tensor = self.third(F.relu(self.second(x))).sum() / 8 + 1
        return loss


MODELS: dict[str, Callable[[], nn.Module]] = {"awkward": Awkward, "pointwise": Pointwise}


def fresh(model: str) -> nn.Module:
    """A plain model, equal on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[model]()


def batch(step: int, rank: int, micro: int) -> Tensor:
    """[2, 7] tokens: what `rank` sees as micro-batch `micro` of `step`."""
    generator = torch.Generator().manual_seed(step * 10_000 + rank * 100 + micro)
    return torch.randint(0, VOCABULARY, (2, 7), generator=generator)


@dataclass
class Trajectory:
    """A training run: losses [steps, ranks, K], and each parameter after every step, [steps, *shape]."""

    losses: Tensor
    parameters: dict[str, Tensor]


@functools.cache
def ddp(model: str, optimizer: str, micro_batches: int, steps: int) -> Trajectory:
    """torch's own DDP on the default group; all ranks call it together."""
    plain = fresh(model)
    replica = DistributedDataParallel(plain)
    made = OPTIMIZERS[optimizer](plain.parameters())
    world, rank = dist.get_world_size(), dist.get_rank()
    losses = torch.zeros(steps, world, micro_batches)
    history: dict[str, list[Tensor]] = {name: [] for name, _ in plain.named_parameters()}
    for step in range(steps):
        made.zero_grad()
        for k in range(micro_batches):
            replica.require_backward_grad_sync = k == micro_batches - 1
            loss = replica(batch(step, rank, k)) / micro_batches
            loss.backward()
            losses[step, rank, k] = loss.detach()
        made.step()
        for name, parameter in plain.named_parameters():
            history[name].append(parameter.detach().clone())
    dist.all_reduce(losses)
    return Trajectory(losses, {name: torch.stack(found) for name, found in history.items()})


_REFERENCES: dict[object, Trajectory] = {}


def references(model: str, plan: ResolvedPlan, runs: Iterable[tuple[str, int]], steps: int) -> list[Trajectory]:
    """The reference's trajectory for each (optimizer, micro-batches) of `runs`, shared out over the ranks.

    Plans that sum alike share one: where there is no accumulation, it does not matter where G cuts the hops in two.
    """
    wanted = []
    for optimizer, micro_batches in runs:
        reference = Reference(fresh(model), plan, OPTIMIZERS[optimizer])
        orders = []
        for name, order in reference.orders.items():
            hops = (order.reduce, order.sync) if micro_batches > 1 else order.reduce + order.sync
            orders.append((name, replace(order, reduce=(), sync=()), hops))
        key = (model, optimizer, micro_batches, steps, plan.topology.order, tuple(orders))
        wanted.append((key, reference, micro_batches))
    missing = [(key, reference, k) for key, reference, k in wanted if key not in _REFERENCES]
    made: list[list[Any]] = []
    for number, (_, reference, micro_batches) in enumerate(missing):
        mine = number % dist.get_world_size() == dist.get_rank()
        made.append([_trajectory(reference, micro_batches, steps) if mine else None])
    for number, (key, _, _) in enumerate(missing):
        dist.broadcast_object_list(made[number], number % dist.get_world_size())
        _REFERENCES[key] = made[number][0]
    return [_REFERENCES[key] for key, _, _ in wanted]


def _trajectory(reference: Reference, micro_batches: int, steps: int) -> Trajectory:
    reference.loss = lambda model, tokens: model(tokens) / micro_batches
    losses = []
    history: dict[str, list[Tensor]] = {name: [] for name in reference.masters}
    for step in range(steps):
        world = range(reference.plan.topology.world_size)
        losses.append(reference.step([[batch(step, rank, k) for k in range(micro_batches)] for rank in world]))
        for name, master in reference.masters.items():
            history[name].append(master.detach().clone())
    return Trajectory(torch.stack(losses), {name: torch.stack(found) for name, found in history.items()})


@dataclass
class Outcome:
    """What this rank saw in one trajectory. Texts name the first difference, "" where there is none.

    Attributes:
        loss_error: largest relative difference to DDP over the steps, of the loss that all ranks and micro-batches average to.
        parameter_error: largest absolute difference to DDP over the steps, in the rows that this rank owns.
        bits, loss_bits: difference to the reference, of parameters and of losses.
        replicas: difference between ranks that hold the same shard.
        ledger: difference between the ledger's columns.
        levels: the last step's counted bytes, level -> transfer -> bytes.
        calls: collectives of the last step by (level, transfer).
        seconds: of the whole trajectory.
    """

    optimizer: str
    micro_batches: int
    loss_error: float = 0.0
    parameter_error: float = 0.0
    bits: str = ""
    loss_bits: str = ""
    replicas: str = ""
    ledger: str = ""
    levels: dict[str, dict[str, int]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def run(
    rank: int, model: str, topology: str, plan: Plan, mode: str, micro_batches: tuple[int, ...], steps: int
) -> list[Outcome]:
    """Shard `model`, then train it from the same start with each optimizer and each number of micro-batches."""
    torch._dynamo.reset()
    resolved = plan.resolve(Topology.parse(topology), "float32")
    runs = [(optimizer, k) for k in micro_batches for optimizer in OPTIMIZERS]
    expected = references(model, resolved, runs, steps)
    begin = time.perf_counter()
    plain = fresh(model)
    start = copy.deepcopy(plain.state_dict())
    out = []
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # plans and compile times, cell by cell: what matters is in the report
        sharded = hierarchical_zero(plain, topology=topology, plan=plan, **MODES[mode])
        for (optimizer, k), reference in zip(runs, expected, strict=True):
            outcome = Outcome(optimizer, k)
            sharded.load_state_dict(start)
            _train(sharded, outcome, ddp(model, optimizer, k, steps), reference, steps)
            outcome.seconds = time.perf_counter() - begin
            begin = time.perf_counter()
            out.append(outcome)
    return out


def _train(model: Any, out: Outcome, dense: Trajectory, reference: Trajectory, steps: int) -> None:
    engine, rank = model.zero, dist.get_rank()
    optimizer = OPTIMIZERS[out.optimizer](model.parameters())
    losses, sums = torch.zeros(steps, dist.get_world_size(), out.micro_batches), []
    for step in range(steps):
        before = engine.runtime.snapshot()
        for k in range(out.micro_batches):
            model.set_requires_gradient_sync(k == out.micro_batches - 1)
            loss = model(batch(step, rank, k)) / out.micro_batches
            loss.backward()
            losses[step, rank, k] = loss.detach()
        after = engine.runtime.snapshot()
        optimizer.step()
        optimizer.zero_grad()
        out.calls = {f"{key[0]} {key[1]}": after[key][0] - before.get(key, (0, 0))[0] for key in sorted(after)}
        _check_ledger(model, out, step)
        for name, (mine, rows) in _owned(model).items():
            found, there = reference.parameters[name][step], dense.parameters[name][step]
            if mine.numel() == 0:
                continue
            if not torch.equal(mine, found[rows]):
                out.bits = out.bits or f"step {step}: {name} differs by {float((mine - found[rows]).abs().max()):.2g}"
            out.parameter_error = worst((out.parameter_error, float((mine - there[rows]).abs().max())))
        sums.append(torch.stack([_checksum(mine) for mine, _ in _owned(model).values()]))
    unequal = (losses[:, rank] != reference.losses[:, rank]).any(1).nonzero()
    if len(unequal):
        out.loss_bits = f"step {int(unequal[0])}: the loss differs"
    dist.all_reduce(losses)
    mean, expected = losses.double().sum((1, 2)), dense.losses.double().sum((1, 2))
    out.loss_error = float(((mean - expected) / expected).abs().max())
    _check_replicas(model, out, torch.stack(sums))
    for name, whole in full_state_dict(model).items():
        history = reference.parameters.get(name)
        if history is not None and not torch.equal(whole, history[-1]):
            out.bits = out.bits or f"full_state_dict: {name} differs, though each shard is right"


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if one is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def _owned(model: Any) -> dict[str, tuple[Tensor, Any]]:
    """name -> (the rows of the master that this rank owns, which rows they are)."""
    found = {}
    for slot in model.zero.slots:
        start, count = slot.spec.layout.local_rows(model.zero.coordinates)
        rows = slice(start, start + count) if slot.spec.shape else ...
        found[slot.name] = slot.master.to_local().detach(), rows
    return found


def _checksum(x: Tensor) -> Tensor:
    """int64 [] of the bits and where they are."""
    bits = x.contiguous().reshape(-1).view(torch.int32).to(torch.int64)
    return (bits * torch.arange(1, bits.numel() + 1)).sum()


def _check_replicas(model: Any, out: Outcome, sums: Tensor) -> None:
    """Ranks that hold the same shard hold the same bits of it, after each of the steps in `sums` [steps, parameters]."""
    everyone = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, sums)
    topology: Topology = model.zero.plan.topology
    for column, slot in enumerate(model.zero.slots):
        first: dict[int, int] = {}
        for rank in range(topology.world_size):
            other = first.setdefault(slot.spec.layout.index(topology.coordinates(rank)), rank)
            unequal = (everyone[rank][:, column] != everyone[other][:, column]).nonzero()
            if len(unequal) and not out.replicas:
                out.replicas = f"step {int(unequal[0])}: {slot.name} on rank {rank} is not that on rank {other}"


def _check_ledger(model: Any, out: Outcome, step: int) -> None:
    levels: dict[str, dict[str, dict[str, int]]] = ledger(model)["levels"]
    for level, transfer, row in _rows(levels):
        if not row["predicted"] == row["compiled"] == row["counted"]:
            out.ledger = out.ledger or f"step {step}: {level} {transfer}: {row}"
    out.levels = {level: {t: row["counted"] for t, row in transfers.items()} for level, transfers in levels.items()}


def _rows(levels: dict[str, dict[str, dict[str, int]]]) -> Iterator[tuple[str, str, dict[str, int]]]:
    for level, transfers in levels.items():
        for transfer, row in transfers.items():
            yield level, transfer, row
