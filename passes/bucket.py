"""bucket: the semantic ops of one unit become one message.

Requires: a forward, backward or inference graph with semantic ops.
Guarantees: gathers of one unit stand side by side at the place of the first, reduces (and syncs) of one unit at the place of the
last, in the order in which their shards lie in the unit's buffers; `meta["zc_bucket"]` numbers the bucket.
Leaves alone: units; which parameters can share a message was decided when the masters were laid out, so that it needs no copy in.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from zcompile import cost
from zcompile.passes import merge
from zcompile.passes.context import Context
from zcompile.passes.nodes import GATHER, REDUCE, SEMANTIC, SYNC, find, reorder, spec_of

NAME = "bucket"
KEY = "zc_bucket"
NAMES: dict[Any, str] = {GATHER: "gather", REDUCE: "reduce", SYNC: "sync"}


def run(gm: GraphModule, context: Context) -> None:
    graph = gm.graph
    merge.run(gm, context)
    for node in find(graph, *SEMANTIC):
        cost.add(context.predicted, cost.transfer_bytes(spec_of(node), NAMES[node.target]))
    number = 0
    for group in _by_unit(find(graph, GATHER)):
        place = group[0].prev  # a gather reads placeholders alone: it may stand anywhere
        for node in sorted(group, key=lambda node: spec_of(node).offset):
            place.append(node)
            place = node
        _number(group, number)
        number += 1
    groups = [sorted(g, key=lambda n: spec_of(n).offset) for t in (REDUCE, SYNC) for g in _by_unit(find(graph, t))]
    reorder(graph, groups)
    for group in groups:
        _number(group, number)
        number += 1
    context.note(f"{len(find(graph, *SEMANTIC))} transfers in {number} messages per hop")


def check(gm: GraphModule, context: Context) -> None:
    if any(KEY not in node.meta for node in find(gm.graph, *SEMANTIC)):
        raise AssertionError("a transfer is in no bucket")


def _by_unit(nodes: list[Node]) -> list[list[Node]]:
    found: dict[object, list[Node]] = {}
    for node in nodes:
        spec = spec_of(node)
        buffer = node.args[1] if node.target is GATHER else None
        found.setdefault((buffer, spec.unit, spec.chain), []).append(node)
    return list(found.values())


def _number(group: list[Node], number: int) -> None:
    for node in group:
        node.meta[KEY] = number
