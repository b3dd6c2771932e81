"""The rank on which a gradient that is no number arose is named, not the one whose shard it ended up in."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.marks import slow
from support.patches import replaced
from support.training import batch
from torch import Tensor, nn

import zcompile
from zcompile import Plan, hierarchical_zero, origins
from zcompile.params import local_of

PLANS = [
    ("2x2", "zero_topo"),
    ("4", "zero3"),
    ("2x2", "ddp"),  # nothing is reduced before the sync
    ("1x2x2", "hsdp"),  # nothing is sent over the innermost level
    ("2x2", "zero1"),
]


class Poison(torch.autograd.Function):
    """Passes on; its backward spoils one element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        spoilt = torch.zeros_like(grad)
        spoilt.view(-1)[3] = ctx.value
        return grad + spoilt, None


class Spoilt(nn.Module):
    """`where` a gradient is spoilt: that of a weight, or of what is between the layers, from which it spreads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 64), nn.Linear(64, 64)
        self.where, self.value = "", 0.0

    def forward(self, x: Tensor) -> Tensor:
        weights = {"first": self.first.weight, "second": self.second.weight}
        if self.where in weights:
            weights[self.where] = Poison.apply(weights[self.where], self.value)
        hidden = torch.tanh(nn.functional.linear(x, weights["first"], self.first.bias))
        if self.where == "hidden":
            hidden = Poison.apply(hidden, self.value)
        return nn.functional.linear(hidden, weights["second"], self.second.bias).square().mean()


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        yield lines
    lines += [line for line in text.getvalue().splitlines() if "skipped" in line]


def told(
    rank: int, topology: str, plan: Any, mode: str, steps: Sequence[dict[int, tuple[str, int]]], looked: bool = True
) -> list[str]:
    """What is said of each step. Each of `steps`: rank -> (where it spoils a gradient, in which of two micro-batches)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    chosen = plan if isinstance(plan, str) else Plan.preset("zero_topo", **plan)
    model: Any = hierarchical_zero(Spoilt(), topology=topology, plan=chosen, compile=mode == "graph", codegen=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = []
    with contextlib.nullcontext() if looked else replaced(origins.Origins, "sent", lambda *_: None):
        for number, faults in enumerate(steps):
            with said() as lines:
                for micro in range(2):
                    where, when = faults.get(rank, ("", -1))
                    model.where, model.value = where, math.nan if micro == when else 0.0
                    model.set_requires_gradient_sync(micro == 1)
                    model(batch(rank, number, 4, 7)).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append("".join(lines) if rank == 0 else "")
    assert zcompile.ledger(model)["skipped_steps"] == sum(bool(faults) for faults in steps)
    return found


FAULTS: list[dict[int, tuple[str, int]]] = [
    {3: ("second", 1)},
    {},
    {2: ("first", 0)},  # in a micro-batch before the last
    {1: ("first", 1), 2: ("second", 1)},  # a backward comes to the second layer first
    {1: ("hidden", 1)},
]
NAMES = ["second.weight", "", "first.weight", "second.weight", "first."]
RANKS = [3, None, 2, 2, 1]


@pytest.mark.parametrize(
    ("topology", "plan", "mode"),
    [(*each, "eager") for each in PLANS] + [slow(*each, "graph") for each in PLANS if each[1] in ("zero_topo", "ddp")],
)
def test_requirement_8_the_rank_where_it_arose_is_named(ranks: Any, topology: str, plan: str, mode: str) -> None:
    lines, *_ = ranks(4).run(told, topology, plan, mode, FAULTS)
    for line, name, rank, faults in zip(lines, NAMES, RANKS, FAULTS, strict=True):
        if rank is None:
            assert line == ""
        else:
            first = (
                f"rank {rank}" if mode == "eager" or len(faults) == 1 else "ranks 1, 2"
            )  # both weights are one message
            assert f"the gradient of '{name}" in line and line.endswith(f"is not finite, first on {first}"), line


def test_it_is_what_is_sent_that_tells(ranks: Any) -> None:
    """Without a look at it the owner of a shard is named, and that it need not be the origin is said."""
    for mode in ("eager", "graph"):
        line = ranks(4).run(told, "2x2", "zero_topo", mode, FAULTS[:1], False)[0][0]
        assert (
            "first on" not in line and "found in the shard that rank 0 owns, which need not be where it arose" in line
        )
        assert "'second.weight'" in line and "checks=True" in line, line


def test_of_quantised_messages_those_in_native_formats_tell(ranks: Any) -> None:
    """What spreads from activations reaches vectors, which are not quantised; of a matrix alone the owner of its shard is named."""
    spread, alone = ranks(4).run(told, "2x2", {"wire": "paper"}, "graph", [FAULTS[4], FAULTS[0]])[0]
    assert "'first.bias' is not finite, first on rank 1" in spread, spread
    assert "'second.weight' is not finite; it was found in the shard that rank" in alone and "checks=True" in alone, (
        alone
    )


def given_up(rank: int) -> str:
    """Gradients that are dropped without a step, as torch.amp.GradScaler does, are not those of the next one."""
    torch.manual_seed(0)
    model: Any = hierarchical_zero(Spoilt(), topology="2", plan="zero3", compile=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with said() as lines:
        for odd in (0, 1):
            model.where, model.value = "second", math.nan if rank == odd else 0.0
            model(batch(rank, odd, 4, 7)).backward()
            if odd == 0:
                assert any(not torch.isfinite(local_of(p.grad)).all() for p in model.parameters()) == (rank == 0)
                optimizer.zero_grad()
        optimizer.step()
    return "".join(lines)


def test_what_was_given_up_without_a_step_is_forgotten(ranks: Any) -> None:
    line, _ = ranks(2).run(given_up)
    assert line.endswith("first on rank 1"), line
