"""Peer gathers through torch's symmetric memory: the bits of messages. Where there is one GPU two ranks share it; skipped without any."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.spawn import run
from support.training import losses_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device, and there is none"),
]


def losses(rank: int, gather: str, peer: bool) -> list[float]:
    from zcompile import Plan, hierarchical_zero

    # torch refuses two ranks on one device by default: it would be of no use to anybody but a test.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).cuda()
    plan = Plan.preset("hsdp", gather=gather, peer_gather=peer)
    model: Any = hierarchical_zero(module, topology="2x1", plan=plan, compute_dtype=torch.bfloat16, codegen=False)
    return losses_of(model, 256, 4, rank, "cuda")


@pytest.mark.parametrize("gather", ["int8", "native"])
def test_bits_are_those_of_messages(gather: str) -> None:
    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    plain, read = (run(losses, 2, gather, peer, backend=backend, timeout=300.0) for peer in (False, True))
    assert plain == read
