"""What `zcompile bench` counts of systems that are not ours, and how launched ranks end together."""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.spawn import Pool
from torch import nn

from zcompile.bench import counting, report
from zcompile.bench.memory import Memory
from zcompile.topology import Topology

SIZE = 64 << 20
Ranks = Callable[[int], Pool]


def one_of_each(rank: int) -> dict[str, list[int]]:
    with counting.counting(Topology.parse("2x2")) as found:
        gathered, mine = torch.empty(16), torch.ones(4)
        dist.all_gather_into_tensor(gathered, mine)  # 48 bytes from the rank before: 0 and 2 over the cluster
        dist.all_reduce(torch.ones(8))  # 2 * 32 * 3/4 = 48, likewise
        dist.all_to_all_single(torch.empty(8), torch.ones(8))  # 8 bytes from each: one beside, two beyond
        if rank in (0, 1):
            (dist.send if rank else dist.recv)(torch.ones(5), 1 - rank)  # 20 bytes to rank 0, over the node
        dist.broadcast(torch.ones(3), 3)  # 12 bytes from rank 3
    return found.messages


def test_collectives_are_booked_by_the_level_they_cross(ranks: Ranks) -> None:
    ring = [48, 0, 48, 0], [0, 48, 0, 48]
    cluster = [2 * r + 16 + (12 if rank in (0, 1) else 0) for rank, r in enumerate(ring[0])]
    node = [2 * r + 8 + (20 if rank == 0 else 0) + (12 if rank == 2 else 0) for rank, r in enumerate(ring[1])]
    found = ranks(4).run(one_of_each, timeout=60.0)
    assert [mine["cluster"][1] for mine in found] == cluster and [mine["node"][1] for mine in found] == node


def ddp(rank: int) -> dict[str, list[int]]:
    model = nn.parallel.DistributedDataParallel(nn.Linear(10, 10, bias=False))
    with counting.counting(Topology.parse("2")) as found:
        model(torch.ones(2, 10)).sum().backward()
    return found.messages


def test_collectives_that_cpp_launches_in_a_backward_are_seen(ranks: Ranks) -> None:
    assert ranks(2).run(ddp, timeout=60.0) == [{"cluster": [1, 400]}] * 2


def test_the_sum_over_ranks() -> None:
    topology = Topology.parse("2x2")
    everyone = [counting.Counted(topology) for _ in range(2)]
    for rank, mine in enumerate(everyone):
        mine.add("node", 100)
        mine.add("node", 300 * rank)
        mine.peer_reads = {"node": 7}
    found = counting.total(everyone)
    assert found["node"] == {"messages": 3, "bytes": 500, "mean_bytes": pytest.approx(500 / 3), "peer_read_bytes": 14}
    assert found["cluster"]["mean_bytes"] == 0.0
    assert report._messages({"messages": found}) == "node 3 of 0.2 kB and 0.0 MB read in memory"


def mapped_twice(rank: int) -> int:
    """Peak bytes of a rank that maps `SIZE` bytes of memory twice, as two ranks that read one another's copy do between them."""
    memory = Memory(torch.device("cpu"))
    memory.reset()
    path = Path(f"/dev/shm/zcompile-test-{os.getpid()}")
    with path.open("wb+") as file:
        file.truncate(SIZE)
        views = [torch.frombuffer(mmap.mmap(file.fileno(), SIZE), dtype=torch.uint8) for _ in range(2)]
    path.unlink()
    for view in views:
        view.fill_(1)
    return memory.peak()


def test_a_page_that_several_map_is_charged_once(ranks: Ranks) -> None:
    (peak,) = ranks(1).run(mapped_twice, timeout=60.0)
    assert 0.9 * SIZE <= peak < 1.5 * SIZE


LONE = '''
import torch.distributed as dist
from zcompile.bench import systems
def make(model, setting):
    """Rank 1 fails in its second step, where the others wait for it."""
    trainer = systems.parse("ddp")(model, setting)
    step, steps = trainer.step, []
    def falls(tokens):
        steps.append(tokens)
        if dist.get_rank() == 1 and len(steps) == 2:
            raise ValueError("a cable fell out")
        return step(tokens)
    trainer.step = falls
    return trainer
def alike(model, setting):
    raise ValueError("on all ranks")
'''
COMMAND = """
import sys
from zcompile import cli
from zcompile.bench import launched
launched.GRACE = 1.0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_launched_ranks_end_with_the_report_where_one_fails_alone(tmp_path: Path) -> None:
    """What all ranks refuse alike costs nothing; what one of them does alone ends the run, and all of them, with what was measured."""
    (tmp_path / "lone.py").write_text(LONE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = f"{tmp_path / 'lone.py'}"
    names = f"alike={file}:alike ddp lone={file}:make fsdp2"
    arguments = [
        "bench",
        "--model",
        "tiny",
        "--topology",
        "2",
        "--steps",
        "2",
        "--repetitions",
        "1",
        "--systems",
        names,
    ]
    command = [sys.executable, "-c", COMMAND, *arguments, "--json", str(tmp_path / "found.json")]
    launched = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env={**launched, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], errors
    rows: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())["systems"]
    assert rows["alike"]["error"] == "ValueError: on all ranks"
    assert (
        rows["ddp"]["runs"] == 1 and rows["ddp"]["bytes"]["cluster"] > 0 and rows["ddp"]["bytes_at"] == "process groups"
    )
    assert rows["lone"]["error"].startswith("rank 1: ValueError: a cable fell out")
    assert rows["fsdp2"]["error"] == "did not run"
