"""bucket: the transfers of one unit stand side by side, in the order of their shards, and are numbered."""

from __future__ import annotations

import pytest
from support.graphs import Hand, targets, unit

from zcompile.passes import bucket
from zcompile.passes.bucket import KEY
from zcompile.passes.nodes import GATHER, REDUCE, SYNC, aten, spec_of


def names(nodes: list) -> list[str]:
    return [spec_of(node).name for node in nodes]


def test_gathers_of_a_unit_stand_at_the_place_of_the_first_in_the_order_of_their_shards() -> None:
    hand = Hand("forward")
    a, b, c = unit({"a": (8, 8), "b": (8, 8), "c": (8, 8)})
    copy, x = hand.copy(a), hand.input("x", 8, 8)
    for spec in (c, a, b):  # the model reads them in another order than they lie
        x = hand.call(aten.mm.default, x, hand.gather(spec, copy))
    hand.output(x)
    hand.run(bucket)
    gathers = targets(hand.gm, GATHER)
    assert names(gathers) == ["a", "b", "c"]
    assert gathers[0].next is gathers[1] and gathers[1].next is gathers[2]
    assert gathers[2].next.target is aten.mm.default
    assert {node.meta[KEY] for node in gathers} == {0}
    assert hand.context.notes["bucket"] == ["3 transfers in 1 messages per hop"]


def test_two_units_are_two_messages() -> None:
    hand = Hand("forward")
    (a,), (b,) = unit({"a": (8, 8)}), unit({"b": (8, 8)}, unit="u1")
    one, two = hand.copy(a), hand.copy(b)
    hand.output(hand.call(aten.mm.default, hand.gather(a, one), hand.gather(b, two)))
    hand.run(bucket)
    assert [node.meta[KEY] for node in targets(hand.gm, GATHER)] == [0, 1]


def test_reduces_and_syncs_wait_for_the_last_of_their_unit() -> None:
    hand = Hand("backward")
    a, b = unit({"a": (8, 4), "b": (8, 4)})
    gb, ga = hand.input("gb", 8, 4), hand.input("ga", 8, 4)
    sb = hand.sync(b, hand.reduce(b, gb))
    late = hand.call(aten.mul.Tensor, ga, 2.0)
    sa = hand.sync(a, hand.reduce(a, late))
    hand.output(sa, sb)
    hand.run(bucket)
    order = [node.target for node in hand.gm.graph.nodes if node.op == "call_function"]
    assert order == [aten.mul.Tensor, REDUCE, REDUCE, SYNC, SYNC]
    assert names(targets(hand.gm, REDUCE)) == names(targets(hand.gm, SYNC)) == ["a", "b"]
    assert len({node.meta[KEY] for node in targets(hand.gm, REDUCE, SYNC)}) == 2


def test_the_closed_forms_of_what_it_saw_are_in_the_context() -> None:
    hand = Hand("backward")
    (a,) = unit({"a": (8, 4)})
    grad = hand.input("grad", 8, 4)
    hand.output(hand.sync(a, hand.reduce(a, grad)))
    hand.run(bucket)
    # 32 elements of 4 bytes: half over the pair, a quarter over the node, an eighth over the cluster.
    assert hand.context.predicted == {("pair", "reduce"): 64, ("node", "reduce"): 32, ("cluster", "sync"): 16}


def test_the_contract_sees_a_transfer_in_no_bucket() -> None:
    hand = Hand("forward")
    (a,) = unit({"a": (8, 4)})
    gm = hand.output(hand.gather(a, hand.copy(a)))
    with pytest.raises(AssertionError, match="in no bucket"):
        bucket.check(gm, hand.context)
