"""Quantised plans, a small model, and its training over real ranks beside the unsharded reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.training import MODES
from torch import Tensor, nn

from zcompile import Plan, Rule, hierarchical_zero, ledger
from zcompile.reference import Reference
from zcompile.topology import Topology

SMALL = {"gather": "int8/32", "reduce": "int4/32"}
"""The paper's formats, in blocks that small weights fill."""

PLANS: dict[str, tuple[str, Plan]] = {
    "paper": ("2x2x2", Plan.preset("zero_topo", **SMALL)),
    "paper on 4x2": ("4x2", Plan.preset("zero_topo", **SMALL)),
    "paper, a level of size 1": ("2x1x4", Plan.preset("zero_topo", **SMALL)),
    "zero3": ("2x2x2", Plan.preset("zero3", **SMALL)),
    "zeropp": ("2x2x2", Plan.preset("zeropp", **SMALL)),
    "replicas sync and come back": ("2x2x2", Plan.preset("mics", **SMALL, back="int8/32")),
    "ddp": ("8", Plan.preset("ddp", reduce="int8/32", back="int8/64")),
    "scales in fp32, stochastic": ("2x2x2", Plan.preset("zero_topo", gather="int8/64/fp32", reduce="int4/32/stochastic")),
    "a format per level": (
        "2x2x2",
        Plan("node", "node", "world", gather={"pair": "bf16", "node": "int8/32"},
             reduce={"pair": "int8/32", "node": "fp32", "cluster": "int4/64"}),
    ),
    "refresh alone": ("2x2x2", Plan.preset("zero_topo", refresh="int4/32")),
    "delta": ("2x2x2", Plan.preset("zero_topo", **SMALL, refresh="int4-delta/32")),
    "delta of native gathers": ("2x2x2", Plan.preset("zero_topo", refresh="int8-delta/32", reduce="int4/32")),
    "delta, full every second": ("4x2", Plan.preset("zero_topo", **SMALL, refresh="int4-delta/32", full_refresh_every=2)),
    "feedback": ("2x2x2", Plan.preset("zero_topo", **SMALL, error_feedback=0.0)),
    "feedback, a moving average": ("2x2x2", Plan.preset("zero_topo", **SMALL, error_feedback=0.5)),
    "an embedding too": ("2x2x2", Plan.preset("zero_topo", **SMALL, rules=(Rule("embed.*", gather="int8/32", reduce="int8/32"),))),
}  # fmt: skip


class Small(nn.Module):
    """[B, 5] tokens -> loss. Rows that eight does not divide, shards that end inside a block, a frozen matrix, one read twice."""

    def __init__(self, reads: int = 2) -> None:
        super().__init__()
        self.reads = reads
        self.embed = nn.Embedding(37, 24)
        self.norm = nn.LayerNorm(24)
        self.twice = nn.Linear(24, 24, bias=False)
        self.up = nn.Linear(24, 45)
        self.frozen = nn.Linear(45, 45, bias=False).requires_grad_(False)
        self.down = nn.Linear(45, 29, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens[:, :-1]))
        for _ in range(self.reads):
            x = torch.tanh(self.twice(x))
        return nn.functional.cross_entropy(
            self.down(self.frozen(self.up(x).relu())).flatten(0, 1), tokens[:, 1:].flatten() % 29
        )


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def once() -> nn.Module:
    torch.manual_seed(0)
    return Small(1)


def tokens(step: int, rank: int, micro: int) -> Tensor:
    return torch.randint(0, 37, (3, 6), generator=torch.Generator().manual_seed(1000 * step + 10 * rank + micro))


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=0.5)


def sharded(rank: int, topology: str, plan: Plan, mode: str, micro: int, steps: int, dtype: torch.dtype,
            make: Callable[[], nn.Module] = small) -> list[Any]:  # fmt: skip
    """Per step: losses of this rank, and (name, rows, values) of every master; the ledger's columns are equal."""
    torch._dynamo.reset()
    torch.set_num_threads(1)
    model: Any = hierarchical_zero(make(), topology=topology, plan=plan, compute_dtype=dtype, **MODES[mode])
    stepper, out = optimizer(p for p in model.parameters() if p.requires_grad), []
    for step in range(steps):
        losses = []
        for k in range(micro):
            model.set_requires_gradient_sync(k == micro - 1)
            loss = model(tokens(step, rank, k)) / micro
            loss.backward()
            losses.append(float(loss.detach()))
        stepper.step()
        stepper.zero_grad()
        for level, rows in ledger(model)["levels"].items():
            for transfer, row in rows.items():
                assert row["predicted"] == row["compiled"] == row["counted"], f"step {step}, {level} {transfer}: {row}"
        held = [
            (s.name, s.spec.layout.local_rows(model.zero.coordinates), s.master.to_local().detach().clone())
            for s in model.zero.slots
        ]
        out.append((losses, held))
    return out


def agree(found: list[list[Any]], reference: Reference, micro: int, steps: int) -> None:
    """Every rank's losses and masters of every step are the reference's, bit for bit."""
    world = range(len(found))
    for step in range(steps):
        losses = reference.step([[tokens(step, rank, k) for k in range(micro)] for rank in world])
        for rank in world:
            mine, held = found[rank][step]
            assert mine == losses[rank].tolist(), f"step {step}: losses of rank {rank}"
            for name, (start, count), values in held:
                expected = reference.masters[name].detach()[start : start + count]
                assert torch.equal(values, expected), (
                    f"step {step}: {name} on rank {rank}: {(values - expected).abs().max()}"
                )


def reference(topology: str, plan: Plan, micro: int) -> Reference:
    """The unsharded twin of `sharded` in fp32."""
    resolved = plan.resolve(Topology.parse(topology), "float32")
    return Reference(
        small(), resolved, lambda p: optimizer(q for q in p if q.requires_grad), loss=lambda m, t: m(t) / micro
    )
