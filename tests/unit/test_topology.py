"""Levels, coordinates, names and texts of a topology, and what is refused (F17)."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcompile.machines import LADDER
from zcompile.topology import Device, Level, Topology


def make(*sizes: int, names: tuple[str, ...] | None = None, order: tuple[int, ...] | None = None) -> Topology:
    names = names or tuple(f"l{i}" for i in range(len(sizes)))
    return Topology(tuple(Level(n, s, 1e9, 1e-6) for n, s in zip(names, sizes, strict=True)), order=order)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = draw(st.none() | st.permutations(range(math.prod(sizes))).map(tuple))
    return make(*sizes, order=order)


@given(topologies())
def test_coordinates_and_rank_at_are_inverse(topology: Topology) -> None:
    seen = set()
    for rank in range(topology.world_size):
        coordinates = topology.coordinates(rank)
        seen.add(coordinates)
        assert topology.rank_at(coordinates) == rank
        position = sum(c * e for c, e in zip(coordinates, topology.extents, strict=False))
        assert (topology.order or range(topology.world_size))[position] == rank
    assert seen == set(itertools.product(*map(range, topology.sizes)))


@given(topologies())
def test_groups_of_a_level_partition_the_ranks_in_coordinate_order(topology: Topology) -> None:
    for level in range(1, len(topology.levels) + 1):
        groups = {tuple(topology.group(rank, level)) for rank in range(topology.world_size)}
        assert sorted(itertools.chain(*groups)) == list(range(topology.world_size))
        for group in groups:
            coordinates = [topology.coordinates(rank) for rank in group]
            assert [c[level - 1] for c in coordinates] == list(range(topology.sizes[level - 1]))
            assert len({(*c[: level - 1], *c[level:]) for c in coordinates}) == 1


@given(topologies())
def test_mesh_is_indexed_by_coordinates_fastest_first(topology: Topology) -> None:
    for rank in range(topology.world_size):
        node = topology.mesh()
        for c in topology.coordinates(rank):
            node = node[c]
        assert node == rank


def test_eight_ranks_as_the_design_draws_them() -> None:
    topology = Topology.parse("2x2x2")
    assert topology.names == ("pair", "node", "cluster")
    assert topology.extents == (1, 2, 4, 8)
    assert [topology.coordinates(r) for r in (1, 2, 4, 7)] == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    assert [topology.group(5, k) for k in (1, 2, 3)] == [[4, 5], [5, 7], [1, 5]]
    assert topology.mesh() == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]


def test_f17_levels_of_size_one_stay_and_hold_one_rank_groups() -> None:
    ones = Topology.parse("1x1x1", world_size=1)
    assert ones.sizes == (1, 1, 1) and ones.world_size == 1 and ones.extents == (1, 1, 1, 1) and ones.world == 3
    assert [ones.group(0, k) for k in (1, 2, 3)] == [[0]] * 3 and ones.mesh() == [[[0]]]
    one_node = Topology.parse("frontier", world_size=8)
    assert one_node.sizes == (2, 4, 1) and one_node.names == ("pair", "node", "cluster")
    assert one_node.group(3, 3) == [3]


@pytest.mark.parametrize(
    ("text", "n", "said"),
    [
        ("2x2x2", 12, "fits 12 ranks: 2x2x3"),
        ("2x2x2", 10, "valid world sizes: 8, 12, 16, ..."),
        ("2x2x2", 2, "valid world sizes: 4, 8, 12, ..."),
        ("8", 6, "fits 6 ranks: 6"),
        ("frontier", 12, "do not fill nodes of 8; valid world sizes: 8, 16, 24"),
        ("frontier:2", 24, "fits 24 ranks: 2x4x3"),
        ("dgx-h100", 4, "valid world sizes: 8, 16, 24"),
        ("frontier", None, "as in frontier:2"),
    ],
)
def test_f17_a_world_that_does_not_fit_lists_sizes_that_do(text: str, n: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")) as error:
        Topology.parse(text, world_size=n)
    assert n is None or str(n) in str(error.value)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 300))
def test_f17_what_an_error_offers_is_accepted(a: int, b: int, c: int, n: int) -> None:
    topology = make(a, b, c)
    try:
        topology.check_world(n)
        assert n == a * b * c
    except ValueError as error:
        assert n != a * b * c
        if "fits" in str(error):
            make(*map(int, str(error).rsplit(": ", 1)[1].split("x"))).check_world(n)
        else:
            offered = [int(size) for size in str(error).rsplit(": ", 1)[1].removesuffix(", ...").split(", ")]
            assert n % (a * b) and all(size % (a * b) == 0 for size in offered)


def test_known_machines() -> None:
    frontier = Topology.parse("frontier:48")
    assert (frontier.key, frontier.names, frontier.world_size) == ("2x4x48", ("pair", "node", "cluster"), 384)
    assert frontier.device.flops("bfloat16") == 191.5e12 and frontier.device.memory == 64e9
    assert [round(level.bandwidth / 1e9, 1) for level in frontier.levels] == [148, 38, 11.9]
    assert Topology.parse("lumi:48") == frontier == Topology.parse("frontier", world_size=384)
    for text in ("mi300x:3", "dgx-h100:3"):
        topology = Topology.parse(text, world_size=24)
        assert topology.names == ("node", "cluster") and topology.sizes == (8, 3)
        assert topology.levels[0].bandwidth > topology.levels[1].bandwidth
    assert frontier.device.flops("float32") < frontier.device.flops("bfloat16")
    with pytest.raises(ValueError, match=r"MI250X GCD.*'float8'.*bfloat16, float16, float32"):
        frontier.device.flops("float8")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8", ("cluster",)),
        ("4x2", ("node", "cluster")),
        ("2x2x2", ("pair", "node", "cluster")),
        ("2x4x128x3", ("pair", "node", "group", "system")),
    ],
)
def test_sizes_as_text_are_named_by_their_number_and_slow_down(text: str, names: tuple[str, ...]) -> None:
    topology = Topology.parse(text)
    assert topology.names == names and topology.key == text and Topology.parse(topology) is topology
    rates = [level.bandwidth for level in topology.levels]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "frontear:2",
            "unknown topology 'frontear:2'.*frontier, lumi, mi300x, dgx-h100, dgx-h200, dgx-2, or its .json file",
        ),
        ("2x", "unknown topology '2x'"),
        ("2x0", "size 0"),
        ("2x2x2x2x2", "1 to 4"),
        ("", "unknown topology ''"),
        ("frontier:", "'' is no number of nodes"),
        ("frontier:0", "'0' is no number of nodes"),
        (8, "topology 8: valid"),
    ],
)
def test_texts_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Topology.parse(text)


def test_names_resolve_to_the_next_slower_level_that_exists() -> None:
    two = Topology.parse("4x2")
    assert [two.index(n) for n in ("whole", "pair", "node", "group", "cluster", "system", "world")] == [
        0,
        1,
        1,
        2,
        2,
        2,
        2,
    ]
    four = Topology.parse("2x4x128x3")
    assert [four.index(n) for n in ("pair", "group", "cluster", "system", "world")] == [1, 3, 4, 4, 4]
    assert [Topology.parse("8").index(n) for n in ("pair", "cluster", "world")] == [1, 1, 1]
    custom = make(2, 3, names=("board", "rack"))
    assert [custom.index(n) for n in ("board", "rack", "node", "world")] == [1, 2, 2, 2]
    with pytest.raises(ValueError, match=r"unknown level 'nod'.*whole, node, cluster, pair.*world"):
        two.index("nod")
    with pytest.raises(ValueError, match="unknown level 'rack'"):
        two.index("rack")


def test_a_site_lies_outside_the_world_and_is_never_a_substitute() -> None:
    topology = make(4, 2, 3, names=("node", "cluster", "site"))
    assert (topology.world, topology.world_size, topology.extents[topology.world]) == (2, 24, 8)
    assert topology.index("system") == 2 and topology.index("site") == 3


@given(st.sets(st.sampled_from(LADDER[:-1]), min_size=1))
def test_resolving_names_keeps_the_ladder_order(names: set[str]) -> None:
    ordered = tuple(sorted(names, key=LADDER.index))
    topology = make(*[2] * len(ordered), names=ordered)
    indices = [topology.index(name) for name in ("whole", *LADDER[:-1], "world")]
    assert indices == sorted(indices)
    assert all(topology.index(name) == ordered.index(name) + 1 for name in ordered)


def test_key_tells_apart_what_needs_different_groups() -> None:
    plain = Topology.parse("2x2x2")
    assert plain.key == "2x2x2"
    identity = make(2, 2, 2, names=plain.names, order=tuple(range(8)))
    assert identity.order is None and identity.key == plain.key
    keys = {plain.key, make(2, 2, 2).key, make(2, 2, 2, names=plain.names, order=(1, 0, *range(2, 8))).key}
    keys.add(make(2, 2, 2, names=plain.names, order=(0, 2, 1, *range(3, 8))).key)
    assert len(keys) == 4
    assert all(key.isascii() and "." not in key and " " not in key for key in keys)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Level("node", 0, 1e9, 0), "size 0"),
        (lambda: Level("node", True, 1e9, 0), "size True"),
        (lambda: Level("node", 2, 0, 0), "bandwidth 0"),
        (lambda: Level("node", 2, math.nan, 0), "bandwidth nan"),
        (lambda: Level("node", 2, 1e9, -1.0), "latency -1.0"),
        (lambda: Level("world", 2, 1e9, 0), "'world' is reserved for a placement"),
        (lambda: Level("a b", 2, 1e9, 0), "must be an identifier"),
        (lambda: Device("d", (("bfloat16", 0),), 1, 1), "peak_flops of bfloat16 is 0"),
        (lambda: Device("d", (), 0, 1), "memory is 0"),
        (lambda: Device("d", (("f", 1), ("f", 2)), 1, 1), "twice"),
        (lambda: Topology(()), "at least one level"),
        (lambda: make(2, names=("site",)), "besides `site`"),
        (lambda: make(2, 2, names=("node", "node")), "unique"),
        (lambda: make(2, 2, names=("cluster", "node")), "fastest first"),
        (lambda: make(2, 2, names=("site", "rack")), "`site` must be the last"),
        (lambda: make(2, 2, order=(0, 1, 2)), "3 entries"),
        (lambda: make(2, 2, order=(0, 1, 2, 2)), "each rank 0..3"),
        (lambda: make(2, 2).coordinates(4), "rank 4.*0..3"),
        (lambda: make(2, 2).coordinates(-1), "rank -1"),
        (lambda: make(2, 2).rank_at((0, 2)), "coordinate 2 of level 'l1'"),
        (lambda: make(2, 2).rank_at((0,)), "levels l0, l1"),
        (lambda: make(2, 2).group(0, 0), "level index 0"),
        (lambda: make(2, 2).group(0, 3), "level index 3"),
    ],
)
def test_everything_is_validated_when_made(build, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        build()


def test_a_topology_is_hashable_and_compares_by_value() -> None:
    order = list(range(16))
    random.Random(0).shuffle(order)
    a, b = (make(4, 4, order=tuple(order)) for _ in range(2))
    assert a == b and len({a, b}) == 1 and a != make(4, 4)
    a.coordinates(3)  # filling a's caches changes neither
    assert a == b and hash(a) == hash(b)
