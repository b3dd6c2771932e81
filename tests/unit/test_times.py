"""What things take by a machine's data: closed forms, no clock."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from zcompile.machines import Device, Level
from zcompile.times import EFFICIENCY, hop_seconds, node_seconds

DEVICE = Device("test", (("float32", 1e9), ("bfloat16", 4e9)), memory=1e9, memory_bandwidth=1e6)


def seconds(function: object, *inputs: torch.Tensor) -> list[float]:
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph  # type: ignore[arg-type]
    return [node_seconds(node, DEVICE) for node in graph.nodes if node.op == "call_function"]


def test_a_hop_is_latency_and_bytes_over_bandwidth() -> None:
    assert hop_seconds(Level("node", 2, 1e6, 1e-3), 5000) == pytest.approx(1e-3 + 5e-3)


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
