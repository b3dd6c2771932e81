"""Error feedback: its state is declared, kept with a checkpoint, reset on another world; and it does what it is for."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from zcompile import Plan, cost, feedback_state, hierarchical_zero, load_feedback_state

PLAN = Plan.preset("zero_topo", reduce="int4/32", error_feedback=0.0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16, bias=False))


def wrapped(topology: str, plan: Plan = PLAN) -> Any:
    return hierarchical_zero(model(), topology=topology, plan=plan, compile=False)


def step(model: Any, rank: int, number: int) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(100 * number + rank))
    model(x).square().mean().backward()


def save(rank: int, folder: str) -> None:
    made = wrapped("2x2")
    for number in range(3):
        step(made, rank, number)
    state = feedback_state(made)
    assert set(state) == {"2x2"} and set(state["2x2"]) == {f"{n}.weight.{t}" for n in "02" for t in ("reduce", "sync")}
    rows = state["2x2"]["0.weight.reduce"]
    assert rows.shape == (4, 32 * 64) and rows.to_local().abs().max() > 0
    assert made.zero.memory()["feedback"] == cost.state_bytes((s.spec for s in made.zero.slots), {}, False)["feedback"]
    dcp.save({"feedback": state}, checkpoint_id=folder)
    other = wrapped("2x2")
    assert load_feedback_state(other, folder)
    for name, row in feedback_state(other)["2x2"].items():
        assert torch.equal(row.to_local(), state["2x2"][name].to_local()), name
    for one, two in zip(made.zero.slots, other.zero.slots, strict=True):
        for transfer, error in one.errors.items():
            assert torch.equal(error, two.errors[transfer])


def load_elsewhere(rank: int, folder: str, topology: str) -> tuple[bool, float, str]:
    made = wrapped(topology)
    step(made, rank, 0)
    assert max(float(e.abs().max()) for s in made.zero.slots for e in s.errors.values()) > 0
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        loaded = load_feedback_state(made, folder)
    return loaded, max(float(e.abs().max()) for s in made.zero.slots for e in s.errors.values()), said.getvalue()


def test_state_is_sharded_saved_and_loaded_and_begins_at_zero_elsewhere(ranks: Any, tmp_path: Any) -> None:
    folder = str(tmp_path / "checkpoint")
    ranks(4).run(save, folder)
    for world in (4, 2):
        found = ranks(world).run(load_elsewhere, folder, str(world))
        assert [(loaded, largest) for loaded, largest, _ in found] == [(False, 0.0)] * world
        assert f"has it for 2x2, not for topology {world} and this plan" in found[0][2]


def drift(rank: int, plan: Plan) -> float:
    """Distance of the sum of 30 gradients of one batch from 30 times the exact one, relative."""
    made, exact = wrapped("2x2", plan), wrapped("2x2", Plan.preset("zero_topo"))
    total, expected = 0.0, 0.0
    for _ in range(30):
        for m in (made, exact):
            m.zero_grad()
            step(m, rank, 0)
        total = total + made.zero.slots[0].master.grad.to_local()
        expected = expected + exact.zero.slots[0].master.grad.to_local()
    return float((total - expected).norm() / expected.norm())


@pytest.mark.slow
def test_what_one_step_loses_the_next_ones_bring(ranks: Any) -> None:
    """The mechanism: without it, or with a state that is never added, the loss of each step adds up."""
    with_it = max(ranks(4).run(drift, PLAN))
    without = min(ranks(4).run(drift, Plan.preset("zero_topo", reduce="int4/32")))
    assert with_it < without / 4, (with_it, without)


def odd(rank: int) -> None:
    with pytest.raises(
        ValueError, match=r"error_feedback with '0.weight': the first hop of its reduce \(pair\) is fp32 and a later"
    ):
        wrapped("2x1x2", Plan("pair", "world", "world", reduce={"cluster": "int4/32"}, error_feedback=0.5))


def test_f29_feedback_that_could_hold_no_state_is_refused(ranks: Any) -> None:
    ranks(4).run(odd)
