"""What one rank launched outside of compiled graphs, in its order: a number for each process group, and the last names.

Nothing here communicates; zcompile.launches compares it between ranks.
"""

from __future__ import annotations

import zlib

from zcompile.faults.sites import Site

PRIME = (1 << 61) - 1
FACTOR = 0x1B873593CC9E2D51
"""A launch is added to its group's number by `number * FACTOR + launch`, modulo PRIME."""
_KEPT = 4096
"""Launches of one group whose names are kept between two exchanges."""

Members = tuple[int, ...]


class Order:
    """What this rank launched outside of compiled graphs since its process groups were made."""

    def __init__(self) -> None:
        self.sums: dict[Members, tuple[int, int]] = {}
        """Members of a group -> launches, and a number made of all of them in their order."""
        self.history: dict[Members, list[Site]] = {}

    def note(self, site: Site) -> None:
        count, total = self.sums.get(site.members, (0, 0))
        token = zlib.crc32(" ".join((site.transfer, site.op, *site.parameters)).encode()) + 1
        self.sums[site.members] = count + 1, (total * FACTOR + token) % PRIME
        kept = self.history.setdefault(site.members, [])
        if len(kept) < _KEPT:
            kept.append(site)
