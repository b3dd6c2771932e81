"""The refresh: O to W, launched after a write to the masters, waited for inside the forward, unit by unit.

Each unit's hops run in order, outermost level first; the last one lands in the compute copy. The work is registered on the copy's
storage, so that a `wait_tensor(copy)` in the graph (or in an eager op) waits for exactly this unit while later ones are still under
way. Chains of several hops need somebody to launch the next hop when one has finished: a thread on CPU, a side stream on a GPU.

Note [Refresh uses the gradient lane]: the gather lane of a level may be busy with this forward's gathers at any time, in an order that
the graph fixes; a refresh runs beside them in an order that only time fixes. Two orders on one process group would differ between
ranks. Reductions use the other lane in backward only, and every refresh is over by the end of the forward.

Note [Barriers]: where gathers read the copies of other ranks in their memory (peer_gather), nobody writes a copy before all that read it
have come to the next refresh, and a copy's refresh is over, for whoever waits for it, when all of them have written theirs.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from zcompile import transfers
from zcompile._torch_compat import register_future
from zcompile.params import Unit
from zcompile.wire import COMPUTE_FORMATS, WireFormat


def run_hops(unit: Unit, full: bool = True) -> None:
    """Bring `unit.copy` up to date with its master; returns when the copy is written (on a GPU: enqueued).

    Args:
        full: of a unit with a delta refresh: send weights, not what has changed.
    """
    first, rows = unit.first, unit.first.layout.shards // unit.first.layout.extents[unit.first.w]
    if unit.image is not None and not full:
        transfers.refresh_delta(unit.master, unit.image, unit.row, unit.specs)
    else:
        x, have = transfers.refresh(unit.master, unit.specs, full=unit.image is not None)
        if unit.image is None:
            unit.copy.copy_(transfers.convert(x, have, first.stored, transfers.flat_geometry(rows, unit.specs)))
            return
        unit.image.view(-1).copy_(x)
    if unit.coded:  # a copy of codes: made from the image here, once, not in every gather
        native = WireFormat.parse(COMPUTE_FORMATS[first.compute])
        geometry = transfers.flat_geometry(rows, unit.specs)
        unit.copy.copy_(transfers.convert(unit.image.view(-1), native, first.stored, geometry))


def barriers(units: Iterable[Unit]) -> dict[tuple[str, str], int]:
    """(level name, "barrier") -> bytes that one rank receives, in the refresh of `units`, so that others may read their copies."""
    found: dict[tuple[str, str], int] = {}
    first: set[int] = set()
    for unit in units:
        level = unit.first.peer_level
        if level:
            key = (unit.first.levels[level - 1], "barrier")
            times = 1 + (level not in first)  # after each write, and once before the first
            found[key] = found.get(key, 0) + times * (unit.first.sizes[level - 1] - 1)
            first.add(level)
    return found


def sent(unit: Unit, full: bool) -> dict[int, int]:
    """level -> bytes that one rank receives in a refresh of this unit: by the sizes of its messages, for the ledger."""
    first, out, rows = unit.first, {}, 1
    for level in unit.refresh_hops():
        wire = WireFormat.parse(COMPUTE_FORMATS[first.compute] if full else first.refresh[level - 1])
        if wire.quantized:
            message = transfers.flat_geometry(rows, unit.specs).message_bytes(wire.code)
        else:
            message = rows * unit.master.numel() * transfers.dtype(wire.text).itemsize
        out[level] = (first.sizes[level - 1] - 1) * message
        rows *= first.sizes[level - 1]
    return out


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

    def launch(self, units: Iterable[Unit], full: Collection[Unit] = ()) -> None:
        """Start the refresh of `units`, in order; their copies may be read after a wait on the copy's storage. Those that are in
        `full` too send weights where the plan says deltas.

        A unit's `seen` is the version of the master that its copy will hold. On the meta device there is nothing to bring.
        """
        ready: set[int] = set()
        for unit in units:
            unit.seen = unit.stepped = unit.version
            unit.foreign = False
            unit.deltas = 0 if unit in full else unit.deltas + 1
            if unit.master.is_meta:
                continue
            level = unit.first.peer_level
            if level and level not in ready:
                ready.add(level)
                self._put(functools.partial(_quietly, transfers.barrier, unit.first, self._device))
            if not unit.refresh_hops() and not level:
                with torch.no_grad():
                    run_hops(unit)
                continue
            future: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=[self._device] if self._stream else None
            )
            register_future(unit.copy, future)
            self._futures.append(future)
            self._put(functools.partial(_run, unit, unit in full, future))

    def _put(self, job: Callable[[], None]) -> None:
        """Run after what was put before it: on the thread, or here on the side stream."""
        if self._stream is None:
            _WORKER.put(job)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            job()

    def drain(self) -> None:
        """Wait for every refresh that was launched: one that no forward read included. Raises what a refresh raised."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.wait()


def _quietly(job: Callable[..., None], *arguments: object) -> None:
    """A barrier that fails is one that the next one on its group fails at too: that one has a future to tell."""
    with contextlib.suppress(Exception):
        job(*arguments)


def _run(unit: Unit, full: bool, future: torch.futures.Future[Tensor]) -> None:
    try:
        with torch.no_grad():
            run_hops(unit, full)
            if unit.first.peer_level:
                transfers.barrier(unit.first, unit.copy.device)
    except Exception as error:
        future.set_exception(error)  # type: ignore[arg-type]
    else:
        future.set_result(unit.copy)
