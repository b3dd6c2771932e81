"""The engine of one wrapped model: what a forward may read, which phase it is in, when copies are refreshed.

Everything that happens around the compiled graphs happens here, in plain Python that Dynamo never sees: `begin` before a forward,
`end` after it, `zcompile.call.Unwrap.backward` when a backward has handed over all its gradients.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zcompile import covered, lossless, peers, transfers
from zcompile._torch_compat import all_gather, in_backward, many_graphs
from zcompile.agreement import pack_flags, set_anywhere
from zcompile.call import Call, Window
from zcompile.course import Course
from zcompile.covered import Reads
from zcompile.eager import keep_wholes_out
from zcompile.launches import Launches
from zcompile.ops import ACCUMULATE, DIRECT, NONE, PHASES, SYNC
from zcompile.origins import Origins
from zcompile.params import MASTER, Slot, Unit, build
from zcompile.refresh import Refresher
from zcompile.resolved import ResolvedPlan
from zcompile.runtime import Runtime
from zcompile.sums import Sums
from zcompile.traffic import Traffic
from zcompile.writes import watch


class _Reading:
    """What the weight properties look at: the engine whose forward is running, and its phase. One object for all models, so that
    a graph guards on it once. Strings, because ints on objects turn symbolic when they change."""

    def __init__(self) -> None:
        self.engine = ""
        self.phase = NONE


READING = _Reading()
_ENGINES: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_count = 0
_KEPT = 8
"""Compilations that an engine remembers."""


def engines() -> list[Engine]:
    """Those of this process that are alive."""
    return list(_ENGINES.values())


def current_engine() -> Engine | None:
    """The engine whose forward is running in this process, if any."""
    return _ENGINES.get(READING.engine)


def recomputing(slot: Slot) -> Call | None:
    """The call whose backward this thread is in, if the user's code runs there again: autograd itself works without gradients."""
    return engine_of_slot(slot).backward if torch.is_grad_enabled() and in_backward() else None


def engine_of_slot(slot: Slot) -> Engine:
    """The engine that a slot belongs to."""
    return _ENGINES[slot.engine]


class _Before(NamedTuple):
    """What was being read when a forward began, and the contexts that are open during it."""

    engine: str
    phase: str
    call: Call | None
    contexts: contextlib.ExitStack


class Engine:
    """State of one wrapped model.

    Attributes:
        units, slots: buffers and parameters, in registration order.
        synchronising: what `set_requires_gradient_sync` set.
        traffic: predicted, compiled and counted bytes; see zcompile.traffic.
    """

    def __init__(self, model: nn.Module, plan: ResolvedPlan, runtime: Runtime, compute: dict[str, torch.dtype],
                 cast_inputs: torch.dtype | None, options: Any, device: torch.device):  # fmt: skip
        global _count
        _count += 1
        self.key = f"zc{_count}"
        _ENGINES[self.key] = self
        self.plan = plan
        self.runtime = runtime
        self.options = options
        self.cast_inputs = cast_inputs
        self.device = device
        self.coordinates = tuple(runtime.coordinates)
        mesh = runtime.mesh(self.device.type if self.device.type != "meta" else "cpu")
        self.units, self.slots = build(model, plan, mesh, self.coordinates, self.key, compute, device, mapped=peers.mapped(runtime, device))
        peers.share(self.units, runtime, self.device)
        for slot in self.slots:
            if slot.master.requires_grad:
                widths = slot.spec.feedback_widths().items()
                slot.errors = {t: torch.zeros(n, dtype=MASTER, device=self.device) for t, n in widths}
                if options.checks:
                    slot.flag = torch.zeros(1, dtype=torch.int32, device=self.device)
        watch(self.slots)
        self.synchronising = True
        self.window = Window()
        self.traffic = Traffic(self)
        self.launches = Launches(runtime)
        """Whether all ranks launch the same transfers outside of compiled graphs."""
        self.course = Course(self)
        """Which compiled graphs run in a step, as all ranks agree."""
        self.refresher = Refresher(self.device)
        self.compiled: Callable[..., Any] | None = None
        """The model's own compiled forward; None if it is compiled from outside or not at all."""
        self.call: Call | None = None
        self.backward: Call | None = None
        """The call whose backward is running."""
        self.programs: list[Any] = []
        self.start_peak = 0
        """Bytes of whole tensors that were alive at once while a model from the meta device got its values."""
        self.saving: Any = None
        """A checkpoint that is being written in the background: zcompile.checkpoint."""
        self.running: Any = None
        """The compiled graph that runs, or that an error broke off."""
        self.steps: dict[int, Any] = {}
        """What zcompile.explain shows: the last compilations, by number."""
        self.graphs: list[tuple[str, Any]] | None = None
        """(stage, lowered graph) of what is compiled; kept where somebody put a list here (zcompile.planner.traced)."""
        self.sums = Sums(self)
        self.origins = Origins()
        self.stepped = False
        """Whether an optimizer has stepped since the last backward began."""
        self.losses: list[Tensor] = []
        """What training forwards returned since the last step, where it was one number."""
        self.reads = Reads()
        """Of the last forward, and of the one that is running."""
        self.breaks: list[dict[str, str]] = []
        """Of Dynamo's graphs: "reason" and "where"."""
        self.skipped = 0
        """Steps that were skipped because a gradient was not finite: zcompile.gradients."""
        self.set_options(options)

    def set_options(self, options: Any) -> None:
        """Options that may change while the model lives: `torch.compile(..., options=)` brings its own."""
        self.options = options
        self.runtime.limit(options.timeout)
        self.refresher.drain()  # its messages are compared, or not, on all ranks
        self.runtime.verify_messages(options.checks == "checksums")

    # -- forward ---------------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def begin(self, eager: bool) -> _Before:
        """Before a forward: agree with the other ranks, launch stale refreshes, make the leaves, open the weights for reading.

        Args:
            eager: no compiler is at work.

        Whole weights that eager code reads are kept out of what autograd saves; in parts of a compiled model from the second forward on.

        Returns:
            what `end` or `abandon` puts back.
        """
        phase = self._phase()
        refusal: Exception | None = None
        overfull: set[Unit] = set()
        try:
            self._check_unchanged()
            self.sums.check_masters()
            self.sums.check_copies()
            overfull = lossless.prepared(self.units)
        except Exception as error:  # raised after the others were told, who would wait for this rank otherwise
            refusal = error
        flags = [unit.stale for unit in self.units] + [unit.wants_full or unit in overfull for unit in self.units]
        agreed = self._agree(phase, flags, refusal)
        if self.runtime.watch is not None:
            self.runtime.watch.in_step()
        self.traffic.start(evaluation=phase == NONE)
        old = [unit for unit, is_old in zip(self.units, agreed, strict=False) if is_old]
        full = {unit for unit, wanted in zip(self.units, agreed[len(self.units) :], strict=True) if wanted}
        self.refresher.launch(old, full)
        self.sums.refreshed(old)
        self.traffic.refreshed(old, full)
        self._check_fresh()
        # Of the forward before: one that is compiled as a whole has nothing to keep out, and no hook to pay for.
        partly = bool(self.reads.eager)
        self.reads = Reads()
        call = Call(self, phase)
        call.open()
        before = _Before(READING.engine, READING.phase, self.call, contextlib.ExitStack())
        if eager or partly:
            before.contexts.enter_context(keep_wholes_out(call))
        if not eager:
            before.contexts.enter_context(many_graphs())
        READING.engine, READING.phase, self.call = self.key, phase, call
        return before

    @torch.compiler.disable
    def end(self, before: _Before, output: Any) -> Any:
        """After a forward: close the weights, wait for refreshes that nobody read, watch the output for the backward's start."""
        call = self.call
        assert call is not None
        self.abandon(before)
        if self.options.strict:
            covered.check(self)
        if call.phase != NONE:
            call.watch(output)
        return output

    @torch.compiler.disable
    def abandon(self, before: _Before) -> None:
        """Part of every `end` and `broke_off`."""
        before.contexts.close()
        READING.engine, READING.phase, self.call = before.engine, before.phase, before.call
        for slot in self.slots:
            slot.leaf = slot.token = slot.main = None
        self.refresher.drain()
        self.sums.note_copies()
        self.traffic.stop()

    def broke_off(self, before: _Before, error: BaseException) -> None:
        """After a forward that raised `error`."""
        self.runtime.broke_off(error)
        self.abandon(before)

    def _phase(self) -> str:
        if not torch.is_grad_enabled() or not any(slot.master.requires_grad for slot in self.slots):
            return NONE
        if not self.synchronising:
            return ACCUMULATE
        return SYNC if self.window.mains else DIRECT

    def _agree(self, phase: str, flags: Sequence[bool], refusal: Exception | None) -> list[bool]:
        """Which flags are set on any rank. A rank that refuses or is in another phase is an error on every rank."""
        refused = len(PHASES)
        said = PHASES.index(phase) if refusal is None else refused
        words = [*self.launches.words(), said, self.course.word(phase), *pack_flags(flags)]
        order, rows = self.launches.split(self.runtime.agreement.exchange(words, step="the start of a forward"))
        if refusal is not None:
            raise refusal
        other = next((rank for rank, row in enumerate(rows) if row[0] == refused), None)
        if other is not None:
            raise RuntimeError(f"zcompile: rank {other} refused this forward; its own error says why")
        self.launches.check(order)
        phases = [PHASES[row[0]] for row in rows]
        if len(set(phases)) > 1:
            odd = next(rank for rank, other in enumerate(phases) if other != phases[0])
            raise RuntimeError(
                f"zcompile: the ranks disagree about this forward: rank 0 is in phase {phases[0]!r}, rank {odd} in {phases[odd]!r} "
                f"(none: no_grad, accumulate: under no_sync, direct/sync: otherwise). Every rank must run the same kind of micro-step."
            )
        self.course.begin(phase, [row[1] for row in rows])
        return set_anywhere([row[2:] for row in rows], len(flags))

    def _check_unchanged(self) -> None:
        for slot in self.slots:
            for module, attribute in slot.owners:
                if module._parameters.get(attribute) is not slot.master:
                    raise RuntimeError(
                        f"zcompile: parameter {slot.name!r} was replaced or removed after hierarchical_zero wrapped the model. "
                        "Assign in place (`with torch.no_grad(): p.copy_(...)`), or change the model first and wrap it then."
                    )
        device = self.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            wanted = torch.get_autocast_dtype(device)
            if any(slot.spec.compute != str(wanted).removeprefix("torch.") for slot in self.slots):
                raise RuntimeError(
                    f"zcompile: torch.autocast({device!r}, {wanted}) is on, but weights are gathered in "
                    f"{self.plan.compute}: twice the bytes, cast after the gather. Wrap with compute_dtype={wanted} and drop the autocast."
                )

    # -- staleness -------------------------------------------------------------------------------------------------------------

    def mark_written(self) -> None:
        """The masters were written in a way torch does not count (`p.data`, another library): the next forward refreshes."""
        for unit in self.units:
            unit.writes += 1

    def _check_fresh(self) -> None:
        """Every refresh that was needed has been launched: no gather reads an old copy."""
        for unit in self.units:
            if unit.stale:
                raise RuntimeError(
                    f"zcompile: the compute copy of {', '.join(s.name for s in unit.slots[:3])}, ... is of version {unit.seen}, the master "
                    f"of version {unit.version}: a refresh is missing. This is a fault of zcompile."
                )

    def versions(self) -> list[int]:
        return [unit.version for unit in self.units]

    # -- user's controls -------------------------------------------------------------------------------------------------------

    def drop_accumulated(self) -> None:
        """Forget what micro-batches have added up since the last sync (`model.zero_grad()`)."""
        self.window.closed = True
        self.window = Window()
        self.origins.clear()

    def look_at_gradients(self) -> None:
        """A backward of this model begins: what it sends is looked at, unless that is not asked for or done more thoroughly."""
        begun = self.window.mains or any(slot.master.grad is not None for slot in self.slots)
        if self.stepped or not begun:  # gradients may also have been given up without a step
            self.origins.clear()
            self.stepped = False
        asked = self.options.nonfinite != "ignore" and not self.options.checks
        self.runtime.look_at_gradients(self.origins if asked else None)

    def note_sources(self, collectives: Sequence[Any]) -> None:
        """Remember at which of the user's lines each parameter is read, for errors outside any graph."""
        lines = {name: entry.source for entry in reversed(collectives) for name in entry.parameters}
        for slot in self.slots:
            slot.source = slot.source or lines.get(slot.name, "")

    def main_grad(self, slot: Slot) -> Tensor:
        """The slot's main grad [E_o / E_g * shard] fp32 in this window, made on first use."""
        if slot not in self.window.mains:
            self.window.mains[slot] = self.new_main(slot)
        return self.window.mains[slot]

    def new_main(self, slot: Slot) -> Tensor:
        width = slot.spec.layout.width(slot.spec.g)
        return torch.zeros(width, dtype=MASTER, device=slot.unit.master.device)

    def compile_report(self) -> str:
        """What was compiled so far, as a table: stage, collectives, where the code came from, wall seconds."""
        from zcompile.debug.report import compile_report

        return compile_report(self.programs)

    def keep(self, step: Any) -> None:
        """Remember a compilation for zcompile.explain; the oldest is forgotten."""
        if step is not None:
            self.steps[step.number] = step
            for number in sorted(self.steps)[:-_KEPT]:
                del self.steps[number]

    def whole_master(self, slot: Slot) -> Tensor:
        """The whole parameter, fp32, from the masters on all ranks; every rank calls it. Not a transfer of a step: not counted."""
        layout = slot.spec.layout
        x = slot.unit.master.narrow(0, slot.spec.offset, layout.shard).clone()
        mesh = cast(DTensor, slot.master).device_mesh
        for level in range(slot.spec.o, 0, -1):
            size = slot.spec.sizes[level - 1]
            if size > 1 and x.numel():
                out = x.new_empty(size * x.numel())
                all_gather(out, x, mesh.get_group(level - 1)).wait()
                x = out
        return transfers.unpack(x.view(layout.shards, -1), layout).clone()

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that want a gradient now."""
        return frozenset(slot.name for slot in self.slots if slot.master.requires_grad)

    def memory(self) -> dict[str, int]:
        """Model-state bytes on this rank by owner, optimizer state excluded."""
        return {
            "master": sum(u.master.numel() * u.master.itemsize for u in self.units),
            "copy": sum(part.numel() * part.itemsize for u in self.units if u.cached for part in u.copied),
            "image": sum(u.image.numel() * u.image.itemsize for u in self.units if u.image is not None and u.coded),
            "main": sum(m.numel() * m.itemsize for m in self.window.mains.values()),
            "feedback": sum(e.numel() * e.itemsize for slot in self.slots for e in slot.errors.values()),
        }
