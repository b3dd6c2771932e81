"""A graph folded by module: the tree of modules, and the order in which to draw what each one holds.

What a module holds stands in layers: each child behind all that it reads from (topological generations, by networkx). Children that
read from one another in turn, such as a module that is called twice, follow one another in the order of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx

from zcompile.debug.record import Row

INPUTS = "inputs"
"""The pseudo module that holds a graph's inputs."""


def tree(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Modules, the root first: {"path", "parent", "layers", "rows"}.

    layers: lists of children, a row by its number, a module m as -m (the root is nobody's child). rows: how many are in it, at any depth.
    """
    numbers: dict[str, int] = {"": 0}
    modules: list[dict[str, Any]] = [{"path": "", "parent": -1, "layers": [], "rows": 0}]
    chains: list[tuple[int, ...]] = []
    """Of each row the modules around it, from the root on."""
    known: dict[str, tuple[int, ...]] = {"": (0,)}
    for row in rows:
        path = INPUTS if row.kind == "input" else row.module
        if path not in known:
            outer, parts = [0], path.split(".")
            for end in range(1, len(parts) + 1):
                prefix = ".".join(parts[:end])
                if prefix not in numbers:
                    numbers[prefix] = len(modules)
                    modules.append({"path": prefix, "parent": outer[-1], "layers": [], "rows": 0})
                outer.append(numbers[prefix])
            known[path] = tuple(outer)
        chains.append(known[path])
    graphs = [nx.DiGraph() for _ in modules]
    for number, chain in enumerate(chains):
        for depth, module in enumerate(chain):
            modules[module]["rows"] += 1
            graphs[module].add_node(_child(chain, depth, number))
    for number, row in enumerate(rows):
        for source in row.inputs:
            one, other, depth = chains[source], chains[number], 0
            while depth + 1 < min(len(one), len(other)) and one[depth + 1] == other[depth + 1]:
                depth += 1
            a, b = _child(one, depth, source), _child(other, depth, number)
            if a != b:
                graphs[one[depth]].add_edge(a, b)
    for entry, graph in zip(modules, graphs, strict=True):
        entry["layers"] = _layers(graph)
    return modules


def _child(chain: tuple[int, ...], depth: int, row: int) -> int:
    return -chain[depth + 1] if depth + 1 < len(chain) else row


def _layers(graph: nx.DiGraph) -> list[list[int]]:
    first = {node: number for number, node in enumerate(graph.nodes)}  # added in the order of the program
    condensed = nx.condensation(graph)
    layers: list[list[int]] = []
    for generation in nx.topological_generations(condensed):
        groups = [sorted(condensed.nodes[each]["members"], key=first.__getitem__) for each in generation]
        singles = sorted((group[0] for group in groups if len(group) == 1), key=first.__getitem__)
        if singles:
            layers.append(singles)
        layers += [[member] for group in groups if len(group) > 1 for member in group]
    return layers
