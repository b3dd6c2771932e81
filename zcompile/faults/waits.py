"""Waiting for works of gloo's, and what a failed one leaves to be asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from zcompile.faults.watch import Watch


def poll(work: Any, limit: float, watch: Watch | None, meanwhile: Callable[[], None] | None = None) -> bool:
    """Wait for a work that may be waited for again (gloo's collectives), looking for a verdict in between, and calling `meanwhile`.

    Returns:
        False if it is not over after `limit` seconds. Raises what the work raises, FaultError, and what `meanwhile` raises.
    """
    deadline = time.monotonic() + limit
    while (left := deadline - time.monotonic()) > 0:
        try:
            work.wait(timedelta(seconds=min(max(left, 0.01), 0.5)))  # less than a millisecond would be no limit at all
            return True
        except RuntimeError:
            if work.is_completed():
                work.wait(timedelta(seconds=1))  # its own error, or it came to its end just now
                return True
        if watch is not None:
            watch.check()
        if meanwhile is not None:
            meanwhile()
    return False


def closed_members(group: dist.ProcessGroup, ranks: Sequence[int]) -> list[int]:
    """Of `ranks`, in group order, those to which this rank's connection is closed: a receive from them cannot even be posted (gloo)."""
    found = []
    for member, rank in enumerate(ranks):
        if member == group.rank():
            continue
        try:
            _POSTED.append(group.recv([torch.empty(1)], member, _PROBE))
        except RuntimeError:
            found.append(rank)
    return found


_POSTED: list[Any] = []
"""Receives that nobody will answer: they live as long as the process, which is not long."""
_PROBE = (1 << 31) - 1
"""A tag that no message has."""
