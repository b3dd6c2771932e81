"""Optimizer steps as writes to the masters.

torch counts most writes to a tensor (`tensor._version`), and `Unit.version` reads those counters; but a `_foreach_*` or fused
optimizer on DTensors moves none (measured on torch 2.13), so a step is announced by a hook that torch documents for all optimizers.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from zcompile.params import Slot, Unit

_SLOTS: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
"""id of a master -> its slot; beside the parameters and not on them, so that these can be pickled. A slot holds its master, so no other
tensor has the id while it lives."""
SKIPPING: Any = weakref.WeakKeyDictionary()
"""Optimizer -> the gradients that were taken from it for the time of a step that is to change nothing: zcompile.gradients."""
_hook: Any = None


def watch(slots: list[Slot]) -> None:
    """From now on a step of any optimizer over these masters counts as a write to their units."""
    global _hook
    for slot in slots:
        _SLOTS[id(slot.master)] = slot
    if _hook is None:
        _hook = (register_optimizer_step_pre_hook(_stepping), register_optimizer_step_post_hook(_stepped))


def _stepping(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for unit in _units(optimizer):
        unit.foreign = unit.foreign or unit.stepped != unit.version


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in SKIPPING:
        return
    for unit in _units(optimizer):
        unit.writes += 1
        unit.stepped = unit.version


def _units(optimizer: torch.optim.Optimizer) -> set[Unit]:
    found = {unit_of(p) for group in optimizer.param_groups for p in group["params"]}
    return {unit for unit in found if unit is not None}


def slot_of(parameter: torch.Tensor) -> Slot | None:
    """The slot whose master this is; None for any other tensor."""
    slot = _SLOTS.get(id(parameter))
    return slot if slot is not None and slot.master is parameter else None


def unit_of(parameter: torch.Tensor) -> Unit | None:
    """The unit that holds this master; None for any other tensor."""
    slot = slot_of(parameter)
    return None if slot is None else slot.unit
