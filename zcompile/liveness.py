"""Memory of a graph while it runs: when each storage comes and goes, and whose it is. Pure: read off the graph's values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node

from zcompile._torch_compat import storage_key
from zcompile.passes.nodes import ALL_GATHER, PEER_GATHER, QUANTIZE, REQUANTIZE, TRAFFIC, TRANSFER, WAIT, WIRE
from zcompile.times import hint


class Liveness:
    """When each storage of a graph comes and goes, and whose it is.

    Weights (masters, copies) and the inputs that hold them are no allocations of a graph: they are the step's model state. A value is
    there from its node on until its last reader has run; a graph's outputs stay.
    """

    def __init__(self, nodes: Sequence[Node], stage: str):
        self.nodes, self.stage = nodes, stage
        self.key: dict[Node, object] = {}
        self.owner: dict[object, str] = {}
        self.size: dict[object, int] = {}
        self.first: dict[object, Node] = {}
        self.last: dict[object, Node] = {}
        kept: set[object] = set()
        for node in nodes:
            if node.op == "output":
                kept = {self.key[arg] for arg in node.all_input_nodes if arg in self.key}
                continue
            self._own(node)
            for arg in node.all_input_nodes:
                if arg in self.key:
                    self.last[self.key[arg]] = node
        self.free: dict[Node, list[object]] = {}
        for key, node in self.last.items():
            if key not in kept and key in self.size:
                self.free.setdefault(node, []).append(key)
        self._placeholders = {self.key[node] for node in nodes if node.op == "placeholder" and node in self.key}
        self._kept = kept

    def _own(self, node: Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return
        if node.target is WAIT and isinstance(node.args[0], Node) and node.args[0] in self.key:
            self.key[node] = self.key[node.args[0]]
            self.last[self.key[node]] = node
            return
        key: object = storage_key(value)
        self.key[node] = key
        self.last[key] = node
        if key not in self.first:
            self.first[key] = node
            owner = _owner(node)
            if owner:
                self.owner[key] = owner
                self.size[key] = hint(value.untyped_storage().nbytes())

    def inputs(self) -> Iterable[tuple[str, int]]:
        """What is there when the graph begins."""
        for key in self._placeholders:
            if key in self.size:
                yield self.owner[key], self.size[key]

    def before(self, node: Node) -> Iterable[tuple[str, int]]:
        key = self.key.get(node)
        if node.op != "placeholder" and key in self.size and self.first[key] is node:
            yield self.owner[key], self.size[key]

    def after(self, node: Node) -> Iterable[tuple[str, int]]:
        for key in self.free.get(node, ()):
            yield self.owner[key], -self.size[key]

    def end(self) -> Iterable[tuple[str, int]]:
        """A backward's outputs are gradients at O, which are model state from here on; a forward's stay for its backward."""
        if self.stage == "backward":
            for key in self._kept:
                if key in self.size:
                    yield self.owner[key], -self.size[key]


def _owner(node: Node) -> str:
    """Whose the storage is that a node makes; "" if it is model state."""
    ours = [user for user in node.users if TRANSFER in user.meta]
    if node.op == "placeholder":
        return "" if ours or TRANSFER in node.meta or not node.users else "activations"
    transfer = node.meta.get(TRANSFER)
    if transfer is None:
        return "gradients" if any(user.meta[TRANSFER] != "gather" for user in ours) else "activations"
    if node.target in (QUANTIZE, REQUANTIZE) or (
        node.target in TRAFFIC and (node.target is not ALL_GATHER or WIRE in node.meta)
    ):
        return "gathered" if node.target is PEER_GATHER else "wire"
    return "gathered" if transfer == "gather" else "gradients"
