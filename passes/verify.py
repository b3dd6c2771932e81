"""verify: the invariants that a graph alone can show.

Requires: a lowered graph.
Guarantees: each collective has exactly one wait and nothing else reads it; each wait is of a collective or of a compute copy; no
value saved for backward derives from a gather that `tag` did not keep; the bytes of the collectives equal the closed forms of the
transfers.
Leaves alone: the graph.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from zcompile import cost
from zcompile.passes.context import Context
from zcompile.passes.nodes import (
    ALL_GATHER,
    COLLECTIVES,
    PEER_GATHER,
    TRAFFIC,
    WAIT,
    WHOLE,
    collective_of,
    derived,
    find,
)

NAME = "verify"


def run(gm: GraphModule, context: Context) -> None:
    """Nothing to change."""


def check(gm: GraphModule, context: Context) -> None:
    for node in find(gm.graph, *COLLECTIVES):
        waits = [user for user in node.users if user.target is WAIT]
        if len(waits) != 1 or len(node.users) != 1:
            raise AssertionError(
                f"{node.format_node()} has {len(waits)} waits and {len(node.users)} users: exactly one wait is right"
            )
    waited = set()
    for node in find(gm.graph, WAIT):
        source = node.args[0]
        assert isinstance(source, Node)
        if source.target not in COLLECTIVES and source.op != "placeholder":
            raise AssertionError(
                f"{node.format_node()} waits for something that is neither a collective nor a compute copy"
            )
        if source in waited:
            raise AssertionError(f"{source.format_node()} is waited for twice")
        waited.add(source)
    if context.stage == "forward":
        _check_saved(gm, context.kept)
    compiled = traffic(gm)
    if compiled != context.predicted:
        raise AssertionError(f"bytes of the graph {compiled} differ from the closed forms {context.predicted}")
    context.note(f"{len(find(gm.graph, *COLLECTIVES))} collectives, one wait each; bytes equal the closed forms")


def traffic(gm: GraphModule) -> cost.Bytes:
    """(level, transfer) -> bytes one rank receives, from the collective nodes; a sync's way back counts as sync."""
    total: cost.Bytes = {}
    for node in find(gm.graph, *TRAFFIC):
        entry = collective_of(node)
        transfer = "sync" if entry.transfer == "back" else entry.transfer
        cost.add(total, {(entry.level, transfer): entry.bytes})
    return total


def _check_saved(gm: GraphModule, kept: set[str]) -> None:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    visible = set(output.meta.get("user_visible_output_idxs", ()))
    wholes = [node for node in gm.graph.nodes if WHOLE in node.meta]
    gathered = derived(
        wholes + find(gm.graph, PEER_GATHER) + [user for node in find(gm.graph, ALL_GATHER) for user in node.users]
    )
    for index, value in enumerate(output.args[0]):
        if index not in visible and value in gathered and value.meta.get(WHOLE) not in kept:
            raise AssertionError(f"{value.format_node()} is saved for backward and derives from a gather")
