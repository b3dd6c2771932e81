"""The refresh: O to W, launched after a write to the masters, waited for inside the forward, unit by unit.

Each unit's hops run in order, outermost level first; the last one lands in the compute copy. Units follow one another, each level busy
with another unit. The work is registered on the copy's
storage, so that a `wait_tensor(copy)` in the graph (or in an eager op) waits for exactly this unit while later ones are still under
way. Chains of several hops need somebody to launch the next hop when one has finished: a thread per level on CPU, a side stream on a GPU.

Note [Refresh uses the gradient lane]: the gather lane of a level may be busy with this forward's gathers at any time, in an order that
the graph fixes; a refresh runs beside them in an order that only time fixes. Two orders on one process group would differ between
ranks. Reductions use the other lane in backward only, and every refresh is over by the end of the forward.

Note [Barriers]: where gathers read the copies of other ranks in their memory (peer_gather), nobody writes a copy before all that read it
have come to the next refresh, and a copy's refresh is over, for whoever waits for it, when all of them have written theirs.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zcompile import lossless, transfers
from zcompile._torch_compat import all_gather, below_autograd, register_future
from zcompile.faults.sites import Parameters, about
from zcompile.faults.watch import REFRESH_THREADS
from zcompile.params import Unit
from zcompile.pool import POOL
from zcompile.wire import COMPUTE_FORMATS, WireFormat

_FP32 = WireFormat.parse("fp32")


def run_hops(unit: Unit, full: bool = True) -> Iterator[int]:
    """Bring `unit.copy` up to date with its master; when it ends the copy is written (on a GPU: enqueued).

    Yields each of the machine's levels, outermost first, before its hop is launched, and 0 before the copy is written: units follow one
    another through these stages, so that a hop of one is under way beside hops of others over other levels. A unit without a hop over a
    level passes that stage too: else it would overtake another one, sooner on one rank than on the next.

    Args:
        full: of a unit with a delta refresh: send weights, not what has changed.
    """
    first, specs, image = unit.first, unit.specs, unit.image
    delta = image is not None and not full
    message, unit.message = None if full else unit.message, None
    x, have, rows = unit.master, _FP32, 1
    hops = unit.refresh_hops()
    places: dict[int, Tensor] = {}
    for level in stages(unit):
        yield level
        if level not in hops:
            continue
        if rows == 1 and message is not None:
            x, places = _places(unit, message.numel(), message.dtype)
            x.copy_(message)
        elif rows == 1 and image is None:
            x, have, places = own_place(unit, full)
        if places:
            x, rows = transfers.gather_in_place(x, places[level], level, first, "refresh"), rows * first.sizes[level - 1]
            continue
        if delta and rows == 1:
            assert image is not None
            have = WireFormat.parse(first.refresh[first.w])
            flat = transfers.flat_geometry(1, specs).text
            x = transfers.kernels.quantize_delta(unit.master, image[unit.row], flat, have.code.text)
        wire = sent_as(unit, level, full)
        x, have, rows = transfers.gather_hops(x, have, [(level, wire.text)], specs, "refresh", rows)
    yield 0
    if message is not None:
        lossless.apply(unit, x)
        return
    geometry = transfers.flat_geometry(rows, specs)
    if image is None:
        stored = transfers.convert(x, have, first.stored, geometry)
        if first.in_place:
            columns = stored.view(rows, -1)
            torch._foreach_copy_(unit.copied, columns.split([spec.layout.shard for spec in specs], dim=1))
        else:
            unit.copy.copy_(stored)
        return
    if delta:
        transfers.kernels.apply_delta(image, x, geometry.text, have.code.text)
    else:
        image.view(-1).copy_(x)
    copy_from_image(unit)


def sent_as(unit: Unit, level: int, full: bool) -> WireFormat:
    """The format of the hop over a level: that of the plan, or native in a `full` one where the plan has deltas."""
    first = unit.first
    return WireFormat.parse(COMPUTE_FORMATS[first.compute] if full and first.delta else first.refresh[level - 1])


def own_place(unit: Unit, full: bool) -> tuple[Tensor, WireFormat, dict[int, Tensor]]:
    """Memory for all rows of a refresh whose hops have one native format, each of which then gathers into its part of it: nobody's own
    values are copied in between.

    Returns:
        (the master's values, where they belong among all; their format; level -> where its hop gathers to). Of other refreshes the master
        itself, fp32, nothing.
    """
    wires = {sent_as(unit, level, full) for level in unit.refresh_hops()}
    wire = wires.pop()
    if wires or wire.quantized:
        return unit.master, _FP32, {}
    x, places = _places(unit, unit.master.numel(), transfers.dtype(wire.text))
    return x.copy_(unit.master), wire.whole, places


def _places(unit: Unit, elements: int, dtype: torch.dtype) -> tuple[Tensor, dict[int, Tensor]]:
    """(this rank's row [elements], level -> where its hop gathers to) in memory for all rows of a refresh."""
    hops = unit.refresh_hops()
    rows, row, places = math.prod(unit.first.sizes[level - 1] for level in hops), unit.row, {}
    x = torch.empty(rows * elements, dtype=dtype, device=unit.master.device)
    POOL.land(x)
    for level in reversed(hops):
        places[level] = x
        size = unit.first.sizes[level - 1]
        rows //= size
        x = x.view(size, -1)[row // rows]
        row %= rows
    return x, places


def copy_from_image(unit: Unit) -> None:
    """A copy of codes is made from the image here, once, not in every gather; any other copy is the image."""
    if unit.coded:
        assert unit.image is not None
        native = WireFormat.parse(COMPUTE_FORMATS[unit.first.compute])
        geometry = transfers.flat_geometry(len(unit.image), unit.specs)
        unit.copy.copy_(transfers.convert(unit.image.view(-1), native, unit.first.stored, geometry))


def spread_image(unit: Unit) -> None:
    """Every holder's image from the owners' own rows, as they came from a checkpoint. Not a transfer of a step: not counted."""
    assert unit.image is not None
    mesh: Any = cast(DTensor, unit.slots[0].master).device_mesh
    x = unit.image[unit.row].clone()
    for level in unit.refresh_hops():
        out = x.new_empty(unit.first.sizes[level - 1] * x.numel())
        all_gather(out, x, mesh.get_group(level - 1)).wait()
        x = out
    unit.image.view(-1).copy_(x)


def stages(unit: Unit) -> list[int]:
    """Levels over which anything can travel, outermost first: the same for all units of a topology."""
    return [level for level in range(len(unit.first.sizes), 0, -1) if unit.first.sizes[level - 1] > 1]


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
        wire = sent_as(unit, level, full)
        if wire.quantized:
            message = transfers.flat_geometry(rows, unit.specs).message_bytes(wire.code)
        elif wire.lossless:
            message = rows * sum(wire.bytes(spec.layout.shard) for spec in unit.specs)
        else:
            message = rows * unit.master.numel() * transfers.dtype(wire.text).itemsize
        out[level] = (first.sizes[level - 1] - 1) * message
        rows *= first.sizes[level - 1]
    return out


class _Workers:
    """The process's refresh threads, one per stage (a level's index; 0: what follows the last hop), started when they are first needed.

    A job is an iterator that yields its next stage. Every job of a topology passes through the same stages, each of which takes them in
    the order in which they come: so the order on each process group is that of the launches, the same on all ranks. Daemons: a job
    that waits for a rank which is gone does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._stages: dict[int, queue.SimpleQueue[Iterator[int]]] = {}
        self._pid = 0

    def put(self, job: Iterator[int]) -> None:
        """Run up to its first stage here, the rest there."""
        stage = next(job, None)
        if stage is None:
            return
        if self._pid != os.getpid():  # threads do not survive a fork
            self._stages, self._pid = {}, os.getpid()
        if stage not in self._stages:
            self._stages[stage] = queue.SimpleQueue()
            name = f"{REFRESH_THREADS}-{stage}"
            threading.Thread(target=self._serve, args=(self._stages[stage],), name=name, daemon=True).start()
        self._stages[stage].put(job)

    def _serve(self, jobs: queue.SimpleQueue[Iterator[int]]) -> None:
        while True:
            self.put(jobs.get())


_WORKERS = _Workers()


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
                self._put(_barrier(unit, self._device))
            if unit.first.lossless and unit not in full:
                if unit.message is None:  # nothing was written here, but on another rank
                    lossless.prepare(unit)
                if self._stream and unit.message is not None:
                    unit.message.record_stream(self._stream)
            if not unit.refresh_hops() and not level:
                with torch.no_grad():
                    for _ in run_hops(unit):
                        pass
                continue
            future: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=[self._device] if self._stream else None
            )
            register_future(unit.copy, future)
            self._futures.append(future)
            self._put(_run(unit, unit in full, future))

    def _put(self, job: Iterator[int]) -> None:
        """Run after what was put before it: on the threads, or here on the side stream."""
        if self._stream is None:
            _WORKERS.put(job)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in job:
                pass

    def drain(self) -> None:
        """Wait for every refresh that was launched: one that no forward read included. Raises what a refresh raised."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.wait()


def _barrier(unit: Unit, device: torch.device) -> Iterator[int]:
    """Nobody reads copies any more: before the first of a level is written. Ahead of all units in the stage in which they write.

    One that fails is not told here: the next one on its group fails too, and that one has a future to tell.
    """
    yield from (*stages(unit), 0)
    with contextlib.suppress(Exception):
        transfers.barrier(unit.first, device)


def _run(unit: Unit, full: bool, future: torch.futures.Future[Tensor]) -> Iterator[int]:
    hops = run_hops(unit, full)
    read_at = next((slot.source for slot in unit.slots if slot.source), "")
    subject = Parameters(tuple(spec.name for spec in unit.specs), read_at, "the refresh after a write")
    try:
        while True:
            with below_autograd(), about(subject):  # of this thread: the stages are others
                stage = next(hops, None)
            if stage is None:
                break
            yield stage
        if unit.first.peer_level:
            with below_autograd(), about(subject):
                transfers.barrier(unit.first, unit.copy.device)
    except Exception as error:
        future.set_exception(error)  # type: ignore[arg-type]
    else:
        future.set_result(unit.copy)
