"""Who is to blame, from what the ranks said; what a graph holds at most, by owner; checksums."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import Hand, unit

from zcompile.faults.checksums import checksum
from zcompile.faults.memory import OWNERS, peaks, ran_out
from zcompile.faults.sites import Listed, Parameters, Site, about, index, subject
from zcompile.faults.verdict import Trouble, Verdict, judge
from zcompile.passes import LOWERED
from zcompile.passes.nodes import Collective

GATHER = Site(
    "node", "gather", "all_gather", 4, (0, 1, 2, 3), 10, ("a.weight", "b.weight"), "net.py:7", "graph 0 forward"
)
REDUCE = Site("node", "reduce", "all_to_all", 2, (0, 1, 2, 3), 12, ("b.weight",), "net.py:9", "graph 0 backward")


def record(
    rank: int, state: str = "running", at: Site | None = None, missing: tuple[int, ...] = (), **more: Any
) -> dict[str, Any]:
    waits = [] if at is None else [asdict(Trouble.of(rank, at, waited=3.0, limit=20.0, missing=missing))]
    base = {"state": "waiting" if at and state == "running" else state, "time": 100.0, "waits": waits, "last": "", "line": "train.py:50",
            "compiling": False, "caught": None}  # fmt: skip
    return base | more


def trouble(rank: int = 0, at: Site = REDUCE, **more: Any) -> Trouble:
    return Trouble.of(rank, at, waited=20.0, limit=20.0, **more)


ERROR = {"type": "ValueError", "message": "no number", "line": "data.py:3"}


def test_the_first_error_is_blamed_before_all_that_follows_from_it() -> None:
    records = {
        0: record(0, at=REDUCE),
        1: record(1, "raised", time=102.0, error={**ERROR, "message": "later"}),
        2: record(2, "raised", time=101.0, error=ERROR),
        3: record(3, at=GATHER, missing=(2,)),
    }
    found = judge(trouble(closed=(1,), missing=(1,)), records, [1], 110.0)
    assert (found.kind, found.ranks) == ("raised", (2,))
    assert found.report.startswith(
        "zcompile: rank 2 raised ValueError: no number at data.py:3; ranks 1 raised too, later"
    )
    assert (
        "missed in  gather all_gather over node, number 4, of {a,b}.weight (net.py:7), in graph 0 forward"
        in found.report
    )


@pytest.mark.parametrize(
    ("records", "more", "silent", "kind", "ranks"),
    [
        ({0: record(0, at=REDUCE), 3: record(3)}, {"closed": (3,)}, [3], "died", (3,)),
        ({0: record(0, at=REDUCE)}, {"closed": (3,)}, [], "died", (3,)),
        ({0: record(0, at=REDUCE), 1: record(1, "left")}, {"missing": (1,)}, [], "left", (1,)),
        ({0: record(0, at=REDUCE), 1: record(1, "left"), 2: record(2)}, {"missing": (2,)}, [2], "silent", (2,)),
        ({0: record(0, at=REDUCE), 1: record(1), 2: record(2, at=REDUCE)}, {}, [], "busy", (1,)),
        ({0: record(0, at=REDUCE), 1: record(1, compiling=True)}, {}, [], "busy", (1,)),
        ({0: record(0, at=REDUCE), 1: record(1, at=GATHER), 2: record(2, at=REDUCE)}, {}, [], "apart", (1,)),
        ({0: record(0, at=REDUCE), 1: record(1, at=GATHER, caught=ERROR)}, {}, [], "apart", (1,)),
        # the same number of the same transfer, of other parameters
        ({0: record(0, at=REDUCE), 1: record(1, at=replace(REDUCE, parameters=("c.weight",)))}, {}, [], "apart", (1,)),
        # the one that went on may be the first to lose patience
        ({0: record(0, at=REDUCE, caught=ERROR), 1: record(1, at=GATHER, missing=(0,)), 2: record(2, at=GATHER)}, {}, [], "apart", (0,)),
        # one that closed its connections because its own wait took too long, and answers, is not dead
        ({0: record(0, at=REDUCE), 1: record(1, "fault", at=GATHER, missing=(2,)), 2: record(2)}, {"closed": (1,)}, [2], "silent", (2,)),
    ],
)  # fmt: skip
def test_blame(records: Any, more: Any, silent: list[int], kind: str, ranks: tuple[int, ...]) -> None:
    found = judge(trouble(**more), records, silent, 110.0)
    assert (found.kind, found.ranks) == (kind, ranks), found
    assert found.headline.startswith(f"rank {ranks[0]} ") and " missed it in " in found.headline
    assert Verdict.from_json(found.to_json()) == found


def test_the_report_names_the_collective_that_the_blamed_rank_reached_last() -> None:
    """The rank that judges waits in a later one than its neighbour: the missing rank has come to the earlier one."""
    records = {0: record(0, at=REDUCE), 1: record(1, at=GATHER, missing=(3,)), 3: record(3, last="gather number 3")}
    found = judge(trouble(missing=(3,), closed=(3,)), records, [3], 101.5)
    assert found.trouble.rank == 1 and found.trouble.parameters == ("a.weight", "b.weight")
    assert (found.trouble.level, found.trouble.op, found.trouble.source) == ("node", "all_gather", "net.py:7")
    assert "last seen  1.5 s ago, after gather number 3; Python at train.py:50" in found.report
    assert "others     rank 0: waiting in reduce" in found.report


def test_many_ranks_make_a_short_report() -> None:
    records = {rank: record(rank, at=REDUCE) for rank in range(3000)}
    silent = [*range(8, 16), 40]
    for rank in silent:
        del records[rank]
    text = judge(trouble(), records, silent, 110.0).report
    assert text.startswith("zcompile: ranks 8-15, 40 do not answer")
    assert len(text.splitlines()) < 12 and all(len(line) < 400 for line in text.splitlines())


def test_launches_take_the_entries_of_their_level_and_transfer_in_order() -> None:
    def entry(level: str, transfer: str, name: str, op: str = "all_gather") -> Collective:
        return Collective(level, transfer, op, "float32", 8, (name,), source=f"{name}.py:1")

    entries = [
        entry("pair", "gather", "a"),
        entry("node", "gather", "b", "peer_read"),
        entry("node", "reduce", "c"),
        entry("pair", "gather", "d"),
        entry("node", "gather", "e"),
    ]
    listed = index(entries)
    graph = Listed("graph 3 forward", listed)
    asked = [("pair", "gather"), ("node", "gather"), ("pair", "gather"), ("node", "reduce"), ("pair", "gather")]
    assert [graph.describe(*key)[0] for key in asked] == [("a",), ("e",), ("d",), ("c",), ()]
    assert Listed("graph 3 forward", listed).describe("pair", "gather") == (("a",), "a.py:1", "graph 3 forward"), "each run begins anew"
    outer, inner = Parameters(("x",), "", ""), Parameters(("y",), "", "")
    with about(outer):
        with about(inner, unless_said=True):
            assert subject() is outer
        with about(inner):
            assert subject() is inner
    assert subject() is None


def test_errors_of_memory_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert ran_out(caught.value) and ran_out(MemoryError()) and ran_out(torch.OutOfMemoryError("HIP out of memory"))
    assert not ran_out(RuntimeError("shape mismatch")) and not ran_out(ValueError("out of memory"))


@given(st.integers(1, 70), st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
def test_f33_any_flipped_bit_changes_the_checksum(size: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    x = bits.view(dtype)
    before = checksum(x)
    assert torch.equal(before, checksum(x.clone()))
    bits[seed % bits.numel()] ^= 1 << seed % 8
    assert not torch.equal(before, checksum(x))


def two_layers(units: str, **formats: Any) -> dict[str, int]:
    """Peaks of a forward through two weights of [64, 64], of one unit or of one each."""
    hand = Hand("forward")
    shapes: dict[str, tuple[int, ...]] = {"a": (64, 64), "b": (64, 64)}
    if units == "one":
        specs = unit(shapes, **formats)
    else:
        specs = [unit({name: shape}, unit=f"u_{name}", **formats)[0] for name, shape in shapes.items()]
    value = hand.input("x", 4, 64)
    copies: dict[str, Any] = {}
    for spec in specs:
        copy = copies.setdefault(spec.unit, None) or hand.copy(spec)
        copies[spec.unit] = copy
        value = hand.call(torch.ops.aten.mm.default, value, hand.gather(spec, copy))
    hand.output(value)
    return peaks(hand.run(*LOWERED))


def test_f37_peaks_by_owner_are_those_of_the_order_of_the_nodes() -> None:
    """A gathered weight is 16 KiB: two buckets follow one another; one bucket holds both at once, and its message."""
    apart, together = two_layers("two"), two_layers("one")
    assert set(apart) == set(OWNERS)
    assert (apart["gathers"], together["gathers"]) == (64 * 64 * 4, 4 * 64 * 64 * 4)
    assert apart["activations"] == together["activations"] == 2 * 4 * 64 * 4, "both products"
    assert apart["quant buffers"] == apart["grads"] == 0
    coded = two_layers("two", gather="int8/256/bf16/nearest", block=256)
    assert coded["gathers"] == 64 * 64 * 4, "what comes out of the codes"
    assert 64 * 64 + 16 * 2 <= coded["quant buffers"] <= 64 * 64 + 16 * 2 + 128, (
        "codes, a scale a block, records rounded up"
    )
