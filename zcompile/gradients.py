"""Gradients between a backward and an optimizer's step: their norm, and whether they are numbers at all.

Note [Skipped steps]: a gradient that is not finite on one rank is, after the reduction, in the shard of one owner, so ranks that looked at
their own shards would decide differently. Before a step they agree: one small exchange. If any has found one, every rank's step finds no
gradients (optimizers pass over parameters without), and gets them back afterwards, for whoever wants to look. Moments, step counts and
masters stay as they were. Of several optimizers each is asked of the gradients that it steps: those of others may be left from another
loss.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from zcompile.params import Slot, local_of
from zcompile.writes import SKIPPING, slot_of

if TYPE_CHECKING:
    from zcompile.engine import Engine

_hook: Any = None
_Kept = list[tuple[Tensor, Tensor]]


def clip_grad_norm_(engine: Engine, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> float:
    """See `zcompile.clip_grad_norm_`."""
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"clip_grad_norm_: {name}={value!r}; must be a positive number (inf is one)")
    order = float(norm_type)
    slots = [slot for slot in engine.slots if slot.master.grad is not None]
    local = [local_of(slot.master.grad) for slot in slots]
    norms = torch._foreach_norm([g for g in local if g.numel()], order, dtype=torch.float64)
    own = torch.stack(norms).tolist() if norms else []
    if math.isinf(order):
        part = max(own, default=0.0) if not any(map(math.isnan, own)) else math.nan
    else:  # what several ranks hold is counted once
        shares = (1 / slot.spec.layout.replicas for slot, g in zip(slots, local, strict=True) if g.numel())
        part = math.fsum(norm**order * share for norm, share in zip(own, shares, strict=True))
    rows = engine.runtime.agreement.exchange([_to_word(part)], step="a gradient norm")
    parts = [_from_word(row[0]) for row in rows]
    whole = max(parts) if math.isinf(order) else sum(parts) ** (1 / order)
    total = math.nan if any(map(math.isnan, parts)) else whole
    if not math.isfinite(total):
        if error_if_nonfinite:
            raise RuntimeError(f"zcompile.clip_grad_norm_: the norm of order {order:g} is {total}: nothing was clipped")
        return total  # gradients stay: the step says which of them is not finite
    if total > max_norm:
        torch._foreach_mul_(local, max_norm / (total + 1e-6))
    return total


def _to_word(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _from_word(word: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", word))[0])


def guard() -> None:
    """From now on ranks agree before each step over masters whether all gradients are finite. See Note [Skipped steps]."""
    global _hook
    if _hook is None:
        _hook = (register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after))


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Looks now, or, where a closure makes the gradients inside the step, when it has."""
    closures = [value for value in (*args[1:], *kwargs.values()) if callable(value)]
    if not closures:
        _look(optimizer)
        return None

    def looked(closure: Any) -> Any:
        def call() -> Any:
            loss = closure()
            _look(optimizer)
            return loss

        return call

    return (
        (args[0], *(looked(value) if callable(value) else value for value in args[1:])),
        {name: looked(value) if callable(value) else value for name, value in kwargs.items()},
    )


def _look(optimizer: torch.optim.Optimizer) -> None:
    """All ranks agree whether this step is one; if not, its gradients are put aside."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    engines: dict[Engine, list[Slot]] = {}
    for parameter in parameters:
        slot = slot_of(parameter)
        if slot is not None:
            engines.setdefault(_engine_of(slot), []).append(slot)
    if any([_agreed(engine, slots) for engine, slots in engines.items()]):  # a list: every engine's ranks are asked
        SKIPPING[optimizer] = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    kept: _Kept = SKIPPING.pop(optimizer, [])
    for parameter, grad in kept:
        parameter.grad = grad


def _engine_of(slot: Slot) -> Engine:
    from zcompile.engine import engine_of_slot

    return engine_of_slot(slot)


def _agreed(engine: Engine, slots: Sequence[Slot]) -> bool:
    """Whether any rank has found a gradient that is not finite: said, counted, and, if the option says so, raised.

    A backward comes to the last parameters first, so the last one that is not finite is where it began.
    """
    if engine.options.nonfinite == "ignore":
        if engine.launches.new:
            engine.launches.check(
                engine.runtime.agreement.exchange(engine.launches.words(), step="an optimizer's step")
            )
        return False
    slots = [slot for slot in slots if slot.master.grad is not None]
    order = {slot: number for number, slot in enumerate(engine.slots, start=1)}
    watched = [slot for slot in slots if slot.flag is not None and bool(slot.flag)] if engine.options.checks else []
    words = [
        *engine.launches.words(),
        max((order[slot] for slot in _not_finite(slots)), default=0),
        max((order[slot] for slot in watched), default=0),
        int(bool(engine.losses) and not bool(torch.isfinite(torch.cat(engine.losses)).all())),
    ]
    engine.losses.clear()
    engine.stepped = True
    for slot in watched:
        assert slot.flag is not None
        slot.flag.zero_()
    launched, rows = engine.launches.split(engine.runtime.agreement.exchange(words, step="an optimizer's step"))
    engine.launches.check(launched)
    if not any(row[0] for row in rows):
        return False
    engine.skipped += 1
    for slot in engine.slots:
        for state in slot.errors.values():
            if not bool(torch.isfinite(state).all()):
                state.zero_()  # what an error feedback has of this gradient would come back with the next one
    text = _text(engine, slots, rows)
    if engine.options.nonfinite == "raise":
        raise FloatingPointError(f"zcompile: {text}")
    if engine.runtime.rank == 0:
        print(f"zcompile: step skipped on all ranks ({engine.skipped} so far): {text}", file=sys.stderr, flush=True)
    return True


def _text(engine: Engine, slots: Sequence[Slot], rows: Sequence[Sequence[int]]) -> str:
    """Which gradient is not finite, and where that arose; every rank calls it, and gets the same.

    Args:
        slots: those that the optimizer steps.
        rows: of every rank: number of the last parameter whose shard is not finite, of the last that was seen to be so before its
            reduction, whether a loss was not finite.
    """
    seen = max(row[1] for row in rows)
    if seen:
        name, first = engine.slots[seen - 1].name, [rank for rank, row in enumerate(rows) if row[1] == seen]
    else:
        name, first = _origin(engine, slots, max(row[0] for row in rows))
    text = f"the gradient of {name!r} is not finite"
    lost = [number for number, row in enumerate(rows) if row[2]]
    if first:
        text += f", first on rank{'s' * (len(first) > 1)} {', '.join(map(str, first[:8]))}{', ...' * (len(first) > 8)}"
    elif not lost and len(rows) > 1:
        owner = next(number for number, row in enumerate(rows) if engine.slots[row[0] - 1].name == name)
        text += (
            f"; it was found in the shard that rank {owner} owns, which need not be where it arose (the option checks=True looks at each "
            "gradient before it is reduced, and says)"
        )
    if lost:
        text += f"; neither was the loss of rank {lost[0]}" + (f" and of {len(lost) - 1} more" if lost[1:] else "")
    return text


def _origin(engine: Engine, slots: Sequence[Slot], worst: int) -> tuple[str, list[int]]:
    """(parameter, the ranks that were the first to send a gradient that is not finite, in one message; none if that is not known): see
    zcompile.origins.

    Args:
        worst: number of the last parameter that is not finite, which is named where it is not known what arose first.
    """
    exchange = engine.runtime.agreement.exchange
    first = [row[0] for row in exchange([engine.origins.first()], step="where a gradient arose")]
    numbers = [number for number in first if number]
    if not numbers:
        return engine.slots[worst - 1].name, []
    carried = set(engine.origins.parameters(min(numbers)))
    order = {slot: number for number, slot in enumerate(engine.slots, start=1)}
    mine = max((order[slot] for slot in _not_finite([s for s in slots if s.name in carried])), default=0)
    named = max(row[0] for row in exchange([mine], step="which gradient arose first")) or worst
    return engine.slots[named - 1].name, [rank for rank, number in enumerate(first) if number == min(numbers)]


def _not_finite(slots: Sequence[Slot]) -> list[Slot]:
    held = [(slot, local_of(slot.master.grad)) for slot in slots]
    held = [(slot, g) for slot, g in held if g.numel() and not g.is_meta]
    if not held:
        return []
    # What is not finite makes every norm so. The one of squares is fast on CPUs, where the largest element takes fifteen times as long, but
    # large finite elements overflow it: the largest element has the last word.
    for order in (2.0, math.inf):
        largest = torch.stack(torch._foreach_norm([g for _, g in held], order))
        if bool(torch.isfinite(largest).all()):
            return []
    return [slot for (slot, _), fine in zip(held, torch.isfinite(largest).tolist(), strict=True) if not fine]
