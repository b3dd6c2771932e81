"""Saving, resuming and starting on a GPU that two ranks share, over gloo: the device's own random state, and masters that lie there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.spawn import run
from support.state import Awkward, same_bits, whole_state
from support.training import tokens

import zcompile
from zcompile import deferred_init, hierarchical_zero

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device, and there is none"),
]


def made(seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """An Awkward model whose weights are made on the device, shard by shard."""
    torch.manual_seed(seed)
    with deferred_init():
        plain = Awkward(dropout=0.2)
    model: Any = hierarchical_zero(plain, topology="2", plan="zero_topo", compile=False, device="cuda")
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: Any, optimizer: torch.optim.Optimizer, rank: int, numbers: range) -> dict[str, Any]:
    for number in numbers:
        model(tokens(rank, number, 11, 2, 5).to("cuda")).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**whole_state(model, optimizer), "drawn": torch.rand(3, device="cuda").cpu()}


def _on_a_gpu(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain = Awkward(dropout=0.2)
    model, optimizer = made(0)
    assert all(p.to_local().is_cuda for p in model.parameters())
    same_bits(whole_state(model), {name: value.cpu() for name, value in plain.state_dict().items()})

    torch.manual_seed(100 + rank)
    train(model, optimizer, rank, range(2))
    saving = zcompile.save(model, optimizer, f"{folder}/two", {"step": 2}, asynchronous=True)
    expected = train(model, optimizer, rank, range(2, 4))
    assert saving is not None
    saving.wait()
    other, again = made(1)
    found = zcompile.load(other, again, f"{folder}/two")
    assert found.exact and found.extra == {"step": 2}
    same_bits(train(other, again, rank, range(2, 4)), expected)
    zcompile.export(other, f"{folder}/out")
    zcompile.load_pretrained(made(2)[0], f"{folder}/out")


def test_a_run_on_a_gpu_starts_saves_and_resumes_as_one_on_a_cpu(tmp_path: Path) -> None:
    run(_on_a_gpu, 2, str(tmp_path), timeout=300)
