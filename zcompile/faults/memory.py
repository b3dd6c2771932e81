"""By whom memory is taken: what a rank that ran out of it tells the others.

Parameters, main grads and optimizer state are counted where they lie. Of a compiled graph the peaks of what it gathers, reduces and
quantises are read off its nodes in their order, storages counted while somebody still uses them; so they are known before it runs, on
CPUs and GPUs alike, and do not count what Inductor saves by fusing.
"""

from __future__ import annotations

import gc
import resource
from typing import Any

import torch
from torch.fx import GraphModule, Node

from zcompile._torch_compat import storage_key
from zcompile.passes.nodes import ALL_GATHER, ALL_TO_ALL, PEER_GATHER, QUANTIZE, REQUANTIZE, SUM, WAIT, WHOLE, WIRE
from zcompile.wording import size

OWNERS = ("gathers", "grads", "quant buffers", "activations")
_SAID = ("out of memory", "can't allocate memory", "not enough memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(said in text for said in _SAID)
    )


def peaks(gm: GraphModule) -> dict[str, int]:
    """The most bytes that each of OWNERS holds at once while the lowered graph runs in the order of its nodes.

    Inputs are not counted, outputs are to the end.
    """
    nodes = list(gm.graph.nodes)
    same: dict[int, int] = {}
    storage: dict[Node, set[int]] = {}
    sizes: dict[int, int] = {}
    owner: dict[int, str] = {}
    inputs: set[int] = set()
    for node in nodes:
        found = set()
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor) and isinstance(value.untyped_storage().nbytes(), int):
                key = storage_key(value)
                if node.target is WAIT:  # what it yields is the collective's own buffer, under another name
                    same[key] = next(iter(storage[node.args[0]]), key)
                key = same.get(key, key)
                found.add(key)
                sizes[key] = max(sizes.get(key, 0), value.untyped_storage().nbytes())
                if owner.get(key, "activations") == "activations":
                    owner[key] = _owner(node)
        storage[node] = found
        inputs |= found if node.op == "placeholder" else set()
    last: dict[int, int] = {}
    for position, node in enumerate(nodes):
        for key in storage[node].union(*(storage[arg] for arg in node.all_input_nodes)):
            last[key] = position
    now, most, alive = dict.fromkeys(OWNERS, 0), dict.fromkeys(OWNERS, 0), set(inputs)
    for position, node in enumerate(nodes):
        for key in storage[node] - alive:
            alive.add(key)
            now[owner[key]] += sizes[key]
        for name in OWNERS:
            most[name] = max(most[name], now[name])
        for key in storage[node].union(*(storage[arg] for arg in node.all_input_nodes)) - inputs:
            if last[key] == position and node.op != "output":
                now[owner[key]] -= sizes[key]
    return most


def _owner(node: Node) -> str:
    """Whose storage a node's value is. Views of activations may tell better: a kernel's buffer is known by the weights in it."""
    if node.target in (QUANTIZE, REQUANTIZE) or WIRE in node.meta:
        return "quant buffers"
    if WHOLE in node.meta or node.target in (ALL_GATHER, PEER_GATHER):
        return "gathers"
    if node.target in (ALL_TO_ALL, SUM):
        return "grads"
    return "activations"


def describe() -> list[str]:
    """Lines for a report: this process's memory by owner, now and at the peaks of the graph that ran last."""
    from zcompile.engine import engines

    lines = []
    for engine in engines():
        held = engine.memory() | {"optimizer": _optimizer_state(engine)}
        lines.append("held: " + ", ".join(f"{name} {size(count)}" for name, count in held.items() if count))
        program = engine.running
        if program is not None:
            peak = ", ".join(f"{name} {size(count)}" for name, count in program.peaks.items())
            lines.append(f"at most, in {program.name}: {peak}")
        elif engine.call is not None:
            wholes = [slot.spec for reference, slot in engine.call.wholes.values() if not reference.expired()]
            alive = sum(spec.layout.numel * getattr(torch, spec.compute).itemsize for spec in wholes)
            lines.append(f"outside compiled graphs: gathers {size(alive)}")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines.append(f"process: {size(rss)} resident at its peak")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        lines.append(
            f"device: {size(torch.cuda.memory_allocated())} allocated, {size(torch.cuda.max_memory_allocated())} at its peak"
        )
    return lines


def _optimizer_state(engine: Any) -> int:
    """Bytes of the state of every optimizer that steps this engine's masters: this rank's part."""
    masters = {id(slot.master) for slot in engine.slots}
    total = 0
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.optim.Optimizer):
            for parameter, state in thing.state.items():
                if id(parameter) in masters:
                    for value in state.values():
                        local = getattr(value, "_local_tensor", value)
                        total += local.numel() * local.itemsize if isinstance(local, torch.Tensor) else 0
    return total
