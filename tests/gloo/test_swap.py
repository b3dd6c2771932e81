"""Messages that post their receives first: what gloo's own collectives give, in any order of sizes, and errors that end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.spawn import Pool, run

from zcompile.runtime import Runtime
from zcompile.swap import METHODS, Swap
from zcompile.topology import Topology

Ranks = Callable[[int], Pool]
SIZES = (1, 5, 4096, 300_001)


def beside_gloo(rank: int) -> list[str]:
    """Both kinds of message of many sizes and dtypes, many in flight at once; what differs from gloo's own."""
    group, wrong = dist.group.WORLD, []
    world, swap = dist.get_world_size(), Swap(group, 20.0)
    jobs: list[tuple[str, Any, torch.Tensor, torch.Tensor]] = []
    for number, size in enumerate(SIZES):
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            generator = torch.Generator().manual_seed(100 * number + rank)
            mine = torch.randint(0, 255, (size,), generator=generator).to(dtype)
            parts = torch.randint(0, 255, (size * world,), generator=generator).to(dtype)
            for kind, x, out in (("gather", mine, size * world), ("exchange", parts, size * world)):
                got, expected = torch.empty(out, dtype=dtype), torch.empty(out, dtype=dtype)
                if kind == "gather":
                    dist.all_gather_into_tensor(expected, x)
                    jobs.append((f"{kind} {size} {dtype}", swap.all_gather(got, x), got, expected))
                else:
                    dist.all_to_all_single(expected, x)
                    jobs.append((f"{kind} {size} {dtype}", swap.all_to_all(got, x), got, expected))
    for name, work, got, expected in reversed(jobs):  # waited for in another order than they were launched in
        work.wait()
        if not torch.equal(got, expected):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("world", [2, 3, 4])
def test_results_are_those_of_gloo(ranks: Ranks, world: int) -> None:
    assert ranks(world).run(beside_gloo) == [[]] * world


class Paper:
    """A process group that writes down what it is asked."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size, self.asked = rank, size, list[tuple[str, int, int]]()

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def recv(self, tensors: list[torch.Tensor], other: int, tag: int) -> Any:
        self.asked.append(("recv", other, tag))

    def send(self, tensors: list[torch.Tensor], other: int, tag: int) -> Any:
        self.asked.append(("send", other, tag))


def test_receives_are_posted_before_sends() -> None:
    """Else gloo moves bulk at half duplex. Each member begins with another one, and who sends first is received from last."""
    group: Any = Paper(1, 4)
    swap = Swap(group, 1.0)
    swap.all_gather(torch.empty(8), torch.ones(2))
    swap.all_to_all(torch.empty(8), torch.ones(8))
    calls = group.asked[:6], group.asked[6:]
    for asked in calls:
        order = [(kind, other) for kind, others in (("recv", (0, 3, 2)), ("send", (2, 3, 0))) for other in others]
        assert [(kind, other) for kind, other, _ in asked] == order
    tags = [{tag for _, _, tag in asked} for asked in calls]
    assert [len(each) for each in tags] == [1, 1] and tags[0] != tags[1], "one for a call, another for the next"


def who_handles(rank: int) -> list[bool]:
    swap = Swap(dist.group.WORLD, 20.0)
    output, mine = torch.empty(6), torch.arange(6.0)
    even = METHODS["all_to_all_single"](swap, (output, mine, [3, 3], [3, 3]), 0)
    assert even is not None and even.wait()
    uneven = METHODS["all_to_all_single"](swap, (output, mine, [2, 4], [2, 4]), 0)
    several = METHODS["all_gather_single_coalesced"](swap, ([torch.empty(2)] * 2, [torch.empty(1)] * 2), 0)
    return [even is not None, uneven is None, several is None]


def test_what_it_does_not_do_is_left_to_the_group(ranks: Ranks) -> None:
    assert ranks(2).run(who_handles) == [[True] * 3] * 2


def two_streams(rank: int) -> bool:
    """Two threads' messages, launched in opposite orders on the two ranks."""
    swap, outs, works = Swap(dist.group.WORLD, 10.0), [torch.empty(2 * 70_000) for _ in range(2)], []
    for stream in (0, 1) if rank else (1, 0):
        works.append(swap.all_gather(outs[stream], torch.full((70_000,), 10.0 * stream + rank), stream))
    for work in works:
        work.wait()
    return all(
        out.view(2, -1)[member].eq(10.0 * stream + member).all() for stream, out in enumerate(outs) for member in (0, 1)
    )


def test_streams_do_not_depend_on_one_anothers_order(ranks: Ranks) -> None:
    assert ranks(2).run(two_streams) == [True, True]


def alone(rank: int) -> Any:
    if rank:
        time.sleep(2.5)
        return None
    start = time.monotonic()
    try:
        Swap(dist.group.WORLD, 0.7).all_gather(torch.empty(2), torch.ones(1)).wait()
    except RuntimeError:
        return time.monotonic() - start
    return "no error"


def test_a_member_that_does_not_come_is_an_error_in_time() -> None:
    seconds = run(alone, 2)[0]
    assert 0.5 < seconds < 2.4


def policies(rank: int) -> dict[bool, set[int]]:
    """Whether a thread is gloo's -> scheduling policies, once a runtime has its groups, and one made later."""
    Runtime.get(Topology.parse("2x2"), timeout=30).background()
    found: dict[bool, set[int]] = {}
    for task in Path("/proc/self/task").iterdir():
        gloos = (task / "comm").read_text().strip() == "gloo_tcp_loop"
        found.setdefault(gloos, set()).add(os.sched_getscheduler(int(task.name)))
    return found


@pytest.mark.skipif(torch.__version__ < "2.13", reason="gloo gives its threads no names before torch 2.13, so none is found")
def test_threads_of_gloo_do_not_interrupt_those_that_send(ranks: Ranks) -> None:
    assert ranks(4).run(policies) == [{True: {os.SCHED_BATCH}, False: {os.SCHED_OTHER}}] * 4
