"""Collectives of a vendor's library over all ranks at once, and the steps of the systems that use them. Closed forms.

A ring over n ranks in nodes of p receives at the slower of what a node's rings reach inside it and what its network cards let through: the
ring crosses each node's boundary once, so a node's cards carry what every one of its ranks receives. Its steps follow one another.

    all-gather, reduce-scatter     (n - 1) step + (n - 1)/n S / bandwidth
    all-reduce                     twice that
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zcompile.machines import Machine


@dataclass(frozen=True)
class Flat:
    """A machine's rings. inside, between: B/s; between is a node's. step, overhead: seconds. per_node: ranks."""

    inside: float
    between: float
    step: float
    overhead: float
    per_node: int

    @classmethod
    def of(cls, machine: Machine, **changes: float) -> Flat:
        values: Mapping[str, float] = {**machine.flat, **changes}
        return cls(**values, per_node=machine.ranks_per_node)  # type: ignore[arg-type]

    def bandwidth(self, ranks: int) -> float:
        """B/s that one rank receives in a ring over so many."""
        return self.inside if ranks <= self.per_node else min(self.inside, self.between)

    def gather(self, whole: float, ranks: int) -> float:
        """Seconds of an all-gather that makes `whole` bytes on each of `ranks`, or of a reduce-scatter of as many."""
        if ranks == 1:
            return 0.0
        return self.overhead + (ranks - 1) * self.step + whole * (ranks - 1) / ranks / self.bandwidth(ranks)

    def reduce(self, whole: float, ranks: int) -> float:
        """Seconds of an all-reduce of `whole` bytes."""
        return 2 * self.gather(whole, ranks)

    def bus(self, whole: float, ranks: int, reduce: bool = False) -> float:
        """Bus bandwidth, B/s, as nccl-tests and rccl-tests print it."""
        moved = (2 if reduce else 1) * whole * (ranks - 1) / ranks
        return moved / (self.reduce(whole, ranks) if reduce else self.gather(whole, ranks))
