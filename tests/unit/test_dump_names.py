"""What nodes are called, and how a graph is folded by module."""

from __future__ import annotations

import pytest
from support.graphs import Hand, unit

from zcompile.debug import modules, record, text
from zcompile.debug.names import Names, path, printable
from zcompile.passes import LOWERED
from zcompile.passes.nodes import aten


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("L['self'].blocks.0.up", "blocks.0.up"),
        ("L['model']._modules['blocks']._modules['0']._modules['up']", "blocks.0.up"),
        ("L['self'].blocks[3]", "blocks.3"),
        ("L['self'].block@1", "block"),
        ("L['args'][0]", "args.0"),
        ("L['kwargs']['mask']", "kwargs.mask"),
        ("L['model']._buffers['cos']", "cos"),
        ("L['self']", ""),
    ],
)
def test_paths_are_a_users(written: str, shown: str) -> None:
    assert path(written) == shown


def test_a_name_is_one_line_whatever_it_is() -> None:
    assert printable("a\nb\x00\u2028\udcff\u4e2d") == "a\\nb\\x00\\u2028\\udcff\u4e2d"


def two_layers(extra: bool = False) -> Hand:
    hand = Hand("forward")
    a, b = unit({"one_w": (8, 8)}, unit="u0")[0], unit({"two_w": (8, 8)}, unit="u1")[0]
    x = hand.input("x", 8, 8)
    for module, spec in (("one", a), ("two", b)):
        whole = hand.gather(spec, hand.copy(spec))
        nodes = [whole]
        if extra and module == "one":
            x = hand.call(aten.relu.default, x)
            nodes.append(x)
        x = hand.call(aten.mm.default, x, whole)
        nodes.append(x)
        for node in nodes:
            node.meta["nn_module_stack"] = {"k": (f"L['self'].{module}", object)}
    hand.output(x)
    return hand


def names_of(hand: Hand) -> list[str]:
    names = Names()
    names.update(hand.gm)
    return [names(node) for node in hand.gm.graph.nodes]


def test_a_node_more_in_one_module_renames_nothing_in_another() -> None:
    before, after = names_of(two_layers()), names_of(two_layers(extra=True))
    assert [name for name in after if name not in before] == ["one.relu"]
    assert [name for name in before if name not in after] == []
    assert {"one.gather", "one.mm", "two.gather", "two.mm"} <= set(before)


def test_names_stay_through_passes_and_new_nodes_count_on() -> None:
    hand, names = two_layers(), Names()
    names.update(hand.gm)
    kept = {node: names(node) for node in hand.gm.graph.nodes if node.target is aten.mm.default}
    hand.run(*LOWERED)
    names.update(hand.gm)
    assert [names(node) for node in kept] == list(kept.values()) == ["one.mm", "two.mm"]
    shown = [names(node) for node in hand.gm.graph.nodes]
    assert len(shown) == len(set(shown))
    assert "one.gather_pair" in shown and "two.gather_pair_wait" in shown


def test_the_halves_call_nodes_as_their_joint_graph_did() -> None:
    joint = two_layers()
    first = Names()
    first.update(joint.gm)
    half, second = two_layers(), Names(first.export())
    second.update(half.gm)
    assert [second(node) for node in half.gm.graph.nodes] == [first(node) for node in joint.gm.graph.nodes]
    other = Names(
        {node.name: ("another operation", "wrong") for node in half.gm.graph.nodes if node.op != "placeholder"}
    )
    other.update(half.gm)
    assert "wrong" not in {other(node) for node in half.gm.graph.nodes}, (
        "a name that stands for another operation there"
    )


def test_a_graph_is_folded_by_module_each_child_behind_what_it_reads() -> None:
    hand, names = two_layers(), Names()
    hand.run(*LOWERED)
    names.update(hand.gm)
    rows = record.rows(hand.gm, names, text.describe_inputs(hand.gm), "forward")
    tree = modules.tree(rows)
    number = {module["path"]: i for i, module in enumerate(tree)}
    assert set(number) == {"", "inputs", "one", "two"} and tree[0]["rows"] == len(rows)
    layers = [
        [("module", -item) if item < 0 else ("row", rows[item].kind) for item in layer] for layer in tree[0]["layers"]
    ]
    assert layers == [
        [("module", number["inputs"])],
        [("module", number["one"])],
        [("module", number["two"])],
        [("row", "output")],
    ]
    inside = [rows[item] for layer in tree[number["one"]]["layers"] for item in layer]
    launch = next(row for row in inside if row.kind == "gather")
    assert rows[launch.partner].kind == "wait" and [rows[user].operation for user in launch.users] == ["mm"]


def test_a_module_that_is_called_twice_is_drawn_once() -> None:
    """Two children that read from one another in turn follow one another."""
    hand = Hand("forward")
    x = hand.input("x", 8, 8)
    for module in ("a", "b", "a"):
        x = hand.call(aten.relu.default, x)
        x.meta["nn_module_stack"] = {"k": (f"L['self'].{module}", object)}
    hand.output(x)
    names = Names()
    names.update(hand.gm)
    tree = modules.tree(record.rows(hand.gm, names, {}, "forward"))
    assert [module["path"] for module in tree] == ["", "inputs", "a", "b"]
    assert tree[0]["layers"] == [[-1], [-2], [-3], [4]] and tree[2]["rows"] == 2
