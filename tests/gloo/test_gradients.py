"""Norms equal those of one process; a gradient that is not finite anywhere is the same decision everywhere."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.training import batch, mlp, ours, replicas, square, theirs
from torch import nn

import zcompile
from zcompile import Plan, gradients, hierarchical_zero

MESHES = [
    ("2x2x2", "zero_topo"),
    ("2x2x2", "hsdp"),
    ("8", "zero3"),
    ("2x4", "zero1"),
    ("4x2", "ddp"),
    ("1x2x4", "zeropp"),
]


class Mixed(nn.Module):
    """Frozen, uneven, scalar and unused beside plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.frozen(self.inner(x)) * self.scale
        return out


def pair(topology: str, plan: Any, **options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    dense = Mixed()
    torch.manual_seed(0)
    return hierarchical_zero(Mixed(), topology=topology, plan=plan, compile=False, **options), dense


def norms(rank: int, topology: str, plan: str) -> None:
    model, dense = pair(topology, plan)
    loss = square(4, 7)
    for number, (order, limit) in enumerate([(2.0, 1e-3), (1.0, 1e-3), (math.inf, 1e-4), (3.0, 1e9), (2.0, math.inf)]):
        ours(model, loss, number)
        theirs(dense, loss, number)
        copies = [None if p.grad is None else p.grad.to_local().clone() for p in model.parameters()]
        expected = torch.nn.utils.clip_grad_norm_(dense.parameters(), limit, order).item()
        found = zcompile.clip_grad_norm_(model, limit, order)
        assert type(found) is float and found == pytest.approx(expected, rel=1e-6)
        for mine, other in zip(model.parameters(), dense.parameters(), strict=True):
            if other.grad is not None and mine.grad is not None:
                # Two orders of summing at most 8 ranks' gradients, each rounded once a term, of terms that may cancel: what is lost is
                # in proportion to the terms, not to their sum.
                lost = 2 * 8 * torch.finfo(torch.float32).eps * float(other.grad.abs().max())
                torch.testing.assert_close(mine.grad.full_tensor(), other.grad, rtol=2e-6, atol=lost)
        if found <= limit:
            kept = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
            assert all(torch.equal(a, b) for a, b in zip(kept, [c for c in copies if c is not None], strict=True))
        if math.isinf(order):  # torch's own cannot take it of a shard without rows
            model.zero_grad()
            dense.zero_grad()
            continue
        torch_says = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], order)
        again = torch.nn.utils.get_total_norm([p.grad for p in dense.parameters() if p.grad is not None], order)
        assert torch_says.full_tensor().item() == pytest.approx(again.item(), rel=1e-6)  # type: ignore[attr-defined]
        model.zero_grad()
        dense.zero_grad()


@pytest.mark.parametrize(("topology", "plan"), MESHES)
def test_requirement_21_norms_are_those_of_one_process(ranks: Any, topology: str, plan: str) -> None:
    ranks(8).run(norms, topology, plan)


def refused(rank: int) -> None:
    model, _ = pair("2", "zero3")
    ours(model, square(4, 7), 0)
    for arguments in ((0.0,), (-1.0,), (True,), (1.0, 0.0), (float("nan"),)):
        with pytest.raises(ValueError, match="clip_grad_norm_"):
            zcompile.clip_grad_norm_(model, *arguments)
    with pytest.raises(ValueError, match=r"nonfinite='explode'.*skip, raise, ignore"):
        pair("2", "zero3", nonfinite="explode")
    model.inner[0].weight.grad.to_local().fill_(math.nan) if rank == 1 else None
    before = model.inner[2].weight.grad.to_local().clone()
    assert math.isnan(zcompile.clip_grad_norm_(model, 1.0))
    assert torch.equal(before, model.inner[2].weight.grad.to_local()), "what is not a norm clips nothing"
    assert math.isnan(zcompile.clip_grad_norm_(model, 1.0, math.inf))
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        zcompile.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


def test_bad_arguments_and_norms_that_are_no_numbers(ranks: Any) -> None:
    ranks(2).run(refused)


def state(model: Any, optimizer: Any) -> list[torch.Tensor]:
    """Masters, moments and step counts."""
    kept = [p.to_local().detach() for p in model.parameters()]
    for entry in optimizer.state.values():
        kept += [value.to_local() if hasattr(value, "to_local") else value for value in entry.values()]
    return [value.clone() for value in kept]


class Poison(torch.autograd.Function):
    """Passes on; its backward makes what goes to the weight infinite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.value, None


class Poisoned(nn.Module):
    """One rank may spoil the gradient of `second.weight` and of nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 8), nn.Linear(8, 3)
        self.value = 1.0
        self.times = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        weight = Poison.apply(self.second.weight, self.value)
        return torch.nn.functional.linear(hidden, weight, self.second.bias).square().mean() * self.times


def skipping(rank: int, compiled: bool, plan: dict[str, Any], options: dict[str, Any], closure: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    chosen = Plan.preset("zero_topo", **plan)
    model: Any = hierarchical_zero(Poisoned(), topology="2x2", plan=chosen, compile=compiled, codegen=False, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    said = io.StringIO()
    found: dict[str, Any] = {"unchanged": [], "changed": []}

    def backward(number: int) -> Any:
        loss = model(batch(rank, number, 4, 7))
        loss.backward()
        return loss

    with contextlib.redirect_stderr(said):
        for number, kind in enumerate(["fine", "parameter", "fine", "loss", "fine"]):
            model.value = math.nan if kind == "parameter" and rank == 3 else 1.0
            model.times = math.inf if kind == "loss" and rank == 2 else 1.0
            before = state(model, optimizer)
            if closure:
                optimizer.step(lambda number=number: backward(number))
            else:
                backward(number)
                optimizer.step()
            after = state(model, optimizer)
            same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            (found["changed"] if kind == "fine" else found["unchanged"]).append(same)
            assert any(p.grad is not None for p in model.parameters()), "given back after a step that was skipped"
            optimizer.zero_grad()
    found["finite"] = all(bool(torch.isfinite(value).all()) for value in state(model, optimizer))
    found["finite"] &= all(bool(torch.isfinite(e).all()) for slot in model.zero.slots for e in slot.errors.values())
    found["said"] = [line for line in said.getvalue().splitlines() if "skipped" in line]
    found["count"] = zcompile.ledger(model)["skipped_steps"]
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("plan", "options", "closure"),
    [
        ({}, {}, False),
        ({}, {"checks": True}, True),
        ({"wire": "paper", "error_feedback": 0.5}, {"checks": True}, False),
    ],
    ids=["native", "checks and a closure", "quantised with error feedback"],
)
def test_requirement_8_f10_all_ranks_skip_together(
    ranks: Any, compiled: bool, plan: dict[str, Any], options: dict[str, Any], closure: bool
) -> None:
    results = ranks(4).run(skipping, compiled, plan, options, closure, timeout=120.0)
    for result in results:
        assert result["unchanged"] == [True, True] and result["changed"] == [False, False, False]
        assert result["finite"] and result["count"] == 2
    first, second = results[0]["said"]
    assert "step skipped on all ranks (1 so far)" in first and "second.weight" in first
    assert "(2 so far)" in second and "the loss of rank 2" in second
    assert "first on rank 3" in first and "first on rank 2" in second
    assert not any(result["said"] for result in results[1:]), "said once"


def raising(rank: int) -> str:
    torch.manual_seed(0)
    model: Any = hierarchical_zero(Poisoned(), topology="2x1", plan="zero3", compile=False, nonfinite="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.value = math.inf if rank == 1 else 1.0
    model(batch(rank, 0, 4, 7)).backward()
    before = state(model, optimizer)
    with pytest.raises(FloatingPointError) as caught:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, optimizer), strict=True))
    return str(caught.value)


def test_every_rank_raises_where_that_is_asked_for(ranks: Any) -> None:
    one, two = ranks(2).run(raising)
    assert one == two and "second.weight" in one


def two_optimizers(rank: int) -> list[Any]:
    """[which weights changed, steps skipped]: rank 1 spoils the gradient of `second.weight` alone."""
    torch.manual_seed(0)
    model: Any = hierarchical_zero(Poisoned(), topology="2x1", plan="zero3", compile=False)
    spoilt = torch.optim.SGD(model.second.parameters(), lr=0.1)
    well = torch.optim.SGD(model.first.parameters(), lr=0.1)
    model.value = math.nan if rank == 1 else 1.0
    before = zcompile.full_state_dict(model)
    model(batch(rank, 0, 4, 7)).backward()
    spoilt.step()
    well.step()
    after = zcompile.full_state_dict(model)
    replicas(model)
    return [
        [name for name in before if not torch.equal(before[name], after[name])],
        zcompile.ledger(model)["skipped_steps"],
    ]


def test_of_two_optimizers_each_looks_at_what_it_steps(ranks: Any) -> None:
    for changed, skipped in ranks(2).run(two_optimizers):
        assert changed == ["first.weight", "first.bias"] and skipped == 1


def ignoring(rank: int, compiled: bool) -> list[int]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = hierarchical_zero(
        Poisoned(), topology="2x1", plan="zero3", compile=compiled, codegen=False, nonfinite="ignore"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.value = math.nan if rank == 1 else 1.0
    model(batch(rank, 0, 4, 7)).backward()
    exchanges = []
    kept = type(model.zero.runtime.agreement).exchange
    model.zero.runtime.agreement.exchange = lambda *a, **k: (
        exchanges.append(1),
        kept(model.zero.runtime.agreement, *a, **k),
    )[1]
    optimizer.step()
    del model.zero.runtime.agreement.exchange
    whole = zcompile.full_state_dict(model)["second.weight"]
    dist.barrier()
    return [len(exchanges), int(whole.isnan().sum())]


@pytest.mark.parametrize("value", [1e30, -3e38, math.inf, -math.inf, math.nan])
def test_large_elements_are_finite(value: float) -> None:
    """Their squares are not."""

    class Master:
        grad = torch.zeros(1000)

    class Slot:
        master = Master

    Master.grad[7] = value
    assert bool(gradients._not_finite([Slot])) is not math.isfinite(value)  # type: ignore[list-item]


def test_without_the_check_nothing_is_exchanged_and_masters_are_spoilt(ranks: Any) -> None:
    for exchanges, spoilt in ranks(2).run(ignoring, True):
        assert exchanges == 0 and spoilt > 0
    for exchanges, spoilt in ranks(2).run(ignoring, False):  # which weights were read: see zcompile.launches
        assert exchanges == 1 and spoilt > 0
