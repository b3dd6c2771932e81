"""The refresh: O to W, launched after a write to the masters, waited for inside the forward, unit by unit.

Each unit's hops run in order, outermost level first; the last one lands in the compute copy. The work is registered on the copy's
storage, so that a `wait_tensor(copy)` in the graph (or in an eager op) waits for exactly this unit while later ones are still under
way. Chains of several hops need somebody to launch the next hop when one has finished: a thread on CPU, a side stream on a GPU.

Note [Refresh uses the gradient lane]: the gather lane of a level may be busy with this forward's gathers at any time, in an order that
the graph fixes; a refresh runs beside them in an order that only time fixes. Two orders on one process group would differ between
ranks. Reductions use the other lane in backward only, and every refresh is over by the end of the forward.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from zcompile import transfers
from zcompile._torch_compat import register_future
from zcompile.params import Unit

_c10d = torch.ops._c10d_functional


def run_hops(unit: Unit) -> None:
    """Bring `unit.copy` up to date with its master; returns when the copy is written (on a GPU: enqueued)."""
    x = unit.master
    first = unit.first
    for level in unit.refresh_hops():
        wire = transfers.dtype(unit.refresh[level - 1])
        role = first.role(level, "refresh")
        x = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.to(wire), first.sizes[level - 1], role))
    unit.copy.copy_(x)


class _Worker:
    """The process's one refresh thread, started when it is first needed: jobs of all models run in the order of their launch.

    A daemon: a job that waits for a rank which is gone does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], None]) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._serve, name="zcompile-refresh", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _serve(self) -> None:
        while True:
            self._jobs.get()()


_WORKER = _Worker()


class Refresher:
    """Launches one model's refreshes in unit order and knows when the last one is over."""

    def __init__(self, device: torch.device):
        self._device = device
        self._futures: list[torch.futures.Future[Tensor]] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def launch(self, units: Iterable[Unit]) -> None:
        """Start the refresh of `units`, in order; their copies may be read after a wait on the copy's storage.

        A unit's `seen` is the version of the master that its copy will hold. On the meta device there is nothing to bring.
        """
        for unit in units:
            unit.seen = unit.version
            if unit.master.is_meta:
                continue
            if not unit.refresh_hops():
                with torch.no_grad():
                    unit.copy.copy_(unit.master)
                continue
            future: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=[self._device] if self._stream else None
            )
            register_future(unit.copy, future)
            self._futures.append(future)
            if self._stream is None:
                _WORKER.put(functools.partial(_run, unit, future))
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(self._stream):
                    _run(unit, future)

    def drain(self) -> None:
        """Wait for every refresh that was launched: one that no forward read included. Raises what a refresh raised."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.wait()


def _run(unit: Unit, future: torch.futures.Future[Tensor]) -> None:
    try:
        with torch.no_grad():
            run_hops(unit)
    except Exception as error:
        future.set_exception(error)  # type: ignore[arg-type]
    else:
        future.set_result(unit.copy)
