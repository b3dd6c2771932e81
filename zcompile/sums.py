"""The option `checks`: checksums of masters and compute copies from one forward to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zcompile.faults.checksums import ChecksumError, checksum
from zcompile.params import Unit

if TYPE_CHECKING:
    from zcompile.engine import Engine


class Sums:
    """Of one model's masters and copies, as they were when they were looked at last."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._masters: dict[Unit, Tensor] = {}
        self._copies: dict[Unit, Tensor] = {}

    def check_masters(self) -> None:
        """Option checks=True: a write that moved no version counter is found by the masters' checksums, and is an error."""
        if not self._engine.options.checks:
            return
        for unit in self._engine.units:
            now = checksum(unit.master)
            if not unit.stale and unit.cached and unit in self._masters and not torch.equal(now, self._masters[unit]):
                names = ", ".join(slot.name for slot in unit.slots)
                raise RuntimeError(
                    f"zcompile: the masters of {names} changed without torch seeing it (a write through `.data`?): the compute copies "
                    "are stale. Call zcompile.mark_written(model) after such a write."
                )
            self._masters[unit] = now

    def note_copies(self) -> None:
        """Option checks="checksums": what a refresh has written, for `check_copies`."""
        if self._engine.options.checks == "checksums":
            for unit in self._engine.units:
                if unit.cached and unit not in self._copies:
                    self._copies[unit] = _of_copy(unit)

    def check_copies(self) -> None:
        for unit, then in self._copies.items():
            if self._engine.options.checks == "checksums" and not torch.equal(_of_copy(unit), then):
                names = ", ".join(slot.name for slot in unit.slots)
                raise ChecksumError(
                    f"zcompile: rank {self._engine.runtime.rank}: the compute copy of {names} is not what its refresh wrote: bits changed "
                    "in this rank's memory"
                )

    def refreshed(self, units: Iterable[Unit]) -> None:
        """The copies of these are written anew."""
        for unit in units:
            self._copies.pop(unit, None)


def _of_copy(unit: Unit) -> Tensor:
    """What this rank wrote: beside it other ranks may be writing."""
    return torch.stack([checksum(part) for part in unit.copied])
