"""The simulator: small graphs whose times can be worked out by hand, and the schedule's own expectations."""

from __future__ import annotations

import itertools

import pytest
from support.graphs import Hand, unit

from zcompile import cost
from zcompile.machines import Device, Level
from zcompile.passes import LOWERED
from zcompile.passes.nodes import aten
from zcompile.plan import Plan
from zcompile.simulator import Noise, Player, Refresh, play
from zcompile.timeline import OWNERS, REASONS, Timeline
from zcompile.topology import Topology

PRODUCT = 64 * 64 * 64 * 2
"""FLOPs of a product: with the device below, seconds."""
DEVICE = Device("one FLOP a second", (("float32", 2.0),), memory=1e9, memory_bandwidth=1e18)
HALF = 64 * 64 * 4 // 2
"""Bytes that one rank receives of a weight over the pair, or of a gradient."""


def machine(pair: float = 1.0, node: float = 1.0, cluster: float = 1.0, **more: object) -> Topology:
    """2x2x2; a hop over the pair takes `pair` products (of PRODUCT seconds), over the node a quarter weight takes `node`, and so on."""
    rates = {"pair": HALF / pair, "node": HALF / 2 / node, "cluster": HALF / 4 / cluster}
    return Topology(tuple(Level(name, 2, rate / PRODUCT, 0.0, **more) for name, rate in rates.items()), DEVICE)  # type: ignore[arg-type]


def hand(stage: str, topology: Topology, overlap: int, plan: str = "zero_topo") -> Hand:
    made = Hand(stage, plan=plan, overlap=overlap)
    made.context.plan = Plan.preset(plan).resolve(topology, "float32")
    return made


def products(depth: int, topology: Topology, overlap: int, stage: str = "backward") -> Hand:
    """A chain of products, each with a weight that is gathered over the pair."""
    made = hand(stage, topology, overlap)
    specs = [unit({f"w{n}": (64, 64)}, unit=f"u{n}")[0] for n in range(depth)]
    copies = [made.copy(spec) for spec in specs]
    x = made.input("x", 64, 64)
    for spec, copy in zip(specs, copies, strict=True):
        x = made.call(aten.mm.default, x, made.gather(spec, copy))
    made.output(x)
    made.run(*LOWERED)
    return made


def gradients(depth: int, topology: Topology, overlap: int) -> Hand:
    made = hand("backward", topology, overlap)
    x, out = made.input("x", 64, 64), []
    for n in range(depth):
        (spec,) = unit({f"w{n}": (64, 64)}, unit=f"u{n}")
        x = made.call(aten.mm.default, x, x)
        out.append(made.sync(spec, made.reduce(spec, x)))
    made.output(x, *out)
    made.run(*LOWERED)
    return made


def played(made: Hand, **noise: float) -> Timeline:
    return play(made.gm.graph, made.context.stage, made.context.plan.topology, Noise(**noise))  # type: ignore[arg-type]


def test_without_overlap_every_hop_is_exposed() -> None:
    found = played(products(3, machine(pair=2.0), 0))
    assert found.seconds == pytest.approx((3 + 3 * 2) * PRODUCT)
    assert found.exposed == pytest.approx(6 * PRODUCT) and found.exposed_by("level") == {
        "pair": pytest.approx(6 * PRODUCT)
    }
    assert found.busy("compute") == pytest.approx(3 * PRODUCT) and found.busy("pair") == pytest.approx(6 * PRODUCT)
    assert [hop.reason for hop in found.hops] == ["nothing to hide behind", "budget", "budget"]


def test_a_hop_that_is_shorter_than_a_product_is_hidden_behind_it() -> None:
    found = played(products(4, machine(pair=0.5), 1))
    assert found.seconds == pytest.approx((4 + 0.5) * PRODUCT), "only the first is waited for"
    assert [hop.exposed > 0 for hop in found.hops] == [True, False, False, False]
    assert found.hops[1].hidden == pytest.approx(PRODUCT), "launched beside the first, which it waits for"
    assert found.hops[2].hidden == pytest.approx(PRODUCT), "queued behind it, then under way: half a product each"


@pytest.mark.parametrize(("burst", "saved"), [(0.0, 0.0), (0.5, 1.0), (1.0, 2.0), (5.0, 2.0)])
def test_links_with_a_burst_make_up_for_the_products_between_hops(burst: float, saved: float) -> None:
    """Each hop takes two products, and waits for the product before it: what its links save up meanwhile is a burst, at most a product.
    burst: in products, what it takes at the bandwidth."""
    found = played(products(3, machine(pair=2.0, burst=burst * HALF / 2.0), 0))
    assert found.seconds == pytest.approx((3 + 3 * 2 - saved) * PRODUCT)
    assert found.exposed == pytest.approx((3 * 2 - saved) * PRODUCT)


def test_a_lane_carries_one_hop_after_another() -> None:
    found = played(products(3, machine(pair=3.0), 3))
    assert found.seconds == pytest.approx((9 + 1) * PRODUCT), "three hops of three, and the last product"
    assert [(hop.begin, hop.end) for hop in found.hops] == [
        (pytest.approx(3 * n * PRODUCT), pytest.approx(3 * (n + 1) * PRODUCT)) for n in range(3)
    ]
    assert [hop.reason for hop in found.hops] == ["nothing to hide behind", "lane busy", "lane busy"]
    assert found.hops[2].cause == "gather w1"


def test_the_tail_of_a_backward_has_nothing_to_hide_behind() -> None:
    found = played(gradients(1, machine(pair=1.0, node=1.0, cluster=1.0), 2))
    assert found.seconds == pytest.approx(4 * PRODUCT, rel=1e-6)
    assert [(hop.level, hop.transfer) for hop in found.hops] == [
        ("pair", "reduce"),
        ("node", "reduce"),
        ("cluster", "sync"),
    ]
    assert {hop.reason for hop in found.hops} == {"nothing to hide behind"}


@pytest.mark.parametrize("overlap", [1, 2, 4])
@pytest.mark.parametrize("pair", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("burst", [0.0, HALF / 4])
def test_the_simulator_and_the_schedule_have_one_clock(overlap: int, pair: float, burst: float) -> None:
    topology = machine(pair, 0.7, 2.0, burst=burst)
    for made in (products(5, topology, overlap), gradients(5, topology, overlap)):
        found, expected = played(made), made.context.expected
        assert found.spans[-1].end == pytest.approx(expected.pop("seconds"), rel=1e-12)
        levels = {f"exposed {level}": pytest.approx(s, rel=1e-9) for level, s in found.exposed_by("level").items()}
        assert expected == levels


def test_spans_of_a_lane_do_not_overlap_and_hops_tell_what_they_carry() -> None:
    found = played(gradients(5, machine(0.8, 0.6, 1.5), 3))
    for lane in found.lanes:
        spans = found.lane(lane)
        assert all(a.end <= b.begin + 1e-9 for a, b in itertools.pairwise(spans)), lane
    names = {node.name for node in gradients(5, machine(0.8, 0.6, 1.5), 3).gm.graph.nodes}
    assert {hop.node for hop in found.hops} | {hop.wait for hop in found.hops} <= names
    assert all(hop.wire == "fp32" and hop.parameters and hop.bytes for hop in found.hops)
    assert {hop.reason for hop in found.hops} <= {"", *REASONS}


def test_received_bytes_are_those_of_the_closed_forms() -> None:
    found, predicted = played(gradients(2, machine(), 2)).received(), {}
    for n in range(2):
        (spec,) = unit({f"w{n}": (64, 64)}, unit=f"u{n}")
        for transfer in ("reduce", "sync"):
            cost.add(predicted, cost.transfer_bytes(spec, transfer))
    assert found == predicted


def test_a_level_behind_another_s_link_shares_it() -> None:
    """Hops over the cluster cross the node's link too: they add to its queue, and queue there."""
    plain = machine(pair=0.0001, node=1.0, cluster=1.0)
    shared = Topology(
        (plain.levels[0], plain.levels[1], Level("cluster", 2, plain.levels[2].bandwidth, 0.0, via=("node",))), DEVICE
    )
    own, both = (played(gradients(4, topology, 8)) for topology in (plain, shared))
    assert own.seconds == pytest.approx((4 + 1 + 1 + 1 + 1) * PRODUCT, rel=1e-3), (
        "then hops over the node, the first of which was waited for a product late, and one over the cluster"
    )
    assert both.seconds > own.seconds + 0.5 * PRODUCT


def test_a_refresh_is_waited_for_before_the_first_use_of_its_copy() -> None:
    made = products(2, machine(pair=0.0001), 1, stage="forward")
    player = Player(made.context.plan.topology)
    player.refresh(
        [Refresh((f"w{n}",), (("cluster", HALF // 4, "fp32"), ("node", HALF // 2, "fp32"))) for n in range(2)]
    )
    player.graph(made.gm.graph, "forward")
    found = player.finish()
    refreshes = [hop for hop in found.hops if hop.transfer == "refresh"]
    assert [(hop.level, round(hop.begin / PRODUCT, 3)) for hop in refreshes] == [
        ("cluster", 0),
        ("cluster", 1),
        ("node", 1),
        ("node", 2),
    ]
    assert found.seconds == pytest.approx((2 + 1 + 1) * PRODUCT, rel=1e-2), (
        "two hops, then a product; the second copy came meanwhile"
    )
    assert [hop.exposed > 0 for hop in refreshes] == [False, False, True, False]


def test_memory_by_owner_comes_and_goes() -> None:
    whole = 64 * 64 * 4
    found = played(products(3, machine(pair=0.5), 1))
    assert found.memory[0].bytes == {"activations": whole, "gathered": 2 * whole}, (
        "the input, and what is launched at once"
    )
    assert found.peak().bytes["gathered"] == 3 * whole, "one in use and two under way"
    assert set(found.peak().bytes) <= set(OWNERS)
    tail = found.memory[-1].bytes
    assert tail.get("gathered", 0) == 0 and tail.get("wire", 0) == 0
    reduced = played(gradients(3, machine(), 0))
    assert reduced.memory[-1].bytes.get("gradients", 0) == 0, "gradients at O are model state once the graph is over"
    assert max(each.bytes.get("wire", 0) for each in reduced.memory) == whole


def test_transfers_wait_for_a_straggler() -> None:
    made = products(4, machine(pair=0.5), 1)
    found = played(made, straggler=1.5)
    assert found.seconds == pytest.approx((0.5 + 4 * 1.5) * PRODUCT)
    tight = products(4, machine(pair=0.5), 0)
    waits = [hop.exposed for hop in played(tight, straggler=1.5).hops]
    assert waits == pytest.approx([0.5 * PRODUCT] + [1.0 * PRODUCT] * 3), (
        "the first rank waits for the slow one's launches too"
    )


def test_jitter_costs_time_and_is_the_same_again() -> None:
    made = products(6, machine(pair=0.5), 1)
    assert played(made, jitter=0.1).seconds == played(made, jitter=0.1).seconds
    assert played(made, jitter=0.1, ranks=64).seconds > played(made).seconds
    assert played(made, jitter=0.1, seed=1).seconds != played(made, jitter=0.1).seconds


@pytest.mark.parametrize("bad", [{"jitter": 1.0}, {"straggler": 0.5}, {"ranks": 0}])
def test_noise_that_cannot_be_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Noise(**bad)  # type: ignore[arg-type]


def test_a_timeline_is_plain_data() -> None:
    found = played(gradients(2, machine(), 1)).as_dict()
    assert found["exposed"]["seconds"] == pytest.approx(sum(hop["exposed"] for hop in found["hops"]))
