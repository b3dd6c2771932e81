"""Every write to a master is seen by the next forward: invariant 8, F2, F3, F28."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.marks import TWO
from support.training import batch, both, mlp, ours, received, same, sgd, square, step, theirs, tokens, train, twins
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zcompile import Plan, full_state_dict, mark_written, refresh, transfers
from zcompile.refresh import Refresher
from zcompile.wire import WireFormat

WORLD = 4
LOSS = square(4, 7)
# Plans whose compute copies are caches of the master at another placement, at another dtype, or no caches at all.
SETTINGS: dict[str, dict[str, Any]] = {
    "zero_topo": {},
    "zeropp": {"plan": "zeropp"},
    "zero1": {"plan": "zero1"},
    "zero3": {"plan": "zero3"},
    "ddp": {"plan": "ddp"},
}


def landed(rank: int, wires: dict[str, str]) -> tuple[int, list[bool], bool]:
    """(hops of a refresh, of each whether the own values lay in place, whether all bits are those without)."""
    right, found = transfers.gather_in_place, []

    def gather(mine: Tensor, whole: Tensor, level: int, spec: Any, transfer: str) -> Tensor:
        size, number = spec.sizes[level - 1], (mine.data_ptr() - whole.data_ptr()) // mine.nbytes
        out = right(mine, whole, level, spec, transfer)
        found.append(0 <= number < size and out is whole and torch.equal(out.view(size, -1)[number], mine))
        return out

    def weights() -> tuple[int, list[Tensor]]:
        model, _ = twins(mlp, "eager", plan=Plan.preset("zero_topo", weights="whole", **wires))
        (optimizer,) = sgd(model)
        for number in range(2):
            ours(model, LOSS, number)
            step([optimizer])
        return sum(len(unit.refresh_hops()) for unit in model.zero.units), list(full_state_dict(model).values())

    with patch.object(transfers, "gather_in_place", gather):
        hops, mine = weights()
    with patch.object(refresh, "own_place", lambda unit, full: (unit.master, WireFormat.parse("fp32"), {})):
        _, copied = weights()
    return hops, found, all(map(torch.equal, mine, copied))


@pytest.mark.parametrize("wires", [{}, {"refresh": "bf16"}], ids=["native", "narrower"])
def test_a_refresh_copies_no_value_of_its_own(ranks: Any, wires: dict[str, str]) -> None:
    """Where all hops have one native format each gathers into its part of what the last one ends with."""
    for hops, found, same_bits in ranks(WORLD).run(landed, wires):
        assert hops > 0 and same_bits and found == [True] * 2 * hops


def agree(model: Any, dense: nn.Module, rank: int) -> None:
    """A forward of both for a new batch, in evaluation and in training: equal."""
    x = batch(rank, 77, 4, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x).detach(), dense(x).detach(), rtol=0, atol=1e-6)


@torch.no_grad()
def in_place(model: Any) -> None:
    for p in model.parameters():
        p.mul_(0.5)


@torch.no_grad()
def single(model: Any) -> None:
    list(model.parameters())[2].add_(0.25)


@torch.no_grad()
def foreach(model: Any) -> None:
    torch._foreach_mul_(list(model.parameters()), 0.5)
    if isinstance(next(model.parameters()), DTensor):
        mark_written(model)  # torch counts no write of a _foreach_ function to DTensors


@torch.no_grad()
def initialised(model: Any) -> None:
    for p in model.parameters():
        nn.init.constant_(p, 0.125)


def by_data(model: Any) -> None:
    for p in model.parameters():
        p.data.mul_(0.5)
    if isinstance(next(model.parameters()), DTensor):
        mark_written(model)


def by_data_assigned(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.data * 0.5)


def locally(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            (p.to_local() if isinstance(p, DTensor) else p).mul_(0.5)


def loaded_plain(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def loaded_own(model: Any) -> None:
    state = {name: (value * 0.5).detach() for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def loaded_child(model: Any) -> None:
    child = model[0]
    child.load_state_dict({name: torch.full(value.shape, 0.1) for name, value in child.state_dict().items()})


WRITES: tuple[Callable[[Any], None], ...] = (
    in_place, single, foreach, initialised, by_data, by_data_assigned, locally, loaded_plain, loaded_own, loaded_child,
)  # fmt: skip


def _writes(rank: int, mode: str, name: str) -> None:
    model, dense = twins(mlp, mode, **SETTINGS[name])
    agree(model, dense, rank)
    for write in WRITES:
        write(model)
        write(dense)
        try:
            agree(model, dense, rank)
            both(model, dense, LOSS, 3)
        except AssertionError as error:
            raise AssertionError(f"after {write.__name__}: {error}") from None
        for module in (model, dense):
            module.zero_grad()


@pytest.mark.parametrize("name", SETTINGS)
def test_invariant_8_f3_every_write_is_seen_by_the_next_forward(ranks: Any, name: str) -> None:
    ranks(WORLD).run(_writes, "eager", name)


def test_invariant_8_f3_every_write_is_seen_by_the_next_compiled_forward(ranks: Any) -> None:
    ranks(WORLD).run(_writes, "graph", "zero_topo")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, eps=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, eps=1e-2),
}


def _stepped(rank: int, name: str) -> None:
    model, dense = twins(mlp, "eager")
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (model, dense)]
    for number in range(2):
        both(model, dense, LOSS, number)
        step(optimizers)
        agree(model, dense, rank)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_invariant_8_every_way_to_step_is_seen(ranks: Any, name: str) -> None:
    ranks(WORLD).run(_stepped, name)


def _ema(rank: int, mode: str) -> None:
    """An EMA kept beside the masters, swapped in for evaluation and out again: bit-equal weights after."""
    model, dense = twins(mlp, mode)
    optimizers = sgd(model, dense)
    averages = [{name: p.detach().clone() for name, p in m.named_parameters()} for m in (model, dense)]
    for number in range(2):
        both(model, dense, LOSS, number)
        step(optimizers)
        for m, average in zip((model, dense), averages, strict=True):
            with torch.no_grad():
                for name, p in m.named_parameters():
                    average[name].lerp_(p, 0.5)
        kept = full_state_dict(model)
        swapped = []
        for m, average in zip((model, dense), averages, strict=True):
            with torch.no_grad():
                swapped.append({name: p.detach().clone() for name, p in m.named_parameters()})
                for name, p in m.named_parameters():
                    p.copy_(average[name])
        agree(model, dense, rank)
        for m, before in zip((model, dense), swapped, strict=True):
            with torch.no_grad():
                for name, p in m.named_parameters():
                    p.copy_(before[name])
        assert all(torch.equal(kept[name], value) for name, value in full_state_dict(model).items())
        agree(model, dense, rank)


@TWO
def test_invariant_8_f3_an_ema_swapped_in_and_out(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_ema, mode)


def _kept_and_put_back(rank: int) -> None:
    """What training scripts do with a state: deep copies, torch.save, strict errors; each shard saves its own bytes alone."""
    model, dense = twins(mlp, "eager")
    (optimizer,) = sgd(model)
    kept = copy.deepcopy(model.state_dict())
    file, parameters = io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), file)
    torch.save(list(model.parameters()), parameters)
    assert file.tell() < 40_000
    copy.deepcopy(optimizer)
    for number in range(2):
        LOSS(model, rank, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for state in (kept, saved):
        with torch.no_grad():
            model[0].weight.zero_()
        model.load_state_dict(state)
        same(model, dense, 0.0)
        agree(model, dense, rank)
    for state, words in (
        ({**kept, "more": torch.zeros(1)}, ("Unexpected key", "more")),
        ({k: v for k, v in kept.items() if k != "2.bias"}, ("Missing key", "2.bias")),
        ({**kept, "2.bias": torch.zeros(4)}, ("size mismatch", "2.bias")),
    ):
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(state)
        assert all(word in str(error.value) for word in words)
    found = model.load_state_dict({"2.bias": torch.ones(5), "more": torch.zeros(1)}, strict=False)
    assert found.unexpected_keys == ["more"] and "0.weight" in found.missing_keys
    dense.load_state_dict({"2.bias": torch.ones(5)}, strict=False)
    agree(model, dense, rank)


def test_f3_states_are_kept_saved_and_put_back(ranks: Any) -> None:
    ranks(WORLD).run(_kept_and_put_back)


def _frozen_not_refreshed(rank: int, mode: str) -> None:
    """A step over trainable weights refreshes these alone; a write to a frozen one refreshes it."""

    def make() -> nn.Module:
        model = mlp()
        model[0].requires_grad_(False)
        model[3].bias.requires_grad_(False)  # beside a weight of equal shape that is trained
        return model

    model, dense = twins(make, mode)
    optimizers = sgd(model, dense)

    def refreshed() -> int:
        return sum(received(model, "refresh").values())

    for number in range(3):
        both(model, dense, LOSS, number)
        step(optimizers)
        if number == 0:
            everything = refreshed()
    trainable = refreshed()
    assert 0 < trainable < everything
    frozen = sum(slot.spec.layout.shard * 4 for slot in model.zero.slots if not slot.master.requires_grad)
    assert everything - trainable == frozen  # each rank receives the other half of a half: its own shard's size
    for m in (model, dense):
        with torch.no_grad():
            m[0].weight.mul_(0.5)
    both(model, dense, LOSS, 4)
    assert refreshed() > trainable
    for m in (model, dense):
        m.zero_grad()


@TWO
def test_invariant_8_frozen_weights_are_not_refreshed_for_a_step(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_frozen_not_refreshed, mode)


def _skipped(rank: int) -> tuple[str, bool]:
    """The refresh of one unit is left out after a write: (what the forward says, whether it had begun to gather)."""
    model, dense = twins(mlp, "eager")
    optimizers = sgd(model, dense)
    both(model, dense, LOSS, 0)
    step(optimizers)
    launch = Refresher.launch
    before = model.zero.runtime.snapshot()
    with patch.object(Refresher, "launch", lambda self, units, full: launch(self, list(units)[1:], full)):
        try:
            LOSS(model, rank, 1)
        except RuntimeError as error:
            after = model.zero.runtime.snapshot()
            gathered = any(after[key] != before.get(key) for key in after if key[1] == "gather")
            message = str(error)
        else:
            return "unseen", True
    both(model, dense, LOSS, 1)  # what was left out is launched now
    return message, gathered


def test_f2_a_skipped_refresh_is_an_error_before_the_gather(ranks: Any) -> None:
    for message, gathered in ranks(WORLD).run(_skipped):
        assert "0.weight" in message and "version" in message, message
        assert not gathered


def _unannounced(rank: int, checks: bool) -> str:
    model, _ = twins(mlp, "eager", checks=checks)
    LOSS(model, rank, 0)
    if rank == 0:  # one rank's shard alone, and the others hear of it
        detached = model[0].weight.detach()
        detached.to_local().mul_(2)
    for _ in range(2):
        try:
            LOSS(model, rank, 1)
        except RuntimeError as error:
            message = str(error)
            assert ("mark_written" in message and "0.weight" in message) if rank == 0 else "rank 0 refused" in message
        else:
            return "unseen"
    mark_written(model)
    LOSS(model, rank, 1)
    return "refused"


def test_f2_checks_find_a_write_that_torch_does_not_count(ranks: Any) -> None:
    assert ranks(WORLD).run(_unannounced, True) == ["refused"] * WORLD
    assert ranks(WORLD).run(_unannounced, False) == ["unseen"] * WORLD


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(11, 6), nn.GRUCell(6, 6), nn.Linear(6, 11)

    def forward(self, words: Tensor) -> Tensor:
        state = words.new_zeros(words.shape[0], 6, dtype=torch.float32)
        for word in self.table(words).unbind(1):
            state = self.cell(word, state)
        out: Tensor = self.head(state)
        return out


def _generates(rank: int, mode: str) -> None:
    """Train, generate in a loop of growing length under no_grad, train: no stale weight, memory back at rest."""
    model, dense = twins(Generator, mode)
    optimizers = sgd(model, dense)

    def loss(model: Any, rank: int, number: int) -> Tensor:
        words = tokens(rank, number, 11, 3, 3)
        return nn.functional.cross_entropy(model(words), words[:, 0])

    rest = model.zero.memory()
    for number in range(2):
        both(model, dense, loss, number)
        step(optimizers)
        same(model, dense)
        written = []
        for m in (model, dense):
            m.eval()
            words = tokens(rank, 9, 11, 2, 2)
            with torch.no_grad():
                for _ in range(2):
                    words = torch.cat([words, m(words).argmax(1, keepdim=True)], 1)
            m.train()
            written.append(words)
        assert torch.equal(written[0], written[1])
        assert model.zero.memory() == rest


@TWO
def test_f28_evaluation_and_generation_between_steps(ranks: Any, mode: str) -> None:
    ranks(2).run(_generates, mode)


def _inference_mode(rank: int, mode: str) -> None:
    model, dense = twins(mlp, mode)
    x = batch(rank, 0, 4, 7)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-6)
    train(model, dense, LOSS, steps=1)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-6)
    theirs(dense, LOSS, 1)
    dense.zero_grad()
    train(model, dense, LOSS, steps=1)


@TWO
def test_f28_inference_mode_between_steps(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_inference_mode, mode)
