"""Ranks for tests: the pool that `zcompile verify` runs on, in which trouble of a dump is an error and not the warning that a job gets.

side_by_side(fn, [a, b, c]) -> {a: fn(a), b: fn(b), c: fn(c)}, computed in two processes: for work of a core each.
"""

from __future__ import annotations

import gc
import pickle
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from zcompile import ranks
from zcompile.ranks import Failure, RanksFailed

__all__ = ["Failure", "Pool", "RanksFailed", "run", "side_by_side"]

RARELY = (20_000, 50, 100)
"""Thresholds of the garbage collector: looking through what a compile makes and keeps took a tenth of its time."""


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
    gc.set_threshold(*RARELY)
    function = ranks._function(*where)
    return function(rank, *pickle.loads(args))


def run(fn: Callable[..., Any], world: int, *args: Any, backend: str | None = "gloo", **times: float) -> list[Any]:
    """See zcompile.ranks.run."""
    pool = Pool(world, backend=backend)
    try:
        return pool.run(fn, *args, **times)
    finally:
        pool.close()


Item = TypeVar("Item", bound=Hashable)


def side_by_side(fn: Callable[[Item], Any], items: Sequence[Item], timeout: float = 600.0) -> dict[Item, Any]:
    """What a module-level function returns for each item, which is pickled as its result is. RanksFailed if it raises for one."""
    if not items:
        return {}
    where = (fn.__module__, str(sys.modules[fn.__module__].__file__), fn.__qualname__)
    found = run(_share, min(2, len(items)), where, items, backend=None, timeout=timeout)
    return {item: result for share in found for item, result in share}


def _share(process: int, where: tuple[str, str, str], items: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Every second item, so that neighbours, which often take equally long, are shared out."""
    function = ranks._function(*where)
    return [(item, function(item)) for item in items[process::2]]
