"""What is kept, computed and sent in which format: read off the tensors that there are, and off the plan where nothing is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zcompile import cost
from zcompile.params import MASTER, Slot, local_of
from zcompile.wire import COMPUTE_FORMATS, WireFormat

if TYPE_CHECKING:
    from zcompile.engine import Engine

Formats = dict[str, int]
"""Format -> elements of the plain parameters that have it."""


def report(engine: Engine, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Formats]:
    """See `zcompile.precision`."""
    slots = engine.slots
    rows: dict[str, Formats] = {
        "masters": _count((slot, _format(slot.shard.dtype)) for slot in slots),
        "compute copies": _count((slot, _stored(slot)) for slot in slots),
        "whole weights": _count((slot, WireFormat.parse(COMPUTE_FORMATS[slot.spec.compute]).short) for slot in slots),
    }
    training = [slot for slot in slots if slot.master.requires_grad]
    for transfer in cost.LEDGER_TRANSFERS:
        for number, level in enumerate(engine.plan.topology.names, start=1):
            found = _count(
                (slot, wire.short)
                for slot in (slots if transfer in ("gather", "refresh") else training)
                for j, wire, _ in cost.transfer_levels(slot.spec, transfer)
                if j == number and slot.spec.sizes[j - 1] > 1
            )
            if found:
                rows[f"{transfer} over {level}"] = found
    rows["main gradients"] = _count((slot, _format(MASTER)) for slot in training)
    given = [(slot, slot.master.grad) for slot in training if slot.master.grad is not None]
    if given:
        rows["gradients for the optimizer"] = _count((slot, _format(local_of(grad).dtype)) for slot, grad in given)
    for slot, optimizer in product(training, optimizers):
        for name, value in optimizer.state.get(slot.master, {}).items():
            if isinstance(value, Tensor) and value.dim():
                held = rows.setdefault(f"optimizer's {name}", {})
                kind = _format(local_of(value).dtype)
                held[kind] = held.get(kind, 0) + slot.spec.layout.numel
    return rows


def _count(pairs: Iterable[tuple[Slot, str]]) -> Formats:
    out: Formats = {}
    for slot, name in pairs:
        out[name] = out.get(name, 0) + slot.spec.layout.numel
    return out


def _stored(slot: Slot) -> str:
    """A copy of codes is bytes; which they are only the spec says."""
    stored = slot.spec.stored
    return stored.short if stored.quantized else _format(slot.unit.copy.dtype)


def _format(dtype: torch.dtype) -> str:
    return WireFormat.parse(COMPUTE_FORMATS[str(dtype).removeprefix("torch.")]).short
