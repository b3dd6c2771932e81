"""tag: nothing derived from a gather is saved for backward; the backward gathers again from the compute copy.

Requires: a joint graph after `merge`.
Guarantees: every gather, and what is one through views and casts, is tagged MUST_RECOMPUTE; compute copies and main grads are
exempt from version checks (both are written between a forward and its backward: see Note [Main grads are not saved tensors] in ops).
Leaves alone: the user's own checkpointing tags on everything else.
"""

from __future__ import annotations

from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from zcompile.passes.context import Context
from zcompile.passes.nodes import GATHER, buffers_of, derived, find

NAME = "tag"
GRAPH_ID = 1_000_000
"""`ac_graph_id` of our tags: above any that the user's checkpointing hands out."""
NO_VERSION_CHECK = "saved_tensor_with_no_vc_check"
"""torch's own mark for tensors stashed on ctx (read in 2.13: torch/_functorch/_aot_autograd); a test watches it."""


def run(gm: GraphModule, context: Context) -> None:
    if context.stage != "joint":
        return
    gathers = find(gm.graph, GATHER)
    for node in derived(gathers):
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta["ac_graph_id"] = GRAPH_ID
    context.note(f"{len(gathers)} gathers are done again in backward")
    for node in gathers:
        for buffer in buffers_of(node):
            buffer.meta[NO_VERSION_CHECK] = True


def check(gm: GraphModule, context: Context) -> None:
    for node in find(gm.graph, GATHER) if context.stage == "joint" else ():
        if node.meta.get("recompute") is not CheckpointPolicy.MUST_RECOMPUTE:
            raise AssertionError(f"gather of {context.parameter(node)} is not tagged")
