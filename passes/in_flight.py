"""What is under way at each launch of a scheduled graph, hops and their bytes: what the pass `schedule` promises is read off it."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from zcompile.passes.nodes import COLLECTIVES, WAIT, collective_of, find
from zcompile.times import value_bytes


def hops(gm: GraphModule) -> list[int]:
    """After each collective's launch: how many have been launched and not been waited for."""
    found, open_ = [], 0
    for node in find(gm.graph, *COLLECTIVES, WAIT):
        if node.target in COLLECTIVES:
            open_ += 1
            found.append(open_)
        elif node.args[0].target in COLLECTIVES:  # type: ignore[union-attr, operator]
            open_ -= 1
    return found


def held_bytes(gm: GraphModule) -> list[tuple[int, int]]:
    """At each collective's launch: buckets of its direction (gathers, reductions) between their first launch and their last wait, and
    the bytes that these hold.
    """
    size: dict[tuple[bool, tuple[str, ...]], int] = {}
    last: dict[tuple[bool, tuple[str, ...]], Node] = {}
    nodes = find(gm.graph, *COLLECTIVES, WAIT)
    for node in nodes:
        if node.target in COLLECTIVES:
            key = _bucket(node)
            size[key] = max(size.get(key, 0), held(node, copy=key[0] and key not in size))
            last[key] = next(user for user in node.users if user.target is WAIT)
    found, open_ = [], set()
    for node in nodes:
        if node.target in COLLECTIVES:
            key = _bucket(node)
            open_.add(key)
            beside = [size[each] for each in open_ if each[0] == key[0]]
            found.append((len(beside), sum(beside)))
        else:
            open_ -= {key for key, wait in last.items() if wait is node}
    return found


def _bucket(launch: Node) -> tuple[bool, tuple[str, ...]]:
    """Whether it is gathered, and its parameters."""
    entry = collective_of(launch)
    return entry.transfer == "gather", entry.parameters


def held(launch: Node, *, copy: bool = False) -> int:
    """Bytes that a hop under way keeps: what it receives and, unless that is a copy of weights, which is there anyway, what it sends."""
    sent = 0 if copy else sum(value_bytes(node.meta.get("val")) for node in launch.all_input_nodes)
    return sent + value_bytes(launch.meta.get("val"))
