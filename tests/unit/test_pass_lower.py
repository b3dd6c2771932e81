"""lower: hops as visible collectives, each with its wait and its parameters' names; one pack before, one unpack after."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.graphs import Hand, targets, unit

from zcompile.passes import LOWERED, bucket, lower
from zcompile.passes.nodes import ALL_GATHER, ALL_TO_ALL, COLLECTIVES, SEMANTIC, WAIT, aten, collective_of

COPIES = (aten.cat.default, aten.clone.default, aten._to_copy.default, aten.copy_.default)


def forward(hand: Hand, shapes: dict[str, tuple[int, ...]], **place: object) -> Hand:
    specs = unit(shapes, **place)  # type: ignore[arg-type]
    copy = hand.copy(specs[0])
    hand.output(*(hand.call(aten.mul.Tensor, hand.gather(spec, copy), 2.0) for spec in specs))
    hand.run(*LOWERED)
    return hand


def backward(hand: Hand, shapes: dict[str, tuple[int, ...]], **place: object) -> Hand:
    specs = unit(shapes, **place)  # type: ignore[arg-type]
    grads = [hand.input(f"grad_{spec.name}", *spec.shape) for spec in specs]
    hand.output(*[hand.sync(spec, hand.reduce(spec, grad)) for spec, grad in zip(specs, grads, strict=True)])
    hand.run(*LOWERED)
    return hand


def between(hand: Hand, first: torch.fx.Node, last: torch.fx.Node) -> list[object]:
    nodes = list(hand.gm.graph.nodes)
    return [node.target for node in nodes[nodes.index(first) + 1 : nodes.index(last)]]


def test_a_gather_over_three_levels_goes_outermost_first_and_every_node_has_a_value() -> None:
    hand = forward(Hand("forward", plan="zero3"), {"a": (8, 8), "b": (16, 8)}, w=3, g=3, o=3)
    assert not targets(hand.gm, *SEMANTIC)
    gathers = targets(hand.gm, ALL_GATHER)
    assert [collective_of(node).level for node in gathers] == ["cluster", "node", "pair"]
    assert all("val" in node.meta for node in hand.gm.graph.nodes if node.op == "call_function")
    for before, after in itertools.pairwise(gathers):
        assert not set(between(hand, before, after)) & set(COPIES), "a copy between hops"
    assert not set(between(hand, next(iter(hand.gm.graph.nodes)), gathers[0])) & set(COPIES), "a copy before the first"


@pytest.mark.parametrize("w", [0, 1])
def test_a_weight_that_is_given_away_is_copied_only_where_it_is_a_view_of_a_copy(w: int) -> None:
    """What a forward keeps for its backward: a hop's result may be kept as it is, a copy would be overwritten by the next refresh."""
    hand = Hand("forward")
    (spec,) = unit({"a": (8, 8)}, w=w)
    hand.output(hand.gather(spec, hand.copy(spec)))
    hand.run(*LOWERED)
    assert len(targets(hand.gm, aten.clone.default)) == 1 - w
    assert len(targets(hand.gm, ALL_GATHER)) == w


def test_collectives_carry_the_names_of_all_their_parameters() -> None:
    hand = backward(Hand("backward"), {"a": (8, 8), "b": (16, 8)})
    found = [collective_of(node) for node in targets(hand.gm, *COLLECTIVES)]
    assert [(e.level, e.transfer, e.op) for e in found] == [
        ("pair", "reduce", "all_to_all"), ("node", "reduce", "all_to_all"), ("cluster", "sync", "all_to_all"),
    ]  # fmt: skip
    assert all(e.parameters == ("a", "b") for e in found)


def test_two_equal_blocks_are_lowered_alike_under_their_own_names() -> None:
    hand = Hand("forward")
    (a,), (b,) = unit({"a": (8, 8)}), unit({"b": (8, 8)}, unit="u1")
    one, two = hand.copy(a), hand.copy(b)
    hand.output(hand.call(aten.mm.default, hand.gather(a, one), hand.gather(b, two)))
    hand.run(*LOWERED)
    assert [collective_of(node).parameters for node in targets(hand.gm, ALL_GATHER)] == [("a",), ("b",)]


def test_a_reduce_packs_once_before_the_first_hop_and_its_sync_takes_the_buffer_as_it_is() -> None:
    hand = backward(Hand("backward"), {"a": (8, 8), "b": (16, 8)})
    assert len(targets(hand.gm, aten.cat.default)) == 1
    (pack,), hops = targets(hand.gm, aten.cat.default), targets(hand.gm, ALL_TO_ALL)
    nodes = list(hand.gm.graph.nodes)
    assert nodes.index(pack) < nodes.index(hops[0])
    assert not set(between(hand, hops[0], hops[-1])) & set(COPIES)


def test_a_sync_of_part_of_a_reduced_bucket_joins_what_it_needs() -> None:
    hand = Hand("backward")
    a, b = unit({"a": (8, 8), "b": (16, 8)})
    ga, gb = hand.input("ga", 8, 8), hand.input("gb", 16, 8)
    main = hand.input("main", a.layout.width(a.g))
    total = hand.call(aten.add.Tensor, main, hand.reduce(a, ga))
    hand.output(hand.sync(a, total), hand.sync(b, hand.reduce(b, gb)))
    hand.run(*LOWERED)
    sync = [collective_of(node) for node in targets(hand.gm, ALL_TO_ALL)][-1]
    assert sync.transfer == "sync" and sync.parameters == ("a", "b")


def test_a_forward_waits_for_the_copy_before_it_reads_it_and_a_backward_does_not() -> None:
    for stage, waits in (("forward", 2), ("inference", 2), ("backward", 1)):
        hand = forward(Hand(stage), {"a": (8, 8)})
        assert len(targets(hand.gm, WAIT)) == waits, stage
    resident = forward(Hand("forward", plan="zero3"), {"a": (8, 8)}, w=3, g=3, o=3)
    sources = [node.args[0].op for node in targets(resident.gm, WAIT)]
    assert "placeholder" not in sources, "the copy is the master: nothing refreshes it"


def test_a_level_of_size_1_has_no_hop() -> None:
    hand = backward(Hand("backward", topology="1x2x4"), {"a": (8, 8)}, sizes=(1, 2, 4))
    assert [collective_of(node).level for node in targets(hand.gm, *COLLECTIVES)] == ["node", "cluster"]


def test_the_wire_format_is_what_travels_and_the_sum_is_fp32() -> None:
    hand = backward(Hand("backward"), {"a": (8, 8)}, wire="bf16")
    assert {node.meta["val"].dtype for node in targets(hand.gm, ALL_TO_ALL)} == {torch.bfloat16}
    additions = [node for node in targets(hand.gm, aten.add.Tensor)]
    assert additions and all(node.meta["val"].dtype == torch.float32 for node in additions)


def test_what_is_inserted_knows_the_users_line() -> None:
    hand = Hand("forward")
    (a,) = unit({"a": (8, 8)})
    whole = hand.gather(a, hand.copy(a))
    whole.meta["stack_trace"] = 'File "gpt.py", line 38, in forward'
    hand.output(hand.call(aten.mul.Tensor, whole, 2.0))
    hand.run(bucket, lower)
    (gather,) = targets(hand.gm, ALL_GATHER)
    assert "gpt.py" in gather.meta["stack_trace"]


def test_the_contract_sees_a_semantic_op_that_is_left() -> None:
    hand = Hand("forward")
    (a,) = unit({"a": (8, 8)})
    gm = hand.output(hand.gather(a, hand.copy(a)))
    with pytest.raises(AssertionError, match="semantic op left"):
        lower.check(gm, hand.context)


def test_the_contract_sees_a_node_without_a_value() -> None:
    hand = forward(Hand("forward"), {"a": (8, 8)})
    del targets(hand.gm, ALL_GATHER)[0].meta["val"]
    with pytest.raises(AssertionError, match="without a value"):
        lower.check(hand.gm, hand.context)
