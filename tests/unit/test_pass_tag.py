"""tag: what is a gather through views and casts is done again in backward, and what forwards write is not version-checked."""

from __future__ import annotations

import pytest
import torch
from support.graphs import Hand, unit
from torch.utils.checkpoint import CheckpointPolicy

from zcompile.passes import tag
from zcompile.passes.nodes import aten

AGAIN = CheckpointPolicy.MUST_RECOMPUTE


def test_gathers_and_their_views_and_casts_are_tagged_and_nothing_else_is() -> None:
    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)})
    copy, x = hand.copy(w), hand.input("x", 4, 8, dtype=torch.bfloat16)
    whole = hand.gather(w, copy)
    cast = hand.call(aten._to_copy.default, whole, dtype=torch.bfloat16)
    turned = hand.call(aten.t.default, hand.call(aten.t.default, cast))
    product = hand.call(aten.mm.default, x, turned)
    product.meta["recompute"] = CheckpointPolicy.MUST_SAVE  # the user's own choice
    doubled = hand.call(aten.mul.Tensor, whole, 2.0)
    hand.output(product, doubled)
    hand.run(tag)
    assert [node.meta.get("recompute") for node in (whole, cast, turned)] == [AGAIN, AGAIN, AGAIN]
    assert whole.meta["ac_graph_id"] == tag.GRAPH_ID
    assert product.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert "recompute" not in doubled.meta


def test_getitems_of_a_split_weight_are_tagged() -> None:
    import operator

    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)})
    parts = hand.call(aten.split.Tensor, hand.gather(w, hand.copy(w)), 4)
    part = hand.call(operator.getitem, parts, 1)
    hand.output(part)
    hand.run(tag)
    assert part.meta["recompute"] is AGAIN


def test_copies_and_main_grads_are_exempt_from_version_checks_and_leaves_are_not() -> None:
    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)})
    copy, main = hand.copy(w), hand.input("main", 8)
    hand.output(hand.gather(w, copy, main, "sync"))
    hand.run(tag)
    marked = {node.name for node in hand.gm.graph.nodes if node.meta.get(tag.NO_VERSION_CHECK)}
    assert marked == {"copy_u0", "main"}


def test_a_graph_that_is_not_joint_is_left_alone() -> None:
    hand = Hand("forward")
    (w,) = unit({"w": (8, 4)})
    whole = hand.gather(w, hand.copy(w))
    hand.output(whole)
    hand.run(tag)
    assert "recompute" not in whole.meta


def test_the_contract_names_a_gather_without_a_tag() -> None:
    hand = Hand("joint")
    (w,) = unit({"w": (8, 4)})
    gm = hand.output(hand.gather(w, hand.copy(w)))
    with pytest.raises(AssertionError, match="gather of w is not tagged"):
        tag.check(gm, hand.context)


def stack(keep: int, w: int = 1) -> list[str]:
    """Names of the kept ones of three layers of 128 bytes each, the second of two parameters; read in order."""
    hand = Hand("joint")
    hand.context.keep = keep
    units = [
        unit(dict.fromkeys(names, shape), unit=names, w=w)
        for names, shape in (("a", (8, 4)), ("bc", (4, 4)), ("d", (8, 4)))
    ]
    copies = [hand.copy(specs[0]) for specs in units]
    hand.output(*(hand.gather(spec, copy) for specs, copy in zip(units, copies, strict=True) for spec in specs))
    hand.run(tag)
    saved = [n for n in hand.gm.graph.nodes if n.meta.get("recompute") is CheckpointPolicy.MUST_SAVE]
    assert {hand.context.parameter(node) for node in saved} == hand.context.kept
    return sorted(hand.context.kept)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0, ""), (127, ""), (128, "d"), (255, "d"), (256, "bcd"), (384, "abcd"), (1 << 40, "abcd")],
)
def test_what_is_read_last_is_kept_first_in_whole_units(keep: int, kept: str) -> None:
    assert stack(keep) == list(kept)


def test_a_copy_that_is_whole_anyway_is_not_kept() -> None:
    assert stack(1 << 40, w=0) == []
