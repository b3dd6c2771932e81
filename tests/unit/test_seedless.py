"""Attention without dropout that is computed again keeps no random state; with dropout it keeps it."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from support.graphs import Hand, targets, unit
from torch.fx import Node

from zcompile._torch_compat import run_and_save_rng_state, run_with_rng_state
from zcompile.passes import LOWERED
from zcompile.passes.nodes import aten

FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default


def _wrapped(hand: Hand, target: Any, *args: Any, keep: bool, **keywords: Any) -> Node:
    """A node of torch's partitioner: it has no value, its results have."""
    node = hand.graph.call_function(target, args, keywords)
    if not keep:
        return node
    state = hand.graph.call_function(operator.getitem, (node, 0))
    with hand.mode:
        state.meta["val"] = torch.empty(5056, dtype=torch.uint8)
    return node


def forward(dropout: float) -> Hand:
    hand = Hand("forward")
    (w,) = unit({"w": (8, 8)})
    whole = hand.gather(w, hand.copy(w))
    q = hand.input("q", 1, 2, 4, 8)
    product = hand.call(aten.add.Tensor, q, hand.call(aten.sum.default, whole))
    node = _wrapped(hand, run_and_save_rng_state, FLASH, product, q, q, dropout, True, keep=True)
    (state,) = node.users
    both = hand.graph.call_function(operator.getitem, (node, 1))
    with hand.mode:
        both.meta["val"] = FLASH(product.meta["val"], q.meta["val"], q.meta["val"], 0.0, True)
    out = hand.graph.call_function(operator.getitem, (both, 0))
    out.meta["val"] = both.meta["val"][0]
    hand.output(out, state)
    hand.run(*LOWERED)
    return hand


def test_a_forward_without_dropout_calls_attention_itself_and_keeps_its_outputs() -> None:
    hand = forward(0.0)
    assert not targets(hand.gm, run_and_save_rng_state)
    (attention,) = targets(hand.gm, FLASH)
    assert attention.args[3:] == (0.0, True) and isinstance(attention.meta["val"], tuple)
    out, state = next(node for node in hand.gm.graph.nodes if node.op == "output").args[0]
    assert out.args == (attention, 0)
    assert (state.meta["val"].shape, state.meta["val"].dtype) == ((5056,), torch.uint8)


def test_a_forward_with_dropout_keeps_the_random_state() -> None:
    hand = forward(0.1)
    assert len(targets(hand.gm, run_and_save_rng_state)) == 1 and not targets(hand.gm, FLASH)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_backward_sets_the_random_state_only_for_dropout(dropout: float, named: bool) -> None:
    hand = Hand("backward")
    state, q = hand.input("state", 5056, dtype=torch.uint8), hand.input("q", 1, 2, 4, 8)
    args, keywords = ((q, q, q), {"dropout_p": dropout}) if named else ((q, q, q, dropout), {})
    node = _wrapped(hand, run_with_rng_state, state, FLASH, *args, keep=False, **keywords)
    out = hand.graph.call_function(operator.getitem, (node, 0))
    out.meta["val"] = q.meta["val"]
    hand.output(out)
    hand.run(*LOWERED)
    assert len(targets(hand.gm, run_with_rng_state)) == (dropout > 0)
    for attention in targets(hand.gm, FLASH):
        assert attention.meta["val"][0].shape == (1, 2, 4, 8)
