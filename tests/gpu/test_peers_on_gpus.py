"""Peer gathers through torch's symmetric memory, on GPUs that can read one another: the bits of messages. Skipped without two of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.spawn import run

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs that can read one another, here: {torch.cuda.device_count()}"
)


def losses(rank: int, peer: bool) -> list[float]:
    from zcompile import Plan, hierarchical_zero

    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).cuda()
    plan = Plan.preset("hsdp", gather="int8", peer_gather=peer)
    model: Any = hierarchical_zero(module, topology="2x1", plan=plan, compute_dtype=torch.bfloat16, codegen=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for number in range(4):
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(10 * number + rank)).cuda()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_bits_are_those_of_messages() -> None:
    plain, read = (run(losses, 2, peer, backend="nccl", timeout=300.0) for peer in (False, True))
    assert plain == read
