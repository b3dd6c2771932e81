"""Shapes that nothing divides: F18, F17, and invariant 3's books for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.marks import TWO, slow
from support.training import both, graphs, mlp, received, replicas, same, sgd, square, step, tokens, train, twins
from torch import Tensor, nn

PLANS = ("ddp", "zero1", "zero2", "zero3", "hsdp", "zeropp", "zero_topo")


class Odd(nn.Module):
    """Parameters of every awkward size: 0, 1, 3, W-1, W, W+1 rows, a prime, a scalar, an empty trailing dimension."""

    def __init__(self, world: int) -> None:
        super().__init__()
        rows = (0, 1, 3, world - 1, world, world + 1, 2 * world + 1, 17)
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(n, 5)) for n in rows)
        self.vectors = nn.ParameterList(nn.Parameter(torch.randn(n)) for n in rows)
        self.cube = nn.Parameter(torch.randn(world + 1, 3, 2))
        self.scale = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(4, 0))
        self.one = nn.Parameter(torch.randn(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        total = x @ self.empty @ self.empty.t() + self.one
        out = [total.sum()]
        for table, vector in zip(self.tables, self.vectors, strict=True):
            out.append(((x.sum() + table).sum(1) * vector).tanh().sum())
        out.append((self.cube * x.mean()).sum())
        return torch.stack(out) * self.scale


class Words(nn.Module):
    """An embedding and a head over a vocabulary that no level divides."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.norm(self.table(words))).transpose(1, 2), words)


def _odd(rank: int, world: int, mode: str, plan: str, topology: str, micro: int) -> None:
    model, dense = twins(lambda: Odd(world), mode, plan=plan, topology=topology)
    same(model, dense, 0.0)
    train(model, dense, square(3, 4), steps=2, micro=micro, lr=0.01)
    received(model, "sync")
    if mode != "eager":
        expected = ["forward", "backward"] if micro == 1 else 2 * ["forward", "backward"]
        assert graphs(model) == expected


@pytest.mark.parametrize(
    ("mode", "world", "micro"), [("eager", 2, 2), ("eager", 3, 2), ("eager", 4, 2), slow("graph", 3, 1), slow("graph", 4, 1)]
)
def test_f18_sizes_that_no_level_divides(ranks: Any, world: int, mode: str, micro: int) -> None:
    topology = {2: "2", 3: "3", 4: "2x2"}[world]
    ranks(world).run(_odd, world, mode, "zero_topo", topology, micro)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_f18_under_every_preset(ranks: Any, plan: str) -> None:
    world, topology = (8, "2x2x2") if plan == "zero_topo" else (4, "2x2")
    ranks(world).run(_odd, world, "eager", plan, topology, 2, timeout=120)


@pytest.mark.slow
def test_f18_through_inductor(ranks: Any) -> None:
    ranks(2).run(_odd, 2, "code", "zero_topo", "2", 1, timeout=200)


@pytest.mark.parametrize("topology", ["1x2x2", "2x1x2", "1x4", "4x1", "2x2x1"])
def test_f17_a_level_of_size_one_adds_no_collective_and_keeps_the_scale(ranks: Any, topology: str) -> None:
    ranks(4).run(_odd, 4, "eager", "zero_topo", topology, 2)


def _alone(rank: int, mode: str) -> None:
    model, dense = twins(lambda: Odd(1), mode, topology="1x1x1")
    train(model, dense, square(3, 4), steps=2, micro=2, lr=0.01)
    assert not any(program.collectives for program in model.zero.programs)
    for transfer in ("gather", "reduce", "sync", "refresh"):
        assert not received(model, transfer)


@TWO
def test_f17_all_levels_of_size_one(ranks: Any, mode: str) -> None:
    ranks(1).run(_alone, mode)


def _misfit(rank: int) -> str:
    try:
        twins(lambda: nn.Linear(2, 2), "eager", topology="3x2")
    except ValueError as error:
        return str(error)
    return "accepted"


def test_f17_a_world_that_does_not_fit_is_refused_with_sizes_that_do(ranks: Any) -> None:
    for message in ranks(4).run(_misfit):
        assert "6" in message and "4" in message, message


def _words(rank: int, world: int, mode: str, vocabulary: int) -> None:
    model, dense = twins(lambda: Words(vocabulary), mode)

    def loss(model: Any, rank: int, number: int) -> Tensor:
        found: Tensor = model(tokens(rank, number, vocabulary, 2, 5))
        return found

    train(model, dense, loss, steps=2, micro=2)


@pytest.mark.parametrize(("mode", "vocabulary"), [("eager", 3), ("eager", 257), slow("graph", 3)])
def test_f18_vocabularies_that_nothing_divides(ranks: Any, mode: str, vocabulary: int) -> None:
    ranks(4).run(_words, 4, mode, vocabulary)


def _resume(rank: int, world: int) -> None:
    """Two steps, the state into a fresh model and optimizer, two more: the bits of four steps."""
    straight, _ = twins(lambda: Odd(world), "eager")
    loss = square(3, 4)

    def steps(model: Any, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            loss(model, rank, number).backward()
            optimizer.step()
            optimizer.zero_grad()

    first = torch.optim.AdamW(straight.parameters(), lr=0.01)
    steps(straight, first, range(2))
    fresh, _ = twins(lambda: Odd(world), "eager")
    fresh.load_state_dict({name: value.clone() for name, value in straight.state_dict().items()})
    second = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(straight, first, range(2, 4))
    steps(fresh, second, range(2, 4))
    for (name, one), (_, other) in zip(straight.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(one.to_local(), other.to_local()), name
    replicas(fresh)


def test_f18_resume(ranks: Any) -> None:
    ranks(4).run(_resume, 4)


SEEN = (3, 4, 5, 6, 7, 9)


def _batches(rank: int, dynamic: bool | None, seen: tuple[int, ...]) -> list[str]:
    model, dense = twins(mlp, "graph", dynamic=dynamic)
    optimizers = sgd(model, dense)
    for number, size in enumerate(seen):
        both(model, dense, square(size, 7), number)
        step(optimizers)
    return graphs(model)


@pytest.mark.slow
def test_requirement_29_many_batch_sizes_compile_twice(ranks: Any) -> None:
    """Once for the first size, once for any size; dynamic=False compiles for each."""
    for found in ranks(2).run(_batches, None, SEEN, timeout=120):
        assert sorted(found) == ["backward", "backward", "forward", "forward"]
    for found in ranks(2).run(_batches, False, SEEN[:3], timeout=120):
        assert sorted(found) == 3 * ["backward"] + 3 * ["forward"]
