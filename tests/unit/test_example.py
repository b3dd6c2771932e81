"""The example's own arithmetic: its data, its entropy, its closed form of ZeRO-3's traffic."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


def text_of(length: int) -> torch.Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def test_corpus_is_the_same_each_time_and_split_by_file(gpt: ModuleType) -> None:
    first, second = gpt.Corpus.standard_library(), gpt.Corpus.standard_library()
    assert torch.equal(first.train, second.train) and torch.equal(first.validation, second.validation)
    assert len(first.train) > 8 * len(first.validation) > 0
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


def test_zero3_traffic_by_hand() -> None:
    example = load("train_gpt")
    topology = Topology.parse("2x2x2")
    # 128 elements of 4 bytes: two gathers and one reduction per micro-step.
    linear = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False))
    assert example.zero3_traffic(linear, topology, "float32", 2) == {
        name: 2 * 3 * 512 * share for name, share in zip(topology.names, (1 / 2, 1 / 4, 1 / 8), strict=True)
    }
    # In bf16 the gathers halve and the fp32 reduction stays.
    assert example.zero3_traffic(linear, topology, "bfloat16", 1)[topology.names[0]] == (2 * 256 + 512) / 2
    # The backward of an embedding reads no weights.
    embedding = torch.nn.Sequential(torch.nn.Embedding(16, 8))
    assert example.zero3_traffic(embedding, topology, "float32", 1)[topology.names[0]] == 2 * 512 / 2
