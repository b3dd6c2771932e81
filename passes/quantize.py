"""quantize: what stands between two quantised hops becomes one kernel.

Requires: a graph after `lower`, whose hops the plan's formats have given their quantisers: quantise -> hop -> dequantise, sum, quantise.
Guarantees: between two quantised hops of a reduction one requantise (dequantise, sum in fp32, quantise; the sum is never written out);
where micro-batches add up, the last hop's sum goes into the main grads in place, in the kernel that dequantises it; a quantised
message is made by one kernel for all parameters of its bucket, or is what an earlier hop brought, and is read by one.
Leaves alone: hops and their order; native formats; the bits (each fused kernel equals the chain that it replaces, see
zcompile.kernels.reference).
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from zcompile.passes.context import Context
from zcompile.passes.nodes import (
    ACCUMULATE_INTO,
    ALL_TO_ALL,
    COLLECTIVES,
    PART,
    QUANTIZE,
    REQUANTIZE,
    SUM,
    WAIT,
    WIRE,
    add_of,
    aten,
    find,
)

NAME = "quantize"


def run(gm: GraphModule, context: Context) -> None:
    graph = gm.graph
    between = [node for node in find(graph, QUANTIZE) if _sum_before(node) is not None]
    for node in between:
        _requantize(node)
    into = [node for node in find(graph, SUM) if _accumulate(graph, node)]
    graph.eliminate_dead_code()
    if messages := [node for node in find(graph, *COLLECTIVES) if WIRE in node.meta]:
        context.note(
            f"{len(messages)} quantised messages: {len(find(graph, QUANTIZE))} made from plain values, {len(between)} between two "
            f"hops; {len(into)} sums go into main grads in place"
        )


def check(gm: GraphModule, context: Context) -> None:
    for node in find(gm.graph, QUANTIZE):
        if _sum_before(node) is not None:
            raise AssertionError(f"{node.format_node()} quantises a sum of quantised values that nothing else reads")
    for node in find(gm.graph, *COLLECTIVES):
        if WIRE not in node.meta:
            continue
        source = node.args[0]
        if node.target is ALL_TO_ALL and isinstance(source, Node) and source.target not in (QUANTIZE, REQUANTIZE):
            raise AssertionError(f"{node.format_node()} sends a message that no quantiser made")
        (wait,) = (user for user in node.users if user.target is WAIT)
        if len(wait.users) != 1:
            raise AssertionError(f"{node.format_node()} is read by {len(wait.users)} kernels")


def _sum_before(node: Node) -> Node | None:
    """The sum that a quantise reads, if nothing else reads it and both see the same rows."""
    xs, geometry = node.args[:2]
    source: Any = xs[0] if isinstance(xs, (list, tuple)) and len(xs) == 1 else None
    fits = isinstance(source, Node) and source.target is SUM and len(source.users) == 1 and not source.args[2]
    return source if fits and source.args[3] == geometry else None


def _requantize(node: Node) -> None:
    total = _sum_before(node)
    assert total is not None
    message, parts, _, geometry, code = total.args
    with node.graph.inserting_before(node):
        fused = node.graph.call_function(REQUANTIZE, (message, parts, geometry, code, node.args[2]))
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    node.graph.erase_node(node)
    node.graph.erase_node(total)


def _accumulate(graph: Graph, total: Node) -> bool:
    """main += part for every parameter of a sum, and nothing else: one kernel that does it in place. False if it is not so."""
    parts = sorted(
        (node for node in graph.nodes if node.meta.get(PART, (None,))[0] is total), key=lambda n: n.meta[PART][1]
    )
    found = [_into_main(part) for part in parts]
    if not found or any(pair is None for pair in found):
        return False
    mains = [pair[0] for pair in found if pair is not None]
    message, count, _, geometry, code = total.args
    with graph.inserting_after(total):
        node = graph.call_function(ACCUMULATE_INTO, (message, count, mains, geometry, code))
    node.meta = {**total.meta, "val": None}
    for _, addition, copy in (pair for pair in found if pair is not None):
        graph.erase_node(copy)
        graph.erase_node(addition)
    return True


def _into_main(part: Node) -> tuple[Node, Node, Node] | None:
    """(main, main + part, its copy into main) if that is all that becomes of a part, and of main."""
    users = list(part.users)
    other = add_of(users[0]) if len(users) == 1 else None
    if other is None:
        return None
    addition = users[0]
    main, copies = other(part), list(addition.users)
    if len(copies) != 1 or copies[0].target is not aten.copy_.default or copies[0].args[:2] != (main, addition):
        return None
    if main.op != "placeholder" or set(main.users) != {addition, copies[0]} or copies[0].users:
        return None
    return main, addition, copies[0]
