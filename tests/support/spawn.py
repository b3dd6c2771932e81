"""Ranks for tests: the pool that `zcompile verify` runs on."""

from __future__ import annotations

from zcompile.ranks import Failure, Pool, RanksFailed, run

__all__ = ["Failure", "Pool", "RanksFailed", "run"]
