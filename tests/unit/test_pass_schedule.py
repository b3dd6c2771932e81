"""schedule: what is launched before what is computed, what is waited for after it, and what never changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from support.graphs import Hand, targets, unit
from torch.fx import Node

from zcompile import times
from zcompile.passes import LOWERED, schedule
from zcompile.passes.nodes import COLLECTIVES, WAIT, aten, collective_of

INT4, INT8 = "int4/256/bf16/nearest", "int8/256/bf16/nearest"
DEPTH = 6


def layers(
    overlap: int,
    *,
    depth: int = DEPTH,
    three: bool = False,
    stage: str = "forward",
    seconds: float = 0.0,
    hops: float = 0.0,
    memory: int = 0,
    **formats: str,
) -> Hand:
    """A graph of `depth` products, each with a weight of its own unit; `three`: gathered over three levels; `seconds`: a product's."""
    hand = Hand(stage, plan="zero3" if three else "zero_topo", overlap=overlap)
    hand.context.memory = memory
    place = {"w": 3, "g": 3, "o": 3} if three else {}
    x = hand.input("x", 64, 64)
    specs, copies = [], []
    for number in range(depth):
        (spec,) = unit({f"w{number}": (64, 64)}, unit=f"u{number}", block=256 if formats else 1, **formats, **place)  # type: ignore[arg-type]
        specs.append(spec)
        copies.append(hand.copy(spec))
    for spec, copy in zip(specs, copies, strict=True):
        x = hand.call(aten.mm.default, x, hand.gather(spec, copy))
    hand.output(x)
    with machine_of(seconds, hops):
        hand.run(*LOWERED)
    return hand


@contextlib.contextmanager
def machine_of(products: float, hops: float) -> Iterator[None]:
    """A machine on which a product takes so many seconds, and a hop (0: as its data say)."""
    operation, hop = schedule.node_seconds, schedule.hop_seconds

    def node_seconds(node: Node, device: Any) -> float:
        return products if products and node.target is aten.mm.default else operation(node, device)

    def hop_seconds(level: Any, received: int) -> float:
        return hops or hop(level, received)

    with (
        mock.patch.object(schedule, "node_seconds", node_seconds),
        mock.patch.object(schedule, "hop_seconds", hop_seconds),
        mock.patch.object(times, "hop_seconds", hop_seconds),
    ):
        yield


def gradients(overlap: int, *, mains: bool = False, seconds: float = 0.0, hops: float = 0.0, **formats: str) -> Hand:
    """A backward: a chain of products, and of each a gradient that is reduced; summed onto mains, or synced."""
    hand = Hand("backward", overlap=overlap)
    specs = [unit({f"w{n}": (64, 64)}, unit=f"u{n}", block=256 if formats else 1, **formats)[0] for n in range(DEPTH)]
    sums = [hand.input(f"main_{n}", spec.layout.width(spec.g)) for n, spec in enumerate(specs)] if mains else []
    x, out = hand.input("x", 64, 64), []
    for number, spec in enumerate(specs):
        x = hand.call(aten.mm.default, x, x)
        total = hand.reduce(spec, x)
        if mains:
            total = hand.call(aten.add.Tensor, sums[number], total)
            hand.call(aten.copy_.default, sums[number], total)
        else:
            out.append(hand.sync(spec, total))
    hand.output(x, *out)
    with machine_of(seconds, hops):
        hand.run(*LOWERED)
    return hand


def story(hand: Hand) -> str:
    """Letters in graph order: m a product, G launches a gather, R a reduction, w waits for a hop; waits for copies are left out."""
    found = []
    for node in hand.gm.graph.nodes:
        if node.target is aten.mm.default:
            found.append("m")
        elif node.target in COLLECTIVES:
            found.append("G" if collective_of(node).transfer == "gather" else "R")
        elif node.target is WAIT and node.args[0].target in COLLECTIVES:
            found.append("w")
    return "".join(found)


def test_off_waits_where_it_launches() -> None:
    assert story(layers(0)) == "Gwm" * DEPTH
    assert story(gradients(0)) == "mRwRwRw" * DEPTH


@pytest.mark.parametrize("overlap", [1, 2])
def test_gathers_are_launched_as_many_buckets_ahead(overlap: int) -> None:
    """In a backward, whose copies are fresh: at each product so many more are under way."""
    ahead = DEPTH - overlap - 1
    expected = "Gw" + "G" * (overlap + 1) + "m" + "wGm" * (ahead - 1) + "wm" * (overlap + 1)
    assert story(layers(overlap, stage="backward")) == expected


def test_no_gather_is_launched_before_its_copy_is_expected_to_be_fresh() -> None:
    """A forward begins with the refresh, which a small product does not hide: waiting for it early would hold up what is ready."""
    assert story(layers(2)) == "Gwm" * DEPTH
    assert "GGG" in story(layers(2, seconds=1.0)), "where products are long, the copies are there by the next one"


def test_the_hops_of_a_bucket_go_over_different_levels_at_once() -> None:
    hand = layers(2, three=True, seconds=1.0)
    hops = [(collective_of(node).level, collective_of(node).parameters[0]) for node in targets(hand.gm, *COLLECTIVES)]
    for number in range(DEPTH):
        assert [level for level, name in hops if name == f"w{number}"] == ["cluster", "node", "pair"]
    assert {name for _, name in hops[3:6]} == {"w1", "w2", "w3"}, "before the first product, hops of three more buckets"


def test_reductions_are_waited_for_when_they_are_expected() -> None:
    slow, fast = story(gradients(64, hops=1.0)), story(gradients(64, seconds=1.0))
    assert slow.startswith("mR" * DEPTH + "w"), "hops longer than all products: none is waited for before the end"
    assert fast.startswith("mRmRwRmRwRwRmRwRwRwm"), (
        "longer than a hop: at the next product each hop that is out is over"
    )


@pytest.mark.parametrize("overlap", [1, 3])
def test_where_too_many_are_in_flight_the_first_to_arrive_is_waited_for(overlap: int) -> None:
    found, flying = story(gradients(overlap, hops=1.0)), 0
    for letter in found:
        flying += {"R": 1, "w": -1}.get(letter, 0)
        assert flying <= overlap + 1
    assert found.startswith("mR" * (overlap + 1) + "mw"), "and no sooner"


def test_memory_bounds_what_is_in_flight_in_bytes() -> None:
    one = 64 * 64 * 4  # a gathered weight
    free = schedule.in_flight(layers(4, three=True, seconds=1.0).gm)
    tight = schedule.in_flight(layers(4, three=True, seconds=1.0, memory=one).gm)
    assert max(free) > max(tight), "a bucket beside the one that is needed next does not fit"
    assert story(layers(4, stage="backward", memory=1)).startswith("GwGm"), "one is always allowed"


def test_the_schedule_is_a_function_of_the_graph() -> None:
    assert story(gradients(3)) == story(gradients(3)) and story(layers(3, seconds=1e-3)) == story(
        layers(3, seconds=1e-3)
    )


def test_more_buckets_than_there_are_is_all_of_them() -> None:
    assert story(layers(64, stage="backward")) == "Gw" + "G" * (DEPTH - 1) + "m" + "wm" * (DEPTH - 1)


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_invariant_7_what_is_in_flight_does_not_grow_with_depth(depth: int) -> None:
    assert max(schedule.in_flight(layers(2, depth=depth, three=True).gm)) == 3


def test_the_contract_sees_too_much_in_flight() -> None:
    hand = layers(2, three=True)
    hand.context.overlap = 0
    schedule.check(hand.gm, hand.context)  # off: nothing to hold
    hand = layers(5, stage="backward")
    assert "GGGGG" in story(hand)
    hand.context.overlap = 1
    with pytest.raises(AssertionError, match="5 hops in flight at once; with overlap 1: at most 4"):
        schedule.check(hand.gm, hand.context)


@pytest.mark.parametrize("formats", [{}, {"gather": INT8, "reduce": INT4, "sync": INT4}], ids=["native", "quantised"])
@pytest.mark.parametrize("mains", [False, True])
def test_the_same_nodes_read_the_same_values(formats: dict[str, str], mains: bool) -> None:
    plain, moved = gradients(0, mains=mains, **formats), gradients(2, mains=mains, **formats)

    def program(hand: Hand) -> set[str]:
        return {text(node) for node in hand.gm.graph.nodes}

    assert program(plain) == program(moved) and story(plain) != story(moved)


def text(node: Node) -> str:
    """The node as an expression of inputs: names may differ, this may not."""
    if node.op == "placeholder":
        return str(node.target)
    parts = ", ".join(text(arg) for arg in node.all_input_nodes)
    return f"{node.target}({parts})" if len(parts) < 2000 else f"{node.target}({hash(parts)})"


def test_sums_go_into_their_mains_in_order_and_late() -> None:
    hand = gradients(2, mains=True, reduce=INT4)
    writes = [
        node for node in hand.gm.graph.nodes if getattr(node.target, "_schema", None) and node.target._schema.is_mutable
    ]
    assert len(writes) == DEPTH
    products = [node for node in hand.gm.graph.nodes if node.target is aten.mm.default]
    order = {node: number for number, node in enumerate(hand.gm.graph.nodes)}
    assert order[writes[0]] > order[products[2]], "the first sum is waited for two products later"


def test_a_buffer_that_is_read_after_it_was_written_keeps_its_place() -> None:
    """A main grad that the graph itself reads again: moving its sum behind that would be another program."""
    hand, plain = main_read_again(1), main_read_again(0)
    assert any("whose order must stay" in note for note in hand.context.notes["schedule"])
    assert [node.format_node() for node in hand.gm.graph.nodes] == [node.format_node() for node in plain.gm.graph.nodes]
    assert story(hand).startswith("Rw")


def main_read_again(overlap: int) -> Hand:
    hand = Hand("backward", overlap=overlap)
    specs = [unit({f"w{n}": (64, 64)}, unit=f"u{n}")[0] for n in range(2)]
    x = hand.input("x", 64, 64)
    main = hand.input("main", specs[0].layout.width(specs[0].g))
    total = hand.call(aten.add.Tensor, main, hand.reduce(specs[0], x))
    hand.call(aten.copy_.default, main, total)
    seen = hand.call(aten.neg.default, main)
    hand.output(seen, hand.sync(specs[1], hand.reduce(specs[1], hand.call(aten.mm.default, x, x))))
    hand.run(*LOWERED)
    return hand
