"""Names of nodes that a reader can follow: the module, then the operation; the same in every pass, on every rank, in every run.

    blocks.0.up.mm          the product in the forward of blocks.0.up; its second one would be blocks.0.up.mm_2
    blocks.0.up.grad.mm     in its backward
    blocks.0.up.mm.1        the second of several results
    copy.blocks.0.up.weight an input: what is stale or fresh (copy, leaf, main, feedback), and the first parameter that it holds

FX numbers nodes over the whole graph, so that one node more renames all that follow. These names count within one module, a node keeps
its name through the passes, and a forward and a backward call what they share as their joint graph does: texts of two plans, of two
commits and of two passes differ where the programs do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch.fx import GraphModule, Node

from zcompile.passes.nodes import COLLECTIVES, WAIT, collective_of

_INDEX = re.compile(r"(?:\._modules)?\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_ROOT = re.compile(r"^L\['([^']*)'\]")
_FORWARD, _BACKWARD = "nn_module_stack", "fwd_nn_module_stack"


def printable(text: str) -> str:
    """`text` with control characters, line ends and lone surrogates escaped: a module may be called anything, and a node has one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@cache
def path(text: str) -> str:
    """The path of a module or a tensor as Dynamo writes it, as a user would: "L['self']._modules['blocks'][0].up" -> "blocks.0.up".

    What is no part of the model keeps the name of its variable: "L['args'][0]" -> "args.0".
    """
    root = _ROOT.match(text)
    kept = "" if root is None or root[1] in ("self", "model") else root[1]
    shown = _INDEX.sub(lambda m: "." + next(g for g in m.groups() if g is not None), _ROOT.sub("", text))
    return printable(f"{kept}.{shown.partition('@')[0].replace('._buffers', '')}".replace("..", ".").strip("."))


def module_of(node: Node) -> tuple[str, bool]:
    """(path of the innermost module that a node belongs to, whether it is of that module's backward)."""
    for key in (_FORWARD, _BACKWARD):
        stack = node.meta.get(key)
        if stack:
            return path(list(stack.values())[-1][0]), key == _BACKWARD
    return "", node.meta.get("partitioner_tag") == "is_backward"


class Names:
    """The names of one graph's nodes on its way through the passes.

    Args:
        known: FX name -> (operation, name) of the graph that this one was cut from.
        inputs: placeholder -> name, where something is known of it.
    """

    def __init__(
        self, known: Mapping[str, tuple[str, str]] | None = None, inputs: Mapping[str, str] | None = None
    ) -> None:
        self._known, self._inputs = dict(known or {}), dict(inputs or {})
        self._names: dict[Node, str] = {}
        self._taken: set[str] = set()

    def __call__(self, node: Node) -> str:
        """The name of a node that `update` has seen; of another one FX's own."""
        return self._names.get(node, node.name)

    def update(self, gm: GraphModule) -> None:
        """Name the nodes that are new, in the graph's order."""
        new = [node for node in gm.graph.nodes if node not in self._names]
        if not self._names:  # a graph begins: first those whose names are known, or a new one might take one of them
            for node in new:
                operation, name = self._known.get(node.name, ("", ""))
                if name and (node.op == "placeholder" or operation == _operation(node)):
                    self._name(node, name)
        for node in new:
            if node not in self._names:
                self._name(node, self._described(node))

    def export(self) -> dict[str, tuple[str, str]]:
        """FX name -> (operation, name), for the graphs that this one is cut into."""
        return {node.name: (_operation(node), name) for node, name in self._names.items()}

    def _name(self, node: Node, wanted: str) -> None:
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        self._names[node] = name

    def _described(self, node: Node) -> str:
        if node.op == "output":
            return "return"
        if node.op == "placeholder":
            return self._inputs.get(node.name) or ("grad.output" if node.name.startswith("tangents") else "input")
        operation = _operation(node)
        source = node.args[0] if node.args else None
        if operation == "getitem" and isinstance(source, Node):
            return f"{self(source)}.{node.args[1]}"
        module, backward = module_of(node)
        return ".".join(part for part in (module, "grad" if backward else "", operation) if part)


def _operation(node: Node) -> str:
    """What a node is called after: its operator; of a hop its transfer, its level, and whether it launches or waits."""
    if node.target in COLLECTIVES:
        entry = collective_of(node)
        return f"{entry.transfer}_{entry.level}"
    if node.target is WAIT:
        source = node.args[0]
        if isinstance(source, Node) and source.target in COLLECTIVES:
            return f"{_operation(source)}_wait"
        return "copy_wait"
    target: Any = node.target
    return str(getattr(target, "_opname", None) or getattr(target, "__name__", None) or target)
