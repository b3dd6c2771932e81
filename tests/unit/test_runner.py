"""The runner: passes in order, their contracts checked, time taken, the observer told, errors that name pass and graph."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from support.graphs import Hand

from zcompile.passes import runner
from zcompile.passes.nodes import aten
from zcompile.passes.runner import PassError


def made(name: str, run: Any = None, check: Any = None) -> ModuleType:
    nothing = lambda gm, context: None  # noqa: E731
    return cast(ModuleType, SimpleNamespace(NAME=name, run=run or nothing, check=check or nothing))


def graph() -> Hand:
    hand = Hand("forward")
    x = hand.input("x", 4)
    hand.output(hand.call(aten.mul.Tensor, x, 2.0))
    return hand


def fail(gm: Any, context: Any) -> None:
    raise ValueError("the reason")


def test_the_observer_sees_the_graph_before_the_first_pass_and_after_each() -> None:
    hand, seen = graph(), []
    runner.run(hand.gm, [made("one"), made("two")], hand.context, lambda gm, context, name: seen.append(name))
    assert seen == ["input", "one", "two"]
    assert set(hand.context.seconds) == {"one", "two"} and min(hand.context.seconds.values()) >= 0


@pytest.mark.parametrize("broken", ["run", "check"])
def test_an_error_names_pass_graph_and_stage_and_the_graph_it_left_is_shown(broken: str) -> None:
    hand, seen = graph(), []
    with pytest.raises(PassError, match=r"pass `two` on by hand \(forward\): the reason") as found:
        runner.run(hand.gm, [made("one"), made("two", **{broken: fail}), made("three")], hand.context,
                   lambda gm, context, name: seen.append(name))  # fmt: skip
    assert isinstance(found.value.__cause__, ValueError)
    assert seen == ["input", "one", "two.failed"]


def test_a_graph_in_an_impossible_order_is_refused() -> None:
    def swap(gm: Any, context: Any) -> None:
        product = next(node for node in gm.graph.nodes if node.op == "call_function")
        next(iter(gm.graph.nodes)).prepend(product)

    with pytest.raises(PassError, match="pass `swap`"):
        runner.run(graph().gm, [made("swap", run=swap)], graph().context)


def test_notes_belong_to_the_pass_that_wrote_them() -> None:
    hand = graph()
    runner.run(hand.gm, [made("one", run=lambda gm, context: context.note("did it")), made("two")], hand.context)
    assert hand.context.notes == {"one": ["did it"]}
