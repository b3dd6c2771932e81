"""What things take, by a machine's data sheet: seconds of a hop, and of a node of a graph. Pure: no device, no clock, no communication.

The schedule pass asks, so all ranks must get the same answers: they are functions of the topology and of shapes alone. They are for
deciding what is under way beside what, not forecasts: a hop takes its level's latency and bytes over bandwidth; an operation the longer
of its FLOPs at EFFICIENCY of the device's peak and the bytes of its operands at the memory's bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from zcompile.machines import Device, Level

EFFICIENCY = 0.5
"""Part of the peak that matrix products are taken to reach: an assumption, not a measurement."""

_FREE = ("view", "reshape", "permute", "transpose", "expand", "squeeze", "unsqueeze", "select", "slice", "split", "detach", "alias", "t",
         "as_strided", "unbind", "getitem", "split_with_sizes", "narrow", "_unsafe_view", "empty", "wait_tensor")  # fmt: skip


def hop_seconds(level: Level, received: int) -> float:
    """Latency and `received` bytes over the level's bandwidth."""
    return level.latency + received / level.bandwidth


def node_seconds(node: Node, device: Device) -> float:
    """Of one operation on the device; 0 for views, inputs and collectives."""
    if node.op != "call_function" or _name(node) in _FREE or "_c10d_functional" in str(node.target):
        return 0.0
    value = node.meta.get("val")
    packet = getattr(node.target, "overloadpacket", None)
    flops = 0.0
    if packet in flop_registry:
        args, keywords = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        flops = float(flop_registry[packet](*args, **keywords, out_val=value))
    moved = sum(_bytes(source.meta.get("val")) for source in node.all_input_nodes) + _bytes(value)
    return max(flops / (EFFICIENCY * _peak(device, value)), moved / device.memory_bandwidth)


def _name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).rpartition(".")[2] if packet is not None else getattr(node.target, "__name__", "")


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.itemsize
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _peak(device: Device, value: Any) -> float:
    """FLOP/s for the dtype of a result; that of the slowest known one where the device has no figure for it."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    name = str(getattr(first, "dtype", "")).removeprefix("torch.")
    rates = dict(device.peak_flops)
    return rates.get(name, min(rates.values()))
