"""Optimizers over sharded masters: element-wise ones as they are, whole-matrix ones right or refused."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.training import both, mlp, ours, same, sgd, square, step, theirs, twins
from torch import nn

from zcompile import Plan, Rule
from zcompile.runtime import Runtime

WORLD = 4
LOSS = square(4, 7)


def matrices() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 16, bias=False), nn.Tanh(), nn.Linear(16, 9, bias=False), nn.Linear(9, 5, bias=False)
    )


ELEMENTWISE: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "foreach": False}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "asgd": (torch.optim.ASGD, {"lr": 0.01}),
}


def _optimizer(rank: int, name: str) -> None:
    cls, settings = ELEMENTWISE[name]
    model, dense = twins(mlp, "eager")

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        return [{"params": matrices}, {"params": rest, "lr": settings["lr"] / 2}]

    optimizers = [cls(groups(m), **settings) for m in (model, dense)]
    for number in range(4):
        both_close(model, dense, number)
        step(optimizers)
    # Updates divided by the root of a tiny gradient's square magnify the last bit of the order of sums.
    same(model, dense, 2e-5)


def both_close(model: Any, dense: nn.Module, number: int) -> None:
    torch.testing.assert_close(ours(model, LOSS, number), theirs(dense, LOSS, number), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_element_wise_optimizers_with_groups_of_their_own(ranks: Any, name: str) -> None:
    ranks(WORLD).run(_optimizer, name)


def _clipped(rank: int) -> None:
    model, dense = twins(mlp, "eager")
    optimizers = sgd(model, dense)
    for number in range(2):
        both(model, dense, LOSS, number)
        mine = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        other = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.1)
        torch.testing.assert_close(mine.full_tensor(), other, rtol=1e-6, atol=1e-7)
        step(optimizers)
        same(model, dense)


def test_torchs_own_clipping_sees_the_whole_norm(ranks: Any) -> None:
    ranks(WORLD).run(_clipped)


def _muon(rank: int, plan: str) -> None:
    """Its products are of whole matrices, by DTensor. In fp64 instead of its bf16, so that the last bits do not hide an error."""
    model, dense = twins(matrices, "eager", plan=plan)
    optimizers = [torch.optim.Muon(m.parameters(), lr=0.1) for m in (model, dense)]
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.double):
        for number in range(2):
            both(model, dense, LOSS, number)
            step(optimizers)
            same(model, dense, 2e-6)
    both(model, dense, LOSS, 2)  # and as it is: equal to the dense one's bf16
    step(optimizers)
    same(model, dense, 0.02)


@pytest.mark.parametrize("plan", ["zero_topo", "zero3", "hsdp", "ddp"])
def test_muon_steps_whole_matrices(ranks: Any, plan: str) -> None:
    ranks(WORLD).run(_muon, plan)


REFUSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1),
    "Subclass": lambda params: type("Subclass", (torch.optim.Adafactor,), {})(params, lr=0.1),
}


def _refused(rank: int, name: str) -> None:
    model, dense = twins(mlp, "eager")
    optimizer = REFUSED[name](model.parameters())
    LOSS(model, rank, 0).backward()
    try:
        optimizer.step(lambda: torch.zeros(()))
    except RuntimeError as error:
        assert name in str(error) and "element-wise" in str(error), error
        same(model, dense, 0.0)  # nothing was stepped
    else:
        raise AssertionError("stepped")
    plain = REFUSED[name](dense.parameters())  # other models are none of our business
    theirs(dense, LOSS, 0)
    plain.step(lambda: torch.zeros(()))


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_shards_would_break_is_refused(ranks: Any, name: str) -> None:
    ranks(WORLD).run(_refused, name)


def _kept_whole(rank: int, name: str, plan: Any) -> None:
    model, dense = twins(mlp, "eager", plan=plan)
    optimizers = [REFUSED[name](m.parameters()) for m in (model, dense)]
    for number in range(2):
        both(model, dense, LOSS, number)
        step(optimizers)
        same(model, dense, 1e-5)


@pytest.mark.parametrize(
    "plan",
    ["ddp", Plan(rules=(Rule("*", weights="whole", gradients="whole", optimizer="whole"),))],
    ids=["ddp", "rule"],
)
def test_adafactor_steps_what_the_plan_keeps_whole(ranks: Any, plan: Any) -> None:
    ranks(WORLD).run(_kept_whole, "Adafactor", plan)


def _earlier(rank: int) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        twins(lambda: model, "eager")
    except ValueError as error:
        assert "AdamW" in str(error) and "before it was wrapped" in str(error)
    else:
        raise AssertionError("accepted")
    assert isinstance(model[0].weight, nn.Parameter) and type(model) is nn.Sequential  # untouched
    cycle: list[Any] = [optimizer]
    cycle.append(cycle)  # garbage, but not yet collected
    proxy = weakref.proxy(mlp())  # isinstance of a dead proxy raises
    del optimizer, cycle
    twins(lambda: model, "eager")
    del proxy


def test_an_optimizer_made_before_wrapping_is_refused(ranks: Any) -> None:
    ranks(WORLD).run(_earlier)


def _quiet(rank: int) -> None:
    """What needs no other rank asks none: one rank alone steps (it is told not to ask whether gradients are finite, and no weight
    was read outside of compiled graphs), looks at a weight, and counts."""
    model, _ = twins(mlp, "graph", nonfinite="ignore")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    LOSS(model, rank, 0).backward()
    before = Runtime.get(model.zero.plan.topology).snapshot()
    if rank == 1:
        optimizer.step()
        assert model[0].weight.shape == (9, 7) and model[0].weight.to_local().numel()
        assert "DTensor" in repr(type(model[0].weight.data)) or model[0].weight.dim() == 2
        assert pickle.dumps(optimizer.state_dict()["param_groups"])
        model.state_dict()
        model.load_state_dict({name: torch.zeros(p.shape) for name, p in model.state_dict().items()})
    assert Runtime.get(model.zero.plan.topology).snapshot() == before


def test_reading_and_stepping_weights_outside_a_forward_never_communicates(ranks: Any) -> None:
    ranks(WORLD).run(_quiet)
