"""What the ranks of a job leave for one another in its store: a record each, and once something went wrong a flag and a verdict.

Only the watch's thread comes here, over a connection of its own: a store that does not answer blocks nobody else. A record is replaced
every few seconds; that is all the traffic there is while nothing is wrong.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from zcompile import _torch_compat as compat

_GENERATIONS = itertools.count()


class Board:
    """Keys under one prefix, of one default process group: the ranks make equally many of these."""

    def __init__(self, store: compat.Store, rank: int, generation: int | None = None):
        self._plain, self._rank = compat.clone_store(store), rank
        self._generation = next(_GENERATIONS) if generation is None else generation
        self._store = compat.PrefixStore(f"zc/watch/{self._generation}", self._plain)

    def again(self) -> Board:
        """The same board over a connection of its own, for another thread."""
        return Board(self._plain, self._rank, self._generation)

    def publish(self, record: dict[str, Any]) -> None:
        self._store.set(str(self._rank), json.dumps(record))

    def records(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The last record of each rank that has left one."""
        keys = [str(rank) for rank in ranks]
        if not self._store.check(keys):  # all of them at once is the usual case
            ranks = [rank for rank, key in zip(ranks, keys, strict=True) if self._store.check([key])]
            keys = [str(rank) for rank in ranks]
        found = self._store.multi_get(keys) if keys else []
        return {rank: json.loads(value) for rank, value in zip(ranks, found, strict=True)}

    def flag(self) -> bool:
        """Say that something is wrong; True for the first to say so."""
        return self._first("flag")

    def flagged(self) -> bool:
        return self._store.check(["flag"])

    def claim(self, turn: int) -> bool:
        """Whether this rank is the one that judges; `turn` counts judges that did not come to an end."""
        return self._first(f"judge/{turn}")

    def decide(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Leave a verdict; returns the one that holds, which is the first."""
        return json.loads(self._store.compare_set("verdict", "", json.dumps(verdict)))  # type: ignore[no-any-return]

    def verdict(self) -> dict[str, Any] | None:
        return json.loads(self._store.get("verdict")) if self._store.check(["verdict"]) else None

    def _first(self, key: str) -> bool:
        return self._store.compare_set(key, "", str(self._rank)).decode() == str(self._rank)
