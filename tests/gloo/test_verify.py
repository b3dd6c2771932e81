"""`zcompile verify`: every preset on every shape of machine against DDP and the reference; and that it sees what is wrong.

The whole matrix and what goes through Inductor are marked slow. The quick suite has a handful of cells, and every fault is put in there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.marks import slow
from support.spawn import Failure, Pool, RanksFailed

from zcompile import Plan, cli, replay, trial, verify
from zcompile.plan import PRESETS
from zcompile.topology import Topology

Ranks = Callable[[int], Pool]

# ---- the matrix

TWO = 2
"""Micro-batches of the matrix in eager torch: one that accumulates and one that adds to it and syncs. On one machine of three levels a step
has one, too. The cells below and the handful take one and four, as `zcompile verify` does, of which those in the middle add to what they
find and do not sync."""
FEW = 2
"""Steps of the matrix, in which each fault that is put in below shows. The second one reads what the first one's refresh sent, and four
runs one after the other train each model."""
STEPS = 3
"""Of the dozen and the handful: the third has a second optimizer state and copies refreshed twice. `zcompile verify` takes 20."""


class Matrix:
    """Some cells; runs all of them when the first is asked for, so that one run serves every test.

    Each group of cells has ranks of its own number: `ranks` is the fixture."""

    def __init__(self, wanted: list[verify.Cell], ranks: Ranks, steps: int) -> None:
        self._wanted = wanted
        self._ranks = ranks
        self._steps = steps
        self._found: dict[tuple[str, str, int], verify.Cell] = {}

    def __getitem__(self, key: tuple[str, str, int]) -> verify.Cell:
        if not self._found:
            for world in (4, 8):
                cells = [cell for cell in self._wanted if Topology.parse(cell.topology).world_size == world]
                verify.verify(cells, self._ranks(world), steps=self._steps)
            self._found = {(cell.plan, cell.topology, cell.micro_batches): cell for cell in self._wanted}
        return self._found[key]


MATRIX = [
    (topology, plan, k)
    for topology in verify.TOPOLOGIES
    for plan in PRESETS
    for k in ((1, TWO) if topology == "2x2x2" else (TWO,))
]
PASSES = (
    ("ddp", "2x1x2", 1), ("zero1", "2x2", 4), ("zero2", "2x1x2", 4), ("zero3", "4", 4), ("hsdp", "1x2x2", 1), ("zeropp", "2x2x2", 1),
    ("zero_topo", "2x2x2", 4), ("zero_topo", "2x4", 1),
)  # fmt: skip
"""Presets that place tensors differently (fsdp and mics are other names), through the passes. Every rank traces for itself: eight do where
there are three levels, or two of different sizes that could be taken for one another, and else four. (zero_topo, 2x2) is in the handful.
Of K = 4 there are two graphs each way; ddp's and hsdp's gradients are added up where zero1's and zero_topo's are."""
INDUCTOR = (("zero_topo", "2x2", 4), ("zero3", "4", 1))
"""With K = 4 code is generated for a graph that accumulates and one that syncs; of three levels, tests/gloo/test_overlap.py has it."""
EXACT = INDUCTOR[0][:2]
"""The one of which bits are compared, on the model in which fusion changes none: see zcompile.verify.EXACT."""


@pytest.fixture(scope="module")
def matrix(ranks: Ranks) -> Matrix:
    return Matrix([verify.Cell(plan, topology, k, "eager") for topology, plan, k in MATRIX], ranks, FEW)


@pytest.fixture(scope="module")
def graphs(ranks: Ranks) -> Matrix:
    return Matrix([verify.Cell(*cell, "graph") for cell in PASSES], ranks, STEPS)


@pytest.fixture(scope="module")
def generated(ranks: Ranks) -> Iterator[Matrix]:
    with mock.patch.object(verify, "EXACT", (EXACT,)):
        yield Matrix([verify.Cell(*cell, "code") for cell in INDUCTOR], ranks, STEPS)


def passes(cell: verify.Cell) -> None:
    assert cell.status == "pass", "\n".join(cell.failures)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "plan", "micro_batches"), MATRIX)
def test_requirement_1_same_answer_as_flat_sharding(
    matrix: Matrix, topology: str, plan: str, micro_batches: int
) -> None:
    """Every preset and topology; also requirements 3 and 4 and invariants 3 and 4 on all of them, 9 where there are both K."""
    cell = matrix[plan, topology, micro_batches]
    passes(cell)
    assert cell.bit_equal and cell.loss_bit_equal


@pytest.mark.slow
@pytest.mark.parametrize("cell", PASSES, ids=lambda cell: "-".join(map(str, cell)))
def test_requirement_1_through_the_passes(graphs: Matrix, cell: tuple[str, str, int]) -> None:
    """Every placement and both K through Dynamo and every pass. Which topologies the others have is left to eager torch, above, whose
    transfers are the same; `zcompile verify` takes all cells this way."""
    passes(graphs[cell])
    assert graphs[cell].bit_equal and graphs[cell].loss_bit_equal


@pytest.mark.slow
@pytest.mark.parametrize("cell", INDUCTOR, ids=lambda cell: "-".join(map(str, cell)))
def test_through_inductor(generated: Matrix, cell: tuple[str, str, int]) -> None:
    """Invariant 4 with code generation, of the preset of three levels and flat sharding. `zcompile verify --codegen` takes a dozen."""
    passes(generated[cell])
    assert generated[cell].bit_equal == (True if cell[:2] == EXACT else None)


def test_what_goes_through_the_passes_has_every_placement_and_both_k() -> None:
    everywhere = Topology.parse("2x2x2")

    def placed(plan: str) -> tuple[int, int, int]:
        found = Plan.parse(plan).resolve(everywhere, "float32")
        return found.weights, found.gradients, found.optimizer

    plans, topologies, micro_batches = zip(*PASSES, strict=True)
    assert {placed(plan) for plan in plans} == {placed(plan) for plan in PRESETS}
    assert set(micro_batches) == {1, 4} and {len(Topology.parse(text).sizes) for text in topologies} == {1, 2, 3}


def test_the_dozen_covers_every_preset_topology_and_k() -> None:
    plans, topologies, micro_batches = zip(*verify.DOZEN, strict=True)
    assert (set(plans), set(topologies), set(micro_batches)) == (set(PRESETS), set(verify.TOPOLOGIES), {1, 4})
    assert len(verify.cells(mode="code")) == 12 and len(verify.cells()) == 9 * 6 * 2


# ---- a handful, quickly

HANDFUL = (
    ("hsdp", "2x2", "eager"),
    ("zero3", "2x1x2", "eager"),
    ("zero_topo", "2x2", "graph"),
    ("zero_topo", "2x2", "eager"),
)


@pytest.fixture(scope="module")
def handful(ranks: Ranks) -> dict[tuple[str, str, str], list[verify.Cell]]:
    """(plan, topology, mode) -> its cells for K = 1 and 4."""
    found = {key: verify.cells([key[0]], [key[1]], key[2]) for key in HANDFUL}
    verify.verify([cell for group in found.values() for cell in group], ranks(4), steps=STEPS)
    return found


@pytest.mark.parametrize("key", HANDFUL, ids="-".join)
def test_invariant_4_compiled_equals_eager_equals_the_reference(handful: Any, key: tuple[str, str, str]) -> None:
    for cell in handful[key]:
        passes(cell)
        assert cell.bit_equal and cell.loss_bit_equal


@pytest.mark.parametrize("key", HANDFUL, ids="-".join)
def test_invariant_9_k_micro_batches_cross_levels_above_g_once(handful: Any, key: tuple[str, str, str]) -> None:
    one, four = handful[key]
    assert one.bytes_above_gradients == four.bytes_above_gradients > 0
    for level in one.bytes:
        assert one.bytes[level]["sync"] == four.bytes[level]["sync"]
        assert 4 * one.bytes[level]["reduce"] == four.bytes[level]["reduce"]


def test_requirement_4_accumulation_stays_sharded_and_equals_one_big_batch(ranks: Ranks) -> None:
    for held, main, error in ranks(4).run(accumulate):
        assert held == main
        assert error < 1e-6


def accumulate(rank: int) -> tuple[int, int, float]:
    """(bytes of main grads after a micro-batch, their closed form, difference to one batch of both micro-batches)."""
    grads = []
    for parts in (2, 1):
        model = trial.hierarchical_zero(trial.fresh("awkward"), topology="2x2", plan="zero2", compile=False)
        tokens = torch.cat([trial.batch(0, rank, k) for k in range(2)])
        for number, part in enumerate(tokens.chunk(parts)):
            model.set_requires_gradient_sync(number == parts - 1)
            (model(part) / parts).backward()
            if parts == 2 and number == 0:
                held = model.zero.memory()["main"]
                main = sum(4 * slot.spec.layout.width(slot.spec.g) for slot in model.zero.slots)
        grads.append([p.grad.to_local() for p in model.parameters()])
    return held, main, max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True) if a.numel())


NARROW = {t: "bf16" for t in ("gather", "reduce", "sync", "refresh", "back")}
WIRES = {
    "all bf16": Plan.preset("zero_topo", **NARROW),
    "bf16, back to the node": Plan.preset("hsdp", **NARROW),
    "bf16 between nodes alone": Plan.preset("zero3", gather={"cluster": "bf16"}, reduce={"cluster": "bf16"}),
    "accumulated whole": Plan.preset("zero1", **NARROW),
}


@pytest.mark.parametrize(
    ("wires", "mode"),
    [(wires, "eager") for wires in WIRES] + [slow(wires, "graph") for wires in WIRES],
)
def test_invariant_4_native_wires(ranks: Ranks, wires: str, mode: str) -> None:
    """Casts happen before each hop, and nowhere else: bf16 wires give the bits of a reference that casts there."""
    micro_batches = (1, 4) if mode == "eager" else (2,)  # the second one's graph accumulates: a compile less
    for outcomes in ranks(4).run(trial.run, "awkward", "2x2", WIRES[wires], mode, micro_batches, 2, timeout=120.0):
        for out in outcomes:
            assert (out.bits, out.loss_bits, out.replicas, out.ledger) == ("", "", "", "")
            assert out.parameter_error > 0, "bf16 wires change something, or the test could not fail"


# ---- what is put in is seen


@contextlib.contextmanager
def reversed_sums() -> Iterator[None]:
    """Each reduce hop sums its group from the last member to the first."""
    from zcompile import transfers

    right = transfers.ordered_sum
    with mock.patch.object(transfers, "ordered_sum", lambda x: right(x.flip(0))):
        yield


@contextlib.contextmanager
def no_outer_reduction() -> Iterator[None]:
    """F1: gradients stop at G; the division stays."""
    from zcompile import transfers

    def sync(x: Any, specs: Any) -> Any:
        first = specs[0]
        kept = x.view(first.layout.shards // first.layout.extents[first.g], -1)[0]
        return (kept / first.layout.extents[-1]).view(first.layout.replicas, -1)

    with mock.patch.object(transfers, "sync", sync):
        yield


@contextlib.contextmanager
def two_divisions() -> Iterator[None]:
    from zcompile import transfers

    right = transfers.sync
    with mock.patch.object(transfers, "sync", lambda x, specs: right(x, specs) / specs[0].layout.extents[-1]):
        yield


@contextlib.contextmanager
def no_refresh() -> Iterator[None]:
    from zcompile import refresh

    def run_hops(unit: Any, full: bool = True) -> Iterator[int]:
        if not unit.copy.any():
            yield from right(unit, full)

    right = refresh.run_hops
    with mock.patch.object(refresh, "run_hops", run_hops):
        yield


@contextlib.contextmanager
def sync_every_time() -> Iterator[None]:
    """No micro-batch accumulates: each one's gradient crosses all levels."""
    from zcompile.front import Root

    with mock.patch.object(Root, "set_requires_gradient_sync", lambda self, value: None):
        yield


@contextlib.contextmanager
def stray_collective() -> Iterator[None]:
    """A gather that nobody planned, in every refresh."""
    from zcompile import engine

    right = engine.Engine.begin

    def begin(self: Any, *args: Any, **keywords: Any) -> Any:
        before = right(self, *args, **keywords)
        name = self.units[0].first.role(1, "gather")
        c10d = torch.ops._c10d_functional
        c10d.wait_tensor(c10d.all_gather_into_tensor(torch.zeros(3), 2, name))
        return before

    with mock.patch.object(engine.Engine, "begin", begin):
        yield


@contextlib.contextmanager
def dropped_collective() -> Iterator[None]:
    """The gather of one parameter does not communicate: every rank makes up the part that is not its own."""
    from zcompile import transfers

    right = transfers.gather_hops

    def hops(x: Any, have: Any, hops: Any, specs: Any, transfer: str, rows: int) -> Any:
        if specs[0].name != "cell.weight" or transfer != "gather":
            return right(x, have, hops, specs, transfer, rows)
        for level, _ in hops:
            size = specs[0].sizes[level - 1]
            x, rows = x.repeat(size), rows * size
        return x, have, rows

    with mock.patch.object(transfers, "gather_hops", hops):
        yield


FAULTS = {f.__name__: f for f in (
    reversed_sums, no_outer_reduction, two_divisions, no_refresh, sync_every_time, stray_collective, dropped_collective,
)}  # fmt: skip


def with_fault(rank: int, fault: str, plan: str, topology: str) -> list[trial.Outcome]:
    with FAULTS[fault]():
        return trial.run(rank, "awkward", topology, Plan.parse(plan), "eager", (1, 4), 2)


def judged(ranks: Ranks, fault: str, plan: str, topology: str, micro_batches: int) -> list[str]:
    """The checks that fail, by the first word of their lines."""
    cell = verify.Cell(plan, topology, micro_batches, "eager")
    outcomes = ranks(4).run(with_fault, fault, plan, topology)
    verify.judge(cell, outcomes, outcomes)
    assert (cell.status == "fail") == bool(cell.failures)
    return sorted({line.split(",")[0].split()[0] for line in cell.failures})


def test_fault_1_a_dropped_outer_reduction_shows_in_the_replicas(ranks: Ranks) -> None:
    assert "replicas" in judged(ranks, "no_outer_reduction", "hsdp", "2x2", 1)


@pytest.mark.slow
def test_requirement_3_the_outer_reduction_really_happens(ranks: Ranks) -> None:
    """Whatever the plan: where no rank holds a replica, the reference sees it."""
    for plan, topology in (("zero_topo", "2x2"), ("ddp", "4"), ("hsdp", "1x2x2")):
        found = judged(ranks, "no_outer_reduction", plan, topology, 1)
        assert "reference" in found and "parameters" in found, (plan, topology)


def test_invariant_4_another_summation_order_is_seen(ranks: Ranks) -> None:
    """By the bits alone: to DDP it is as near as before."""
    assert judged(ranks, "reversed_sums", "zero3", "4", 1) == ["reference"]


def test_invariant_4_a_second_division_is_seen(ranks: Ranks) -> None:
    found = judged(ranks, "two_divisions", "zero_topo", "2x2", 4)
    assert "reference" in found and "parameters" in found


def test_a_skipped_refresh_is_seen(ranks: Ranks) -> None:
    assert "reference" in judged(ranks, "no_refresh", "zero_topo", "2x2", 1)


def test_invariant_9_a_sync_per_micro_batch_is_seen(ranks: Ranks) -> None:
    assert "bytes" in judged(ranks, "sync_every_time", "zero_topo", "2x2", 4)


def test_invariant_3_a_stray_collective_is_seen(ranks: Ranks) -> None:
    assert judged(ranks, "stray_collective", "zero3", "2x2", 1) == ["ledger"]


def test_invariant_3_a_dropped_collective_is_seen(ranks: Ranks) -> None:
    assert "ledger" in judged(ranks, "dropped_collective", "zero3", "2x2", 1)


# ---- judging and the command


def outcomes(**changes: Any) -> list[list[trial.Outcome]]:
    """Two ranks' outcomes of a cell in which all is well, but for `changes` to the last rank's with K = 4."""
    levels = {k: {"cluster": {"gather": 8 * k, "reduce": 8 * k, "sync": 8, "refresh": 0}} for k in (1, 4)}
    calls = {k: {"cluster gather": k, "cluster sync": 1} for k in (1, 4)}
    found = [
        [trial.Outcome(o, k, levels=levels[k], calls=calls[k]) for k in (1, 4) for o in trial.OPTIMIZERS]
        for _ in range(2)
    ]
    for out in found[-1][2:]:
        for key, value in changes.items():
            setattr(out, key, value)
    return found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loss_error": 2e-6}, "loss under AdamW"),
        ({"loss_error": float("nan")}, "loss under AdamW"),
        ({"parameter_error": 2e-6}, "parameters under SGD"),
        ({"bits": "step 0: x"}, "reference, adamw, rank 1: step 0: x"),
        ({"loss_bits": "step 0"}, "reference, adamw, rank 1: step 0"),
        ({"replicas": "step 1: x"}, "replicas, adamw: step 1: x"),
        ({"ledger": "step 1: x"}, "ledger, adamw: step 1: x"),
        ({"levels": {}}, "ranks received different amounts"),
    ],
)
def test_each_check_fails_a_cell(change: dict[str, Any], text: str) -> None:
    for k, expected in ((1, "pass"), (4, "fail")):
        cell = verify.Cell("zero3", "2", k, "graph")
        found = outcomes(**change)
        verify.judge(cell, found, found)
        assert cell.status == expected
        assert any(line.startswith(text) for line in cell.failures) == (k == 4)


def test_more_bytes_or_calls_beyond_the_gradients_level_fail_a_cell() -> None:
    one, many = outcomes()[0][0], outcomes()[0][2]
    assert verify.once(one, many) == []
    many.levels["cluster"]["sync"] = 32
    many.calls["cluster sync"] = 4
    assert verify.once(one, many) == [
        "sync over cluster is 32 bytes instead of 1 x 8",
        "4 collectives of cluster sync instead of 1",
    ]


def test_the_command_starts_its_own_ranks_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    given = ["--plans", "zero3", "fsdp", "--topologies", "2", "--steps", "2", "--eager", "--json", str(file)]
    assert cli.main(["verify", *given]) == 0
    result = json.loads(file.read_text())
    assert result["ok"] and result["cells"] == result["passed"] == 4 and result["runs"] == 2
    cell = result["results"][2]
    assert (cell["plan"], cell["run_as"], cell["micro_batches"], cell["status"]) == ("fsdp", "zero3", 1, "pass")
    assert cell["placements"] == ["cluster", "cluster", "cluster"] and cell["bytes"]["cluster"]["gather"] > 0


def test_the_command_replays(tmp_path: Path) -> None:
    file = tmp_path / "replay.json"
    given = ["--replay", "3", "--plans", "zero3", "fsdp", "--topologies", "2", "--eager", "--json", str(file)]
    assert cli.main(["verify", *given]) == 0
    result = json.loads(file.read_text())
    (cell,) = result["results"]
    assert result["ok"] and result["cells"] == result["passed"] == 1, "two names of one plan are replayed once"
    assert (cell["plan"], cell["replays"], cell["status"]) == ("zero3", 3, "pass") and cell["sleeps"] > 0


def test_a_replay_that_differs_or_breaks_off_fails_its_cell() -> None:
    class Ranks:
        def run(self, function: Any, topology: str, *arguments: Any, **keywords: Any) -> Any:
            if topology == "4":
                raise RanksFailed({1: Failure("Died", "exit code 1", ""), 0: Failure("FaultError", "rank 1", "")}, {})
            return [
                {"differences": [], "sleeps": 2, "seconds": 1.0},
                {"differences": ["replay 0: x differs"], "sleeps": 1, "seconds": 2.0},
            ]

    found = replay.cells(["zero3"], ["2", "4"], "graph", 5)
    replay.run(found, Ranks())
    assert [(cell.status, cell.sleeps) for cell in found] == [("fail", 3), ("error", 0)]
    assert found[0].failures == ["rank 1, replay 0: x differs"] and found[1].failures[0].startswith("rank 1: Died")
    assert not replay.report(found, 1.0)["ok"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--topologies", "2x"], "topology '2x'"),
        (["--topologies", "2", "4"], "equally many ranks"),
        (["--steps", "0"], "--steps at least 1"),
        (["--codegen", "--topologies", "2"], "no cell"),
        (["--replay", "0"], "--replay 0: must be at least 1"),
    ],
)
def test_the_command_refuses(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *arguments]) == 2
    assert text in capsys.readouterr().out


def test_a_rank_that_fails_is_an_error_of_its_cells_alone(ranks: Ranks) -> None:
    class Broken:
        def run(self, *arguments: Any, **keywords: Any) -> Any:
            if "4" in arguments:
                return ranks(4).run(broken)
            return ranks(4).run(*arguments, **keywords)

    found = verify.cells(["ddp"], ["4", "2x2"], "eager")
    verify.verify(found, Broken(), steps=1)
    assert [cell.status for cell in found] == ["error", "error", "pass", "pass"]
    assert "rank 0: ValueError: no such thing" in found[0].failures[0]
    assert not verify.report(found, 1, 0.0)["ok"]


def broken(rank: int) -> None:
    raise ValueError("no such thing")
