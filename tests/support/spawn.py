"""Ranks for tests: the pool that `zcompile verify` runs on, in which trouble of a dump is an error and not the warning that a job gets."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

from zcompile import ranks
from zcompile.ranks import Failure, RanksFailed

__all__ = ["Failure", "Pool", "RanksFailed", "run"]


class Pool(ranks.Pool):
    """See zcompile.ranks.Pool."""

    def run(self, fn: Callable[..., Any], *args: Any, **times: float) -> list[Any]:
        if "<locals>" in fn.__qualname__:  # refused there
            return super().run(fn, *args, **times)
        where = (fn.__module__, str(sys.modules[fn.__module__].__file__), fn.__qualname__)
        return super().run(strictly, where, pickle.dumps(args), **times)


def strictly(rank: int, where: tuple[str, str, str], args: bytes) -> Any:
    """The function that `where` names, in a rank. Its arguments may be of what its module defines: that is loaded first."""
    warnings.filterwarnings("error", message="zcompile: no further dump")
    function = ranks._function(*where)
    return function(rank, *pickle.loads(args))


def run(fn: Callable[..., Any], world: int, *args: Any, backend: str | None = "gloo", **times: float) -> list[Any]:
    """See zcompile.ranks.run."""
    pool = Pool(world, backend=backend)
    try:
        return pool.run(fn, *args, **times)
    finally:
        pool.close()
