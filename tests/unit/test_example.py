"""The examples' own arithmetic: data, entropy, ZeRO-3's traffic, the plan an option asks for, the table of differences."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from zcompile import Plan
from zcompile.topology import Topology

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpt() -> ModuleType:
    return load("gpt")


@pytest.fixture(scope="module")
def train_gpt() -> ModuleType:
    return load("train_gpt")


@pytest.fixture(scope="module")
def convergence(train_gpt: ModuleType) -> ModuleType:
    return load("convergence")


def text_of(length: int) -> torch.Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def test_corpus_is_the_same_each_time_and_split_by_file(gpt: ModuleType) -> None:
    first, second = gpt.Corpus.standard_library(), gpt.Corpus.standard_library()
    assert torch.equal(first.train, second.train) and torch.equal(first.validation, second.validation)
    assert len(first.train) > 5 * len(first.validation) > 0
    assert 2.2 < gpt.bigram_entropy(first.validation) < 2.7


def test_bigram_entropy(gpt: ModuleType) -> None:
    """0 where each byte follows from the one before, ln 2 where a fair coin decides, and a chain of both."""
    assert gpt.bigram_entropy(torch.tensor([7, 8] * 100, dtype=torch.uint8)) == pytest.approx(0, abs=1e-12)
    coin = torch.tensor([0, 0, 1, 1] * 1000 + [0], dtype=torch.uint8)
    assert gpt.bigram_entropy(coin) == pytest.approx(math.log(2))
    # 1 follows 0 half of the time, 0 always follows 1: H = P(0) ln 2.
    chain = torch.tensor([0, 0, 1] * 1000 + [0], dtype=torch.uint8)
    assert gpt.bigram_entropy(chain) == pytest.approx(2 / 3 * math.log(2))


@pytest.mark.parametrize("ranks", [2, 4])
def test_batches_are_the_same_rows_on_any_number_of_ranks(gpt: ModuleType, ranks: int) -> None:
    text = text_of(1 + 16 * 20)
    alone = gpt.Batches(text, context=16, seed=3)
    together = [gpt.Batches(text, context=16, seed=3) for _ in range(ranks)]
    for _ in range(12):  # past the end of the epoch: 20 windows, 8 a step
        x, y = alone.take(8, 0, 1)
        parts = [batches.take(8 // ranks, rank, ranks) for rank, batches in enumerate(together)]
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))
        assert torch.equal(x[:, 1:], y[:, :-1])
    assert alone.position == together[0].position


def test_batches_resume_from_their_position_alone(gpt: ModuleType) -> None:
    text = text_of(1 + 16 * 20)
    whole = gpt.Batches(text, context=16, seed=3)
    seen = [whole.take(4, 0, 1)[0] for _ in range(14)]
    position = 0
    for expected in seen:
        fresh = gpt.Batches(text, context=16, seed=3, position=position)
        assert torch.equal(fresh.take(4, 0, 1)[0], expected)
        position = fresh.position
    epoch = torch.cat(seen[:5])
    assert len({tuple(row.tolist()) for row in epoch}) == 20  # each window once


def test_gpt_is_causal_and_starts_at_uniform(gpt: ModuleType) -> None:
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Shape(layers=2, hidden=32, heads=2, context=16))
    x = text_of(4 * 17).view(4, 17).long()
    assert model(x[:, :-1], x[:, 1:]).item() == pytest.approx(math.log(256), rel=0.05)
    ignored = torch.full((4, 16), -100)
    ignored[:, :8] = x[:, 1:9]  # only the first half is scored, so the second half of x must not matter
    other = x[:, :-1].clone()
    other[:, 8:] = 0
    torch.testing.assert_close(model(x[:, :-1], ignored), model(other, ignored), rtol=0, atol=1e-6)


def test_zero3_traffic_by_hand(train_gpt: ModuleType) -> None:
    topology = Topology.parse("2x2x2")
    # 128 elements of 4 bytes: two gathers and one reduction per micro-step.
    linear = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False))
    assert train_gpt.zero3_traffic(linear, topology, "float32", 2) == {
        name: 2 * 3 * 512 * share for name, share in zip(topology.names, (1 / 2, 1 / 4, 1 / 8), strict=True)
    }
    # In bf16 the gathers halve and the fp32 reduction stays.
    assert train_gpt.zero3_traffic(linear, topology, "bfloat16", 1)[topology.names[0]] == (2 * 256 + 512) / 2
    # The backward of an embedding reads no weights.
    embedding = torch.nn.Sequential(torch.nn.Embedding(16, 8))
    assert train_gpt.zero3_traffic(embedding, topology, "float32", 1)[topology.names[0]] == 2 * 512 / 2


def test_zero3_traffic_counts_padding_and_the_sync_of_replicas(train_gpt: ModuleType) -> None:
    topology = Topology.parse("2x2x2")
    # 9 rows on 8 ranks: shards of two rows, so 16 rows travel. 8 elements a row, 3 transfers.
    odd = torch.nn.Sequential(torch.nn.Linear(8, 9, bias=False))
    assert train_gpt.zero3_traffic(odd, topology, "float32", 1)[topology.names[0]] == 3 * 16 * 8 * 4 / 2
    # 4 rows: sharded over pair and node. Over the cluster a sum and the way back, of half a shard each, once a step.
    few = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    one, many = (train_gpt.zero3_traffic(few, topology, "float32", micro_steps) for micro_steps in (1, 5))
    shard = 8 * 4
    assert one[topology.names[2]] == many[topology.names[2]] == 2 * shard / 2
    assert many[topology.names[0]] == 5 * one[topology.names[0]] == 5 * 3 * 4 * shard / 2


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ([], Plan.preset("zero_topo")),
        (["--plan", "zeropp", "--wire", "paper"], Plan.preset("zeropp", gather="int8", reduce="int4/128")),
        (["--wire", "paper", "--gather", "bf16"], Plan.preset("zero_topo", gather="bf16", reduce="int4/128")),
        (
            ["--gather", "int8/128", "--reduce", "int8", "--sync", "int4", "--refresh", "int4-delta"],
            Plan.preset("zero_topo", gather="int8/128", reduce="int8", sync="int4", refresh="int4-delta"),
        ),
        (["--wire", "paper", "--error-feedback", "0"], Plan.preset("zero_topo", wire="paper", error_feedback=0.0)),
    ],
)
def test_options_make_the_plan(train_gpt: ModuleType, given: list[str], plan: Plan) -> None:
    assert train_gpt.plan_of(train_gpt.parse(given)) == plan


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--plan", "zero9"], "unknown plan 'zero9'"),
        (["--wire", "papre"], "wire='papre'"),
        (["--reduce", "int5"], "reduce='int5'"),
        (["--reduce", "int4-delta"], "a delta is a format of the refresh"),
        (["--gather", "int8/100"], "gather='int8/100'"),
        (["--wire", "paper", "--error-feedback", "1"], "error_feedback=1.0"),
        (["--error-feedback", "nan"], "error_feedback=nan"),
    ],
)
def test_a_bad_plan_ends_every_rank_before_they_meet(
    train_gpt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *given])
    monkeypatch.setattr(train_gpt, "prepare", None)  # nothing is launched, no data read
    monkeypatch.setattr(train_gpt.Corpus, "standard_library", None)
    with pytest.raises(SystemExit) as ended:
        train_gpt.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().out
    assert printed.startswith("error:") and said in printed.replace("\n", " ")


def made_up(train: tuple[float, ...], validation: tuple[float, ...]) -> list[dict[str, object]]:
    pairs = zip(train, validation, strict=True)
    return [
        {"seed": seed, "train_loss": t, "validation_loss": v, "bytes": {"pair": 1000 + seed, "node": 0}, "seconds": 2.0}
        for seed, (t, v) in enumerate(pairs)
    ]


def test_differences_are_paired_by_seed(convergence: ModuleType) -> None:
    native, other = made_up((2.0, 4.0), (1.0, 2.0)), made_up((2.02, 3.96), (1.0, 2.1))
    found = convergence.differences(other, native, "train_loss")
    assert found == pytest.approx({"mean": 0.0, "min": -0.01, "max": 0.01})
    found = convergence.differences(other, native, "validation_loss")
    assert found == pytest.approx({"mean": 0.025, "min": 0.0, "max": 0.05})
    with pytest.raises(ValueError, match="same seeds"):
        convergence.differences(other[::-1], native, "train_loss")


def test_train_loss_is_the_mean_of_the_last_tenth(convergence: ModuleType) -> None:
    assert convergence.tail([9.0] * 18 + [2.0, 4.0]) == 3.0
    assert convergence.tail([9.0, 9.0, 5.0]) == 5.0


def test_report_and_its_table(convergence: ModuleType) -> None:
    found = {"native": made_up((2.0, 4.0), (1.0, 2.0)), "paper-delta": made_up((2.02, 3.96), (1.0, 2.1))}
    result = convergence.report({"steps": 7}, found, 12.5)
    assert result["settings"] == {"steps": 7} and result["seconds"] == 12.5
    plan = result["plans"]["paper-delta"]
    assert plan["fields"] == {"wire": "paper", "refresh": "int4-delta"}
    assert plan["mean"] == pytest.approx({"train_loss": 2.99, "validation_loss": 1.55}) and plan["seconds"] == 4
    assert result["plans"]["native"]["difference"]["train_loss"] == {"mean": 0, "min": 0, "max": 0}
    headings, rows = convergence.rows(result)
    assert headings[-2:] == ["pair", "node"] and all(len(row) == len(headings) for row in rows)
    title = convergence.PLANS["paper-delta"].title
    assert rows[1] == [
        title, "2.9900", "1.5500", "+0.00 % (-1.00 .. +1.00)", "+2.50 % (+0.00 .. +5.00)", "1 kB", "0 B",
    ]  # fmt: skip
    lines = convergence.markdown(headings, rows).splitlines()
    assert len(lines) == 4 and lines[1] == "| --- |" + " ---: |" * (len(headings) - 1)
    assert lines[3].startswith(f"| {title} | 2.9900 |")


def test_native_is_always_among_the_plans(convergence: ModuleType) -> None:
    assert convergence.parse(["--plans", "paper-delta", "paper"]).plans == ["native", "paper", "paper-delta"]
    assert convergence.parse([]).plans == convergence.DEFAULT
    with pytest.raises(SystemExit):
        convergence.parse(["--plans", "papre"])


def test_every_plan_of_the_comparison_is_one(convergence: ModuleType) -> None:
    """Each quantises the transfers it says of the example's matrices, at every level, and leaves the rest alone."""
    weights, gradients = {"gather", "refresh"}, {"reduce", "sync"}
    alone = {"native": set(), "reordered": set(), "gathers": weights, "reductions": gradients}
    for name, variant in convergence.PLANS.items():
        resolved = variant.plan().resolve(Topology.parse(convergence.TOPOLOGY), "bfloat16")
        wires = resolved.wires("blocks.0.qkv.weight", (192, 64))
        for transfer in weights | gradients:
            quantized = transfer in alone.get(name, weights | gradients)
            assert all(wire.quantized == quantized for wire in getattr(wires, transfer)), (name, transfer)
        assert not any(wire.quantized for wire in resolved.wires("embed.weight", (256, 64), kind="embedding").gather)


def test_expected_waiting_counts_each_graph_as_often_as_a_step_runs_it(
    train_gpt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {
        "graph 0 forward": {"runs": 8, "seconds": 9.0, "exposed pair": 0.5, "exposed refresh": 1.0},
        "graph 0 backward": {"runs": 4, "seconds": 9.0, "exposed pair": 1.0},
        "graph 1 inference": {"runs": 100, "seconds": 9.0, "exposed pair": 7.0},
    }
    monkeypatch.setattr(train_gpt.zcompile, "ledger", lambda model: {"schedule": schedule})
    assert train_gpt.expected_waiting(None, 4) == {"pair": 2.0, "refresh": 2.0}
