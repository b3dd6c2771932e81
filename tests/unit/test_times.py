"""What things take by a machine's data: closed forms, no clock."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from zcompile.machines import Device, Level
from zcompile.times import EFFICIENCY, MESSAGE_OVERHEAD, MESSAGES, Lanes, at, hop_seconds, message_bytes, node_seconds

DEVICE = Device("test", (("float32", 1e9), ("bfloat16", 4e9)), memory=1e9, memory_bandwidth=1e6)


def seconds(function: object, *inputs: torch.Tensor) -> list[float]:
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph  # type: ignore[arg-type]
    return [node_seconds(node, DEVICE) for node in graph.nodes if node.op == "call_function"]


def test_a_hop_is_latency_and_bytes_over_bandwidth() -> None:
    assert hop_seconds(Level("node", 2, 1e6, 1e-3), 5000) == pytest.approx(1e-3 + 5e-3)


@pytest.mark.parametrize(
    ("steps", "size", "count"), [("direct", 9, 1), ("ring", 9, 8), ("tree", 9, 4), ("ring", 1, 1), ("tree", 1, 1)]
)
def test_a_collective_s_messages_follow_one_another_as_its_level_says(steps: str, size: int, count: int) -> None:
    level = Level("node", size, 1e6, 1e-3, steps=steps, overhead=5e-3)
    assert hop_seconds(level, 8000) == pytest.approx(5e-3 + count * 1e-3 + 8e-3)


def test_small_messages_reach_a_part_of_the_bandwidth() -> None:
    curve = ((1e3, 0.2), (1e5, 0.6), (1e6, 1.0))
    assert [at(curve, x) for x in (1, 1e3, 1e4, 1e5, 1e6, 1e9)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 1.0, 1.0])
    ring = Level("node", 11, 1e6, 0.0, steps="ring", curve=curve)
    assert hop_seconds(ring, 10_000) == pytest.approx(10e-3 / 0.2), "ten messages of a thousand bytes"


def test_messages_are_so_large_that_a_level_s_latency_matters_little() -> None:
    quick = Level("node", 4, 1e9, 1e-6)
    for slow in (Level("cluster", 2, 1e9, 1e-3), Level("cluster", 33, 1e9, 0.5e-4, steps="ring")):
        size = message_bytes((quick, slow))
        received = int(size * (1 / 4 - 1 / (4 * slow.size)))
        taken, empty = hop_seconds(slow, received), hop_seconds(slow, 0)
        assert MESSAGES[0] < size < MESSAGES[1] and empty / (taken - empty) == pytest.approx(MESSAGE_OVERHEAD, rel=1e-3)
    assert message_bytes((quick,)) == MESSAGES[0], "no smaller ones, however quick"
    assert message_bytes((quick, Level("cluster", 1000, 1e9, 1e-2, steps="ring"))) == MESSAGES[1], (
        "and none that fill a device"
    )
    assert message_bytes((quick, Level("cluster", 1, 1e9, 1.0))) == MESSAGES[0], "a level of one rank sends nothing"


def test_a_lane_is_a_queue_of_work_and_a_shared_link_has_that_of_both() -> None:
    levels = Level("node", 2, 1000.0, 0.0), Level("cluster", 2, 100.0, 0.0, via=("node",))
    lanes = Lanes(levels)
    assert lanes.launch("cluster", 200, 0.0) == (0.0, 2.0)
    assert lanes.launch("node", 1000, 0.0) == (pytest.approx(0.2), pytest.approx(1.2)), "behind the cluster's 200 bytes"
    assert lanes.launch("cluster", 10, 0.0) == (2.0, pytest.approx(2.1))
    apart = Lanes((levels[0], Level("cluster", 2, 100.0, 0.0)))
    apart.launch("cluster", 200, 0.0)
    assert apart.launch("node", 1000, 0.0) == (0.0, 1.0)


def test_a_link_that_has_rested_lets_a_burst_pass_at_once() -> None:
    lanes = Lanes((Level("cluster", 2, 100.0, 0.0, burst=50.0),))

    def ends(received: int, now: float) -> float:
        begin, end = lanes.launch("cluster", received, now)
        assert begin == now
        return end

    assert ends(200, 0.0) == pytest.approx(2.0), "a step follows another: nothing was saved up before it"
    assert ends(200, 2.0) == pytest.approx(4.0), "nor between hops that follow one another"
    assert ends(200, 4.2) == pytest.approx(6.0), "two tenths of a second were"
    assert ends(200, 16.0) == pytest.approx(17.5), "never more than the burst"
    assert ends(20, 30.0) == pytest.approx(30.0), "which is there at once"
    assert ends(200, 30.0) == pytest.approx(31.7), "and what is left of it is for the next one"


def test_a_burst_saves_no_latency_and_no_link_carries_more_than_its_bandwidth() -> None:
    level = Level("cluster", 2, 100.0, 0.1, burst=50.0)
    lanes, now = Lanes((level,)), 0.0
    _, now = lanes.launch("cluster", 100, now)
    _, end = lanes.launch("cluster", 20, now + 9.0)
    assert end == pytest.approx(now + 9.1)
    lanes, now = Lanes((level,)), 0.0
    for _ in range(9):
        _, now = lanes.launch("cluster", 100, now + 0.3)
    assert now == pytest.approx(9 * hop_seconds(level, 100)), "gaps shorter than the burst cost nothing"


def test_hops_that_cross_a_link_use_up_its_burst() -> None:
    node, cluster = Level("node", 2, 1000.0, 0.0, burst=500.0), Level("cluster", 2, 100.0, 0.0, via=("node",))
    for first, left in ((0, 0.5), (300, 0.2), (900, 0.0)):
        lanes = Lanes((node, cluster))
        lanes.launch("cluster", first, 10.0)
        _, end = lanes.launch("node", 1000, 10.0)
        assert end == pytest.approx(11.0 - left + max(0, first - 500) / 1000), first


def test_a_product_takes_its_flops_at_the_rate_of_its_dtype() -> None:
    a, b = torch.zeros(512, 512), torch.zeros(512, 512)
    expected = 2 * 512**3 / (EFFICIENCY * 1e9)
    assert seconds(torch.mm, a, b) == [pytest.approx(max(expected, 3 * 4 * 512**2 / 1e6))]
    fast = Device("fast memory", DEVICE.peak_flops, memory=1e9, memory_bandwidth=1e12)
    graph = make_fx(torch.mm, tracing_mode="fake")(a, b).graph
    (node,) = (node for node in graph.nodes if node.op == "call_function")
    assert node_seconds(node, fast) == pytest.approx(expected)
    half = make_fx(torch.mm, tracing_mode="fake")(a.bfloat16(), b.bfloat16()).graph
    (node,) = (node for node in half.nodes if node.op == "call_function")
    assert node_seconds(node, fast) == pytest.approx(expected / 4)


def test_anything_else_takes_the_bytes_that_it_moves_and_views_take_nothing() -> None:
    a = torch.zeros(1000)
    assert seconds(lambda x: x + x, a) == [pytest.approx(2 * 4000 / 1e6)], "an operand that comes twice is read once"
    assert seconds(lambda x: x.view(10, 100).t(), a) == [0.0, 0.0]
