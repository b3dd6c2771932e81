"""tag: nothing derived from a gather is saved for backward but what the option `keep` pays for; the backward gathers the rest again.

Requires: a joint graph after `merge`; `context.keep`, bytes of gathered weights that the forward may leave for the backward.
Guarantees: every gather, and what is one through views and casts, is tagged MUST_RECOMPUTE; the gathers of the units that are read last,
which a backward begins with, MUST_SAVE as long as they fit into `keep`, whole units and only those that travel. Compute copies and main
grads are exempt from version checks (both are written between a forward and its backward: see Note [Main grads are not saved tensors] in
ops).
Leaves alone: the user's own checkpointing tags on everything else.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from zcompile.passes.context import Context
from zcompile.passes.nodes import GATHER, buffers_of, derived, find, spec_of
from zcompile.times import value_bytes

NAME = "tag"
GRAPH = "ac_graph_id"
"""torch's meta key of what was tagged together; a value that a forward saves has it in the backward, too."""
GRAPH_ID = 1_000_000
"""Of our tags: above any that the user's checkpointing hands out."""
NO_VERSION_CHECK = "saved_tensor_with_no_vc_check"
"""torch's own mark for tensors stashed on ctx (read in 2.13: torch/_functorch/_aot_autograd); a test watches it."""


def run(gm: GraphModule, context: Context) -> None:
    if context.stage != "joint":
        return
    gathers = find(gm.graph, GATHER)
    for node in derived(gathers):
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta[GRAPH] = GRAPH_ID
    kept = _kept(gathers, context)
    for node in kept:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    context.kept = {context.parameter(node) for node in kept}
    context.note(
        f"{len(gathers) - len(kept)} gathers are done again in backward"
        + (f", {len(kept)} are kept: {sum(map(_bytes, kept))} of {context.keep} bytes" if context.keep else "")
    )
    for node in gathers:
        for buffer in buffers_of(node):
            buffer.meta[NO_VERSION_CHECK] = True


def check(gm: GraphModule, context: Context) -> None:
    for node in find(gm.graph, GATHER) if context.stage == "joint" else ():
        right = (
            CheckpointPolicy.MUST_SAVE if context.parameter(node) in context.kept else CheckpointPolicy.MUST_RECOMPUTE
        )
        if node.meta.get("recompute") is not right:
            raise AssertionError(f"gather of {context.parameter(node)} is not tagged")


def _kept(gathers: list[Node], context: Context) -> list[Node]:
    units: dict[str, list[Node]] = {}
    for node in reversed(gathers):  # units come in the order of their last reads, the last one first
        spec = spec_of(node)
        if spec.w and not spec.in_place:  # what lies whole in this rank's memory is there anyway
            units.setdefault(spec.unit, []).append(node)
    left, kept = context.keep, []
    for nodes in units.values():
        size = sum(map(_bytes, nodes))
        if size <= left:
            left -= size
            kept += nodes
    return kept


def _bytes(gather: Node) -> int:
    return value_bytes(gather.meta["val"])
