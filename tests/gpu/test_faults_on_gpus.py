"""Faults where NCCL or RCCL carries the collectives, and the host waits for none of them. Needs two GPUs: not run yet."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from support.faulty import fault, jobs
from torch import nn

from zcompile import hierarchical_zero
from zcompile.faults import flight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins one process a GPU: needs two GPUs"),
]
LIMIT = 15.0


def train(rank: int, what: str) -> None:
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    model: Any = hierarchical_zero(
        nn.Linear(64, 64).cuda(), topology="2", plan="zero_topo", timeout=LIMIT, compile=False
    )
    launched, step = flight.Flight.launch, 0

    def launch(start: Any, group: Any, *rest: Any) -> Any:
        if rank == 1 and step == 1 and group.transfer == "reduce":
            fault()
            if what == "raise":
                raise ValueError("sample 17 is no number")
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        return launched(start, group, *rest)

    flight.Flight.launch = launch  # type: ignore[method-assign,assignment]
    for step in range(3):  # noqa: B007 (what `launch` reads)
        model(torch.ones(4, 64, device="cuda")).square().mean().backward()
        torch.cuda.synchronize()
    time.sleep(1)


@pytest.mark.parametrize(
    ("what", "said"),
    [("kill", "rank 1 does not answer"), ("stop", "rank 1 does not answer"), ("raise", "rank 1 raised ValueError")],
)
def test_f12_f13_f14_with_nccl(what: str, said: str) -> None:
    with jobs() as job:
        ranks = job.run(train, 2, what)
    assert ranks[0].code not in (0, None) and ranks[0].seconds < LIMIT + 30, ranks
    report = "".join(rank.output for rank in ranks)
    assert f"zcompile: {said}" in report and "missed in  reduce all_to_all over cluster" in report, report
