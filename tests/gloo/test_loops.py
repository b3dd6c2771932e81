"""What a training loop may do: micro-batches in any order, two backwards, modes, exceptions, optimizers, several models."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.marks import TWO
from support.spawn import RanksFailed
from support.training import batch, both, graphs, mlp, received, replicas, same, sgd, square, step, theirs, train, twins
from torch import Tensor, nn

from zcompile.agreement import AgreementError
from zcompile.faults.verdict import FaultError

WORLD = 4


SMALLER = pytest.mark.parametrize(("mode", "world"), [("eager", WORLD), ("graph", 2)])
"""For what has nothing to do with levels: a compile takes each rank a second or more."""
LOSS = square(4, 7)
_kept: dict[str, tuple[Any, nn.Module, dict[str, Tensor], dict[str, Tensor]]] = {}


@contextlib.contextmanager
def start(mode: str) -> Iterator[tuple[Any, nn.Module]]:
    """(wrapped, dense): the mlp with its first weights. A pair serves one test after the other, so that its graphs are compiled once; one
    in whose hands a test failed is not used again."""
    if mode not in _kept:
        pair = twins(mlp, mode)
        _kept[mode] = (*pair, *({name: value.clone() for name, value in each.state_dict().items()} for each in pair))
    model, dense, *states = kept = _kept.pop(mode)
    for module, state in zip((model, dense), states, strict=True):
        module.load_state_dict(state)
        module.zero_grad()
    model.set_requires_gradient_sync(True)
    yield model, dense
    _kept[mode] = kept


class Branches(nn.Module):
    """A trunk and three branches; one is never used, one only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(7, 7), nn.Linear(7, 3), nn.Linear(7, 3)
        self.never = nn.Linear(7, 3)

    def forward(self, x: Tensor, right: bool) -> Tensor:
        hidden = self.trunk(x).tanh()
        out: Tensor = self.right(hidden) if right else self.left(hidden)
        return out


def _branches(rank: int, mode: str) -> None:
    """A parameter unused in a step keeps no gradient; used in an early micro-batch only, it is not lost."""
    model, dense = twins(Branches, mode)
    optimizers = sgd(model, dense)
    pattern = [[False], [True], [True, False], [False, True, False], [True, True]]
    for number, uses in enumerate(pattern):
        for k, right in enumerate(uses):

            def loss(model: Any, rank: int, number: int, right: bool = right) -> Tensor:
                found: Tensor = model(batch(rank, number, 4, 7), right).square().mean()
                return found

            both(model, dense, loss, 10 * number + k, sync=k == len(uses) - 1)
        for name, parameter in model.named_parameters():
            expected = dense.get_parameter(name).grad
            assert (parameter.grad is None) == (expected is None), f"step {number}: {name}"
        step(optimizers)
        same(model, dense)
    assert not model.zero.memory()["main"]


@SMALLER
def test_parameters_unused_in_a_step_or_used_in_an_early_micro_batch_only(ranks: Any, mode: str, world: int) -> None:
    ranks(world).run(_branches, mode)


class Parted(nn.Module):
    """One of two branches, or none; `outside` keeps them out of graphs."""

    def __init__(self, width: int, outside: bool = False) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(7, 7), nn.Linear(7, 3), nn.Linear(7, width)
        self.last = nn.Linear(7, 2)
        self.branch: Any = torch.compiler.disable(self._branch) if outside else self._branch

    def _branch(self, hidden: Tensor, which: str) -> Tensor:
        found: Tensor = self.left(hidden) if which == "left" else self.right(hidden)  # read here
        return found

    def forward(self, x: Tensor, which: str) -> Tensor:
        hidden = self.trunk(x).tanh()
        out = self.last(hidden).square().mean()
        return out + self.branch(hidden, which).square().mean() if which else out


def _parted(rank: int, mode: str, width: int, odd: str, outside: bool, settings: dict[str, Any]) -> tuple[str, bool]:
    """What a step in which odd ranks take another branch says, and whether the weights are what they were."""
    other = mode == "other compiler"
    model, _ = twins(lambda: Parted(width, outside), "eager" if other else mode, **settings)
    called: Any = torch.compile(model, backend="eager") if other else model
    (optimizer,) = sgd(model)
    before = [p.to_local().clone() for p in model.parameters()]
    said = ""
    try:
        called(batch(rank, 0, 4, 7), odd if rank % 2 else "left").backward()
        optimizer.step()
    except AgreementError as error:
        if isinstance(error, FaultError):  # nothing runs on these ranks any more
            raise
        said = str(error)
    return said, all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("mode", "outside", "settings"),
    [
        ("eager", False, {}),
        ("eager", False, {"nonfinite": "ignore"}),
        ("graph", False, {}),
        ("graph", True, {}),
        ("other compiler", False, {}),
    ],
    ids=["eager", "eager, nonfinite ignored", "graph", "a branch outside of graphs", "another compiler"],
)
def test_f11_a_branch_on_some_ranks_only_is_an_error_before_a_step_though_shapes_are_equal(
    ranks: Any, mode: str, outside: bool, settings: dict[str, Any]
) -> None:
    found = ranks(WORLD).run(_parted, mode, 3, "right", outside, settings)
    assert all(unchanged for _, unchanged in found)
    assert len({said for said, _ in found}) == 1
    said = found[0][0]
    assert "rank 0" in said and "rank 1" in said and "left.weight" in said and "right.weight" in said, said
    if mode == "graph" and not outside:
        assert "ranks disagree on collectives of this forward" in said, said
    else:
        assert "launched different transfers over level `node`" in said, said
        assert "rank 0 has `gather of left.weight" in said and "rank 1 has `gather of right.weight" in said, said
        assert mode == "other compiler" or said.count("at test_loops.py:") == 2, said


@pytest.mark.parametrize(("width", "odd"), [(5, "right"), (3, "")], ids=["of another size", "none"])
def test_f11_an_eager_branch_that_others_do_not_take_is_no_hang(ranks: Any, width: int, odd: str) -> None:
    """Messages of two sizes never meet (gloo would abort both processes): who waits is told in time for what, and who is elsewhere."""
    with pytest.raises(RanksFailed) as caught:
        ranks(WORLD).run(_parted, "eager", width, odd, False, {"timeout": 1.5})
    failures = caught.value.failures
    assert len(failures) == WORLD and {failure.type for failure in failures.values()} == {"FaultError"}, caught.value
    for failure in failures.values():
        assert "waits at another place: the ranks do not run the same sequence of collectives" in failure.message
        missed = "(left|right).weight" if odd else "(left|last).weight"
        assert re.search(
            rf"missed it in gather .*, of {missed} \(test_loops.py:\d+\), in eager code", failure.message
        ), failure


def _apart(rank: int, plan: str) -> None:
    """Without gradients ranks that share no group for weights may read what they like; then they train on."""
    model, dense = twins(lambda: Parted(5), "eager", plan=plan)
    optimizers = sgd(model, dense)
    both(model, dense, lambda model, rank, number: model(batch(rank, number, 4, 7), "left"), 0)
    step(optimizers)
    which = ["left", "right"][rank // 2 if plan == "zero_topo" else rank % 2]
    with torch.no_grad():
        for number in range(2):
            x = batch(rank, number, 4, 7)
            torch.testing.assert_close(model(x, which), dense(x, which), rtol=0, atol=1e-6)
    both(model, dense, lambda model, rank, number: model(batch(rank, number, 4, 7), "right"), 3)
    step(optimizers)
    same(model, dense)


@pytest.mark.parametrize("plan", ["zero_topo", "ddp"])
def test_f11_what_is_gathered_apart_may_differ(ranks: Any, plan: str) -> None:
    ranks(WORLD).run(_apart, plan)


def _changing(rank: int, mode: str) -> None:
    with start(mode) as (model, dense):
        optimizers = sgd(model, dense)
        number = 0
        for micro in (1, 4, 2, 1, 3):
            for k in range(micro):
                both(model, dense, LOSS, number, sync=k == micro - 1)
                number += 1
            step(optimizers)
            same(model, dense)
        # The epoch ends in the middle of a window: its last micro-batch was not known to be the last.
        for k in range(2):
            both(model, dense, LOSS, number + k, sync=False)
        assert all(p.grad is None for p in model.parameters())
        both(model, dense, LOSS, number + 2)
        step(optimizers)
        same(model, dense)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_f36_accumulation_steps_that_change_lose_no_micro_batch(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_changing, mode)


def _no_sync(rank: int) -> None:
    """The context manager is the setter; the phase is fixed at forward; zero_grad drops what was added up."""
    with start("eager") as (model, dense):
        optimizers = sgd(model, dense)
        with model.no_sync():
            lost = LOSS(model, rank, 0)
        lost.backward()
        assert model.zero.memory()["main"] > 0
        model.zero_grad()
        assert not model.zero.memory()["main"]
        with model.no_sync():
            kept = LOSS(model, rank, 1)
        kept.backward()
        theirs(dense, LOSS, 1)
        both(model, dense, LOSS, 2)
        step(optimizers)
        same(model, dense)
        # A forward before the drop and its backward after it still counts: it is a new micro-batch's gradient.
        with model.no_sync():
            early = LOSS(model, rank, 3)
        model.zero_grad()
        early.backward()
        theirs(dense, LOSS, 3)
        both(model, dense, LOSS, 4)
        step(optimizers)
        same(model, dense)
        try:
            model.set_requires_gradient_sync(1)
        except TypeError as error:
            assert "True or False" in str(error)
        else:
            raise AssertionError("accepted 1")


def test_no_sync_and_zero_grad(ranks: Any) -> None:
    ranks(WORLD).run(_no_sync)


def _two_forwards(rank: int, mode: str) -> None:
    """Two forwards in every mixture of phases, then (a + b).backward() or two backwards, in either order.

    One synchronising forward is enough for both gradients to arrive, whichever backward comes last.
    """
    with start(mode) as (model, dense):
        optimizers = sgd(model, dense)
        for joint in (True, False):
            for phases in ((True, True), (False, True), (True, False), (False, False)):
                for turned in (False,) if joint else (False, True):
                    losses = []
                    for number, sync in enumerate(phases):
                        model.set_requires_gradient_sync(sync)
                        losses.append(LOSS(model, rank, number))
                        theirs(dense, LOSS, number)
                    if turned:
                        losses.reverse()
                    for loss in [losses[0] + losses[1]] if joint else losses:
                        loss.backward()
                    if not any(phases):
                        assert all(p.grad is None for p in model.parameters())
                        model.set_requires_gradient_sync(True)
                        LOSS(model, rank, 2).mul(0).backward()
                    assert not model.zero.memory()["main"]
                    step(optimizers)
                    same(model, dense)


@TWO
def test_two_forwards_before_their_backwards(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_two_forwards, mode)


def _partial_grad(rank: int, mode: str) -> None:
    """torch.autograd.grad with respect to the input leaves no trace on the parameters and communicates no gradient."""
    with start(mode) as (model, dense):
        x = batch(rank, 0, 4, 7).requires_grad_()
        y = x.detach().clone().requires_grad_()
        (mine,) = torch.autograd.grad(model(x).square().mean(), x)
        (other,) = torch.autograd.grad(dense(y).square().mean(), y)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
        assert all(p.grad is None for p in model.parameters())
        train(model, dense, LOSS, steps=2)


@TWO
def test_gradients_of_inputs_alone(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_partial_grad, mode)


def _nan(rank: int, mode: str) -> None:
    """NaN on one rank's batch alone: every rank gets a NaN gradient, and takes the same decision."""
    with start(mode) as (model, dense):
        (optimizer,) = sgd(model)
        x = batch(rank, 0, 4, 7)
        if rank == WORLD - 1:
            x[0, 0] = float("nan")
        model(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert not torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        replicas(model)
        # every gradient is NaN on every rank that holds a row of it: no rank steps what another skips
        assert all(p.grad.to_local().isnan().all() for p in model.parameters())
        optimizer.zero_grad()  # all skip
        train(model, dense, LOSS, steps=1)
        x[0, 0] = float("nan")
        model(x).square().mean().backward()
        optimizer.step()  # of itself it skips too: tests/gloo/test_gradients.py
        replicas(model)
        same(model, dense)


@TWO
def test_f10_a_nan_gradient_of_one_rank_is_seen_by_all(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_nan, mode)


def _retain(rank: int, mode: str) -> None:
    """Of graphs of its own: what is compiled in a backward that keeps nothing refuses, in torch, to run in one that does."""
    model, dense = twins(mlp, mode)
    optimizers = sgd(model, dense)
    loss = LOSS(model, rank, 0)
    loss.backward(retain_graph=True)
    loss.backward()
    for _ in range(2):
        theirs(dense, LOSS, 0)
    step(optimizers)
    same(model, dense)
    # in a window: the first accumulates, twice; the last syncs, twice
    with model.no_sync():
        early = LOSS(model, rank, 1)
    early.backward(retain_graph=True)
    early.backward()
    last = LOSS(model, rank, 2)
    last.backward(retain_graph=True)
    last.backward()
    for number in (1, 1, 2, 2):
        theirs(dense, LOSS, number)
    step(optimizers)
    same(model, dense)


@TWO
def test_a_backward_twice_over_a_retained_graph(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_retain, mode)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fail = nn.Linear(7, 9), nn.Linear(9, 3), False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.fail:
            raise KeyError("user code")
        out: Tensor = self.second(hidden)
        return out


def _exception(rank: int, mode: str) -> None:
    model, dense = twins(Breaks, mode)
    optimizers = sgd(model, dense)
    both(model, dense, LOSS, 0)
    step(optimizers)
    model.fail = True
    with contextlib.suppress(KeyError):
        LOSS(model, rank, 1)
    assert type(model.first.weight).__name__ == "DTensor" or isinstance(model.first.weight, nn.Parameter)
    model.fail = False
    for number in (2, 3):
        both(model, dense, LOSS, number)
        step(optimizers)
        same(model, dense)


@SMALLER
def test_an_exception_in_a_forward_and_the_next_forward(ranks: Any, mode: str, world: int) -> None:
    ranks(world).run(_exception, mode)


def _models(rank: int, mode: str) -> None:
    """A teacher, a student, and steps of both in turn; then two trained against each other."""
    teacher, dense_teacher = twins(mlp, mode)
    student, dense_student = twins(lambda: nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)), mode)
    pairs = [(teacher, dense_teacher), (student, dense_student)]
    optimizers = sgd(teacher, dense_teacher, student, dense_student)

    def distil(teacher: Any, student: Any, who: int, number: int) -> Tensor:
        x = batch(who, number, 4, 7)
        with torch.no_grad():
            goal = teacher(x)
        found: Tensor = (student(x) - goal).square().mean()
        return found

    def against(teacher: Any, student: Any, who: int, number: int) -> Tensor:
        x = batch(who, number, 4, 7)
        found: Tensor = (student(x) * teacher(x)).mean() + teacher(student(x).repeat(1, 3)[:, :7]).square().mean()
        return found

    for number, loss in enumerate((distil, against, distil, against)):
        loss(teacher, student, rank, number).backward()
        for who in range(dist.get_world_size()):
            (loss(dense_teacher, dense_student, who, number) / dist.get_world_size()).backward()
        step(optimizers)
        for model, dense in pairs:
            same(model, dense)


@SMALLER
def test_several_models_in_one_process(ranks: Any, mode: str, world: int) -> None:
    ranks(world).run(_models, mode)


def _evaluation(rank: int, mode: str) -> None:
    """F28's other half: eval() and no_grad between steps cost no gradient bytes, and memory returns to rest."""
    model, dense = twins(lambda: nn.Sequential(nn.Linear(7, 9), nn.Dropout(0.5), nn.Linear(9, 3)), mode)
    for module in (model, dense):
        module.eval()
    optimizers = sgd(model, dense)
    rest = model.zero.memory()
    for number in range(3):
        both(model, dense, LOSS, number)
        step(optimizers)
        with torch.no_grad():
            x = batch(rank, 50 + number, 4, 7)
            torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-6)
        assert model.zero.memory() == rest
    assert received(model, "sync")
    if mode == "graph":
        assert graphs(model) == ["forward", "backward", "inference"]


@TWO
def test_evaluation_between_steps(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_evaluation, mode)
