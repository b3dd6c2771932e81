"""pin: what the generated code launches and waits for, in which order, against the graph's."""

from __future__ import annotations

import pytest
import torch._inductor.config as inductor
from support.graphs import Hand, unit

from zcompile.passes import LOWERED, pin

CALL = (
    "        buf{n} = torch.ops._c10d_functional.all_gather_into_tensor.default(arg0_1, 2, 'zc.2x2x2.{level}.gather')"
)
WAIT = "        torch.ops._c10d_functional.wait_tensor.default(buf{n})"
ORDER = [
    "all_gather_into_tensor zc.2x2x2.node.gather", "wait_tensor",
    "all_gather_into_tensor zc.2x2x2.pair.gather", "wait_tensor",
]  # fmt: skip
SOURCE = [
    "# Topologically Sorted Source Nodes: [w], Original ATen: [_c10d_functional.all_gather_into_tensor]",
    "# %w = call_function[target=torch.ops._c10d_functional.wait_tensor.default](args = (%p,))",
    CALL.format(n=1, level="node"), WAIT.format(n=1), CALL.format(n=2, level="pair"), WAIT.format(n=2),
]  # fmt: skip


def refused(lines: list[str], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        pin.check_code("\n".join(lines), ORDER)


def test_code_in_the_graphs_order_passes_and_comments_are_not_code() -> None:
    pin.check_code("\n".join(SOURCE), ORDER)


def test_swapped_launches() -> None:
    swapped = [*SOURCE[:2], SOURCE[4], SOURCE[5], SOURCE[2], SOURCE[3]]
    refused(swapped, r"at collective 0: all_gather_into_tensor zc\.2x2x2\.pair\.gather where the graph has .*node")


def test_a_launch_that_passed_a_wait() -> None:
    refused([*SOURCE[:3], SOURCE[4], SOURCE[3], SOURCE[5]], "at collective 1: all_gather_into_tensor")


def test_dropped_wait_and_dropped_launch() -> None:
    refused(SOURCE[:5], "at collective 3: nothing where the graph has wait_tensor")
    refused([*SOURCE[:2], *SOURCE[3:]], "at collective 0: wait_tensor")


def test_a_launch_too_many() -> None:
    refused([*SOURCE, SOURCE[2]], "at collective 4: all_gather_into_tensor .* where the graph has nothing")


def test_code_of_a_graph_with_collectives_that_shows_none() -> None:
    refused(["def call(args): pass"], "at collective 0: nothing")


def test_the_graphs_order_names_op_and_role() -> None:
    hand = Hand("forward", plan="zero3")
    (w,) = unit({"w": (8, 8)}, w=2, g=3, o=3)
    hand.output(hand.gather(w, hand.copy(w)))
    hand.run(*LOWERED)
    assert pin.order(hand.gm) == ["wait_tensor", *ORDER]


def test_every_switch_exists_in_this_torch() -> None:
    known = inductor.get_config_copy()
    assert set(pin.PATCHES) <= set(known)
