"""Memory: model states equal their closed form, and what a step gathers does not grow with the number of layers."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from zcompile import cost, hierarchical_zero
from zcompile.passes.nodes import COLLECTIVES, WAIT, derived, find

PRESETS = ("ddp", "zero1", "zero2", "zero3", "hsdp", "zeropp", "zero_topo")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 17), nn.LayerNorm(17))


def state_bytes(rank: int, plan: str, topology: str, dtype: torch.dtype | None) -> dict[str, Any]:
    wrapped = hierarchical_zero(model(), topology=topology, plan=plan, compile=False, compute_dtype=dtype)
    engine = wrapped.zero
    optimizer = torch.optim.AdamW(wrapped.parameters())
    with wrapped.no_sync():
        wrapped(torch.ones(2, 24)).float().sum().backward()
    have = dict(engine.memory())
    wrapped(torch.ones(2, 24)).float().sum().backward()
    after = engine.memory()["main"]
    have["gradient"] = sum(s.master.grad.to_local().untyped_storage().nbytes() for s in engine.slots)
    optimizer.step()
    local = [t.to_local() for s in optimizer.state.values() for t in s.values() if t.dim()]
    rows = sum(slot.spec.layout.local_rows(engine.coordinates)[1] * slot.spec.layout.row for slot in engine.slots)
    copies = {slot.name: int(slot.unit.cached) for slot in engine.slots}
    want = cost.state_bytes((slot.spec for slot in engine.slots), copies, accumulating=True)
    return {
        "have": have,
        "want": want,
        "main after sync": after,
        "moments": sum(t.numel() * t.itemsize for t in local),
        "moments of own rows": 8 * rows,
    }


NATIVE = ("ddp", "zero3", "hsdp", "zero_topo")
"""Presets whose copy in fp32 is the master itself, and one whose copy is another buffer, as it is in bf16 with all of them."""


@pytest.mark.parametrize(
    ("plan", "dtype"), [*((plan, None) for plan in NATIVE), *((plan, torch.bfloat16) for plan in PRESETS)]
)
def test_model_state_bytes_equal_the_closed_form(ranks: Any, plan: str, dtype: torch.dtype | None) -> None:
    for result in ranks(8).run(state_bytes, plan, "2x2x2", dtype):
        have, want = result["have"], result["want"]
        assert {key: have[key] for key in ("master", "copy", "main")} == {
            key: want[key] for key in ("master", "copy", "main")
        }
        # autograd copies a gradient that somebody else still holds just then: the copy has no padding
        assert result["moments of own rows"] / 2 <= have["gradient"] <= want["gradient"]
        assert result["main after sync"] == 0
        assert result["moments"] == result["moments of own rows"] <= want["moments"]


def most_gathered(gm: torch.fx.GraphModule) -> int:
    """Highest sum of bytes of gathered weights (messages received and what is unpacked from them) alive at one time."""
    sources = [user for node in find(gm.graph, *COLLECTIVES) for user in node.users if "gather" in str(node.args[2])]
    if not sources:
        return 0
    owners = derived(node for node in sources if node.target is WAIT) | set(find(gm.graph, *COLLECTIVES))
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    alive: dict[int, int] = {}
    for node in owners:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            last = max((order[user] for user in node.users), default=order[node])
            for index in range(order[node], last + 1):
                alive[index] = alive.get(index, 0) + value.numel() * value.itemsize
    return max(alive.values())


def gathered(rank: int, layers: int, bias: bool = False, overlap: int = 2) -> list[int]:
    found: list[int] = []
    from zcompile import params
    from zcompile.backend import Compilation

    torch.manual_seed(0)  # whatever ran on these ranks before
    with mock.patch.object(params, "VECTOR_BYTES", 512):
        wrapped = hierarchical_zero(
            nn.Sequential(*(nn.Linear(32, 32, bias) for _ in range(layers))),
            topology="2",
            plan="zero3",
            codegen=False,
            overlap=overlap,
        )
    run = Compilation.half

    def half(self: Any, gm: Any, *args: Any, **kwargs: Any) -> Any:
        out = run(self, gm, *args, **kwargs)
        found.append(most_gathered(gm))
        return out

    Compilation.half = half  # type: ignore[method-assign]
    try:
        wrapped(torch.ones(2, 32)).sum().backward()
    finally:
        Compilation.half = run  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("overlap", [0, 2])
def test_transient_memory_does_not_grow_with_depth(ranks: Any, overlap: int) -> None:
    shallow, deep = (ranks(2).run(gathered, layers, False, overlap)[0] for layers in (8, 32))
    assert len(shallow) == 2 and all(shallow)
    assert shallow == deep
    layer = 4 * (32 * 32 + 32)
    assert max(deep) < (4 + 1.5 * overlap) * layer, "a layer or two, the messages of one, and those under way"


@pytest.mark.slow
def test_vectors_that_travel_together_are_bounded_too(ranks: Any) -> None:
    """Four biases of 128 bytes share a message of at most 512; with 32 layers as with 8."""
    shallow, deep = ranks(2).run(gathered, 8, True, 0)[0], ranks(2).run(gathered, 32, True, 0)[0]
    alone = ranks(2).run(gathered, 8, False, 0)[0]
    assert shallow == deep
    assert 0 < max(deep) - max(alone) <= 2 * 512


def refresh_threads(rank: int) -> int:
    torch.manual_seed(0)
    for _ in range(3):
        wrapped = hierarchical_zero(nn.Linear(8, 8), topology="2x2x2", plan="zero_topo", compile=False)
        wrapped(torch.ones(2, 8)).sum().backward()
    return sum(thread.name.startswith("zcompile-refresh") for thread in threading.enumerate())


def test_models_that_come_and_go_leave_no_threads_behind(ranks: Any) -> None:
    assert ranks(8).run(refresh_threads) == [4] * 8, "one for each level, and one for what follows the last hop"
