"""The option `keep`: gathered weights that the forward leaves for its backward, in bytes, and the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.marks import slow
from support.spawn import Pool, RanksFailed
from torch import nn

from zcompile import Plan, hierarchical_zero, ledger
from zcompile.front import engine_of
from zcompile.passes.work import weights_at_work

Ranks = Callable[[int], Pool]
LAYERS, WIDTH = 4, 32
ONE = 4 * WIDTH * WIDTH
"""Bytes of a layer's weight."""


def gathered(model: Any) -> int:
    """Bytes that this rank received for gathers in the last step; predicted, compiled and counted ones are equal."""
    found = [transfers["gather"] for transfers in ledger(model)["levels"].values() if "gather" in transfers]
    assert all(each["predicted"] == each["compiled"] == each["counted"] for each in found), found
    return sum(each["counted"] for each in found)


def trained(rank: int, keep: int, settings: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
    """Masters after three steps of two micro-batches, and bytes of gathers in the last step."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
    model: Any = hierarchical_zero(
        nn.Sequential(*layers), topology={2: "2", 4: "2x2"}[dist.get_world_size()], keep=keep, **settings
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        for micro in range(2):
            torch.manual_seed(100 * rank + 10 * step + micro)
            with model.no_sync() if micro == 0 else contextlib.nullcontext():
                model(torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.to_local().clone() for p in model.parameters()], gathered(model)


MOST = 2 * LAYERS - 1
"""Gathers of a micro-batch, forward and backward, in which nobody asks for the gradient of the input."""
LEFT = {ONE - 1: MOST, 2 * ONE: MOST - 2, LAYERS * ONE: LAYERS}
"""keep -> gathers that are left."""


@pytest.mark.parametrize(
    ("wire", "codegen", "world", "keeps"),
    [
        ("fp32", False, 2, tuple(LEFT)),
        slow("int8", False, 4, (2 * ONE,)),
        slow("int8", True, 2, (2 * ONE,)),
    ],
)
def test_bits_stay_and_bytes_go(ranks: Ranks, wire: str, codegen: bool, world: int, keeps: tuple[int, ...]) -> None:
    settings = {"plan": Plan.preset("zero3", gather=wire), "codegen": codegen}
    pool = ranks(world)
    plain = pool.run(trained, 0, settings, timeout=300.0)
    each = plain[0][1] // (2 * MOST)  # a layer's gather; two micro-batches
    for keep in keeps:
        for (weights, received), (right, _) in zip(
            pool.run(trained, keep, settings, timeout=300.0), plain, strict=True
        ):
            assert received == 2 * LEFT[keep] * each, (keep, received)
            assert all(torch.equal(a, b) for a, b in zip(weights, right, strict=True))


def keeps(rank: int, keep: Any) -> None:
    hierarchical_zero(nn.Linear(4, 4), topology="2x2", keep=keep)


def different(rank: int) -> None:
    hierarchical_zero(nn.Linear(4, 4), topology="2x2", keep=100 * rank)


def test_bad_values_and_ranks_that_keep_different_amounts(ranks: Ranks) -> None:
    for bad in (-1, True, "1GB", 1.5):
        with pytest.raises(RanksFailed, match=r"option keep=.*must be a number of bytes, or 0 to keep nothing"):
            ranks(4).run(keeps, bad)
    with pytest.raises(RanksFailed, match="settings of hierarchical_zero"):
        ranks(4).run(different)


def work(_: int, peer_gather: bool, keep: int) -> dict[str, int]:
    """Stage -> elements of the weights at work in its graph."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
    plan = Plan.preset("zero3", peer_gather=peer_gather)
    settings = {"topology": "2", "plan": plan, "compute_dtype": torch.bfloat16}
    model: Any = hierarchical_zero(nn.Sequential(*layers), keep=keep, codegen=False, **settings)
    engine_of(model, "").graphs = graphs = []
    model(torch.randn(8, WIDTH).bfloat16()).square().mean().backward()
    return {stage: sum(weights_at_work(gm.graph.nodes).values()) for stage, gm in graphs}


@pytest.mark.parametrize(
    ("peer_gather", "keep"), [(False, 0), (False, LAYERS * ONE), (True, 0)], ids=["gathered", "kept", "in place"]
)
def test_the_work_of_weights_is_known_wherever_they_are(ranks: Ranks, peer_gather: bool, keep: int) -> None:
    """What a schedule goes by: each forward product reads a weight; a backward has two products of each, but for the first's input."""
    one = WIDTH * WIDTH
    for found in ranks(2).run(work, peer_gather, keep, timeout=120.0):
        assert found == {"forward": LAYERS * one, "backward": (2 * LAYERS - 1) * one}
