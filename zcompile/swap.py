"""Gathers and all-to-alls over gloo at the full rate of a link that carries both directions at once.

gloo's own collectives move bulk at half duplex in small groups: the notice that a rank is ready to receive waits on the same connection
behind the data that it sends (measured with torch 2.13: an all-to-all of two ranks reaches 0.50 of the link's rate, an all-gather 0.62).
Receives that are posted before the sends reach 1.00. So here each message is a receive from every member, then a send to every member:
the same bytes, the same result. This is gloo's doing: NCCL and RCCL need none of it, and their groups do not come here.

Tensors of a GPU (several processes that share one, which NCCL refuses) travel through host memory: gloo sends from and receives into that.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zcompile.pool import POOL

MOST_MEMBERS = 16
"""In larger groups every member would hold a connection to every other: gloo's rings are left to do it."""

STREAMS = 8
_NUMBERS, _SIZES = 1 << 16, 1 << 12
"""Of each stream: calls, after which the messages that had a tag before are long over, and sizes of messages, as good as told apart."""


class Swap:
    """The messages of one communicator. Within a stream every member calls the same methods in the same order: stream and number of the
    call are its tag, and the size of the message: one that is not what its receiver expects would end the process (gloo aborts), where so
    both wait, and the watch says for what. Streams are independent of one another, so that threads may each use one of their own.

    Args:
        timeout: seconds that a wait may take before it raises.
    """

    def __init__(self, inner: dist.ProcessGroup, timeout: float):
        self.inner = inner
        self.timeout = timeout
        self._rank, self._size = inner.rank(), inner.size()
        self._calls = [itertools.count() for _ in range(STREAMS)]

    def all_gather(self, output: Tensor, mine: Tensor, stream: int = 0) -> Exchange:
        """output [size * n] becomes every member's `mine` [n], in group order."""
        parts = [mine.reshape(-1)] * self._size
        return self._exchange(output, parts, parts if mine.is_cpu else [parts[0].cpu()] * self._size, stream)

    def all_to_all(self, output: Tensor, mine: Tensor, stream: int = 0) -> Exchange:
        """output [size * n]: from every member that part of its `mine` [size * n] that is meant for this one."""
        parts = mine.reshape(self._size, -1)
        rows = parts.unbind()
        return self._exchange(output, rows, rows if mine.is_cpu else parts.cpu().unbind(), stream)

    def _exchange(self, output: Tensor, parts: Sequence[Tensor], sent: Sequence[Tensor], stream: int) -> Exchange:
        """`parts`: what each member gets; `sent`: the same in host memory."""
        POOL.land(output)
        tag = _tag(stream, next(self._calls[stream]), parts[0].nbytes)
        out = output.view(self._size, -1)
        rows = out.unbind()
        here = output.is_cpu
        landing = rows if here else torch.empty(out.shape, dtype=out.dtype, pin_memory=True).unbind()
        others = [(self._rank + k) % self._size for k in range(1, self._size)]
        works: list[tuple[int, Any]] = [
            (other, self.inner.recv([landing[other]], other, tag)) for other in reversed(others)
        ]
        works += [(other, self.inner.send([sent[other]], other, tag)) for other in others]
        if rows[self._rank].data_ptr() != parts[self._rank].data_ptr():
            rows[self._rank].copy_(parts[self._rank])
        arrived = () if here else [(rows[other], landing[other]) for other in others]
        return Exchange(works, output, sent, timedelta(seconds=self.timeout), arrived)


def _tag(stream: int, number: int, size: int) -> int:
    mixed = size * 0x9E3779B1 >> 16  # sizes are multiples of powers of two: all of their bits count
    return (stream * _SIZES + mixed % _SIZES) * _NUMBERS + number % _NUMBERS


class Exchange(dist.Work):
    """One message in flight. Holds what is sent and where it arrives until it is over: whoever launched it may drop both, and memory that
    is given back is somebody else's.

    Attributes:
        waits_for: the member whose part is waited for: after a wait that failed, the one to blame.
    """

    def __init__(
        self,
        works: list[tuple[int, Any]],
        result: Tensor,
        sent: Sequence[Tensor],
        timeout: timedelta,
        arrived: Sequence[tuple[Tensor, Tensor]] = (),
    ):
        """
        Args:
            sent: what the works send from.
            arrived: (part of the result, where in host memory it comes in) of a result that lies elsewhere.
        """
        super().__init__()
        self.waits_for = -1
        self._timeout = timeout
        self._works = works
        self._result = result
        self._sent: Sequence[Tensor] | None = sent
        self._arrived = arrived
        self._lock = threading.Lock()

    def wait(self, timeout: Any = None) -> bool:
        with self._lock:
            works, self._works = self._works, []
            for self.waits_for, work in works:
                work.wait(timeout or self._timeout)  # gloo's own default is that of the group's making
            arrived, self._arrived = self._arrived, ()
            for part, host in arrived:
                part.copy_(host, non_blocking=True)  # the allocator of pinned memory waits for it
            self._sent = None
        return True

    def is_completed(self) -> bool:
        return not self._works

    def result(self) -> list[Tensor]:
        return [self._result]

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        self.wait()
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result([self._result])
        return future


def do_not_preempt() -> None:
    """From now on no thread of gloo's in this process interrupts another thread when a message wakes it (Linux's SCHED_BATCH; it keeps its
    share of the processor). They are known by their names, which they have from torch 2.13 on; with older ones nothing changes.

    A thread that sends holds its connection's lock, and gloo's own thread asks the kernel for that connection's events again and again
    for as long. Where ranks share cores, the message wakes its receiver, which interrupts the sender at that point: docs/bench.md says
    what that costs.
    """
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # the thread is over; a kernel that allows no change
            if (
                task.joinpath("comm").read_text().strip() == "gloo_tcp_loop"
                and os.sched_getscheduler(int(task.name)) == os.SCHED_OTHER
            ):
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


def _tensor(value: Any) -> Tensor:
    while isinstance(value, (list, tuple)):
        (value,) = value
    assert isinstance(value, Tensor)
    return value


def _gather(swap: Swap, args: tuple[Any, ...], stream: int) -> Exchange | None:
    if isinstance(args[0], (list, tuple)) and len(args[0]) != 1:
        return None
    output, mine = _tensor(args[0]), _tensor(args[1])
    return swap.all_gather(output, mine, stream) if output.is_contiguous() else None


def _all_to_all(swap: Swap, args: tuple[Any, ...], stream: int) -> Exchange | None:
    output, mine, *splits = args[:4]
    if any(len(set(split)) > 1 for split in splits if split) or not output.is_contiguous():
        return None
    return swap.all_to_all(output, mine, stream)


METHODS: dict[str, Callable[[Swap, tuple[Any, ...], int], Exchange | None]] = {
    "all_gather_single_coalesced": _gather,
    "all_gather_single": _gather,
    "allgather_into_tensor_coalesced": _gather,
    "_allgather_base": _gather,
    "all_to_all_single": _all_to_all,
    "alltoall_base": _all_to_all,
}
"""Methods of a process group -> what does the same here; None: it is for the group itself (uneven splits, several tensors)."""
