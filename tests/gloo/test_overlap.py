"""Transfers that are under way while the graph computes: the same bits, the same bytes, in whatever order hops complete."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.marks import slow
from support.spawn import Pool

from zcompile import Plan, hierarchical_zero, replay, trial
from zcompile.faults.flight import Flight
from zcompile.runtime import Runtime
from zcompile.topology import Topology

Ranks = Callable[[int], Pool]
PLANS = {
    "zero_topo": Plan.preset("zero_topo"),
    "zero3": Plan.preset("zero3"),
    "zero1": Plan.preset("zero1"),
    "hsdp": Plan.preset("hsdp"),
}


def right(outcome: trial.Outcome) -> None:
    assert (outcome.bits, outcome.loss_bits, outcome.replicas, outcome.ledger) == ("", "", "", "")


@pytest.mark.parametrize(
    "plan", [next(iter(PLANS)), *(slow(plan) for plan in list(PLANS)[1:])]
)
def test_invariant_4_bits_and_ledger_are_those_without_overlap(ranks: Ranks, plan: str) -> None:
    # With two both graphs are there: one that accumulates, one that syncs.
    micro_batches = (1, 4) if plan == "zero_topo" else (2,)
    for outcomes in ranks(4).run(trial.run, "awkward", "2x2", PLANS[plan], "overlap", micro_batches, 3, timeout=200.0):
        for outcome in outcomes:
            right(outcome)


@pytest.mark.slow
def test_three_levels_through_inductor(ranks: Ranks) -> None:
    """The generated code launches and waits in the scheduled order (or compiling it fails), and computes the reference's bits."""
    plan = Plan.preset("zero_topo")
    for outcomes in ranks(8).run(trial.run, "pointwise", "2x2x2", plan, "overlapped code", (2,), 3, timeout=300.0):
        for outcome in outcomes:
            assert (outcome.bits, outcome.replicas, outcome.ledger) == ("", "", "")


@pytest.mark.slow
@pytest.mark.parametrize("level", ["cluster", "node"])
def test_f4_delays_in_a_level_change_no_bit(ranks: Ranks, level: str) -> None:
    """Each rank launches and awaits that level's hops up to 20 ms late, each at times of its own: who reads before it waited reads NaN."""
    for outcomes in ranks(4).run(delayed, level, timeout=200.0):
        for outcome in outcomes:
            right(outcome)


def delayed(rank: int, level: str) -> list[trial.Outcome]:
    sleeps = replay.Sleeps(random.Random(rank), [level], 0.02)
    with Runtime.get(Topology.parse("2x2")).disturbed(sleeps):
        found = trial.run(rank, "awkward", "2x2", PLANS["zero_topo"], "overlap", (1, 2), 2)
    assert sleeps.number
    return found


def replayed(rank: int, plan: str, times: int, seed: int, mode: str = "overlap") -> dict[str, Any]:
    return replay.replay(rank, "2x2", replay.plan_of(plan), mode, times, seed)


def passes_early(rank: int, plan: str, transfer: str) -> list[str]:
    """The mutant: waits for that transfer's hops do not wait. What they were to bring comes later, so that nothing is left undone."""
    wait, left = Flight.wait, []

    def early(self: Flight, timeout: Any = None) -> bool:
        if self._group.transfer != transfer or self._group.disturb is None:
            return wait(self, timeout)
        left.append(self)
        return True

    with mock.patch.object(Flight, "wait", early):
        found: list[str] = replay.replay(rank, "2x2", replay.plan_of(plan), "overlap", 1)["differences"]
    for flight in left:
        wait(flight)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ["zero_topo", "zero_topo, int4-delta", "zero_topo, int4-delta, peers"]
)
def test_f4_replays_with_late_launches_and_waits_have_the_same_bits(ranks: Ranks, plan: str) -> None:
    for found in ranks(4).run(replayed, plan, 2, 0, timeout=200.0):
        assert found["differences"] == [] and found["sleeps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["overlap", "overlapped code", "eager"])
def test_f4_many_replays(ranks: Ranks, mode: str) -> None:
    """Of one compile: each replay sleeps elsewhere. `zcompile verify --replay 100` takes as many as one likes."""
    for found in ranks(4).run(replayed, "zero_topo, int4-delta", 20, 1, mode, timeout=400.0):
        assert found["differences"] == [] and found["sleeps"] > 0


@pytest.mark.parametrize("transfer", ["gather", "reduce"])
def test_f4_a_wait_that_does_not_wait_is_seen(ranks: Ranks, transfer: str) -> None:
    for differences in ranks(4).run(passes_early, "zero_topo", transfer, timeout=200.0):
        assert differences


def hooks_left(rank: int) -> int:
    runtime = Runtime.get(Topology.parse("2x2"))
    with contextlib.suppress(KeyError), runtime.disturbed(replay.Sleeps(random.Random(0), ["node"])):
        assert all(role.disturb is not None for role in runtime._roles.values())
        raise KeyError
    return sum(role.disturb is not None for role in runtime._roles.values())


def test_a_replay_leaves_nothing_behind(ranks: Ranks) -> None:
    assert ranks(4).run(hooks_left, timeout=60.0) == [0] * 4


@pytest.mark.parametrize("wire", ["int4-delta refresh", slow("paper")])
def test_quantised_messages_overlap_to_the_same_bits(ranks: Ranks, wire: str) -> None:
    for found in ranks(4).run(losses_of, wire, timeout=200.0):
        assert len(found) == 3 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def losses_of(rank: int, wire: str) -> list[torch.Tensor]:
    """Losses of six steps and the last masters: without overlap, with 1 and with 3 buckets in flight."""
    options: dict[str, Any] = {"wire": "paper"} if wire == "paper" else {"wire": "paper", "refresh": "int4-delta"}
    plan, found = Plan.preset("zero_topo", **options), []
    for overlap in (0, 1, 3):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model: Any = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        model = hierarchical_zero(model, topology="2x2", plan=plan, codegen=False, overlap=overlap)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for step in range(6):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(100 * step + rank))
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        masters = [p.to_local().detach().flatten() for p in model.parameters()]  # type: ignore[attr-defined]
        found.append(torch.cat([torch.stack(losses), *masters]))
    return found


@pytest.mark.parametrize("overlap", [-1, 65, 1.5, True, "2"])
def test_a_bad_number_is_named(overlap: Any) -> None:
    with pytest.raises(ValueError, match=r"option overlap=.*from 0 to 64"):
        hierarchical_zero(torch.nn.Linear(2, 2), topology="1x1", overlap=overlap)
