"""What draws no random numbers needs no random state: attention without dropout that backward computes again.

torch's partitioner takes every operation that may draw for one that does: fused attention inside a checkpointed block is wrapped, forward
keeps the random state of each and backward sets it again. That costs a state per layer, and there is none on the meta device.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from zcompile._torch_compat import run_and_save_rng_state, run_with_rng_state
from zcompile.passes.nodes import aten, find


def unwrap(gm: GraphModule, mode: Any) -> int:
    """Call such attention itself, forward and backward; returns how many. What does draw stays wrapped.

    The states stay outputs of the forward, whose number is fixed by then: as zeros, which nobody reads.

    Args:
        mode: the fake mode of the graph's values.
    """
    count = 0
    for state in _states(gm):
        state.meta["val"] = _settled(state.meta["val"], mode)
    for node in find(gm.graph, run_and_save_rng_state):
        if not _draws(*node.args, **node.kwargs):
            _unwrap_forward(node)
            count += 1
    for node in find(gm.graph, run_with_rng_state):
        _, op, *rest = node.args
        if not _draws(op, *rest, **node.kwargs):
            _unwrap_backward(node, mode)
            count += 1
    return count


def _states(gm: GraphModule) -> list[Node]:
    """The nodes that are random states: results in a forward, inputs in a backward."""
    saved = [item for node in find(gm.graph, run_and_save_rng_state) for item in node.users if item.args[1] == 0]
    return saved + [node.args[0] for node in find(gm.graph, run_with_rng_state) if isinstance(node.args[0], Node)]


def _settled(state: torch.Tensor, mode: Any) -> torch.Tensor:
    """The value of a state with a number for its size: torch gives it a symbol, which no schedule can price."""
    lengths: list[Any] = list(state.shape)
    size = [length.node.hint if isinstance(length, torch.SymInt) else length for length in lengths]
    with mode:
        return torch.empty(size, dtype=state.dtype, device=state.device)


def _draws(op: Any, *args: Any, **keywords: Any) -> bool:
    """Whether a call draws random numbers, as far as one can tell: not with a dropout of nothing."""
    for place, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            value = args[place] if place < len(args) else keywords.get("dropout_p", argument.default_value)
            return not (isinstance(value, (int, float)) and value == 0)
    return True


def _unwrap_forward(node: Node) -> None:
    graph, (op, *rest) = node.graph, node.args
    for item in list(node.users):
        assert item.target is operator.getitem, item.format_node()
        with graph.inserting_before(item):
            if item.args[1] == 1:
                made = graph.call_function(op, tuple(rest), node.kwargs)  # type: ignore[arg-type]
            else:
                state: torch.Tensor = item.meta["val"]
                size, keywords = list(state.shape), {"dtype": state.dtype, "device": state.device}
                made = graph.call_function(aten.full.default, (size, 0), keywords)  # type: ignore[arg-type]
        made.meta = dict(item.meta)
        item.replace_all_uses_with(made)
        graph.erase_node(item)
    graph.erase_node(node)


def _unwrap_backward(node: Node, mode: Any) -> None:
    op: Any
    graph, (_, op, *rest) = node.graph, node.args
    with graph.inserting_before(node):
        made = graph.call_function(op, tuple(rest), node.kwargs)  # type: ignore[arg-type]
    made.meta = dict(node.meta)
    if "val" not in made.meta:  # torch gives the wrapped one none
        args, keywords = map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
        with mode:
            made.meta["val"] = op(*args, **keywords)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
