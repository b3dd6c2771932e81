"""Reading a weight outside any compiled graph: the same transfers, one parameter at a time.

Note [One reduce for many reads]: a weight that is read several times in a forward gets its gradient from several places. The sum is
taken over whole gradients, in the order autograd delivers them, before one reduce: the same bits as a dense model, and one transfer.
Each forward counts its reads of a parameter; the backward of the last one reduces. Reads whose gradient never arrives are settled by
`flush` when the backward ends.

Note [Frames that Dynamo gives up]: a frame that Dynamo cannot trace (one that raises) runs in eager torch, but the functions it calls
are frames that Dynamo tries next. The transfers here are none of the model's code: they are kept from it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from zcompile import transfers
from zcompile._torch_compat import storage_key
from zcompile.faults.sites import Parameters, about, places, users_place
from zcompile.ops import ACCUMULATE, compensated, finish, needs_wait, watch
from zcompile.params import Slot


class _Reads:
    """Reads of one parameter in one forward: how many there were, how many gradients are still to come, and their sum so far."""

    def __init__(self, slot: Slot, main: Tensor | None):
        self.slot, self.main = slot, main
        self.count = self.open = 0
        self.total: Tensor | None = None


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, slot: Slot, call: Any, reads: _Reads | None) -> Tensor:
        ctx.call, ctx.reads, ctx.slot = call, reads, slot
        return whole(slot, call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        reads = ctx.reads
        if reads is None:
            raise RuntimeError(
                "zcompile: activation checkpointing with use_reentrant=True runs a backward of its own inside the backward, whose "
                "gradients would miss their reduction. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        if reads.slot.flag is not None:
            watch(reads.slot.flag, grad)
        reads.open -= 1
        reads.total = grad if reads.total is None else reads.total + grad
        return (_settle(ctx.call, reads) if reads.open == 0 else None), None, None, None


@contextlib.contextmanager
def transferring(call: Any, slot: Slot, stage: str) -> Iterator[None]:
    """Around transfers of one parameter: collectives know whose they are, and an error is remembered that breaks them off; of one in a
    backward nobody else hears."""
    try:
        with about(Parameters((slot.name,), slot.source, stage)):
            yield
    except Exception as error:
        call.engine.runtime.broke_off(error)
        raise


@torch.compiler.disable  # see Note [Frames that Dynamo gives up]
def whole(slot: Slot, call: Any) -> Tensor:
    """The whole parameter in its compute dtype: gathers from the unit's copy."""
    spec, copy = slot.spec, slot.unit.copy
    if needs_wait(spec):
        copy = torch.ops._c10d_functional.wait_tensor(copy)
    call.engine.traffic.op("gather", spec)
    with transferring(call, slot, "eager code"):
        out = transfers.gather(copy, [spec])[0]
    storage = out.untyped_storage()
    if storage_key(storage) != storage_key(copy):
        call.wholes[storage_key(storage)] = (StorageWeakRef(storage), slot)
    return out


@torch.compiler.disable  # see Note [Frames that Dynamo gives up]
def read(slot: Slot) -> Tensor:
    """`module.weight` inside a forward that no compiler traces."""
    from zcompile.engine import current_engine

    engine = current_engine()
    assert engine is not None and engine.call is not None
    call = engine.call
    if slot.name not in engine.reads.eager:
        engine.reads.eager[slot.name] = users_place(places(traceback.walk_stack(sys._getframe())))
    slot.source = slot.source or os.path.basename(engine.reads.eager[slot.name])
    leaf = slot.token if call.phase == ACCUMULATE else slot.leaf
    assert leaf is not None
    if not (leaf.requires_grad and torch.is_grad_enabled()):
        return whole(slot, call).detach()
    reads = call.reads.get(slot)
    if reads is None:
        reads = call.reads[slot] = _Reads(slot, slot.main)
    reads.count += 1
    reads.open = reads.count
    return Gather.apply(leaf, slot, call, reads)


def flush(call: Any, slot: Slot) -> Tensor | None:
    """Settle reads of `slot` in this call that have a sum but wait for gradients that will not come."""
    reads = call.reads.get(slot)
    return _settle(call, reads) if reads is not None and reads.total is not None else None


@torch.compiler.disable  # see Note [Frames that Dynamo gives up]
def read_again(slot: Slot, call: Any) -> Tensor:
    """`module.weight` where activation checkpointing recomputes a forward for what its backward needs; no gradient passes through it, as
    the first read's receives it."""
    if not slot.master.requires_grad:
        return whole(slot, call).detach()
    return Gather.apply(call.edge, slot, call, None)


@torch.compiler.disable  # see Note [Frames that Dynamo gives up]
def _settle(call: Any, reads: _Reads) -> Tensor | None:
    slot, grad = reads.slot, reads.total
    assert grad is not None
    reads.total, reads.open = None, reads.count
    spec, traffic = slot.spec, call.engine.traffic
    traffic.op("reduce", spec)
    with transferring(call, slot, "a backward"):
        reduced = transfers.reduce([compensated(grad, slot.errors, spec, "reduce")], [spec])
        if call.phase != ACCUMULATE:
            traffic.op("sync", spec)
        return finish(reads.main, slot.errors, reduced, spec.text, call.phase)


class _Saved:
    """Stands in for a view of a whole weight, or of a cast of one, among saved tensors: how to see the weight that way again."""

    def __init__(self, slot: Slot, tensor: Tensor):
        self.slot, self.size, self.stride, self.offset = slot, tensor.size(), tensor.stride(), tensor.storage_offset()
        self.dtype = tensor.dtype


_MOVES_NOTHING = {f"{kind}Backward0" for kind in ("T", "Transpose", "Permute", "View", "UnsafeView", "Alias")}
"""Views after which a cast has its elements in the order in which the weight has them in memory."""


def _cast_of(tensor: Tensor) -> Slot | None:
    """The parameter whose whole weight `tensor` is a cast of, or a view of such a cast. A cast keeps the order in memory."""
    cast = tensor if tensor._base is None else tensor._base
    node: Any = cast.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None
    node = node.next_functions[0][0]
    while node is not None and node.name() in _MOVES_NOTHING:
        node = node.next_functions[0][0]
    slot = getattr(node, "slot", None)
    same = isinstance(slot, Slot) and cast.numel() == slot.spec.layout.numel and cast.device == slot.unit.copy.device
    return slot if same and cast.untyped_storage().nbytes() == cast.numel() * cast.itemsize else None


@contextlib.contextmanager
def keep_wholes_out(call: Any) -> Iterator[None]:
    """Inside, autograd saves no gathered weight and no cast of one: a note instead, and the backward gathers again.

    A saved tensor is recognised by its storage, whose address the weak reference keeps from being used again; a cast by what made it (of a
    frozen weight nothing is recorded of that, and its casts are saved).
    """

    @torch.compiler.disable  # see Note [Frames that Dynamo gives up]
    def pack(tensor: Tensor) -> Tensor | _Saved:
        found = call.wholes.get(storage_key(tensor))
        if found is not None and tensor.dtype == transfers.dtype(found[1].spec.compute):
            return _Saved(found[1], tensor)
        slot = _cast_of(tensor)
        return tensor if slot is None else _Saved(slot, tensor)

    @torch.compiler.disable
    def unpack(saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        call.start()
        return whole(saved.slot, call).to(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
