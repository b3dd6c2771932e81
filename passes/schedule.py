"""schedule: hops are under way while the graph computes.

Requires: a graph after `quantize`, each hop followed by its wait; `context.overlap`, the number of buckets in flight (0: all stays).
Guarantees: a bucket's first gather hop is launched `overlap` buckets before it is needed, its next hops one bucket later each, and its last
wait stands where it is needed, as does its unpack (in flight a quantised bucket is its codes). What follows a reduction's launch (its wait,
the next hop, what becomes of the sum) moves one launch later per hop, at most `overlap` of them, and to the graph's end. At most
`overlap` + 1 gathered buckets and as many reduced ones are in flight, however deep the model is. The order is a function of the graph
alone: equal on all ranks.
Leaves alone: the nodes, what they read and thereby the bits; the order of everything that computes; the order of nodes that write one
buffer; a graph in which it cannot show that (it says so in a note).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Graph, GraphModule, Node

from zcompile.passes.context import Context
from zcompile.passes.nodes import COLLECTIVES, WAIT, arrange, collective_of, find

NAME = "schedule"


def run(gm: GraphModule, context: Context) -> None:
    if not context.overlap:
        context.note("off: each hop is waited for where it is launched")
        return
    schedule = _Schedule(gm.graph, context.overlap)
    order = schedule.order()
    if order is None:
        context.note("off: a buffer is written on the way of a transfer, whose order must stay")
        return
    arrange(gm.graph, order)
    context.note(
        f"{len(schedule.gathers)} gathered buckets, {schedule.launches} reductions launched, {context.overlap} in flight"
    )


def check(gm: GraphModule, context: Context) -> None:
    if not context.overlap:
        return
    gm.graph.lint()
    flying = in_flight(gm)
    limit = 2 * (context.overlap + 1)  # gathers and reductions, one hop of each bucket
    if max(flying, default=0) > limit:
        raise AssertionError(f"{max(flying)} hops in flight at once; with overlap {context.overlap}: at most {limit}")


def in_flight(gm: GraphModule) -> list[int]:
    """After each collective's launch: how many have been launched and not been waited for."""
    found, open_ = [], 0
    for node in find(gm.graph, *COLLECTIVES, WAIT):
        if node.target in COLLECTIVES:
            open_ += 1
            found.append(open_)
        elif node.args[0].target in COLLECTIVES:  # type: ignore[union-attr, operator]
            open_ -= 1
    return found


@dataclass
class _Gather:
    """One gathered bucket: what must run until its last wait is over, cut behind each launch."""

    place: int
    stages: list[list[Node]] = field(default_factory=list)


class _Schedule:
    """Where each node of a graph goes."""

    def __init__(self, graph: Graph, overlap: int):
        self.nodes = list(graph.nodes)
        self.at = {node: number for number, node in enumerate(self.nodes)}
        self.overlap = overlap
        self.gathers: list[_Gather] = []
        self.launches = 0

    def order(self) -> list[Node] | None:
        """All nodes in their new order; None if it would be another program."""
        early = self._early()
        late = self._late()
        moved = {node for group in (*early.values(), *late.values()) for node in group}
        out: list[Node] = []
        for number, node in enumerate(self.nodes):
            out += early.get(number, [])
            if node.op == "output":
                out += late.get(len(self.nodes), [])
            if node not in moved:
                out.append(node)
            out += late.get(number, [])
        return out if self._same_program(out) else None

    def _early(self) -> dict[int, list[Node]]:
        """place in the graph -> gather nodes that run before the node there."""
        last: dict[tuple[str, ...], Node] = {}
        for node in self.nodes:
            if node.target in COLLECTIVES and collective_of(node).transfer == "gather":
                last[collective_of(node).parameters] = node  # a bucket's hops stand in their order
        taken: set[Node] = set()
        for collective in last.values():
            (wait,) = (user for user in collective.users if user.target is WAIT)
            chain = sorted((node for node in _ancestors(wait) if node not in taken), key=self.at.__getitem__)
            taken.update(chain)
            gather = _Gather(self.at[chain[0]], [[]])
            for node in chain:
                gather.stages[-1].append(node)
                if node.target in COLLECTIVES:
                    gather.stages.append([])
            self.gathers.append(gather)
        self.gathers.sort(key=lambda gather: gather.place)
        groups: dict[int, list[tuple[int, int, int, list[Node]]]] = {}
        for number, gather in enumerate(self.gathers):
            final = len(gather.stages) - 1
            for stage, nodes in enumerate(gather.stages):
                slot = number if stage == final else min(number, max(0, number - self.overlap + stage))
                # Launches first; then what waits for an earlier hop and launches the next; what is needed here is waited for last.
                rank = 0 if stage == 0 else 2 if slot == number else 1
                groups.setdefault(self.gathers[slot].place, []).append((rank, number, stage, nodes))
        return {
            place: [node for *_, nodes in sorted(found, key=lambda entry: entry[:3]) for node in nodes]
            for place, found in groups.items()
        }

    def _late(self) -> dict[int, list[Node]]:
        """place in the graph -> what follows from earlier reductions, to run after the node there; the number of nodes: at the end."""
        first: list[Node] = []
        bucket: dict[Node, int] = {}
        stage: dict[Node, int] = {}
        for node in self.nodes:
            before = [arg for arg in node.all_input_nodes if arg in bucket]
            starts = node.target in COLLECTIVES and collective_of(node).transfer != "gather" and not before
            if starts:
                first.append(node)
                bucket[node], stage[node] = len(first) - 1, 0
            elif before and node.op != "output":
                bucket[node] = max(bucket[arg] for arg in before)
                # One more behind each launch: everything up to the next one, and that too, goes to one place.
                stage[node] = max(stage[arg] + (arg.target in COLLECTIVES) for arg in before)
        self.launches = len(first)
        groups: dict[int, list[Node]] = {}
        for node in self.nodes:
            if node in bucket and stage[node]:
                slot = bucket[node] + min(stage[node], self.overlap)
                place = self.at[first[slot]] if slot < len(first) else len(self.nodes)
                groups.setdefault(place, []).append(node)
        return groups

    def _same_program(self, order: list[Node]) -> bool:
        """Every node after what it reads, and all that touch a buffer that is written in their old order."""
        if len(order) != len(self.nodes):
            return False
        new = {node: number for number, node in enumerate(order)}
        sharing: dict[object, list[Node]] = {}
        for node in self.nodes:
            sharing.setdefault(_storage(node), []).append(node)
        if any(new[arg] > new[node] for node in order for arg in node.all_input_nodes):
            return False
        for node in self.nodes:
            for buffer in _written(node):
                users = {user for alias in sharing[_storage(buffer)] for user in alias.users}
                if any((self.at[user] < self.at[node]) != (new[user] < new[node]) for user in users - {node}):
                    return False
        return True


def _ancestors(node: Node) -> set[Node]:
    """The node and all it derives from, inputs left out."""
    found: set[Node] = set()
    queue = [node]
    while queue:
        each = queue.pop()
        if each not in found and each.op != "placeholder":
            found.add(each)
            queue += each.all_input_nodes
    return found


def _written(node: Node) -> list[Node]:
    """The arguments that a node writes to, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    found: list[Node] = []
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [
                each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, Node)
            ]
    return found


def _storage(node: Node) -> object:
    """Equal for nodes whose values share memory."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node
