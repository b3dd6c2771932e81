"""pin: what the generated code launches and waits for, in which order, against the graph's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch._inductor.config as inductor
from support.graphs import Hand, unit

from zcompile.passes import LOWERED, pin
from zcompile.passes.nodes import PEER_GATHER

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


def test_a_peer_gather_that_passed_a_wait() -> None:
    read = "        buf9 = torch.ops.zcompile_kernels.peer_gather.default(arg1_1, 2, 'zc.2x2x2.pair.gather', '[2]', '', torch.float32)"
    order = [*ORDER[:2], "peer_gather zc.2x2x2.pair.gather", *ORDER[2:]]
    pin.check_code("\n".join([*SOURCE[:4], read, *SOURCE[4:]]), order)
    with pytest.raises(AssertionError, match=r"at collective 1: peer_gather .* where the graph has wait_tensor"):
        pin.check_code("\n".join([*SOURCE[:3], read, *SOURCE[3:]]), order)


class Scheduled:
    """As much of Inductor's scheduler node as keeping the order needs."""

    def __init__(self, kind: str, buffer: str, asked: list[str]) -> None:
        self.node, self.buffer = kind, buffer
        self.scheduler = self
        self.after: list[tuple[str, str, bool]] = []
        self.asked = asked

    def get_buffer_names(self) -> list[str]:
        return [self.buffer]

    def add_fake_dep(self, dep: Any) -> None:
        self.after.append((dep.name, dep.mutating_buf, dep.is_fake))

    def compute_ancestors(self) -> None:
        self.asked.append("ancestors")


def test_invariant_7_each_launch_and_wait_depends_on_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused kernel takes the place of its first part: what its other parts wait for must not come along."""
    from torch._inductor import utils

    monkeypatch.setattr(utils, "is_collective", lambda node: node == "launch")
    monkeypatch.setattr(utils, "is_wait", lambda node: node == "wait")
    asked: list[str] = []
    nodes = [Scheduled(k, f"buf{i}", asked) for i, k in enumerate(("launch", "mm", "wait", "launch", "add", "wait"))]
    keep = pin.PATCHES["_pre_fusion_custom_pass"]
    assert keep(nodes) == nodes, "it moves nothing itself"
    assert [node.after for node in nodes] == [
        [], [], [("buf0", "buf2", True)], [("buf2", "buf3", True)], [], [("buf3", "buf5", True)]
    ]  # fmt: skip
    assert asked == ["ancestors"], "fusion asks these to avoid cycles"
    assert keep([nodes[1]]) == [nodes[1]] and keep.uuid(), "a graph without collectives; and a name for the code cache"


def test_a_peer_gather_keeps_its_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import utils

    monkeypatch.setattr(utils, "is_collective", lambda node: False)
    monkeypatch.setattr(utils, "is_wait", lambda node: node == "wait")
    nodes = [Scheduled(kind, f"buf{i}", []) for i, kind in enumerate(("wait", "peer", "mm", "wait"))]
    nodes[1].node = SimpleNamespace(op_overload=PEER_GATHER)  # type: ignore[assignment]
    pin.PATCHES["_pre_fusion_custom_pass"](nodes)
    assert [node.after for node in nodes] == [[], [("buf0", "buf1", True)], [], [("buf1", "buf3", True)]]
