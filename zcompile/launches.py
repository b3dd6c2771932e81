"""Do all ranks launch the same transfers where no compiled graph lists them?

The collectives of a graph are compared before it runs. Outside of graphs whoever reads a weight launches its transfers, one by one, and a
process group pairs what its members launch by their order alone: ranks that take different branches would mix shards of different
parameters, and where these are of one size nothing would show it. So each launch is noted, as one running number per group, and the
exchanges that are made anyway (at the start of a forward, before a graph, before an optimizer's step) carry these numbers. The history
since the last exchange is kept, to name the first launch that differs.

Note [Groups apart]: only ranks that share a group are compared. What two pairs gather among themselves may differ (other experts, say,
where nothing is trained), and a weight that is whole on every rank may be read by any of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zcompile.agreement import AgreementError
from zcompile.faults.order import FACTOR, PRIME, Members
from zcompile.faults.sites import Site

if TYPE_CHECKING:
    from zcompile.runtime import Runtime


class Launches:
    """One model's part in it: what was launched since it was wrapped, which its exchanges compare.

    A model begins anew, so that ranks which parted earlier, and were told so, can train another one.
    """

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        topology = runtime.topology
        self._levels = [number for number, level in enumerate(topology.levels, start=1) if level.size > 1]
        self._groups = [tuple(topology.group(runtime.rank, level)) for level in self._levels]
        self._begun = {group: self._sum(group) for group in self._groups}
        self._agreed = dict(self._begun)

    def _sum(self, group: Members) -> tuple[int, int]:
        return (0, 0) if self._runtime.watch is None else self._runtime.watch.order.sums.get(group, (0, 0))

    @property
    def new(self) -> bool:
        """Whether this rank has launched anything since the ranks last compared."""
        return any(self._sum(group) != self._agreed[group] for group in self._groups)

    def words(self) -> list[int]:
        """For an exchange: a number for each level of more than one member."""
        found = []
        for group in self._groups:
            (count, total), (before, base) = self._sum(group), self._begun[group]
            found.append((total - base * pow(FACTOR, count - before, PRIME)) % PRIME)
        return found

    def split(self, rows: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """Every rank's words of an exchange that begins with these, and what came after them."""
        size = len(self._groups)
        return [row[:size] for row in rows], [row[size:] for row in rows]

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """AgreementError, on all ranks alike, if two ranks of one group launched different transfers.

        Args:
            rows: every rank's `words`, by rank.
        """
        odd = None if len({tuple(row) for row in rows}) == 1 else self._first_odd(rows)
        if odd is not None:
            raise AgreementError(self._text(*odd))
        self._agreed = {group: self._sum(group) for group in self._groups}
        if self._runtime.watch is not None:
            self._runtime.watch.order.history.clear()

    def _first_odd(self, rows: Sequence[Sequence[int]]) -> tuple[int, int, int] | None:
        """(level, rank, rank) of two that differ and share a group."""
        topology = self._runtime.topology
        for place, level in enumerate(self._levels):
            for rank, row in enumerate(rows):
                first = topology.group(rank, level)[0]
                if row[place] != rows[first][place]:
                    return level, first, rank
        return None

    def _text(self, level: int, one: int, other: int) -> str:
        watch, topology = self._runtime.watch, self._runtime.topology
        group = self._groups[self._levels.index(level)]
        mine = [] if watch is None else [_said(site) for site in watch.order.history.get(group, ())]
        found = self._runtime.agreement.texts(json.dumps(mine), (one, other))
        left, right = (json.loads(text) for text in found)
        number = next(
            (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
        )
        a, b = (f"`{said[number]}`" if number < len(said) else "nothing more" for said in (left, right))
        where = (
            f"the first of them, number {number + 1} since they last agreed: rank {one} has {a}, rank {other} has {b}"
            if a != b
            else "where they parted is too long ago to be known"
        )
        return (
            f"zcompile: outside of compiled graphs rank {other} and rank {one} launched different transfers over level "
            f"`{topology.names[level - 1]}`; {where}. All ranks that share a level must read the same weights in the same order, and take "
            "the same branches in a backward: what was computed since then is mixed up, and no optimizer may step on it. Let ranks that "
            "have nothing for a branch run it too (on an empty batch, or times zero)."
        )


def _said(site: Site) -> str:
    at = f" at {site.source}" if site.source else ""
    return f"{site.transfer} of {', '.join(site.parameters)}{at}"
