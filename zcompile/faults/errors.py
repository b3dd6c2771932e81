"""What an error says of itself: as last words, and whether another rank is behind it."""

from __future__ import annotations

import traceback
from typing import Any

import torch.distributed as dist

from zcompile.faults import memory
from zcompile.faults.sites import places, users_line
from zcompile.faults.verdict import FaultError

_GLOO = ("gloo/transport", "Application timeout caused pair closure", "Operation timed out!")
"""What gloo's errors have in their texts; NCCL's and the store's have types of their own."""


def described(error: BaseException) -> dict[str, Any]:
    """An error as it goes on the board; for one that ran out of memory, by whom memory is taken."""
    found: dict[str, Any] = {
        "type": type(error).__name__,
        "message": (str(error).splitlines() or [""])[0][:300],
        "line": users_line(places(reversed(list(traceback.walk_tb(error.__traceback__))))),
    }
    if memory.ran_out(error):
        found["memory"] = memory.describe()
    return found


def is_verdict(error: BaseException | None) -> bool:
    """Whether an error is one of ours about another rank, or was raised on account of one."""
    while error is not None:
        if isinstance(error, FaultError):
            return True
        error = error.__cause__ or error.__context__
    return False


def of_collectives(error: BaseException) -> bool:
    """Whether it was raised, or its cause, by a collective because of another rank's end, or of the time that another rank took."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, dist.DistError) or (
            isinstance(found, RuntimeError) and any(said in str(found) for said in _GLOO)
        ):
            return True
        found = found.__cause__
    return False
