"""Optimizer steps as writes to the masters.

torch counts most writes to a tensor (`tensor._version`), and `Unit.version` reads those counters; but a `_foreach_*` or fused
optimizer on DTensors moves none (measured on torch 2.13), so a step is announced by a hook that torch documents for all optimizers.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from zcompile.params import Slot

_UNIT = "_zc_unit"
_hook: Any = None


def watch(slots: list[Slot]) -> None:
    """From now on a step of any optimizer over these masters counts as a write to their units."""
    global _hook
    for slot in slots:
        setattr(slot.master, _UNIT, weakref.ref(slot.unit))
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    found = {getattr(p, _UNIT, None) for group in optimizer.param_groups for p in group["params"]}
    for reference in found:
        if reference is not None and (unit := reference()) is not None:
            unit.writes += 1
