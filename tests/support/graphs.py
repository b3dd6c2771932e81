"""FX graphs built by hand, with fake values, for tests of one pass at a time. No process group, no model.

hand = Hand("joint")
up, down = unit({"up": (16, 8), "down": (8, 16)})
copy = hand.copy(up)
whole = hand.gather(up, copy)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from zcompile.layout import TRANSFERS, ParamSpec, side_by_side
from zcompile.ops import ACCUMULATE, DIRECT
from zcompile.passes import runner
from zcompile.passes.context import Context
from zcompile.passes.nodes import GATHER, REDUCE, SYNC
from zcompile.plan import Plan
from zcompile.topology import Topology

LEVELS = ("pair", "node", "cluster")


def unit(shapes: dict[str, tuple[int, ...]], *, sizes: tuple[int, ...] = (2, 2, 2), w: int = 1, g: int = 2, o: int = 3, unit: str = "u0",
         wire: str = "fp32", compute: str = "float32", block: int = 1, **formats: Any) -> list[ParamSpec]:  # fmt: skip
    """Parameters that lie side by side in one unit, as zcompile.params lays them out."""
    wires = {t: (formats.get(t, wire),) * len(sizes) for t in TRANSFERS}
    place: dict[str, Any] = {
        "sizes": sizes, "levels": LEVELS[: len(sizes)], "topology": "x".join(map(str, sizes)),
        "w": w, "g": g, "o": o, "compute": compute, "unit": unit, "block": block, **wires,
    }  # fmt: skip
    return side_by_side(
        [ParamSpec(name=name, shape=shape, offset=0, unit_shard=0, **place) for name, shape in shapes.items()]
    )


class Hand:
    """A graph in the making: every node gets its value on fake tensors."""

    def __init__(self, stage: str, topology: str = "2x2x2", plan: str = "zero_topo", overlap: int = 0) -> None:
        self.graph = Graph()
        self.mode = FakeTensorMode()
        self.context = Context(
            stage, Plan.preset(plan).resolve(Topology.parse(topology), "float32"), name="by hand", overlap=overlap
        )
        self.gm: GraphModule

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(*shape, dtype=dtype)
        return node

    def input_like(self, node: Node) -> Node:
        """An input with the value of `node`, in a finished graph."""
        with self.gm.graph.inserting_before(next(iter(self.gm.graph.nodes))):
            made = self.gm.graph.placeholder("stand_in")
        made.meta["val"] = node.meta["val"]
        return made

    def copy(self, spec: ParamSpec) -> Node:
        """The compute copy of the unit of `spec`."""
        rows = spec.layout.shards // spec.layout.extents[spec.w]
        if spec.stored.quantized:
            return self.input(f"copy_{spec.unit}", rows * spec.unit_record, dtype=torch.uint8)
        return self.input(f"copy_{spec.unit}", rows * spec.unit_shard)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        with self.mode:
            real = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*real[0], **real[1])
        return node

    def gather(self, spec: ParamSpec, copy: Node, main: Node | None = None, phase: str = DIRECT) -> Node:
        leaf = next((n for n in self.graph.nodes if n.name == f"leaf_{spec.name}"), None)
        if leaf is None:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                leaf = self.input(f"leaf_{spec.name}", 0 if phase == ACCUMULATE else spec.layout.shard)
        return self.call(GATHER, leaf, copy, main, [], spec.text, phase)

    def reduce(self, spec: ParamSpec, grad: Node) -> Node:
        return self.call(REDUCE, grad, spec.text)

    def sync(self, spec: ParamSpec, total: Node) -> Node:
        return self.call(SYNC, total, spec.text)

    def output(self, *values: Node | None, visible: Sequence[int] | None = None) -> GraphModule:
        node = self.graph.output(tuple(values))
        node.meta["user_visible_output_idxs"] = tuple(range(len(values)) if visible is None else visible)
        self.gm = GraphModule(torch.nn.Module(), self.graph)
        return self.gm

    def run(self, *passes: ModuleType) -> GraphModule:
        """The passes on the finished graph, with their contracts, as the backend runs them."""
        runner.run(self.gm, passes, self.context)
        return self.gm


def targets(gm: GraphModule, *wanted: Any) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in wanted]
