"""Bytes of quantised transfers: closed forms against arithmetic by hand, and what holds for every layout."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcompile import cost
from zcompile.layout import Layout, ParamSpec, extents
from zcompile.wire import WireFormat

LEVELS = ("pair", "node", "cluster")
REDUCTIONS = ("reduce", "sync", "back")


def wire(text: str) -> WireFormat:
    return WireFormat.parse(text)


def spec(layout: Layout, w: int, g: int, *, gather: str = "bf16", reduce: str = "fp32", sync: str = "fp32",
         refresh: str = "bf16", back: str = "fp32") -> ParamSpec:  # fmt: skip
    """A parameter of that layout on three levels; each format at every level."""
    formats = {"gather": gather, "reduce": reduce, "sync": sync, "back": back, "refresh": refresh}
    texts = {name: (wire(text).text,) * 3 for name, text in formats.items()}
    return ParamSpec("p", layout.shape, layout.sizes, LEVELS, "2x2x2", w, g, layout.o, "bfloat16", **texts, unit="u0", offset=0,
                     unit_shard=layout.shard, block=layout.block)  # fmt: skip


def hops(layout: Layout, text: str, transfer: str) -> list[int]:
    return [cost.hop_bytes(layout, level, wire(text), transfer) for level in (1, 2, 3)]


# By hand.


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("int8/32", 192 + 6 * 2 + 4),  # 192 codes, 6 scales of bf16, 204 -> 208
        ("int8/32/fp32", 192 + 6 * 4 + 8),  # 216 -> 224
        ("int8/64", 192 + 3 * 2 + 10),  # 198 -> 208
        ("int4/32", 96 + 6 * 2 + 4),  # two values to a byte; 108 -> 112
        ("int4/64/fp32", 96 + 3 * 4 + 4),
        ("bf16", 2 * 192),
        ("fp32", 4 * 192),
    ],
)
def test_hops_of_48_rows_of_32_on_eight_ranks(text: str, record: int) -> None:
    """A shard is 48 / 8 = 6 rows, 192 values, and there are no replicas: a piece is the shard. With 8 rows on the wire a rank receives
    8 / 1 - 8 / 2 = 4 of them over the pair, 8 / 2 - 8 / 4 = 2 over the node, 8 / 4 - 8 / 8 = 1 over the cluster."""
    layout = Layout((48, 32), (2, 2, 2), 3, 64)
    assert (layout.shard, layout.piece, wire(text).bytes(192)) == (192, 192, record)
    for transfer in ("gather", "refresh", *REDUCTIONS):
        assert hops(layout, text, transfer) == [4 * record, 2 * record, record]


def test_replicas_send_a_record_for_each_piece() -> None:
    """O is the node: 4 shards of 12 rows, 384 values; two replicas, so a piece is 192 values. A gather moves shards, a reduction pieces."""
    layout = Layout((48, 32), (2, 2, 2), 2, 32)
    assert (layout.shards, layout.shard, layout.replicas, layout.piece) == (4, 384, 2, 192)
    whole = 384 + 12 * 2 + 8  # int8: 408 -> 416
    assert hops(layout, "int8/32", "gather")[:2] == [2 * whole, whole]
    piece = 96 + 6 * 2 + 4  # int4: 108 -> 112
    for transfer in REDUCTIONS:
        assert hops(layout, "int4/32", transfer) == [4 * piece, 2 * piece, piece]
    mics = spec(layout, 2, 2, gather="int8/32", reduce="int4/32", sync="int4/32", back="int8/32")
    assert cost.transfer_bytes(mics, "gather") == {("node", "gather"): whole, ("pair", "gather"): 2 * whole}
    assert cost.transfer_bytes(mics, "reduce") == {("pair", "reduce"): 4 * piece, ("node", "reduce"): 2 * piece}
    assert cost.transfer_bytes(mics, "sync") == {("cluster", "sync"): piece + (192 + 12 + 4)}, "there, and back in int8"
    assert cost.transfer_bytes(mics, "refresh") == {}


def test_a_full_refresh_sends_the_compute_dtype_where_others_send_deltas() -> None:
    """W is the pair: a refresh goes over the cluster (one shard of 192 values) and over the node (two)."""
    layout = Layout((48, 32), (2, 2, 2), 3, 32)
    delta = spec(layout, 1, 2, gather="int8/32", refresh="int4-delta/32")
    assert cost.transfer_bytes(delta, "refresh") == {("cluster", "refresh"): 112, ("node", "refresh"): 224}
    assert cost.full_refresh_bytes(delta) == {("cluster", "refresh"): 2 * 192, ("node", "refresh"): 2 * 2 * 192}
    for text in ("int8/32", "bf16", "fp32"):
        same = spec(layout, 1, 2, refresh=text)
        assert cost.full_refresh_bytes(same) == cost.transfer_bytes(same, "refresh")


def test_overhead_by_hand() -> None:
    """37 rows of 24: a shard is 5 rows, 120 values, padded to 4 blocks of 32. The whole is 888 values in 8 x 128 = 1024."""
    layout = Layout((37, 24), (2, 2, 2), 3, 32)
    assert (layout.shard, layout.numel) == (128, 888)
    codes, scales, zeros = 128, 4 * 2, 8  # 136 -> 144
    assert wire("int8/32").bytes(128) == codes + scales + zeros
    holes = 4 * codes * (1024 - 888) // 1024  # on average over the ranks
    assert cost.overhead_bytes(layout, 1, wire("int8/32"), "gather") == (4 * zeros + holes, 4 * scales)
    assert cost.overhead_bytes(layout, 1, wire("bf16"), "gather") == (4 * 256 * 136 // 1024, 0)
    dense = Layout((48, 32), (2, 2, 2), 3, 32)
    assert cost.overhead_bytes(dense, 3, wire("int4/32"), "sync") == (4, 12)
    assert cost.overhead_bytes(Layout((48, 32), (1, 8), 2, 32), 1, wire("int8/32"), "gather") == (0, 0), "no hop"


# Every layout.


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    rows, row = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    o = draw(st.sampled_from([k for k, extent in enumerate(extents(sizes)) if extent <= rows]))
    return Layout((rows, row), sizes, o, draw(st.sampled_from((32, 64, 256))))


def quantised(layout: Layout) -> st.SearchStrategy[WireFormat]:
    """Formats whose blocks the shards of a layout are padded for."""
    blocks = [block for block in (32, 64, 128, 256) if block <= layout.block]
    texts = ("/".join(map(str, parts)) for parts in itertools.product(("int8", "int4"), blocks, ("bf16", "fp32")))
    return st.sampled_from([wire(text) for text in texts])


anything = st.one_of(st.just(wire("bf16")), st.just(wire("fp32")))


@given(st.data())
def test_levels_add_up_to_what_one_flat_transfer_receives(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    made = data.draw(st.one_of(anything, quantised(layout)))
    world, levels = layout.extents[-1], range(1, len(layout.sizes) + 1)
    rows = world * made.bytes(layout.piece)
    total = sum(cost.hop_bytes(layout, level, made, "reduce") for level in levels)
    assert total * world == rows * (world - 1), "(1 - 1 / E_m) of the bytes of all rows"
    gathered = sum(cost.hop_bytes(layout, level, made, "gather") for level in levels if level <= layout.o)
    assert gathered == (layout.shards - 1) * made.bytes(layout.shard)


@given(st.data())
def test_records_begin_at_multiples_of_16_bytes(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    made = data.draw(quantised(layout))
    for n in (layout.shard, layout.piece):
        record = made.bytes(n)
        net = n * made.bits // 8 + n // made.block * (2 if made.scale == "bf16" else 4)
        assert record % 16 == 0 and 0 <= record - net < 16
    for level in range(1, len(layout.sizes) + 1):
        assert cost.hop_bytes(layout, level, made, "sync") % 16 == 0


@given(st.data())
def test_the_parts_of_a_hop_add_up(data: st.DataObject) -> None:
    """Padding, scales and the codes (or values) of real elements are the hop; none is negative, native formats have no scales."""
    layout = data.draw(layouts())
    made = data.draw(st.one_of(anything, quantised(layout)))
    transfer = data.draw(st.sampled_from(("gather", "refresh", *REDUCTIONS)))
    level = data.draw(st.integers(1, layout.o if transfer in ("gather", "refresh") and layout.o else len(layout.sizes)))
    if transfer in ("gather", "refresh") and not layout.o:
        return
    total = cost.hop_bytes(layout, level, made, transfer)
    padding, scales = cost.overhead_bytes(layout, level, made, transfer)
    assert padding >= 0 and scales >= 0
    width = layout.shard if transfer in ("gather", "refresh") else layout.piece
    values = total // made.bytes(width) * width  # elements in the hop, holes included
    real = total - padding - scales
    exact = values * made.bits / 8 * layout.numel / (layout.shards * layout.shard)
    assert real == math.ceil(exact - 1e-9)
    assert scales == (values // made.block * (2 if made.scale == "bf16" else 4) if made.quantized else 0)


@given(layouts(), st.sampled_from(("bf16", "fp32")), st.sampled_from(("gather", "reduce")))
def test_native_hops_are_the_closed_form(layout: Layout, text: str, transfer: str) -> None:
    made = wire(text)
    top = layout.o if transfer == "gather" else len(layout.sizes)
    for level in range(1, top + 1):
        values = {
            cost.B: made.bits // 8, cost.P: layout.shards * layout.shard, cost.INNER: layout.extents[level - 1],
            cost.OUTER: layout.extents[level],
        }  # fmt: skip
        assert cost.HOP.subs(values) == cost.hop_bytes(layout, level, made, transfer)
