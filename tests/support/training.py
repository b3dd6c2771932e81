"""Train a wrapped model over real ranks beside its dense twin, and compare.

The twin sees every rank's batch, with the mean of the ranks' losses, so after each step both hold the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zcompile import full_state_dict, hierarchical_zero

MODES: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "graph": {"codegen": False},
    "code": {"codegen": True},
}
"""No compiler; Dynamo and every pass, the graph run node by node; the same with Inductor's code."""

SIZES = {1: "1", 2: "2", 3: "3", 4: "2x2", 6: "6", 8: "2x2x2"}
TOLERANCE = 1e-6


def twins(make: Callable[[], nn.Module], mode: str, **settings: Any) -> tuple[Any, nn.Module]:
    """(wrapped, dense): equal weights. `settings` go to hierarchical_zero."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    dense = copy.deepcopy(model)
    settings = {"topology": SIZES[dist.get_world_size()], "plan": "zero_topo", **MODES[mode], **settings}
    return hierarchical_zero(model, **settings), dense


def batch(rank: int, number: int, *shape: int) -> Tensor:
    """What `rank` sees as its batch `number`: anyone can make anyone's."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * number + rank))


def tokens(rank: int, number: int, vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1000 * number + rank))


Loss = Callable[[Any, int, int], Tensor]
"""(model, rank, batch number) -> that rank's loss."""


def square(*shape: int) -> Loss:
    """Mean square of the output for a random input of `shape`."""

    def loss(model: Any, rank: int, number: int) -> Tensor:
        output = model(batch(rank, number, *shape))
        found: Tensor = output.square().mean()
        return found

    return loss


def ours(model: Any, loss: Loss, number: int, *, sync: bool = True) -> Tensor:
    """Forward and backward of this rank's share."""
    model.set_requires_gradient_sync(sync)
    value = loss(model, dist.get_rank(), number)
    value.backward()
    return value.detach()


def theirs(dense: nn.Module, loss: Loss, number: int) -> Tensor:
    """The same for every rank's share, on the twin; returns this rank's loss."""
    world = dist.get_world_size()
    values = [loss(dense, rank, number) for rank in range(world)]
    for value in values:
        (value / world).backward()
    return values[dist.get_rank()].detach()


def both(model: Any, dense: nn.Module, loss: Loss, number: int, *, sync: bool = True) -> None:
    """One micro-batch on both; the losses agree."""
    mine, other = ours(model, loss, number, sync=sync), theirs(dense, loss, number)
    torch.testing.assert_close(mine.float(), other.float(), rtol=1e-6, atol=1e-6)


def train(model: Any, dense: nn.Module, loss: Loss, *, steps: int = 3, micro: int = 1, lr: float = 0.1,
          optimizer: Callable[..., Any] = torch.optim.SGD, tolerance: float = TOLERANCE) -> None:  # fmt: skip
    """`steps` steps of `micro` micro-batches on both, compared after each."""
    mine, other = optimizer(trained(model), lr=lr), optimizer(trained(dense), lr=lr)
    for step in range(steps):
        for k in range(micro):
            both(model, dense, loss, step * micro + k, sync=k == micro - 1)
        mine.step()
        other.step()
        mine.zero_grad()
        other.zero_grad()
        same(model, dense, tolerance)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def same(model: Any, dense: nn.Module, tolerance: float = TOLERANCE) -> None:
    """Names, shapes and values of the whole state are the dense model's; replicas hold equal bits."""
    full, expected = full_state_dict(model), dense.state_dict()
    assert list(full) == list(expected), f"{list(full)} != {list(expected)}"
    for name, value in expected.items():
        found = full[name]
        assert found.shape == value.shape, f"{name}: {found.shape} instead of {value.shape}"
        torch.testing.assert_close(
            found.float(), value.float(), rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    replicas(model)


def replicas(model: Any) -> None:
    """Every rank that holds a shard holds the same bits of it (NaN included)."""
    mine = [
        (slot.name, slot.unit.specs[0].layout.index(model.zero.coordinates), slot.master.to_local().detach().clone())
        for slot in model.zero.slots
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first: dict[tuple[str, int], Tensor] = {}
    for holds in everyone:
        for name, index, shard in holds:
            other = first.setdefault((name, index), shard)
            equal = torch.equal(other.view(torch.int32), shard.view(torch.int32))
            assert equal, f"replicas of shard {index} of {name} differ"


def mlp() -> nn.Module:
    """Seven features in, three out; sizes that two and four do not divide."""
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def sgd(*models: nn.Module) -> list[torch.optim.SGD]:
    return [torch.optim.SGD(trained(model), lr=0.1) for model in models]


def step(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def graphs(model: Any) -> list[str]:
    """Stages of the graphs that ran, in the order of compiling."""
    return [program.stage for program in model.zero.programs if program.runs]


def received(model: Any, transfer: str) -> dict[str, int]:
    """Bytes per level that the process groups counted for `transfer` in the last step; levels without any left out."""
    from zcompile import ledger

    levels = ledger(model)["levels"]
    for level, rows in levels.items():
        for name, row in rows.items():
            assert row["predicted"] == row["compiled"] == row["counted"], f"{level} {name}: {row}"
    return {level: rows[transfer]["counted"] for level, rows in levels.items() if rows[transfer]["counted"]}


def refused(kind: type[BaseException], words: tuple[str, ...], call: Callable[[], Any]) -> None:
    """`call` raises `kind`, with every one of `words` in its text."""
    try:
        call()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError(f"accepted; expected {kind.__name__} with {words}")


def losses_of(model: Any, width: int, steps: int, rank: int, device: str) -> list[float]:
    """Of AdamW steps on batches that depend on rank and step alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for number in range(steps):
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(10 * number + rank)).to(device)
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
