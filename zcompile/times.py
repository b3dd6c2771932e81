"""What things take, by a machine's data sheet: seconds of a hop, and of a node of a graph. Pure: no device, no clock, no communication.

The one cost model: the schedule pass asks it when it orders a graph, the simulator when it plays one, the planner through the simulator.
All ranks must get the same answers: they are functions of the topology and of shapes alone.

    hop         overhead + steps(s) latency + bytes / (bandwidth curve(bytes / steps(s)))      over a level of size s
    operation   the longer of FLOPs / (efficiency peak) and the bytes of its operands / the memory's bandwidth
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from zcompile.machines import Device, Level

EFFICIENCY = 0.5
"""Part of the peak that matrix products are taken to reach: an assumption, not a measurement."""

_FREE = ("view", "reshape", "permute", "transpose", "expand", "squeeze", "unsqueeze", "select", "slice", "split", "detach", "alias", "t",
         "as_strided", "unbind", "getitem", "split_with_sizes", "narrow", "_unsafe_view", "empty", "wait_tensor")  # fmt: skip


def steps(level: Level) -> int:
    """Messages of one hop that follow one another."""
    if level.steps == "ring":
        return max(level.size - 1, 1)
    return max(math.ceil(math.log2(level.size)), 1) if level.steps == "tree" else 1


def at(curve: Sequence[tuple[float, float]], x: float) -> float:
    """A curve's value: linear in log x between its points, constant beyond them; 1 where there are none."""
    if not curve:
        return 1.0
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
    return curve[-1][1]


def hop_seconds(level: Level, received: int) -> float:
    """Of one hop over the level in which each rank receives so many bytes."""
    count = steps(level)
    rate = level.bandwidth * at(level.curve, max(received, 1) / count)
    return level.overhead + count * level.latency + received / rate


class Lanes:
    """The links of each level, as queues of work: a hop is over when every link that it crosses has worked off what was queued up to it.

    Hops of one level follow one another, as on one communicator. Those that share a link with another level (`Level.via`) add their
    bytes to its queue too. With `Level.via` empty everywhere a hop simply takes its level when those before it are over.
    """

    def __init__(self, levels: Sequence[Level]):
        self.levels = {level.name: level for level in levels}
        self.free = dict.fromkeys(self.levels, 0.0)
        """When the level's links have nothing more to do."""

    def launch(self, name: str, received: int, now: float) -> tuple[float, float]:
        """A hop over level `name`, launched at `now`, each rank receiving so many bytes: when it begins and ends."""
        level = self.levels[name]
        begin = max(now, self.free[name])
        end = begin + hop_seconds(level, received)
        for other in level.via:
            if other in self.levels:
                self.free[other] = max(self.free[other], begin) + received / self.levels[other].bandwidth
                end = max(end, self.free[other])
        self.free[name] = end
        return begin, end


def node_flops(node: Node) -> float:
    """FLOPs of one node; 0 for what has none to speak of."""
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in flop_registry:
        return 0.0
    args, keywords = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return float(flop_registry[packet](*args, **keywords, out_val=node.meta.get("val")))


def node_seconds(node: Node, device: Device) -> float:
    """Of one operation on the device; 0 for views, inputs and collectives."""
    if node.op != "call_function" or _name(node) in _FREE or "_c10d_functional" in str(node.target):
        return 0.0
    value, flops = node.meta.get("val"), node_flops(node)
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
