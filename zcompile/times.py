"""What things take, by a machine's data sheet: seconds of a hop, and of a node of a graph. Pure: no device, no clock, no communication.

The one cost model: the schedule pass asks it when it orders a graph, the simulator when it plays one, the planner through the simulator.
All ranks must get the same answers: they are functions of the topology and of shapes alone.

    hop         overhead + steps(s) latency + bytes / (bandwidth curve(bytes / steps(s)))      over a level of size s, less what its links
                                                                                               are ahead: see Note [Bursts]
    operation   the longer of FLOPs / (efficiency peak) and the bytes of its operands / the memory's bandwidth
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from zcompile.machines import Device, Level

EFFICIENCY = 0.5
"""Part of the peak that matrix products are taken to reach where a device has no curve of its own: an assumption, not a measurement."""

SECONDS = "zc_seconds"
"""meta key of a node that stands for a stretch of a graph: (seconds, FLOPs) on the device."""

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


MESSAGE_OVERHEAD = 0.03
"""Part of a hop's time that may pass before and between its bytes (calls, latency), where the size of messages is free."""
MESSAGES = (25 * 2**20, 400 * 2**20)
"""Bytes of weights: a unit is not cut smaller than the first, and not made larger than the second, whatever the links."""


def message_bytes(levels: Sequence[Level]) -> int:
    """Bytes of whole weights that should travel together over levels, fastest first: so many that at each of them a hop is that much
    longer than its calls and latencies. Slow starts want large messages, and so do many ranks in a ring; MESSAGES bounds it.

    With c seconds of calls and latency, bandwidth B and the part 1/E_(j-1) - 1/E_j of the weights that a rank receives (zcompile.cost):
    c B / (MESSAGE_OVERHEAD (1/E_(j-1) - 1/E_j)), the largest of all levels.
    """
    inner, most = 1, 0.0
    for level in levels:
        outer = inner * level.size
        if level.size > 1:
            empty, rate = level.overhead + steps(level) * level.latency, level.bandwidth * at(level.curve, math.inf)
            most = max(most, empty * rate / (MESSAGE_OVERHEAD * (1 / inner - 1 / outer)))
        inner = outer
    return int(min(max(most, MESSAGES[0]), MESSAGES[1]))


class Lanes:
    """The links of each level, as queues of work: a hop is over when every link that it crosses has worked off what was queued up to it.

    Hops of one level follow one another, as on one communicator. Those that share a link with another level (`Level.via`) add their
    bytes to its queue too. With `Level.via` empty everywhere a hop simply takes its level when those before it are over. See Note [Bursts].

    Note [Bursts]: a link behind a token bucket that has rested is ahead of its rate: what comes next goes at once, as many bytes as the
    link could have carried meanwhile, at most a burst. So its queue may have been empty since a moment in the past, by so much at most
    as the burst takes at the level's rate: gaps shorter than that cost nothing, hops that follow one another get nothing. Links begin
    with nothing ahead: one step follows another.
    """

    def __init__(self, levels: Sequence[Level]):
        self.levels = {level.name: level for level in levels}
        self.free = dict.fromkeys(self.levels, 0.0)
        """When the level's links have nothing more to do, at the level's rate."""
        self.over = dict.fromkeys(self.levels, 0.0)
        """When the level's last hop is: later, where its bytes were a burst."""

    def launch(self, name: str, received: int, now: float) -> tuple[float, float]:
        """A hop over level `name`, launched at `now`, each rank receiving so many bytes: when it begins and ends."""
        level = self.levels[name]
        begin = max(now, self.free[name], self.over[name])
        end = max(self._queue(level, begin, hop_seconds(level, received)), begin + hop_seconds(level, 0))
        for other in level.via:
            if other in self.levels:
                below = self.levels[other]
                end = max(end, self._queue(below, begin, received / below.bandwidth))
        self.over[name] = end
        self.free[name] = max(self.free[name], end - _ahead(level))
        return begin, end

    def _queue(self, level: Level, begin: float, seconds: float) -> float:
        """So much more work for a level's links, none of it there before `begin`: when it is done."""
        self.free[level.name] = max(self.free[level.name], begin - _ahead(level)) + seconds
        return self.free[level.name]


def _ahead(level: Level) -> float:
    """Seconds that a level's links can be ahead of their rate."""
    return level.burst / level.bandwidth


def flops(target: Any, args: Sequence[Any], keywords: Mapping[str, Any], value: Any) -> float:
    """FLOPs of one operation on values (tensors, fake or not); 0 for what has none to speak of."""
    packet = getattr(target, "overloadpacket", None)
    if packet in _FLASH_ON_CPU:
        return _FLASH_ON_CPU[packet](*args)
    return float(flop_registry[packet](*args, **keywords, out_val=value)) if packet in flop_registry else 0.0


def roofline(device: Device, count: float, moved: float, dtype: str) -> float:
    """Seconds of one operation: the longer of its FLOPs, at the device's efficiency for so many, and the bytes that it moves."""
    rate = _peak(device, dtype) * (at(device.efficiency, max(count, 1.0)) if device.efficiency else EFFICIENCY)
    return max(count / rate, moved / device.memory_bandwidth, device.overhead)


def is_free(target: Any) -> bool:
    """Views and the like: nothing is computed and nothing moved."""
    return _target_name(target) in _FREE or "_c10d_functional" in str(target)


def is_pointwise(target: Any) -> bool:
    """One element for each: compilers fuse chains of these, and what passes between two of them is not written."""
    return torch.Tag.pointwise in getattr(target, "tags", ())


def is_product(target: Any) -> bool:
    """Whether its FLOPs are counted: matrix products, convolutions, attention."""
    packet = getattr(target, "overloadpacket", None)
    return packet in flop_registry or packet in _FLASH_ON_CPU


def node_flops(node: Node) -> float:
    """FLOPs of one node; 0 for what has none to speak of."""
    if node.op != "call_function":
        return 0.0
    if SECONDS in node.meta:
        return float(node.meta[SECONDS][1])
    if not is_product(node.target):
        return 0.0
    args, keywords = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: tree_map(_known, n.meta.get("val")))
    return flops(node.target, args, keywords, tree_map(_known, node.meta.get("val")))


def node_seconds(node: Node, device: Device) -> float:
    """Of one operation on the device; 0 for views, inputs and collectives."""
    if SECONDS in node.meta:
        return float(node.meta[SECONDS][0])
    if node.op != "call_function" or is_free(node.target):
        return 0.0
    value = node.meta.get("val")
    moved = sum(value_bytes(source.meta.get("val")) for source in node.all_input_nodes if not _stays_inside(source))
    moved += 0 if _stays_inside(node) else value_bytes(value)
    return roofline(device, node_flops(node), moved, value_dtype(value))


def tokens_in(inputs: Any) -> int:
    """Of a micro-batch: elements of the first tensor of integers among its inputs; 0 where there is none."""
    leaves = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    return next((leaf.numel() for leaf in leaves if not leaf.is_floating_point()), 0)


def _stays_inside(node: Node) -> bool:
    """A value that a fused chain makes and uses: no memory sees it."""
    return is_pointwise(node.target) and bool(node.users) and all(is_pointwise(user.target) for user in node.users)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> float:
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> float:
    return float(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FLASH_ON_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Which torch's own registry (2.13) leaves out."""


def _target_name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return str(packet).rpartition(".")[2] if packet is not None else getattr(target, "__name__", "")


def value_bytes(value: Any) -> int:
    """Of a tensor, or of all in a list or tuple."""
    if isinstance(value, torch.Tensor):
        return hint(value.numel()) * value.itemsize
    return sum(value_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def hint(number: Any) -> int:
    """What a size was when its graph was traced. To compare a symbolic one would make its value a guard of the compiled code."""
    return int(number.node.hint) if isinstance(number, torch.SymInt) else number


def _known(value: Any) -> Any:
    """A tensor without symbols in its shape."""
    if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
        return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")
    return hint(value)


def value_dtype(value: Any) -> str:
    """Name of the dtype of a result, of its first tensor where it has several."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return str(getattr(first, "dtype", "")).removeprefix("torch.")


def _peak(device: Device, dtype: str) -> float:
    """FLOP/s for the dtype of a result; that of the slowest known one where the device has no figure for it."""
    rates = dict(device.peak_flops)
    return rates.get(dtype, min(rates.values()))
