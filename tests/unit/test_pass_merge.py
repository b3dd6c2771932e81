"""merge: one gather per parameter, one reduce of the summed gradients, the same bits as before."""

from __future__ import annotations

import pytest
import torch
from support.graphs import Hand, targets, unit
from torch.fx import GraphModule, Node

from zcompile.ops import ACCUMULATE
from zcompile.ops import SYNC as SYNC_PHASE
from zcompile.passes import merge
from zcompile.passes.nodes import GATHER, REDUCE, SYNC, aten

ALONE = {"sizes": (1, 1, 1), "w": 0, "g": 0, "o": 0}
"""Levels of size 1: the semantic ops run in one process, so a graph can be run before and after the pass."""


def evaluate(gm: GraphModule) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gm.recompile()
    inputs = [torch.randn(n.meta["val"].shape, generator=generator) for n in gm.graph.nodes if n.op == "placeholder"]
    return [value for value in gm(*inputs) if value is not None]


def test_reads_of_one_parameter_become_one_gather() -> None:
    hand = Hand("forward")
    (w,) = unit({"w": (8, 4)})
    copy = hand.copy(w)
    x = hand.input("x", 4, 8)
    one, two = hand.gather(w, copy), hand.gather(w, copy)
    hand.output(hand.call(aten.mm.default, hand.call(aten.mm.default, x, one), hand.call(aten.t.default, two)))
    hand.run(merge)
    (gather,) = targets(hand.gm, GATHER)
    assert len(gather.users) == 2
    assert hand.context.notes["merge"] == ["read of w merged"]


def test_gathers_of_two_parameters_stay_two() -> None:
    hand = Hand("forward")
    a, b = unit({"a": (8, 4), "b": (8, 4)})
    copy = hand.copy(a)
    hand.output(hand.call(aten.add.Tensor, hand.gather(a, copy), hand.gather(b, copy)))
    hand.run(merge)
    assert len(targets(hand.gm, GATHER)) == 2


def gradients(hand: Hand, count: int, shape: tuple[int, int]) -> list[Node]:
    return [hand.input(f"grad{i}", *shape) for i in range(count)]


@pytest.mark.parametrize("reads", [2, 3, 5])
def test_gradients_are_summed_before_one_reduce_with_the_bits_of_a_dense_model(reads: int) -> None:
    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)}, **ALONE)
    grads = gradients(hand, reads, (8, 4))
    total = hand.sync(w, hand.reduce(w, grads[0]))
    for grad in grads[1:]:
        total = hand.call(aten.add.Tensor, total, hand.sync(w, hand.reduce(w, grad)))
    gm = hand.output(total)
    before = evaluate(gm)
    hand.run(merge)
    assert len(targets(gm, REDUCE)) == len(targets(gm, SYNC)) == 1
    (after,) = evaluate(gm)
    assert torch.equal(before[0], after)
    assert hand.context.notes["merge"] == [f"{reads} gradients of w summed before one reduce"]


def test_accumulating_gradients_become_one_addition_to_the_main_grad() -> None:
    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)}, **ALONE)
    main = hand.input("main", 32)
    grads = gradients(hand, 3, (8, 4))
    total = main
    for grad in grads:
        total = hand.call(aten.add.Tensor, total, hand.reduce(w, grad))
    gm = hand.output(total)
    before = evaluate(gm)
    hand.run(merge)
    assert len(targets(gm, REDUCE)) == 1
    torch.testing.assert_close(evaluate(gm)[0], before[0])  # sums of three in another order


def test_the_main_grad_is_added_once_when_the_window_ends() -> None:
    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)}, **ALONE)
    main, zeros = hand.input("main", 32), None
    grads = gradients(hand, 2, (8, 4))
    one = hand.sync(w, hand.call(aten.add.Tensor, main, hand.reduce(w, grads[0])))
    zeros = hand.call(aten.full.default, [32], 0)  # what is left of the main grad after the first
    two = hand.sync(w, hand.call(aten.add.Tensor, zeros, hand.reduce(w, grads[1])))
    gm = hand.output(hand.call(aten.add.Tensor, one, two))
    before = evaluate(gm)
    hand.run(merge)
    assert len(targets(gm, REDUCE)) == len(targets(gm, SYNC)) == 1
    torch.testing.assert_close(evaluate(gm)[0], before[0])


def test_a_sum_that_is_no_plain_chain_is_left_alone() -> None:
    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)}, **ALONE)
    one, two = (hand.sync(w, hand.reduce(w, grad)) for grad in gradients(hand, 2, (8, 4)))
    gm = hand.output(hand.call(aten.add.Tensor, hand.call(aten.mul.Tensor, one, 2.0), two))
    before = evaluate(gm)
    hand.run(merge)
    assert len(targets(gm, REDUCE)) == 2
    assert torch.equal(evaluate(gm)[0], before[0])


def test_gradients_in_a_backward_graph_are_left_alone() -> None:
    hand = Hand("backward")
    (w,) = unit({"w": (8, 4)}, **ALONE)
    one, two = (hand.sync(w, hand.reduce(w, grad)) for grad in gradients(hand, 2, (8, 4)))
    hand.output(hand.call(aten.add.Tensor, one, two))
    hand.run(merge)
    assert len(targets(hand.gm, REDUCE)) == 2


def test_the_contract_sees_a_parameter_that_is_gathered_twice() -> None:
    hand = Hand("forward")
    (w,) = unit({"w": (8, 4)})
    copy = hand.copy(w)
    gm = hand.output(hand.gather(w, copy), hand.gather(w, copy))
    with pytest.raises(AssertionError, match="gathered twice"):
        merge.check(gm, hand.context)


def test_reads_of_one_parameter_in_two_phases_stay_two() -> None:
    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)})
    copy, main = hand.copy(w), hand.input("main", 8)
    hand.output(hand.gather(w, copy, main, SYNC_PHASE), hand.gather(w, copy, main, ACCUMULATE))
    hand.run(merge)
    assert len(targets(hand.gm, GATHER)) == 2
