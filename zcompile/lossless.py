"""The lossless delta refresh: what a unit's ranks send when the very bits of its weights are to arrive in fewer bytes.

A rank's own row of its copy is what all other holders have of its masters, to the bit: every refresh brings the masters, rounded. So
the owner needs no state to know what to send, and the holders none to add it to. A message has room for so many exceptions
(zcompile.kernels.code.LOSSLESS_SHARE): one is made at the beginning of a forward, before the ranks agree which units are refreshed, and
a unit of which any rank's did not hold all of them is refreshed as without deltas, on all ranks. What travels is therefore known before
it is launched.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zcompile.kernels import lossless
from zcompile.kernels.code import lossless_bytes
from zcompile.params import Unit
from zcompile.pool import POOL


def prepare(unit: Unit) -> Tensor | bool:
    """Make the message of the unit's next refresh; whether it holds everything (on a GPU: a tensor)."""
    size = sum(lossless_bytes(spec.layout.shard) for spec in unit.specs)
    unit.message = torch.empty(size, dtype=torch.uint8, device=unit.master.device)
    POOL.land(unit.message)
    return lossless.encode(unit.master, [part[unit.row] for part in unit.rows], unit.message)


def prepared(units: Iterable[Unit]) -> set[Unit]:
    """Make the messages of all units that are due for a lossless delta: those units whose message does not hold everything."""
    fits: dict[Unit, Tensor | bool] = {}
    for unit in units:
        unit.message = None
        if unit.first.lossless and unit.stale and not unit.wants_full and not unit.master.is_meta:
            fits[unit] = prepare(unit)
    on_device = [fit for fit in fits.values() if isinstance(fit, Tensor)]
    known = torch.stack(on_device).tolist() if on_device else fits.values()  # one wait for all
    return {unit for unit, fit in zip(fits, known, strict=True) if not fit}


def apply(unit: Unit, message: Tensor) -> None:
    """What all ranks sent, into the copy. RuntimeError where that is not what it was after its last refresh."""
    try:
        lossless.decode(message, unit.rows)
    except lossless.Changed as error:
        name = unit.specs[error.parameter].name
        raise RuntimeError(
            f"zcompile: the compute copy of {name!r} is not what its last refresh left, on this rank or on the one that owns it: something "
            "has written to weights inside a forward. A lossless delta goes on from what is there; a parameter that is written to needs a "
            f"refresh that does not, Rule({name!r}, refresh='native')"
        ) from None
