"""DTensor's placements of element-wise operations, found without a search: those that torch's search finds, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.spawn import Pool
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from zcompile import elementwise, hierarchical_zero
from zcompile._torch_compat import propagate_by, sharding_propagator
from zcompile.paper import world
from zcompile.topology import Topology

Found = list[tuple[str, Any, Any]]


@pytest.fixture(scope="module")
def paper() -> Iterator[Pool]:
    """A process of its own: that of the other tests has a process group left, and DTensor has met their shapes there."""
    pool = Pool(1, backend=None)
    yield pool
    pool.close()


@contextlib.contextmanager
def searched() -> Iterator[Found]:
    """(operation, what `stays` says, what torch's search finds) of every operation that is met for the first time."""
    propagator, found = sharding_propagator(), []
    right = propagator.propagate_op_sharding_non_cached
    torchs = type(propagator).propagate_op_sharding_non_cached

    def both(schema: Any) -> Any:
        found.append((schema.op.name(), elementwise.stays(propagator, schema), torchs(propagator, schema)))
        return found[-1][2]

    propagate_by(both)
    try:
        yield found
    finally:
        propagate_by(right)


def wrapped(*sizes: int) -> Any:
    """A model with gradients, of sizes that no other test has: what DTensor has met once it does not ask for again."""
    plain = nn.Sequential(nn.Linear(*sizes), nn.LayerNorm(sizes[1]))
    model = hierarchical_zero(plain, topology="2x2x2", plan="zero_topo")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


STEPS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), foreach=False).step(),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=0.1, foreach=False).step(),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), foreach=False).step(),
    "clipping": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True),
    "loading": lambda model: model.load_state_dict(model.state_dict()),
}
QUICK = {"zeros_like", "empty_like", "detach", "clone", "stack", "linalg_vector_norm", "_foreach_norm", "full_like"}
"""What torch places without a long search."""


def compare(rank: int, name: str) -> tuple[set[str], set[str], list[str]]:
    """(operations that are answered, others, those that are answered other than by torch)."""
    with world(Topology.parse("2x2x2")):
        number = list(STEPS).index(name)
        model = wrapped(41 + 2 * number, 23 + 2 * number)
        with searched() as found:
            STEPS[name](model)
        answered = {name for name, mine, _ in found if mine is not None}
        wrong = [f"{name}: {mine} instead of {torchs}" for name, mine, torchs in found
                 if mine is not None and described(mine) != described(torchs)]  # fmt: skip
        return answered, {name.split("::")[1].split(".")[0] for name, mine, _ in found if mine is None}, wrong


def described(found: Any) -> Any:
    return found.output_spec, found.redistribute_schema, found.needs_redistribute


@pytest.mark.parametrize("name", STEPS)
def test_the_placements_are_those_of_torchs_search(paper: Any, name: str) -> None:
    ((answered, others, wrong),) = paper.run(compare, name)
    assert answered and not wrong
    assert others <= QUICK


def unlike(rank: int) -> list[str]:
    with world(Topology.parse("2x2x2")):
        mesh = wrapped(67, 31).zero.runtime.mesh("cpu")
        rows = distribute_tensor(torch.ones(16, 3), mesh, [Shard(0)] * 3)
        others = distribute_tensor(torch.ones(16, 3), mesh, [Shard(0), Shard(0), Replicate()])
        sums = DTensor.from_local(torch.ones(2, 3), mesh, [Partial(), Shard(0), Shard(0)], run_check=False)
        row = distribute_tensor(torch.ones(1, 3), mesh, [Replicate()] * 3)
        operations: dict[str, Callable[[], Any]] = {
            "other placements": lambda: rows + others,
            "broadcast": lambda: rows * row,
            "partial": lambda: sums * 2,
            "partial sums": lambda: sums + sums,
            "no element-wise operation": lambda: rows.sum(0),
            "a list": lambda: torch._foreach_mul([sums], 2.0),
        }
        wrong = []
        for name, operation in operations.items():
            with searched() as found:
                operation()
            if not found or found[0][1] is not None:
                wrong.append(name)
        return wrong


def test_what_does_not_lie_alike_is_torchs_to_place(paper: Any) -> None:
    assert paper.run(unlike) == [[]]


def ways(rank: int) -> list[Any]:
    """What an own function is asked if DTensor asks for what is in its cache in Python, and if it does not."""
    asked: list[Any] = []
    with searched():  # puts back what there was
        propagate_by(asked.append)
        sharding_propagator().propagate_op_sharding("by the cache")
        sharding_propagator().propagate_op_sharding_non_cached("at once")
    return asked


def test_the_shortcut_is_on_both_ways_to_torchs_search(paper: Any) -> None:
    """torch 2.11 goes by a cache that holds the method which it was made with, for all operations over lists."""
    assert paper.run(ways) == [["by the cache", "at once"]]


class Given(torch.autograd.Function):
    """Something whose gradient is what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Any, gradient: Any) -> torch.Tensor:
        ctx.gradient = gradient
        return x.to_local().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        return ctx.gradient, None


def held(rank: int) -> list[Any]:
    """(rows, placements, local values) of gradients that autograd has to copy, since somebody holds them."""
    with world(Topology.parse("2x2x2")):
        mesh = wrapped(83, 19).zero.runtime.mesh("cpu")
        found = []
        for rows in (16, 13, 1):
            kept = distribute_tensor(torch.arange(rows * 3.0).view(rows, 3), mesh, [Shard(0)] * 3, src_data_rank=None)
            parameter = nn.Parameter(kept + 1)
            Given.apply(parameter, kept).backward()
            assert parameter.grad is not kept
            found.append((rows, parameter.grad.placements, torch.equal(parameter.grad.to_local(), kept.to_local())))
        return found


def test_a_gradient_that_somebody_holds_is_copied_where_it_is(paper: Any) -> None:
    """torch 2.11 makes the copy of uneven rows whole, by collectives that only some ranks may call."""
    assert paper.run(held) == [[(rows, (Shard(0),) * 3, True) for rows in (16, 13, 1)]]


def first_step(rank: int) -> list[str]:
    """What an optimizer's first step and a load leave to torch's search, for shapes that it has not met."""
    with world(Topology.parse("2x2x2")):
        model = wrapped(71, 37)
        asked: list[str] = []
        propagator = sharding_propagator()
        search = propagator._wrap_with_op_strategy  # the first thing of a search

        def listed(schema: Any) -> Any:
            asked.append(schema.op.name())
            return search(schema)

        propagator._wrap_with_op_strategy = listed
        try:
            torch.optim.AdamW(model.parameters(), foreach=False).step()
            model.load_state_dict(model.state_dict())
        finally:
            del propagator._wrap_with_op_strategy
        return asked


def test_a_wrapped_models_optimizer_is_spared_the_search(paper: Any) -> None:
    (asked,) = paper.run(first_step)
    assert asked and {name.split("::")[1].split(".")[0] for name in asked} <= QUICK
