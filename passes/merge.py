"""merge: several reads of one parameter become one gather, and their gradients are summed before one reduce.

Requires: a joint, forward or inference graph with semantic ops.
Guarantees: one gather per parameter and phase; in a joint graph one reduce and at most one sync per parameter, its input the sum of
the gradients in the order autograd delivered them (so the bits are those of a dense model).
Leaves alone: gradients whose sum is not a plain chain of adds, and those with error feedback, whose state is kept for each; they
are correct, and cost a transfer each.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import GraphModule, Node

from zcompile.passes.context import Context
from zcompile.passes.nodes import GATHER, REDUCE, SYNC, add_of, aten, find, spec_of

NAME = "merge"


def run(gm: GraphModule, context: Context) -> None:
    graph = gm.graph
    first: dict[object, Node] = {}
    for node in find(graph, GATHER):
        kept = first.setdefault(node.args, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            context.note(f"read of {context.parameter(kept)} merged")
    if context.stage == "joint":
        by_parameter: defaultdict[object, list[Node]] = defaultdict(list)
        for node in find(graph, REDUCE):
            by_parameter[node.args[1]].append(node)
        for reduces in by_parameter.values():
            if len(reduces) > 1 and spec_of(reduces[0]).feedback is None:
                _merge_gradients(reduces, context)
        graph.eliminate_dead_code()


def check(gm: GraphModule, context: Context) -> None:
    gathers = [node.args for node in find(gm.graph, GATHER)]
    if len(gathers) != len(set(gathers)):
        raise AssertionError("a parameter is gathered twice in one graph")


def _merge_gradients(reduces: list[Node], context: Context) -> None:
    """One reduce of the sum in place of `reduces`, which are of one parameter, in graph order."""
    plan = [_consumer(node) for node in reduces]
    if any(found is None for found in plan):
        return
    syncs = [found[0] for found in plan if found is not None and found[0] is not None]
    last = reduces[-1]
    graph = last.graph
    if syncs and (len(syncs) != len(reduces) or any(_lone_add(sync) is None for sync in syncs[:-1])):
        return
    if not syncs and any(_lone_add(node) is None for node in reduces):
        return
    with graph.inserting_before(last):
        total = reduces[0].args[0]
        for node in reduces[1:]:
            total = _add(graph, total, node.args[0])  # type: ignore[arg-type]
    last.args = (total, last.args[1])
    if not syncs:
        for node in reduces[:-1]:
            _drop(node)
    else:
        main = plan[0][1]  # type: ignore[index]
        kept = syncs[-1]
        with graph.inserting_before(kept):
            kept.args = (last if main is None else _add(graph, main, last), kept.args[1])
        for sync in syncs[:-1]:
            _drop(sync)
    context.note(f"{len(reduces)} gradients of {context.parameter(last)} summed before one reduce")


def _consumer(reduce: Node) -> tuple[Node | None, Node | None] | None:
    """(sync, main) that use a reduced gradient: (sync, None) directly, (sync, main) after main was added, (None, None) if accumulated."""
    users = list(reduce.users)
    if len(users) != 1:
        return None
    user = users[0]
    if user.target is SYNC:
        return user, None
    other = add_of(user)
    if other is None:
        return None
    into = list(user.users)
    if len(into) == 1 and into[0].target is SYNC:
        return into[0], other(reduce)
    return None, None


def _lone_add(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and add_of(users[0]) is not None else None


def _drop(term: Node) -> None:
    """Take `term` out of the sum it is added to."""
    addition = _lone_add(term)
    assert addition is not None
    other = add_of(addition)
    assert other is not None
    addition.replace_all_uses_with(other(term))
    addition.graph.erase_node(addition)


def _add(graph: torch.fx.Graph, left: Node, right: Node) -> Node:
    node = graph.call_function(aten.add.Tensor, (left, right))
    node.meta = {
        key: value
        for key, value in right.meta.items()
        if key in ("stack_trace", "nn_module_stack", "seq_nr", "partitioner_tag", "custom")
    }
    node.meta["val"] = left.meta["val"] + right.meta["val"]
    return node
