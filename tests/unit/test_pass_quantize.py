"""quantize: one kernel between two quantised hops, sums that go into main grads in place, and nothing else."""

from __future__ import annotations

import pytest
import torch
from support.graphs import Hand, targets, unit

from zcompile.passes import LOWERED, bucket, lower, quantize
from zcompile.passes.nodes import (
    ACCUMULATE_INTO,
    ALL_GATHER,
    ALL_TO_ALL,
    COLLECTIVES,
    DEQUANTIZE,
    QUANTIZE,
    REQUANTIZE,
    SUM,
    WIRE,
    aten,
)

SHAPES = {"a": (64, 256), "b": (32, 512)}
INT4, INT8 = "int4/256/bf16/nearest", "int8/256/bf16/nearest"


def backward(formats: dict[str, str], *, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Hand:
    hand = Hand("backward")
    specs = unit(shapes, block=256, **formats)
    grads = [hand.input(f"grad_{spec.name}", *spec.shape) for spec in specs]
    hand.output(*[hand.sync(spec, hand.reduce(spec, grad)) for spec, grad in zip(specs, grads, strict=True)])
    return hand


def kernels(hand: Hand) -> tuple[int, int, int]:
    """(quantise, requantise, sum) kernels."""
    return tuple(len(targets(hand.gm, op)) for op in (QUANTIZE, REQUANTIZE, SUM))  # type: ignore[return-value]


def test_three_hops_take_one_quantiser_two_requantisers_and_one_sum() -> None:
    hand = backward({"reduce": INT4, "sync": INT4})
    hand.run(*LOWERED)
    assert [node.meta[WIRE] for node in targets(hand.gm, ALL_TO_ALL)] and len(targets(hand.gm, ALL_TO_ALL)) == 3
    assert kernels(hand) == (1, 2, 1)
    assert {node.meta["val"].dtype for node in targets(hand.gm, ALL_TO_ALL)} == {torch.uint8}


def test_without_the_pass_each_hop_sums_and_quantises_and_the_contract_sees_it() -> None:
    hand = backward({"reduce": INT4, "sync": INT4})
    hand.run(bucket, lower)
    assert kernels(hand) == (3, 0, 3)
    with pytest.raises(AssertionError, match="quantises a sum"):
        quantize.check(hand.gm, hand.context)


def test_a_native_hop_between_quantised_ones_keeps_its_sum() -> None:
    hand = backward({"reduce": INT4})
    hand.run(*LOWERED)
    assert kernels(hand) == (1, 1, 1)
    assert targets(hand.gm, ALL_TO_ALL)[-1].meta["val"].dtype == torch.float32


def test_native_formats_are_left_alone() -> None:
    hand, again = backward({}), backward({})
    hand.run(bucket, lower)
    again.run(bucket, lower, quantize)
    assert [node.format_node() for node in hand.gm.graph.nodes] == [node.format_node() for node in again.gm.graph.nodes]
    assert kernels(again) == (0, 0, 0)


def test_a_copy_of_codes_needs_no_quantiser_to_be_gathered() -> None:
    hand = Hand("forward")
    specs = unit(SHAPES, block=256, gather=INT8)
    copy = hand.copy(specs[0])
    hand.output(*(hand.call(aten.mul.Tensor, hand.gather(spec, copy), 2.0) for spec in specs))
    hand.run(*LOWERED)
    assert len(targets(hand.gm, ALL_GATHER)) == 1 and not targets(hand.gm, QUANTIZE)
    assert len(targets(hand.gm, DEQUANTIZE)) == 1, "one kernel for the bucket"


def accumulating(*, main_read_again: bool) -> Hand:
    hand = Hand("backward")
    specs = unit(SHAPES, block=256, reduce=INT4)
    mains = [hand.input(f"main_{spec.name}", spec.layout.width(spec.g)) for spec in specs]
    grads = [hand.input(f"grad_{spec.name}", *spec.shape) for spec in specs]
    out = []
    for spec, main, grad in zip(specs, mains, grads, strict=True):
        total = hand.call(aten.add.Tensor, main, hand.reduce(spec, grad))
        hand.call(aten.copy_.default, main, total)
        if main_read_again:
            out.append(hand.call(aten.neg.default, main))
    hand.output(*out)
    hand.run(*LOWERED)
    return hand


def test_a_sum_goes_into_main_grads_in_place() -> None:
    hand = accumulating(main_read_again=False)
    (into,) = targets(hand.gm, ACCUMULATE_INTO)
    assert [node.name for node in into.args[2]] == ["main_a", "main_b"]  # type: ignore[union-attr]
    assert not targets(hand.gm, SUM, aten.add.Tensor, aten.copy_.default)
    assert kernels(hand) == (1, 1, 0)


def test_mains_that_something_else_reads_are_added_to_as_before() -> None:
    hand = accumulating(main_read_again=True)
    assert not targets(hand.gm, ACCUMULATE_INTO)
    assert len(targets(hand.gm, SUM)) == 1 and len(targets(hand.gm, aten.copy_.default)) == 2


def test_the_contract_sees_a_message_that_no_quantiser_made() -> None:
    hand = backward({"reduce": INT4, "sync": INT4})
    hand.run(*LOWERED)
    first = targets(hand.gm, ALL_TO_ALL)[0]
    first.replace_input_with(first.args[0], hand.input_like(first.args[0]))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="no quantiser made"):
        quantize.check(hand.gm, hand.context)


def test_the_contract_sees_a_message_that_two_kernels_read() -> None:
    hand = backward({"reduce": INT4, "sync": INT4})
    hand.run(*LOWERED)
    (wait,) = targets(hand.gm, *COLLECTIVES)[0].users
    (reader,) = wait.users
    with hand.gm.graph.inserting_before(reader):
        hand.gm.graph.node_copy(reader)
    with pytest.raises(AssertionError, match="read by 2 kernels"):
        quantize.check(hand.gm, hand.context)


def test_the_note_counts_what_it_did() -> None:
    hand = backward({"reduce": INT4, "sync": INT4})
    hand.run(*LOWERED)
    (note,) = hand.context.notes["quantize"]
    assert note.startswith("3 quantised messages: 1 made from plain values, 2 between two hops; 0 sums")
