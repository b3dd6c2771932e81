"""Memory of a hop that is under way is nobody else's: whoever launched it drops its tensors, others of that size are written meanwhile."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.spawn import Pool

from zcompile.passes import pin
from zcompile.runtime import Runtime
from zcompile.swap import Exchange, Swap
from zcompile.topology import Topology

Ranks = Callable[[int], Pool]
BYTES = 1 << 16
"""Small enough for the allocator to hand the same memory out again at once."""
LATE = 0.3
"""Seconds by which one member comes later. gloo sends nothing before the other side has asked for it."""
functional = torch.ops._c10d_functional


def overwrite() -> list[torch.Tensor]:
    return [torch.full((BYTES,), 7, dtype=torch.uint8) for _ in range(16)]


class Careless:
    """A group of gloo that holds no tensor: it is handed memory that others own. gloo's own does hold them, as of torch 2.13."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def recv(self, tensors: list[torch.Tensor], other: int, tag: int) -> Any:
        return self._inner.recv([self._alias(t) for t in tensors], other, tag)

    def send(self, tensors: list[torch.Tensor], other: int, tag: int) -> Any:
        return self._inner.send([self._alias(t) for t in tensors], other, tag)

    @staticmethod
    def _alias(t: torch.Tensor) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_char * t.nbytes).from_address(t.data_ptr()), dtype=t.dtype)


def dropped(rank: int, kind: str, forget: str) -> list[bool]:
    """Whether what each member sent arrived here; rank 1 is late. `forget`: what a message is made not to hold."""
    group: Any = Careless(dist.group.WORLD)
    swap, world = Swap(group, 20.0), dist.get_world_size()
    time.sleep(LATE * (rank == 1))
    mine = torch.full((BYTES * (world if kind == "all_to_all" else 1),), rank + 1, dtype=torch.uint8)
    work = getattr(swap, kind)(torch.empty(BYTES * world, dtype=torch.uint8), mine)
    del mine
    if forget:
        setattr(work, forget, None)
    others = overwrite()
    work.wait()
    found = work.result()[0].view(world, -1)
    assert all(bool(other.eq(7).all()) for other in others), "nothing was received into their memory"
    return [bool(found[member].eq(member + 1).all()) for member in range(world)]


@pytest.mark.parametrize("kind", ["all_gather", "all_to_all"])
def test_a_message_holds_what_it_sends_and_receives(ranks: Ranks, kind: str) -> None:
    assert ranks(2).run(dropped, kind, "") == [[True, True]] * 2


def test_a_message_that_does_not_hold_what_it_sends_is_seen(ranks: Ranks) -> None:
    assert ranks(2).run(dropped, "all_gather", "_sent")[1] == [False, True]


def graph(x: torch.Tensor, role: str) -> tuple[torch.Tensor, ...]:
    """A hop whose input is needed no more, and results of its size before the wait."""
    arriving = functional.all_gather_into_tensor(x * 2, 2, role)
    others = [(x + k) @ x for k in range(4)]  # a buffer for each x + k
    return functional.wait_tensor(arriving), *others


def late(rank: int, compiled: bool, mutant: bool) -> bool:
    """Whether rank 1, which comes late, gets what rank 0 sent, and the other way round."""
    from torch._inductor import ir

    torch._dynamo.reset()
    role = Runtime.get(Topology.parse("2"), timeout=30).role(1, "gather")
    run: Any = (
        torch.compile(graph, fullgraph=True, options={**pin.PATCHES, "fx_graph_cache": False}) if compiled else graph
    )
    x = torch.full((128, 128), float(rank + 1))
    forgets = mock.patch.object(ir._WaitKernel, "get_volatile_reads", lambda self: [])
    with forgets if mutant else mock.patch.dict({}):
        run(x, role)
    dist.barrier()
    time.sleep(LATE * (rank == 1))
    found = run(x, role)[0].view(2, -1)
    return all(bool(found[member].eq(2.0 * (member + 1)).all()) for member in range(2))


@pytest.mark.parametrize("compiled", [False, True])
def test_no_buffer_of_a_graph_is_reused_under_a_hop(ranks: Ranks, compiled: bool) -> None:
    assert ranks(2).run(late, compiled, False, timeout=120.0) == [True, True]


def test_generated_code_that_reuses_one_is_seen(ranks: Ranks) -> None:
    assert ranks(2).run(late, True, True, timeout=120.0)[1] is False


def test_what_was_sent_is_given_back_when_the_message_is_over() -> None:
    sent = torch.ones(2)
    message = Exchange([], torch.empty(2), sent, timeout=None)  # type: ignore[arg-type]
    assert message._sent is sent
    message.wait()
    assert message._sent is None
