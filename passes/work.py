"""Which nodes of a graph do work that is in proportion to weights: what can be said of computing without the shapes of a batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from zcompile.passes.nodes import COLLECTIVES, QUANTIZERS, TRAFFIC, VIEWS_AND_CASTS, WAIT, WHOLE, aten, collective_of
from zcompile.passes.tag import GRAPH, GRAPH_ID
from zcompile.times import is_free, is_pointwise, is_product

_MOVES = {aten.cat.default, aten.constant_pad_nd.default, *VIEWS_AND_CASTS, *QUANTIZERS}
"""What hands a gradient on, beside views of every kind."""

WEIGHTS = "zc_weights"
"""meta key of a node that stands for a stretch of a graph: elements of weights that its products read or make gradients of."""


def weights_at_work(nodes: Iterable[Node]) -> dict[Node, int]:
    """Elements of the weights that each product reads, gathered, kept by the forward or read in place, and of the gradient that it makes
    for a reduction.

    A forward's product and the two of its backward come to the elements of its weight, each of them. What reads weights and multiplies
    nothing (norms, an embedding's lookup) is not in it.
    """
    found: dict[Node, int] = {}
    weights: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder" and node.meta.get(GRAPH) == GRAPH_ID:  # a backward's, which the forward kept
            weights.add(node)
        if node.op != "call_function":
            continue
        if node.meta.get(WEIGHTS):
            found[node] = node.meta[WEIGHTS]
            continue
        read = [source for source in node.all_input_nodes if source in weights]
        if _gathers(node) or WHOLE in node.meta:
            weights.add(node)
        elif read and is_product(node.target):
            found[node] = found.get(node, 0) + sum(_elements(source) for source in read)
        elif read and len(read) == len(node.all_input_nodes):
            weights.add(node)
        if node.target in COLLECTIVES and collective_of(node).transfer == "reduce":
            for product in _products(node):
                found[product] = found.get(product, 0) + _elements(product)
    return found


def _gathers(node: Node) -> bool:
    """Whether the node's value is a weight, or a message with weights."""
    if node.target is WAIT:
        node = node.args[0]  # type: ignore[assignment]
    return node.target in TRAFFIC and collective_of(node).transfer == "gather"


def _products(launch: Node) -> list[Node]:
    """The products whose results a first reduction sends, behind what only moves or adds them up."""
    found: list[Node] = []
    seen: set[Node] = set()
    queue = list(launch.all_input_nodes)
    while queue:
        node = queue.pop()
        if node in seen or node.op != "call_function" or node.target in COLLECTIVES:
            continue
        seen.add(node)
        if is_product(node.target):
            found.append(node)
        elif is_free(node.target) or is_pointwise(node.target) or node.target in _MOVES:
            queue += node.all_input_nodes
    return found


def _elements(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0
