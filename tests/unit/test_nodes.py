"""What passes share: reorder, derived, the identity of a collective."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import Hand
from torch.fx import Graph

from zcompile.passes.nodes import Collective, add_of, aten, derived, reorder


def test_members_of_a_group_stand_at_the_place_of_the_last_and_their_users_follow() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.sin, (x,))
    user = graph.call_function(torch.cos, (a,))
    other = graph.call_function(torch.tan, (x,))
    b = graph.call_function(torch.exp, (other,))
    graph.output((user, b))
    reorder(graph, [[b, a]])
    assert [node for node in graph.nodes if node.op == "call_function"] == [other, b, a, user]
    graph.lint()


def test_a_group_whose_members_depend_on_each_other_is_refused() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.sin, (x,))
    b = graph.call_function(torch.cos, (a,))
    graph.output(b)
    with pytest.raises(RuntimeError, match="depends on another one"):
        reorder(graph, [[a, b]])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_graph_keeps_its_nodes_a_right_order_and_the_order_of_all_that_need_not_move(data: st.DataObject) -> None:
    """Groups of nodes that are equally deep, so that no member can depend on another."""
    graph = Graph()
    depth = {graph.placeholder("x"): 0}
    for _ in range(data.draw(st.integers(1, 12))):
        known = list(depth)
        inputs = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2))
        depth[graph.call_function(torch.sin, tuple(inputs))] = 1 + max(depth[n] for n in inputs)
    graph.output(tuple(depth))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    level = data.draw(st.integers(1, max(depth.values())))
    group = [n for n in data.draw(st.permutations(calls)) if depth[n] == level]
    before = list(graph.nodes)
    reorder(graph, [group])
    after = list(graph.nodes)
    graph.lint()
    assert sorted(after, key=id) == sorted(before, key=id)
    at = after.index(group[0])
    assert after[at : at + len(group)] == group
    moved = derived_through_anything(group)
    assert [n for n in after if n not in moved] == [n for n in before if n not in moved]


def derived_through_anything(nodes: list[torch.fx.Node]) -> set[torch.fx.Node]:
    found = set(nodes)
    queue = list(nodes)
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return found


def test_derived_goes_through_views_and_casts_and_stops_at_arithmetic() -> None:
    hand = Hand("forward")
    x = hand.input("x", 4, 4)
    turned = hand.call(aten.t.default, x)
    cast = hand.call(aten._to_copy.default, turned, dtype=torch.bfloat16)
    product = hand.call(aten.mm.default, cast, cast)
    hand.output(product)
    assert derived([x]) == {x, turned, cast}


def test_add_of_gives_the_other_operand_and_refuses_scaled_sums() -> None:
    hand = Hand("forward")
    x, y = hand.input("x", 4), hand.input("y", 4)
    plain = hand.call(aten.add.Tensor, x, y)
    scaled = hand.call(aten.add.Tensor, x, y, alpha=2)
    constant = hand.call(aten.add.Tensor, x, 1.0)
    hand.output(plain, scaled, constant)
    other = add_of(plain)
    assert other is not None and other(x) is y and other(y) is x
    assert add_of(scaled) is None and add_of(constant) is None


def test_every_field_of_a_collective_is_part_of_its_identity() -> None:
    """Ranks that gather other parameters of equal size would take one weight for the other."""
    one = Collective("pair", "gather", "all_gather", "float32", 64, ("a",))
    other = {
        "level": "node",
        "transfer": "back",
        "op": "all_to_all",
        "dtype": "bfloat16",
        "bytes": 32,
        "parameters": ("b",),
        "wire": "int8/256",
    }
    assert set(other) == {field.name for field in dataclasses.fields(Collective) if field.compare}
    for field, value in other.items():
        assert dataclasses.replace(one, **{field: value}).identity != one.identity, field
