"""Gathers that read the other ranks' memory: the bits of messages, nobody reads too early, nothing is left behind, clear refusals."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.faulty import fault, jobs
from support.marks import slow
from support.spawn import Pool
from support.training import received
from torch import nn

from zcompile import Plan, full_state_dict, hierarchical_zero, peers, refresh, transfers
from zcompile.kernels import ops as kernels
from zcompile.kernels import peers as memory
from zcompile.passes import pin
from zcompile.passes.context import Context

Ranks = Callable[[int], Pool]
FORMATS: dict[str, dict[str, Any]] = {
    "native": {},
    "int8": {"gather": "int8/64", "reduce": "int4/64"},
    "int8, delta": {"gather": "int8/64", "reduce": "int4/64", "refresh": "int4-delta/64"},
    "native, delta": {"refresh": "int4-delta/64"},
}


class Awkward(nn.Module):
    """A vector without elements, rows that the ranks do not divide evenly, a bias, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))
        self.first, self.norm, self.second = nn.Linear(24, 50), nn.LayerNorm(50), nn.Linear(50, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.norm(torch.tanh(self.first(x)))) + self.nothing.sum()
        return y.square().mean()


def train(
    rank: int, formats: str, peer: bool, overlap: int = 0, compiled: bool = True, codegen: bool = False, micro: int = 2
) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plan = Plan.preset("zero_topo", peer_gather=peer, **FORMATS[formats])
    options: dict[str, Any] = {"codegen": codegen, "overlap": overlap, "compile": compiled}
    model: Any = hierarchical_zero(Awkward(), topology="2x2", plan=plan, compute_dtype=torch.bfloat16, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for number in range(3 * micro):
        last = number % micro == micro - 1
        model.set_requires_gradient_sync(last)
        loss = model(torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * number + rank)))
        loss.backward()
        losses.append(loss.item())
        if last:
            optimizer.step()
            optimizer.zero_grad()
    in_place = [spec for unit in model.zero.units for spec in unit.specs if spec.in_place]
    ops = {entry.op for program in model.zero.programs for entry in program.collectives if entry.transfer == "gather"}
    return {
        "losses": losses,
        "weights": {name: value.clone() for name, value in full_state_dict(model).items()},
        "gather": received(model, "gather"),
        "barrier": received(model, "barrier") if peer else {},
        "ops": ops,
        "direct": [program.direct for program in model.zero.programs],
        "in place": sum(spec.layout.shard * spec.layout.shards // 2 * 2 for spec in in_place),
    }


COMPILED = ("native", "int8, delta")
"""Formats whose graphs are compiled; the others are for eager torch, as a delta is no matter of a graph."""


@pytest.fixture(scope="module")
def compiled(ranks: Ranks) -> Callable[[str, bool], list[dict[str, Any]]]:
    """`compiled(formats, peer)`: a compiled run without overlap, which several tests look at."""
    return functools.cache(lambda formats, peer: ranks(4).run(train, formats, peer, timeout=120.0))


@pytest.mark.parametrize("formats", ["native", *(slow(each) for each in list(FORMATS)[1:])])
def test_bits_and_bytes_are_those_of_messages(
    ranks: Ranks, compiled: Callable[[str, bool], list[dict[str, Any]]], formats: str
) -> None:
    if formats in COMPILED:
        plain, read = compiled(formats, False), compiled(formats, True)
    else:
        plain, read = (ranks(4).run(train, formats, peer, 0, False, timeout=120.0) for peer in (False, True))
    for a, b in zip(plain, read, strict=True):
        assert a["losses"] == b["losses"]
        all_in_place = formats == "native"
        if all_in_place:
            assert b["gather"] == {}
        else:  # vectors lie in place: read by both forwards of a step, and at most by both backwards
            assert 0 < 2 * b["in place"] <= a["gather"]["node"] - b["gather"]["node"] <= 4 * b["in place"]
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
        if formats in COMPILED:
            # The backward needs one weight of a unit of two: a part of a unit comes as a message.
            assert a["ops"] == {"all_gather"} and b["ops"] == (set() if all_in_place else {"all_gather", "peer_read"})
        assert b["barrier"].keys() == {"node"}, "2x2 has no pair: the node is its fastest level"
    assert not list(peers.FOLDER.glob("zcompile-*")), "no name is left"


def test_eager_and_overlapped_runs_too(ranks: Ranks, compiled: Callable[[str, bool], list[dict[str, Any]]]) -> None:
    for overlap, compiles in ((2, True), (0, False)):
        found = ranks(4).run(train, "int8, delta", True, overlap, compiles, timeout=120.0)
        for a, b in zip(compiled("int8, delta", True), found, strict=True):
            assert a["losses"] == b["losses"]


def through_inductor(rank: int, peer: bool) -> dict[str, Any]:
    """`train`, and for each graph: peer gathers among the launches and waits that its generated code must have in order."""
    checked: list[list[str]] = []
    check = pin.check_code

    def seen(source: str, expected: list[str]) -> None:
        check(source, expected)
        checked.append(expected)

    with mock.patch.object(pin, "check_code", seen):
        found = train(rank, "int8, delta", peer, 2, codegen=True, micro=1)
    return {**found, "peer gathers": [sum("peer_gather" in line for line in order) for order in checked]}


@pytest.mark.slow
def test_bits_and_order_through_inductor(ranks: Ranks) -> None:
    """What `zcompile bench` measures: generated code, a delta refresh, buckets under way."""
    pool = ranks(4)
    plain, read = (pool.run(through_inductor, peer, timeout=300.0) for peer in (False, True))
    for a, b in zip(plain, read, strict=True):
        assert a["losses"] == b["losses"]
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
        assert not any(a["peer gathers"]) and any(b["peer gathers"])
        assert all(a["direct"]) and all(b["direct"]) and len(b["direct"]) == 2


def slow_writer(rank: int, formats: str) -> list[list[float]]:
    """Losses of three runs from the same weights: as it is; where rank 1 writes its copies late; and so without the barrier, where rank 0
    reads what was there before."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plan = Plan.preset("zero_topo", peer_gather=True, **FORMATS[formats])
    model: Any = hierarchical_zero(Awkward(), topology="2x2", plan=plan, compute_dtype=torch.bfloat16, codegen=False)
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    right, taken_out = refresh.run_hops, mock.patch.object(transfers, "barrier", lambda *arguments: None)

    def late(unit: Any, full: bool = True) -> Iterator[int]:
        for stage in right(unit, full):
            if stage == 0 and rank == 1:
                time.sleep(0.15)
            yield stage

    found = [two_steps(rank, model)]
    for without in (contextlib.nullcontext(), taken_out):
        model.load_state_dict(begin)
        with mock.patch.object(refresh, "run_hops", late), without:
            found.append(two_steps(rank, model))
    return found


def two_steps(rank: int, model: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for number in range(2):
        loss = model(torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * number + rank)))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["int8", "native"])
def test_nobody_reads_a_copy_before_it_is_written(ranks: Ranks, formats: str) -> None:
    runs = ranks(4).run(slow_writer, formats, timeout=120.0)
    expected, with_barrier, without = ([run[which] for run in runs] for which in range(3))
    assert with_barrier == expected
    assert without != expected, "without the barrier this test sees it"


PAUSE = [0.0]


@torch.library.custom_op("zcompile_tests::pause", mutates_args=())
def pause(x: torch.Tensor) -> torch.Tensor:
    time.sleep(PAUSE[0])
    return x.clone()


pause.register_fake(torch.empty_like)


class Pausing(Awkward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.norm(pause(torch.tanh(self.first(x)))))
        return y.square().mean()


def late_reader(rank: int, without: bool) -> list[float]:
    """Losses of forwards, between which all masters change; rank 1 pauses in the middle of the last but one. Without the barrier rank 0
    writes, meanwhile, what rank 1 has yet to read."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plan = Plan.preset("zero_topo", peer_gather=True)
    model: Any = hierarchical_zero(Pausing(), topology="2x2", plan=plan, compute_dtype=torch.bfloat16, codegen=False)
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    taken_out = mock.patch.object(transfers, "barrier", lambda *arguments: None)
    losses = []
    with torch.no_grad(), taken_out if without else contextlib.nullcontext():
        for number in range(6):
            PAUSE[0] = 1.5 if (rank, number) == (1, 4) else 0.0
            losses.append(model(x).item())
            for master in model.parameters():
                master.mul_(1.5)
    return losses


@pytest.mark.slow
def test_nobody_writes_what_another_rank_has_yet_to_read(ranks: Ranks) -> None:
    pool = ranks(4)
    expected = pool.run(late_reader, False, timeout=60.0)
    assert all(losses == expected[0] for losses in expected), "all ranks see the same"
    assert pool.run(late_reader, True, timeout=60.0)[1] != expected[1], "without the barrier this test sees it"


def gone_before_it_writes(rank: int) -> None:
    """Of two ranks that share memory, and exchange no other message then, one dies in its second refresh."""
    torch.manual_seed(0)
    plan = Plan.preset("zero_topo", peer_gather=True)
    model: Any = hierarchical_zero(Awkward(), topology="2", plan=plan, compute_dtype=torch.bfloat16, compile=False, timeout=60.0)
    right, refreshes = refresh.run_hops, [0]

    def dying(unit: Any, full: bool = True) -> Iterator[int]:
        refreshes[0] += unit is model.zero.units[0]
        for stage in right(unit, full):
            if (rank, refreshes[0], stage) == (1, 2, 0):
                fault()
                os.kill(os.getpid(), signal.SIGKILL)
            yield stage

    with mock.patch.object(refresh, "run_hops", dying):
        two_steps(rank, model)
        model(torch.ones(4, 24))


@pytest.mark.slow
def test_f12_a_rank_that_dies_before_a_barrier_is_named_soon() -> None:
    with jobs() as made:
        left, dead = made.run(gone_before_it_writes, 2)
    assert dead.code == -signal.SIGKILL
    assert left.code not in (0, None) and left.seconds < 30, "its limit is 60 s"
    assert "zcompile: rank 1 died" in left.output and "in barrier all_gather over" in left.output, left.output


def in_place(rank: int) -> dict[str, Any]:
    """What lies in one buffer of two ranks, who writes what of it, and what is kept for a backward when `keep` has room for all."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = Awkward()
    plan = Plan.preset("zero_topo", peer_gather=True)
    model: Any = hierarchical_zero(copy.deepcopy(dense), topology="2x2", plan=plan, compute_dtype=torch.bfloat16, codegen=False,
                                   keep=1 << 20, checks="checksums")  # fmt: skip
    notes: list[str] = []
    with mock.patch.object(Context, "note", lambda self, text: notes.append(text)):
        model(torch.randn(4, 24)).backward()
    units = model.zero.units
    wholes = {spec.name: transfers.gather(unit.copy, [spec])[0] for unit in units for spec in unit.specs}
    right = {name: torch.equal(value, wholes[name].float()) for name, value in dense.bfloat16().float().state_dict().items()}
    dist.barrier()
    for unit in units:
        for part in unit.copied:
            part.fill_(1.0 + rank)
    dist.barrier()
    return {
        "right": right,
        "notes": [note for note in notes if "lie whole" in note],
        "written": [sorted(unit.copy.unique().tolist()) for unit in units if unit.copy.numel()],
        "halves": [2 * sum(part.numel() for part in unit.copied) == unit.copy.numel() for unit in units],
        "memory": model.zero.memory()["copy"] * 2 == sum(unit.copy.numel() * unit.copy.itemsize for unit in units),
        "kept": [name for program in model.zero.programs for name in program.reads if program.stage == "backward"],
    }


def test_native_copies_of_a_host_lie_in_one_buffer(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks(4).run(in_place, timeout=120.0)):
        both = [1.0, 2.0] if rank < 2 else [3.0, 4.0]
        assert all(found["right"].values()) and len(found["right"]) == 7
        assert found["written"] == [both] * 2, "each writes its part, and sees the other's"
        assert all(found["halves"]) and found["memory"]
        assert found["notes"][0].startswith("6 parameters lie whole in memory that their level's ranks share")
        assert found["kept"], "nothing of it is kept for a backward, which reads it there too"


def refused(rank: int, how: str) -> str:
    """The error of a wrap whose memory cannot be had; on all ranks."""
    missing = Path("/nowhere-zcompile")
    allocate = os.posix_fallocate

    def full(handle: int, start: int, size: int) -> None:
        if rank == 2:
            raise OSError(errno.ENOSPC, "full")
        allocate(handle, start, size)

    exists = Path.exists

    def unseen(path: Path) -> bool:
        return exists(path) and not (rank == 3 and path.name.startswith("zcompile-"))

    patches = {
        "no room": mock.patch.object(os, "posix_fallocate", full),
        "another host": mock.patch.object(Path, "exists", unseen),
        "no folder": mock.patch.object(peers, "FOLDER", missing if rank == 0 else peers.FOLDER),
    }
    with patches[how]:
        try:
            hierarchical_zero(Awkward(), topology="2x2", plan=Plan.preset("zero_topo", peer_gather=True), sync_init=True,
                              compute_dtype=torch.bfloat16, compile=False)  # fmt: skip
        except peers.PeerMemoryError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no room", ("rank 2", "No space left", "64 MB")),
        ("another host", ("rank 3 does not see the memory of rank 2", "on one host")),
        ("no folder", ("rank 0", "No such file")),
    ],
)
def test_memory_that_cannot_be_had_is_an_error_on_all_ranks(ranks: Ranks, how: str, words: tuple[str, ...]) -> None:
    for text in ranks(4).run(refused, how, timeout=60.0):
        assert all(word in text for word in (*words, "`node`"))
    assert not list(peers.FOLDER.glob("zcompile-*"))


def test_plans_that_have_nothing_to_read() -> None:
    from zcompile.topology import Topology

    levels = Topology.parse("2x2x2")
    with pytest.raises(ValueError, match="peer_gather='yes': must be True or False"):
        Plan.preset("zero_topo", peer_gather="yes")
    with pytest.raises(ValueError, match=r"peer_gather=True with weights over pair and node.*valid: weights='pair'"):
        Plan.preset("zeropp", peer_gather=True).resolve(levels, "bfloat16")
    assert (
        "read the other ranks' memory"
        in Plan.preset("zero_topo", peer_gather=True).resolve(levels, "bfloat16").describe()
    )


def test_a_buffer_that_nobody_shared() -> None:
    with pytest.raises(RuntimeError, match=r"peer_gather of a buffer of 8 bytes.*peer_gather=True"):
        kernels.peer_gather(
            torch.zeros(8, dtype=torch.uint8), 2, "zc.2.node.gather", "[2,0,[[4,8]]]", "", torch.float32
        )


@pytest.mark.parametrize("code", ["int8/64/bf16/nearest", "int4/64/bf16/nearest", ""])
def test_the_kernel_equals_dequantising_what_a_gather_brings(code: str) -> None:
    """Parameters with holes, four ranks, each reading as each of them."""
    from zcompile.kernels import reference
    from zcompile.kernels.code import Code
    from zcompile.kernels.geometry import Geometry, Piece

    spans = ((0, 128), (128, 100), (228, 0), (228, 72))
    geometry = Geometry(4, (Piece(128, 512), Piece(128, 300, spans)), False)
    generator = torch.Generator().manual_seed(3)
    wholes = [torch.randn(piece.numel, generator=generator) for piece in geometry.pieces]
    if code:
        message = reference.quantize(wholes, geometry, Code.parse(code))
        expected = reference.dequantize(message, geometry, Code.parse(code), torch.float32)
    else:
        rows = torch.zeros(4, 256)
        for row in range(4):
            for index, piece in enumerate(geometry.pieces):
                start, valid = piece.span(row)
                rows[row, 128 * index : 128 * index + valid] = wholes[index][start : start + valid]
        message = rows.reshape(-1)
        expected = torch.cat([torch.cat((w, w.new_zeros(-len(w) % 64))) for w in wholes])
    parts = tuple(part.clone() for part in message.view(4, -1))
    for rank in range(4):
        seen: list[int] = []
        memory.register(parts[rank], memory.Peers(rank, seen.append, parts))
        found = kernels.peer_gather(parts[rank], 4, "zc.4.node.gather", geometry.text, code, torch.float32)
        if not code:  # into another dtype torch copies, as on a GPU
            wide = kernels.peer_gather(parts[rank], 4, "zc.4.node.gather", geometry.text, code, torch.float64)
            whole = [
                (start, start + piece.numel) for start, piece in zip(geometry.starts, geometry.pieces, strict=False)
            ]
            assert all(torch.equal(wide[begin:end], found[begin:end].double()) for begin, end in whole)
            assert seen.pop() == seen[0]
        memory.forget(parts[rank])
        for start, piece in zip(geometry.starts, geometry.pieces, strict=False):
            assert torch.equal(found[start : start + piece.numel], expected[start : start + piece.numel])
        assert seen == [3 * parts[0].numel() * parts[0].itemsize]
