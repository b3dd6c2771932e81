"""What went through compiled graphs: nothing is taken for compiled because its numbers are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zcompile
from zcompile import hierarchical_zero


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class Broken(Whole):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        out: Tensor = self.second(x)
        return out


class Looped(Whole):
    """A tensor's `if` in a loop: Dynamo gives the whole frame up, makes no graph and reports no break."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.first(x)
            if x.sum() > 1e9:
                x = self.second(x)
        return x


class Partly(Whole):
    """Compiled but for one call that Dynamo may not look into."""

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(torch.tanh(self.first(x)))

    @torch.compiler.disable
    def outside(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(x)
        return out


MODELS = {cls.__name__: cls for cls in (Whole, Broken, Looped, Partly)}


def covered(rank: int, name: str) -> dict[str, Any]:
    model: Any = hierarchical_zero(MODELS[name](), topology="2", plan="zero3", codegen=False, sync_init=True)
    model(torch.ones(2, 6)).sum().backward()
    first = zcompile.coverage(model)
    with torch.no_grad():
        model(torch.ones(2, 6))
    assert zcompile.coverage(model)["share"] == first["share"]
    return first


FIRST, SECOND = ["first.weight", "first.bias"], ["second.weight", "second.bias"]


def test_one_graph(ranks: Any) -> None:
    for found in ranks(2).run(covered, "Whole"):
        assert (
            found["share"] == 1.0 and found["compiled"] == FIRST + SECOND and not found["eager"] and not found["breaks"]
        )
        assert found["unread"] == ["third.weight", "third.bias"]
        assert found["graphs"] and all("graph" in name for name in found["graphs"])


def test_a_break_costs_no_coverage_and_is_told_with_its_line(ranks: Any) -> None:
    for found in ranks(2).run(covered, "Broken"):
        assert found["share"] == 1.0 and len(found["breaks"]) == 1
        assert "graph_break" in found["breaks"][0]["reason"] and __file__ in found["breaks"][0]["where"]


def test_a_frame_that_is_given_up_in_silence_is_seen(ranks: Any) -> None:
    for found in ranks(2).run(covered, "Looped"):
        assert found["share"] == 0.0 and not found["graphs"] and not found["breaks"]
        assert set(found["eager"]) == set(FIRST) and all(__file__ in where for where in found["eager"].values())


def test_a_part(ranks: Any) -> None:
    for found in ranks(2).run(covered, "Partly"):
        assert found["share"] == 0.5 and found["compiled"] == FIRST and list(found["eager"]) == SECOND


def strict(rank: int, name: str, compiled: bool) -> str:
    model: Any = hierarchical_zero(
        MODELS[name](), topology="2", plan="zero3", codegen=False, sync_init=True, compile=compiled, strict=True
    )
    try:
        model(torch.ones(2, 6)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "compiled", "said"),
    [
        ("Whole", True, ""),
        ("Broken", True, ""),
        ("Looped", True, "0%"),
        ("Partly", True, "50%"),
        ("Whole", False, "0%"),
    ],
)
def test_strict(ranks: Any, name: str, compiled: bool, said: str) -> None:
    for message in ranks(2).run(strict, name, compiled):
        assert (said in message and "strict=True" in message and __file__ in message) if said else message == ""


def symbols(rank: int) -> list[int]:
    """Sizes that are symbols in the first graph of each of two models, after the first one has seen two shapes."""
    found = []
    for rows in ((4, 6), (8,)):
        model: Any = hierarchical_zero(Whole(), topology="2", plan="zero3", codegen=False, sync_init=True)
        model.zero.graphs = []
        for count in rows:
            model(torch.ones(count, 6)).sum().backward()
        inputs = [node.meta["val"] for node in model.zero.graphs[0][1].graph.nodes if node.op == "placeholder"]
        dynamic = [
            x for x in inputs if isinstance(x, torch.SymInt) or any(isinstance(n, torch.SymInt) for n in x.shape)
        ]
        found.append(len(dynamic))
    return found


def test_a_model_does_not_begin_with_the_changed_shapes_of_another(ranks: Any) -> None:
    assert ranks(2).run(symbols) == [[0, 0]] * 2
