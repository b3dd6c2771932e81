"""One forward and the backward that belongs to it; the windows in which micro-batches add up.

Note [Windows]: a window is the micro-batches that one optimizer step adds up. It is opened by the first forward under `no_sync` and
closed by the first synchronising backward; its main grads live exactly as long. A backward that accumulates into a window that is
closed already (two forwards whose backwards run in the other order) is synced at once: nothing is lost, one sync more is sent.
A synchronising forward that came before the window's first one went `direct`, without main grads; if its backward comes after that
of a later micro-batch (it is `crossing`), it syncs what that one left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zcompile import transfers
from zcompile._torch_compat import wrap_local
from zcompile.agreement import pack_flags, set_anywhere
from zcompile.eager import flush, transferring
from zcompile.ops import ACCUMULATE, DIRECT, NONE, SYNC, compensated
from zcompile.params import MASTER, Slot

if TYPE_CHECKING:
    from zcompile.engine import Engine

LOSSES = 64
"""Of so many forwards of one step the loss is kept, to say whose was not finite."""


class Window:
    """One accumulation window: main grads by slot, and whether its sync has run. See Note [Windows]."""

    def __init__(self) -> None:
        self.mains: dict[Slot, Tensor] = {}
        self.touched: set[Slot] = set()
        self.closed = False


class Call:
    """One forward and the backward that belongs to it."""

    def __init__(self, engine: Engine, phase: str):
        self.engine = engine
        self.phase = phase
        self.window = engine.window
        self.versions = engine.versions()
        self.reads: dict[Slot, Any] = {}
        """Eager reads by slot: see zcompile.eager."""
        self.wholes: dict[int, Any] = {}
        """Storages of whole weights that eager reads made."""
        self.started = False
        self.edge = torch.empty(0, requires_grad=True)
        """Of reads that are done again: they need one that gradients could take, as the first ones had. Made here, as selective
        checkpointing counts the operations of what it recomputes."""

    def open(self) -> None:
        """Give every slot its leaf and main grad for this forward."""
        engine = self.engine
        training: list[Slot] = []
        for slot in engine.slots:
            slot.main = None
            if self.phase != NONE and slot.master.requires_grad:
                training.append(slot)
            else:
                slot.leaf = slot.token = slot.padded.detach()
        if not training:
            return
        if self.phase in (ACCUMULATE, SYNC):
            for slot in training:
                slot.main = engine.main_grad(slot)
        leaves = Unwrap.apply(self, training, *(slot.master for slot in training))
        for slot, leaf in zip(training, leaves, strict=True):
            slot.leaf = slot.token = leaf

    def watch(self, output: Any) -> None:
        """Run `start` when the backward of this forward begins."""
        leaves, _ = torch.utils._pytree.tree_flatten(output)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
                leaf.register_hook(lambda _: self.start())
                if leaf.numel() == 1 and len(self.engine.losses) < LOSSES and not leaf.is_meta:
                    self.engine.losses.append(leaf.detach().reshape(1).to(MASTER))

    def start(self) -> None:
        """A backward re-gathers weights: refuse if they are no longer those of its forward."""
        if self.started:
            return
        self.started = True
        self.engine.backward = self
        self.engine.traffic.start(evaluation=False)
        self.engine.look_at_gradients()
        for unit, then, now in zip(self.engine.units, self.versions, self.engine.versions(), strict=True):
            if then != now:
                raise RuntimeError(
                    f"zcompile: parameters ({', '.join(s.name for s in unit.slots[:3])}, ...) were modified between a forward and its "
                    "backward, which gathers them again: the gradients would be of other weights. Run the backward before the write."
                )

    def finish(self, training: list[Slot], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """All gradients of this backward are in: sync what earlier micro-batches left behind, close the window."""
        self.start()
        self.started = False  # a second backward over a retained graph is checked again
        self.engine.backward = None
        out = self._flush_reads(training, list(grads))
        if self.phase == ACCUMULATE:
            self.window.touched.update(slot for slot, grad in zip(training, out, strict=True) if grad is not None)
            out = [None] * len(out)
        late = self.phase == ACCUMULATE and self.window.closed
        crossing = self.phase == DIRECT and bool(self.window.mains)
        if self.phase == SYNC or late or crossing:
            left = [
                slot
                for slot, grad in zip(training, out, strict=True)
                if (grad is None or crossing) and slot in self.window.touched
            ]
            mask = self._union(training, left)
            for i, (slot, grad) in enumerate(zip(training, out, strict=True)):
                if mask[i] and (grad is None or crossing):
                    total = self._sync_main(slot)
                    out[i] = total if grad is None else grad + total
            self.window.touched.clear()
            self.window.closed = True
            if self.engine.window is self.window:
                self.engine.window = Window()
        self.engine.traffic.stop(step=self.phase != ACCUMULATE)
        return out

    def _flush_reads(self, training: list[Slot], out: list[Tensor | None]) -> list[Tensor | None]:
        """Eager reads some of whose gradients never came: reduce what did come."""
        for i, slot in enumerate(training):
            found = flush(self, slot)
            if found is not None:
                before = out[i]
                out[i] = found if before is None else before + found
        return out

    def _union(self, training: list[Slot], left: list[Slot]) -> list[bool]:
        chosen = set(left)
        rows = self.engine.runtime.agreement.exchange(pack_flags([slot in chosen for slot in training]))
        return set_anywhere(rows, len(training))

    def _sync_main(self, slot: Slot) -> Tensor:
        main = self.window.mains[slot]
        total = main.clone()
        main.zero_()
        self.engine.traffic.op("sync", slot.spec)
        with transferring(self, slot, "a backward"):
            return transfers.sync(compensated(total, slot.errors, slot.spec, "sync"), [slot.spec]).reshape(-1)


class Unwrap(torch.autograd.Function):
    """Master DTensors -> padded local leaves, and back: what the model's autograd sees of the masters.

    One node for all parameters: its backward runs when the backward has handed over every gradient.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, training: list[Slot], *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.training = call, training
        if call.phase == ACCUMULATE:
            return tuple(slot.unit.master.new_empty(0) for slot in training)
        return tuple(slot.padded.detach() for slot in training)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call, training = ctx.call, ctx.training
        out = [
            None if grad is None else wrap_local(slot.trimmed(grad.reshape(-1)), slot.master)
            for slot, grad in zip(training, call.finish(training, grads), strict=True)
        ]
        return (None, None, *out)
