"""verify sees what was planted: dropped and doubled waits, saved gathers, stray and dropped collectives (invariants 1, 2, 3, 12)."""

from __future__ import annotations

import pytest
import torch
from support.graphs import Hand, targets, unit

from zcompile.passes import LOWERED, verify
from zcompile.passes.nodes import ALL_GATHER, COLLECTIVES, WAIT, aten


def lowered(*, shape: tuple[int, ...] = (8, 8), compute: str = "float32") -> Hand:
    hand = Hand("forward")
    (w,) = unit({"w": shape}, compute=compute)
    copy, x = hand.copy(w), hand.input("x", shape[0], shape[0], dtype=getattr(torch, compute))
    hand.output(hand.call(aten.mm.default, x, hand.gather(w, copy)))
    hand.run(*LOWERED)
    return hand


def save(hand: Hand, node: torch.fx.Node) -> None:
    """`node` becomes an output that the user does not see: saved for backward."""
    output = next(n for n in hand.gm.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], node),)


def refused(hand: Hand, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        verify.check(hand.gm, hand.context)


def test_a_right_graph_passes() -> None:
    hand = lowered()
    verify.check(hand.gm, hand.context)
    assert hand.context.notes["verify"][0].startswith("1 collectives, one wait each")


def test_dropped_wait() -> None:
    hand = lowered()
    gather = targets(hand.gm, ALL_GATHER)[0]
    (wait,) = gather.users
    wait.replace_all_uses_with(gather)
    hand.gm.graph.erase_node(wait)
    refused(hand, "has 0 waits")


def test_doubled_wait() -> None:
    hand = lowered()
    (wait,) = targets(hand.gm, ALL_GATHER)[0].users
    with hand.gm.graph.inserting_after(wait):
        hand.gm.graph.call_function(WAIT, wait.args).meta.update(wait.meta)
    refused(hand, "has 2 waits")


def test_a_reader_that_does_not_wait() -> None:
    hand = lowered()
    gather = targets(hand.gm, ALL_GATHER)[0]
    with hand.gm.graph.inserting_after(gather):
        hand.gm.graph.call_function(aten.mul.Tensor, (gather, 2.0)).meta["val"] = gather.meta["val"]
    refused(hand, "1 waits and 2 users")


def test_a_copy_that_is_waited_for_twice() -> None:
    hand = lowered()
    wait = next(n for n in targets(hand.gm, WAIT) if n.args[0].op == "placeholder")
    with hand.gm.graph.inserting_after(wait):
        hand.gm.graph.call_function(WAIT, wait.args).meta.update(wait.meta)
    refused(hand, "waited for twice")


def test_a_wait_for_something_computed() -> None:
    hand = lowered()
    product = targets(hand.gm, aten.mm.default)[0]
    with hand.gm.graph.inserting_after(product):
        hand.gm.graph.call_function(WAIT, (product,)).meta.update(product.meta)
    refused(hand, "neither a collective nor a compute copy")


@pytest.mark.parametrize("shape", [(8, 8), (5, 5)], ids=["dense", "with holes"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_gathered_weight_that_is_saved(shape: tuple[int, int], compute: str) -> None:
    hand = lowered(shape=shape, compute=compute)
    product = targets(hand.gm, aten.mm.default)[0]
    save(hand, product.args[1])
    refused(hand, "is saved for backward and derives from a gather")


def test_a_view_of_a_gathered_weight_that_is_saved() -> None:
    hand = lowered(shape=(5, 5))
    product = targets(hand.gm, aten.mm.default)[0]
    with hand.gm.graph.inserting_before(product):
        turned = hand.gm.graph.call_function(aten.t.default, (product.args[1],))
    save(hand, turned)
    refused(hand, "is saved for backward and derives from a gather")


def test_a_weight_that_the_user_returns_is_not_saved_for_backward() -> None:
    hand = Hand("forward")
    (w,) = unit({"w": (8, 8)})
    hand.output(hand.gather(w, hand.copy(w)))
    hand.run(*LOWERED)


def test_a_stray_collective() -> None:
    hand = lowered()
    gather = targets(hand.gm, ALL_GATHER)[0]
    (wait,) = gather.users
    with hand.gm.graph.inserting_after(wait):
        again = hand.gm.graph.node_copy(gather)
        again.meta = dict(gather.meta)
    with hand.gm.graph.inserting_after(again):
        hand.gm.graph.call_function(WAIT, (again,)).meta.update(wait.meta)
    refused(hand, r"bytes of the graph .*256.* differ from the closed forms .*128")


def test_a_dropped_collective() -> None:
    hand = lowered()
    gather = targets(hand.gm, ALL_GATHER)[0]
    (wait,) = gather.users
    whole = hand.input_like(wait)
    wait.replace_all_uses_with(whole)
    hand.gm.graph.erase_node(wait)
    hand.gm.graph.erase_node(gather)
    assert not targets(hand.gm, *COLLECTIVES)
    refused(hand, r"bytes of the graph \{\} differ")
