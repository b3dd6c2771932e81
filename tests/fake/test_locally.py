"""Operations over lists of masters, run on the local tensors (zcompile.locally): the bits are those of DTensor's own way, and what does not
lie alike goes that way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.spawn import Pool
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from zcompile import hierarchical_zero, locally
from zcompile._torch_compat import by_dtensor, wrap_local
from zcompile.paper import world
from zcompile.params import local_of
from zcompile.topology import Topology


@pytest.fixture(scope="module")
def paper() -> Iterator[Pool]:
    pool = Pool(1, backend=None)
    yield pool
    pool.close()


def wrapped() -> Any:
    torch.manual_seed(0)
    return hierarchical_zero(
        nn.Sequential(nn.Linear(24, 17), nn.LayerNorm(17), nn.Linear(17, 1)), topology="2x2x2", plan="zero_topo"
    )


def each(kind: Any, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda model: kind(model.parameters(), lr=0.1, **options)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, fused": each(torch.optim.AdamW, fused=True),
    "AdamW, fused, amsgrad, a tensor for the rate": lambda model: torch.optim.AdamW(
        model.parameters(), lr=torch.tensor(0.1), amsgrad=True, fused=True
    ),
    "Adam, fused": each(torch.optim.Adam, fused=True, weight_decay=0.1),
    "SGD, fused": each(torch.optim.SGD, fused=True, momentum=0.9, nesterov=True),
    "Adagrad, fused": each(torch.optim.Adagrad, fused=True),
    "AdamW over lists": each(torch.optim.AdamW, foreach=True, amsgrad=True),
    "SGD over lists": each(torch.optim.SGD, foreach=True, momentum=0.9, weight_decay=0.1),
    "NAdam over lists": each(torch.optim.NAdam, foreach=True),
    "Adagrad over lists": each(torch.optim.Adagrad, foreach=True),
}


def stepped(make: Callable[[Any], torch.optim.Optimizer], plain: bool = False) -> list[torch.Tensor]:
    """What this rank holds after three steps: masters and state; plain: of the same tensors that are no DTensors."""
    model: Any = wrapped()
    if plain:
        model = nn.ParameterList(local_of(p).detach().clone() for p in model.parameters())
    optimizer = make(model)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for parameter in model.parameters():
            local = torch.randn(local_of(parameter).shape, generator=generator)
            parameter.grad = local if plain else wrap_local(local, parameter)
        optimizer.step()
    found = []
    for parameter in model.parameters():
        state = optimizer.state[parameter].values()
        assert plain or all(value.dim() == 0 or value.placements == parameter.placements for value in state)
        found += [local_of(value).clone() for value in (parameter, *state)]
    return found


def compare(rank: int, name: str) -> tuple[bool, int, int]:
    """(are the bits equal, operations that ran on local tensors, operations that went by DTensor)."""
    with world(Topology.parse("2x2x2")):
        alike, others = [], []

        def looked(*args: Any) -> bool:
            found = lie_alike(*args)
            (alike if found else others).append(args)
            return found

        lie_alike = locally._lie_alike
        with mock.patch.object(locally, "_lie_alike", looked):
            ours = stepped(OPTIMIZERS[name])
        same = all(map(torch.equal, ours, stepped(OPTIMIZERS[name], plain=True)))
        if name not in ("SGD, fused", "Adagrad, fused"):  # which DTensor has not (2.13)
            with mock.patch.object(locally, "_lie_alike", lambda *args: False):
                same &= all(map(torch.equal, ours, stepped(OPTIMIZERS[name])))
        return same, len(alike), len(others)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_of_dtensors_own_way(paper: Pool, name: str) -> None:
    ((same, alike, others),) = paper.run(compare, name)
    assert same and alike >= 3 and not others


def numbers(rows: Any, number: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """What lies alike."""
    return {
        "a number that is a DTensor": (torch.ops.aten._foreach_mul.Tensor, ([rows], number)),
        "plain numbers": (torch.ops.aten._foreach_add.List, ([rows], [torch.ones(())])),
    }


def unlike(rank: int) -> list[str]:
    """What was run on local tensors though it does not lie alike, or whose result is another than DTensor's."""
    with world(Topology.parse("2x2x2")):
        mesh = wrapped().zero.runtime.mesh("cpu")
        rows = distribute_tensor(torch.ones(16, 3), mesh, [Shard(0)] * 3)
        others = distribute_tensor(torch.ones(16, 3), mesh, [Shard(0), Shard(0), Replicate()])
        sums = DTensor.from_local(torch.ones(2, 3), mesh, [Partial(), Shard(0), Shard(0)], run_check=False)
        number = distribute_tensor(torch.tensor(2.0), mesh, [Replicate()] * 3)
        add = torch.ops.aten._foreach_add
        cases: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "other placements": (add.List, ([rows, others], [others, others])),
            "partial": (torch.ops.aten._foreach_mul.Scalar, ([sums], 2.0)),
            "a sharded tensor for a number": (torch.ops.aten._foreach_mul.Tensor, ([sums], number)),
            **numbers(rows, number),
        }
        wrong = []
        for name, (op, args) in cases.items():
            with mock.patch.object(locally, "by_dtensor", side_effect=by_dtensor) as way:
                found = op(*args)
            expected = by_dtensor(op, args, {})
            if way.called == (name in numbers(rows, number)) or not all(
                a.placements == b.placements and torch.equal(local_of(a), local_of(b))
                for a, b in zip(found, expected, strict=True)
            ):
                wrong.append(name)
        try:
            add.List([rows], [torch.ones(16, 3)])
            wrong.append("a plain tensor of the whole shape")
        except RuntimeError as error:
            if "mixed" not in str(error):
                wrong.append(str(error))
        return wrong


def test_what_does_not_lie_alike_goes_by_dtensor(paper: Pool) -> None:
    assert paper.run(unlike) == [[]]


def again(rank: int) -> list[bool]:
    """Of equal lists, and of lists that begin alike: is the remembered answer taken for these alone?"""
    with world(Topology.parse("2x2x2")):
        mesh = wrapped().zero.runtime.mesh("cpu")
        rows = [distribute_tensor(torch.ones(16, 3), mesh, [Shard(0)] * 3) for _ in range(2)]
        other = distribute_tensor(torch.ones(16, 3), mesh, [Shard(0), Shard(0), Replicate()])
        ask = locally._lie_alike
        return [ask(rows, [rows, rows], ()), ask(rows, [rows, rows], ()), ask(rows, [rows, [rows[0], other]], ()),
                ask(rows, [rows, [rows[0], torch.ones(())]], ())]  # fmt: skip


def test_an_answer_is_remembered_for_the_same_lists_alone(paper: Pool) -> None:
    assert paper.run(again) == [[True, True, False, True]]
