"""What eager parts of a model leave saved for the backward: neither a gathered weight nor a cast of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.patches import replaced
from support.saved import nodes_behind, raw_saved
from support.training import batch
from torch import Tensor, nn

from zcompile import engine, full_state_dict, hierarchical_zero

ROWS, WIDTH, INNER = 5, 24, 40
LOW = torch.bfloat16


class Casting(nn.Module):
    """Weights as they are, cast, cast of a view, view of a cast."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(WIDTH, WIDTH)
        self.one = nn.Parameter(torch.randn(INNER, WIDTH) / 5)
        self.two = nn.Parameter(torch.randn(WIDTH, INNER) / 5)
        self.three = nn.Parameter(torch.randn(2, WIDTH // 2, WIDTH) / 5)

    def forward(self, x: Tensor) -> Tensor:
        low = self.plain(x).tanh().to(LOW)
        low = nn.functional.linear(low, self.one.to(LOW)).tanh()
        low = (low @ self.two.t().to(LOW)).tanh()
        out: Tensor = low @ self.three.to(LOW).view(WIDTH, WIDTH).t()
        return out.float()


class Aside(nn.Module):
    """Compiled around a part that no compiler sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.casting = nn.Linear(WIDTH, WIDTH), Casting()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        out: Tensor = self.aside(x)
        return out.tanh()

    @torch.compiler.disable
    def aside(self, x: Tensor) -> Tensor:
        out: Tensor = self.casting(x)
        return out


def saved(loss: Tensor) -> list[Tensor]:
    """Tensors that the graph behind `loss` holds for its backward, of hooks what they were packed into if that is one."""
    found: dict[int, Tensor] = {}
    for node in nodes_behind(loss):
        found |= {tensor.untyped_storage()._cdata: tensor for tensor in raw_saved(node)}
        found |= {t.untyped_storage()._cdata: t for t in getattr(node, "saved_tensors", ()) if isinstance(t, Tensor)}
    return list(found.values())


@contextlib.contextmanager
def without() -> Iterator[None]:
    with replaced(engine, "keep_wholes_out", lambda call: contextlib.nullcontext()):
        yield


def trained(rank: int, compiled: bool, keep: bool) -> tuple[dict[str, Tensor], int, int]:
    """State after two steps; bytes of whole matrices that a forward left saved, all that it left."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = hierarchical_zero(
        Aside() if compiled else Casting(), topology="2x2", plan="zero_topo", compile=compiled, codegen=False
    )
    shapes = [tuple(slot.spec.shape) for slot in model.zero.slots if len(slot.spec.shape) > 1]
    elements = {torch.Size(shape).numel() for shape in shapes}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = everything = 0
    with contextlib.nullcontext() if keep else without():
        for number in range(2):
            loss = model(batch(rank, number, ROWS, WIDTH)).square().mean()
            found = saved(loss)
            held = sum(
                t.untyped_storage().nbytes() for t in found if t.untyped_storage().nbytes() // t.itemsize in elements
            )
            everything = sum(t.untyped_storage().nbytes() for t in found)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return full_state_dict(model), held, everything


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_requirement_18_no_whole_weight_and_no_cast_of_one_is_saved(ranks: Any, compiled: bool) -> None:
    kept = ranks(4).run(trained, compiled, True)
    without_hooks = ranks(4).run(trained, compiled, False)
    for (state, held, everything), (expected, held_there, everything_there) in zip(kept, without_hooks, strict=True):
        assert held == 0 and held_there >= 2 * 2 * WIDTH * INNER + 2 * WIDTH * WIDTH, (held, held_there)
        assert everything <= everything_there - held_there
        for name, value in expected.items():
            assert torch.equal(state[name], value), name
