"""One collective under way: a work that knows which one it is, and says so when it fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from zcompile.faults import checksums
from zcompile.faults.sites import Site
from zcompile.faults.waits import closed_members, poll
from zcompile.faults.watch import Watch
from zcompile.swap import Exchange


class Flight(dist.Work):
    """A work of a CPU group. Its wait raises `FaultError` when a rank is lost, and `ChecksumError` when asked to compare.

    On a GPU the host waits for nothing: there the backend's own work goes out, and the watch looks after it.
    """

    def __init__(self, work: Any, group: Any, watch: Watch, site: Site, label: str, check: Callable[[], None] | None):
        super().__init__()
        self._work, self._group, self._watch, self._site = work, group, watch, site
        self._label, self._check = label, check
        self._lock = threading.Lock()
        self._done = False

    @classmethod
    def launch(
        cls, start: Callable[[], Any], group: Any, watch: Watch, op: str, args: tuple[Any, ...], label: str
    ) -> Any:
        """Launch by `start` and return the work to wait for.

        Args:
            group: the zcompile.groups.CountingGroup that was called, with `args`.
            label: what the wait is called in a profiler's trace; "" for nothing.
        """
        site = watch.site(group.level, group.transfer, op, group.ranks)
        check = checksums.launch(group, op, args, site) if group.checksums else None
        if group.origins is not None and op == "all_to_all":
            group.origins.sent(site.parameters, args[1])
        try:
            work = start()
        except RuntimeError as error:
            closed = [] if watch.on_device else closed_members(group.inner, group.ranks)
            if not closed:
                raise
            raise watch.lost(site, error, missing=closed, closed=closed) from error
        if watch.on_device and not isinstance(work, Exchange):
            watch.track(site, work)
            if check is None:
                return work
        return cls(work, group, watch, site, label, check)

    def wait(self, timeout: Any = None) -> bool:
        if self._group.disturb is not None:
            self._group.disturb.wait(self._group.level)
        with self._lock:
            if self._done:
                return True
            self._watch.wait_begins(self._site, self._missing)
            try:
                with record_function(f"zc wait {self._label}") if self._label else contextlib.nullcontext():
                    self._wait()
                    if self._check is not None:
                        self._check()
            finally:
                self._watch.wait_ends()
            self._done = True
        return True

    def _wait(self) -> None:
        watch = self._watch
        try:
            if isinstance(self._work, Exchange):
                self._work.wait()
                return
            if poll(self._work, watch.timeout, watch):
                return
            error: Exception | str = f"no answer after {watch.timeout:g} s"
        except RuntimeError as found:
            error = found
        asks = not watch.on_device and "imed out" not in str(error)
        closed = closed_members(self._group.inner, self._group.ranks) if asks else []
        raise watch.lost(self._site, error, missing=closed or self._missing(), closed=closed)

    def _missing(self) -> list[int]:
        """The rank whose part is waited for, where that is known."""
        if isinstance(self._work, Exchange) and self._work.waits_for >= 0:
            return [self._group.ranks[self._work.waits_for]]
        return []

    def is_completed(self) -> bool:
        return self._done or bool(self._work.is_completed())

    def result(self) -> list[torch.Tensor]:
        return self._work.result()  # type: ignore[no-any-return]

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        self.wait()
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result(self.result())
        return future
