"""plan="auto" on real ranks: the same plan on each, and the ordinary training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import training
from support.marks import slow
from support.spawn import Pool
from torch import nn

from zcompile import Auto, hierarchical_zero, ledger

Ranks = Callable[[int], Pool]


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def train(rank: int, example: bool) -> tuple[str, int, float, Any]:
    settings: dict[str, Any] = (
        {"plan": Auto(micro_batches=2), "example": torch.zeros(2, 16)} if example else {"plan": "auto"}
    )
    wrapped, dense = training.twins(make, "graph", **settings)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (wrapped, dense)]
    loss = training.square(2, 16)
    for number in range(3):
        training.ours(wrapped, loss, number)
        torch.stack([loss(dense, r, number) for r in range(dist.get_world_size())]).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        gap = float((wrapped(torch.ones(2, 16)) - dense(torch.ones(2, 16))).abs().max())
    return wrapped.zero.plan.describe(), wrapped.zero.options.overlap, gap, ledger(wrapped)["levels"]


@pytest.mark.parametrize("example", [slow(False), True])
def test_every_rank_chooses_the_same_plan_and_trains(ranks: Ranks, example: bool) -> None:
    found = ranks(4).run(train, example, timeout=300.0)
    assert len({(plan, overlap) for plan, overlap, _, _ in found}) == 1
    for plan, overlap, gap, _ in found:
        assert plan.startswith("plan auto on 2x2") and overlap >= 1 and gap < 1e-5


def refused(rank: int) -> str:
    try:
        hierarchical_zero(make(), topology="2x2", plan="zero3", example=torch.zeros(2, 16))
    except ValueError as error:
        return str(error)
    return ""


def test_an_example_that_nothing_needs_is_refused(ranks: Ranks) -> None:
    assert all("for plan='auto'" in text for text in ranks(4).run(refused))
