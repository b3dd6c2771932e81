"""One rank dies, stops, fails or stays behind: the others end in time, and one report says who, where and why."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.faulty import Jobs, Rank, fault, jobs
from torch import nn

from zcompile import hierarchical_zero
from zcompile.faults import flight

LIMIT = 8.0
"""Seconds that a rank waits for another in these jobs."""
SOON = LIMIT + 30


@pytest.fixture(scope="module")
def job() -> Iterator[Jobs]:
    with jobs() as made:
        yield made


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.tanh(self.first(x)))  # the line of both
        return y.square().mean()


FAULTS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": lambda: _raise(),
    "memory": lambda: torch.empty(1 << 60),
    "spin": lambda: time.sleep(10_000),
    "leave": lambda: os.sys.exit(0),
    "pass": lambda: None,
}


def _raise() -> None:
    raise ValueError("the data of sample 17 are no numbers")


def train(rank: int, odd: int, what: str, transfer: str, mode: str, topology: str = "2x2") -> None:
    """Steps of a small model; in the second one rank `odd` fails as it launches a `transfer`."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"eager": {"compile": False}, "graph": {"codegen": False}}[mode]
    model: Any = hierarchical_zero(Model(), topology=topology, plan="zero_topo", timeout=LIMIT, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    launch = flight.Flight.launch

    def failing(start: Any, group: Any, *rest: Any) -> Any:
        if group.transfer == transfer and step == 1 and rank == odd:
            fault()
            FAULTS[what]()
        return launch(start, group, *rest)

    flight.Flight.launch = failing  # type: ignore[method-assign,assignment]
    for step in range(3):
        loss = model(torch.ones(4, 24) * (rank + 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("trained", flush=True)


def report_of(ranks: list[Rank]) -> str:
    """The one report in all that the ranks printed."""
    found = [out[out.index("zcompile: rank") :] for out in (r.output for r in ranks) if "\n  missed in  " in out]
    everything = "".join(rank.output for rank in ranks)
    assert everything.count("\n  missed in  ") == 1, everything
    return found[0]


@pytest.mark.parametrize("what", ["kill", "stop", "raise", "memory"])
@pytest.mark.parametrize("transfer", ["gather", "reduce", "sync"])
def test_f12_f13_f14(job: Jobs, what: str, transfer: str) -> None:
    ranks = job.run(train, 4, 3, what, transfer, "eager")
    for r in ranks:
        print(r.code, r.seconds, r.output)
    print(report_of(ranks))
