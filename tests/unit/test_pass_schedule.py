"""schedule: what is launched before what is computed, what is waited for after it, and what never changes."""

from __future__ import annotations

from unittest import mock

import pytest
from support.graphs import Hand, targets, unit
from torch.fx import Node

from zcompile import cost
from zcompile.passes import LOWERED, in_flight, schedule
from zcompile.passes.nodes import COLLECTIVES, WAIT, aten, collective_of
from zcompile.passes.work import weights_at_work
from zcompile.simulator import Noise, Player, Refresh

INT4, INT8 = "int4/256/bf16/nearest", "int8/256/bf16/nearest"
DEPTH = 6
LONG, SHORT = 1e3, 1e-3
"""Products that take much longer than all hops, and much shorter."""


def layers(
    overlap: int,
    *,
    depth: int = DEPTH,
    three: bool = False,
    stage: str = "forward",
    balance: float = 1.0,
    memory: int = 0,
    rows: int = 64,
    tokens: int = 0,
    **formats: str,
) -> Hand:
    """A graph of `depth` products, each with a weight of its own unit; `three`: gathered over three levels; `balance`: what
    all of them take, in times of the busiest level."""
    hand = Hand(stage, plan="zero3" if three else "zero_topo", overlap=overlap)
    hand.context.memory, hand.context.tokens = memory, tokens
    place = {"w": 3, "g": 3, "o": 3} if three else {}
    x = hand.input("x", rows, 64)
    specs, copies = [], []
    for number in range(depth):
        (spec,) = unit({f"w{number}": (64, 64)}, unit=f"u{number}", block=256 if formats else 1, **formats, **place)  # type: ignore[arg-type]
        specs.append(spec)
        copies.append(hand.copy(spec))
    for spec, copy in zip(specs, copies, strict=True):
        x = hand.call(aten.mm.default, x, hand.gather(spec, copy))
    hand.output(x)
    with mock.patch.dict(schedule.BALANCE, {stage: balance}):
        hand.run(*LOWERED)
    return hand


def gradients(
    overlap: int, *, mains: bool = False, balance: float = 1.0, rows: int = 64, memory: int = 0, **formats: str
) -> Hand:
    """A backward: of each weight a product that makes its gradient, which is reduced; summed onto mains, or synced."""
    hand = Hand("backward", overlap=overlap)
    hand.context.memory = memory
    specs = [unit({f"w{n}": (64, 64)}, unit=f"u{n}", block=256 if formats else 1, **formats)[0] for n in range(DEPTH)]
    sums = [hand.input(f"main_{n}", spec.layout.width(spec.g)) for n, spec in enumerate(specs)] if mains else []
    x, y, out = hand.input("x", 64, rows), hand.input("y", rows, 64), []
    for number, spec in enumerate(specs):
        x = hand.call(aten.neg.default, x)
        total = hand.reduce(spec, hand.call(aten.mm.default, x, y))
        if mains:
            total = hand.call(aten.add.Tensor, sums[number], total)
            hand.call(aten.copy_.default, sums[number], total)
        else:
            out.append(hand.sync(spec, total))
    hand.output(x, *out)
    with mock.patch.dict(schedule.BALANCE, {"backward": balance}):
        hand.run(*LOWERED)
    return hand


def story(hand: Hand) -> str:
    """Letters in graph order: m a product, G launches a gather, R a reduction, w waits for a hop; waits for copies are left out."""
    found = []
    for node in hand.gm.graph.nodes:
        if node.target is aten.mm.default:
            found.append("m")
        elif node.target in COLLECTIVES:
            found.append("G" if collective_of(node).transfer == "gather" else "R")
        elif node.target is WAIT and node.args[0].target in COLLECTIVES:
            found.append("w")
    return "".join(found)


def test_off_waits_where_it_launches() -> None:
    assert story(layers(0)) == "Gwm" * DEPTH
    assert story(gradients(0)) == "mRwRwRw" * DEPTH


@pytest.mark.parametrize("overlap", [1, 2])
def test_gathers_are_launched_as_many_buckets_ahead(overlap: int) -> None:
    """In a backward, whose copies are fresh: at each wait so many more are under way."""
    ahead = DEPTH - overlap - 1
    expected = "G" * (overlap + 1) + "wGm" * ahead + "wm" * (overlap + 1)
    assert story(layers(overlap, stage="backward")) == expected


def test_no_gather_is_launched_before_its_copy_is_expected_to_be_fresh() -> None:
    """A forward begins with the refresh, which a small product does not hide: waiting for it early would hold up what is ready."""
    assert story(layers(2, balance=SHORT)) == "Gwm" * DEPTH
    assert "GGG" in story(layers(2, balance=LONG)), "where products are long, the copies are there by the next one"


def test_copies_are_expected_when_the_simulator_has_them() -> None:
    """One clock: the refresh is ordered by the hops that it has, not by the size of a copy."""
    for formats in ({}, {"gather": INT8, "refresh": "int4-delta/256/bf16/nearest"}):
        hand = layers(2, **formats)
        made = schedule._Schedule(hand.gm.graph, hand.context)
        player = Player(hand.context.plan.topology, Noise())
        waits = [node for node in targets(hand.gm, WAIT) if node in made.fresh]
        specs = [unit({f"w{n}": (64, 64)}, block=256 if formats else 1, **formats)[0] for n in range(DEPTH)]  # type: ignore[arg-type]
        player.refresh([Refresh((s.name,), tuple((*hop, "") for hop in cost.refresh_hops([s]))) for s in specs])
        assert len(cost.refresh_hops(specs)) == 2, "node and cluster"
        assert [made.fresh[node] for node in waits] == list(player.arrivals.values()) and len(waits) == DEPTH


def test_the_hops_of_a_bucket_go_over_different_levels_at_once() -> None:
    hand = layers(2, three=True, balance=LONG)
    hops = [(collective_of(node).level, collective_of(node).parameters[0]) for node in targets(hand.gm, *COLLECTIVES)]
    for number in range(DEPTH):
        assert [level for level, name in hops if name == f"w{number}"] == ["cluster", "node", "pair"]
    assert {name for _, name in hops[:3]} == {"w0", "w1", "w2"}, "while the first is waited for, three are under way"
    assert {level for level, _ in hops[3:6]} > {"node"}, "the next hop of one beside the first of another"


def test_reductions_are_waited_for_when_they_are_expected() -> None:
    slow, fast = story(gradients(64, balance=SHORT)), story(gradients(64, balance=LONG))
    assert slow.startswith("mR" * DEPTH + "w"), "hops longer than all products: none is waited for before the end"
    assert fast.startswith("mRmRwRmRwRwRmRwRwRwm"), (
        "longer than a hop: at the next product each hop that is out is over"
    )


@pytest.mark.parametrize("overlap", [1, 3])
def test_where_too_many_are_in_flight_the_first_to_arrive_is_waited_for(overlap: int) -> None:
    found, flying = story(gradients(overlap, balance=SHORT)), 0
    for letter in found:
        flying += {"R": 1, "w": -1}.get(letter, 0)
        assert flying <= overlap + 1
    assert found.startswith("mR" * (overlap + 1) + "mw"), "and no sooner"


@pytest.mark.parametrize("buckets", [1, 2, 3])
def test_memory_bounds_what_is_in_flight_in_bytes(buckets: int) -> None:
    weight = 64 * 64 * 4
    alone = max(amount for _, amount in in_flight.held_bytes(layers(0, three=True).gm))
    assert alone == weight * 3 // 2, "over the last level it sends half of the weight, and receives it whole"
    assert max(amount for _, amount in in_flight.held_bytes(layers(0).gm)) == weight, "a copy is there anyway"
    sums = max(amount for _, amount in in_flight.held_bytes(gradients(0).gm))
    assert sums == 2 * weight, "a reduction keeps what it sends until it has arrived"
    for make, one in (
        (lambda memory: layers(4, three=True, balance=LONG, memory=memory), alone),
        (lambda memory: gradients(4, balance=SHORT, memory=memory), sums),
    ):
        for memory in (one * buckets, one * (buckets + 1) - 1):
            assert max(in_flight.held_bytes(make(memory).gm)) == (buckets, one * buckets)
        assert max(in_flight.held_bytes(make(0).gm))[0] > 3, "no bound"


def test_a_bucket_alone_is_always_allowed() -> None:
    assert story(layers(4, stage="backward", memory=1)).startswith("GwGm"), "one is always allowed"


def test_the_contract_sees_too_many_bytes_in_flight() -> None:
    for hand in (layers(2, three=True, balance=LONG), gradients(2, balance=SHORT)):
        schedule.check(hand.gm, hand.context)
        hand.context.memory = 2 * 64 * 64 * 4
        with pytest.raises(AssertionError, match=r"\d+ bytes in flight at once; with memory 32768"):
            schedule.check(hand.gm, hand.context)


def test_the_schedule_is_a_function_of_the_graph() -> None:
    assert story(gradients(3)) == story(gradients(3)) and story(layers(3, balance=1.0)) == story(layers(3, balance=1.0))


@pytest.mark.parametrize("overlap", [1, 2])
def test_ranks_with_batches_of_other_shapes_run_one_order(overlap: int) -> None:
    """Times that follow from shapes would order hops by them: a rank with a smaller last batch would wait for another hop than the rest."""
    assert len({story(layers(overlap, three=True, rows=rows)) for rows in (1, 7, 64, 4096)}) == 1
    assert len({story(gradients(overlap, rows=rows)) for rows in (1, 7, 64, 4096)}) == 1
    assert (
        layers(overlap, rows=1).context.expected["seconds"] < layers(overlap, rows=1 << 20).context.expected["seconds"]
    )


def test_tokens_say_how_long_products_take() -> None:
    """A hint, equal on all ranks, in the place of a balance: few tokens are a device too fast for its network, many the contrary."""
    few, many = (story(layers(2, tokens=tokens)) for tokens in (1, 1 << 30))
    assert few == story(layers(2, balance=SHORT)) != many == story(layers(2, balance=LONG))
    assert len({story(layers(2, tokens=64, rows=rows)) for rows in (1, 64, 4096)}) == 1, "shapes have no say"


def test_the_work_of_a_graph_is_that_of_its_weights() -> None:
    for rows in (3, 64):
        found = weights_at_work(layers(0, rows=rows).gm.graph.nodes)
        assert {node.target for node in found} == {aten.mm.default} and list(found.values()) == [64 * 64] * DEPTH
        found = weights_at_work(gradients(0, rows=rows, reduce=INT4).gm.graph.nodes)
        assert {node.target for node in found} == {aten.mm.default} and list(found.values()) == [64 * 64] * DEPTH


def test_more_buckets_than_there_are_is_all_of_them() -> None:
    assert story(layers(64, stage="backward")) == "G" * DEPTH + "wm" * DEPTH


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_invariant_7_what_is_in_flight_does_not_grow_with_depth(depth: int) -> None:
    assert max(in_flight.hops(layers(2, depth=depth, three=True).gm)) == 3


def test_the_contract_sees_too_much_in_flight() -> None:
    hand = layers(2, three=True)
    hand.context.overlap = 0
    schedule.check(hand.gm, hand.context)  # off: nothing to hold
    hand = layers(5, stage="backward")
    assert "GGGGG" in story(hand)
    hand.context.overlap = 1
    with pytest.raises(AssertionError, match="6 hops in flight at once; with overlap 1: at most 4"):
        schedule.check(hand.gm, hand.context)


@pytest.mark.parametrize("formats", [{}, {"gather": INT8, "reduce": INT4, "sync": INT4}], ids=["native", "quantised"])
@pytest.mark.parametrize("mains", [False, True])
def test_the_same_nodes_read_the_same_values(formats: dict[str, str], mains: bool) -> None:
    plain, moved = gradients(0, mains=mains, **formats), gradients(2, mains=mains, **formats)

    def program(hand: Hand) -> set[str]:
        return {text(node) for node in hand.gm.graph.nodes}

    assert program(plain) == program(moved) and story(plain) != story(moved)


def text(node: Node) -> str:
    """The node as an expression of inputs: names may differ, this may not."""
    if node.op == "placeholder":
        return str(node.target)
    parts = ", ".join(text(arg) for arg in node.all_input_nodes)
    return f"{node.target}({parts})" if len(parts) < 2000 else f"{node.target}({hash(parts)})"


def test_sums_go_into_their_mains_in_order_and_late() -> None:
    hand = gradients(2, mains=True, reduce=INT4)
    writes = [
        node for node in hand.gm.graph.nodes if getattr(node.target, "_schema", None) and node.target._schema.is_mutable
    ]
    assert len(writes) == DEPTH
    products = [node for node in hand.gm.graph.nodes if node.target is aten.mm.default]
    order = {node: number for number, node in enumerate(hand.gm.graph.nodes)}
    assert order[writes[0]] > order[products[2]], "the first sum is waited for two products later"


def test_a_buffer_that_is_read_after_it_was_written_keeps_its_place() -> None:
    """A main grad that the graph itself reads again: moving its sum behind that would be another program."""
    hand, plain = main_read_again(1), main_read_again(0)
    assert any("whose order must stay" in note for note in hand.context.notes["schedule"])
    assert [node.format_node() for node in hand.gm.graph.nodes] == [node.format_node() for node in plain.gm.graph.nodes]
    assert story(hand).startswith("Rw")


def main_read_again(overlap: int) -> Hand:
    hand = Hand("backward", overlap=overlap)
    specs = [unit({f"w{n}": (64, 64)}, unit=f"u{n}")[0] for n in range(2)]
    x = hand.input("x", 64, 64)
    main = hand.input("main", specs[0].layout.width(specs[0].g))
    total = hand.call(aten.add.Tensor, main, hand.reduce(specs[0], x))
    hand.call(aten.copy_.default, main, total)
    seen = hand.call(aten.neg.default, main)
    hand.output(seen, hand.sync(specs[1], hand.reduce(specs[1], hand.call(aten.mm.default, x, x))))
    hand.run(*LOWERED)
    return hand
