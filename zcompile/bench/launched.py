"""Work that a launcher's ranks do together, and the end of it where one fails alone.

A rank that raises while others wait for it leaves them in a collective that nobody can call off. So each rank says in the job's store how
its work ended, and watches, over a connection of its own, whether another one has failed: if this rank does not come to its end within
`GRACE` seconds of that, or has come to another end, `end` is called on every rank.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from zcompile import _torch_compat as compat

T = TypeVar("T")
GRACE = 20.0
"""Seconds in which a rank that meets the same error as another one has raised it too."""
REPORT = 30.0
"""Seconds in which rank 0 has made its report; the others wait for that, as launchers end all ranks when the first one has ended."""
_TICK = 0.1


class Together:
    """All ranks make it, and call `run` equally often.

    Args:
        end: called with a text, on every rank, when one has failed alone; it does not return. On any thread.
    """

    def __init__(self, end: Callable[[str], Any]):
        self._store = compat.clone_store(compat.default_store())
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._end = end
        self._ending = threading.Lock()
        self._numbers = itertools.count()

    def run(self, work: Callable[[], T]) -> tuple[T | None, str]:
        """(what `work` returned, "") on all ranks, or (None, the error) on all ranks."""
        prefix, over = f"zc/bench/{next(self._numbers)}", threading.Event()
        threading.Thread(target=self._watch, args=(prefix, over), name="zcompile-bench-watch", daemon=True).start()
        value, error = None, ""
        try:
            value = work()
        except Exception as found:
            error = f"{type(found).__name__}: {found}"[:400]
        if error:
            self._store.compare_set(f"{prefix}/failed", "", f"rank {self._rank}: {error}")
        self._store.set(f"{prefix}/{self._rank}", json.dumps(error))
        keys = [f"{prefix}/{rank}" for rank in range(self._world)]
        while not self._store.check(keys):
            time.sleep(_TICK)
        over.set()
        errors = [json.loads(text) for text in self._store.multi_get(keys)]
        if any(errors) and not all(errors):
            self._stop(self._store.get(f"{prefix}/failed").decode())
        with (
            self._ending
        ):  # not while the other thread ends the process, which closes connections and so ends waits here
            return value, error

    def _watch(self, prefix: str, over: threading.Event) -> None:
        store = compat.clone_store(self._store)
        with contextlib.suppress(RuntimeError):  # the store went with the process that holds it
            while not over.wait(5 * _TICK):
                if store.check([f"{prefix}/failed"]):
                    if not over.wait(GRACE):
                        self._stop(store.get(f"{prefix}/failed").decode())
                    return

    def _stop(self, text: str) -> None:
        with self._ending:  # the first thread to come ends the process
            self._end(text)


def wait_for_report(store: compat.Store, rank: int) -> None:
    """Rank 0 says that its report is made, and lets the others see it; they wait for that."""
    store = compat.clone_store(store)
    with contextlib.suppress(RuntimeError):
        if rank == 0:
            store.set("zc/bench/reported", "")
            time.sleep(10 * _TICK)
            return
        until = time.monotonic() + REPORT
        while time.monotonic() < until and not store.check(["zc/bench/reported"]):
            time.sleep(_TICK)
