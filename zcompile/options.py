"""What can be said beside topology and plan; the same keys in the decorator and in `torch.compile(..., options=)`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

CHECKS = (False, True, "masters", "checksums")
"""What the option `checks` may be."""
NONFINITE = ("skip", "raise", "ignore")
_RANKS = r"|all|\d+(,\d+)*"
_RANKS_HELP = "must be ranks, as '0' or '0,8,16', or 'all'"


@dataclass(frozen=True)
class Options:
    """Checked when made; an unknown key is an error that lists these.

    Attributes:
        codegen: generate code with Inductor. False runs the same backend and passes and executes the lowered graph node by node.
        dump: folder for the program before and after each pass (also the environment variable ZCOMPILE_DUMP); "" is none.
        dump_ranks: whose programs are dumped: "0" (or more of them: "0,8,16") or "all" (also ZCOMPILE_DUMP_RANKS). The first of them writes
            ledger, trace and report.
        overlap: buckets whose transfers are under way while the graph computes, in either direction, however deep the model: 0 waits for
            each hop where it is launched; more hide more and keep so many more buckets in memory. Compiled graphs only.
        memory: bytes that transfers under way may hold, what they send and what they receive, gathers and reductions each; one bucket
            is always under way, whatever it takes. 0: no bound but that of `overlap`.
        keep: bytes of gathered weights that a forward leaves for its backward, which does not gather them again: whole units, those that
            are read last first; 0: none. Compiled graphs only.
        tokens: rows that a product multiplies with a weight: tokens, or samples, of a micro-batch on one rank, about. From them the
            schedule knows how long products take beside transfers on the machine's device; 0: it takes both to be as long
            (passes/schedule.py). Batches may differ from it and from each other.
        timeout: seconds a rank waits for another, at set-up, at an agreement and in a collective, before it looks who is missing and
            raises FaultError.
        compile_timeout: seconds a rank waits for another that is alive and compiles a graph that is new to both; for one that compiles
            again alone `timeout` is the limit.
        sync_init: take rank 0's initial values on every rank instead of requiring that they are equal.
        checks: True or "masters" compares checksums of the masters before each forward, to find writes that torch does not see, and looks
            at each gradient before it is reduced, to say on which rank one that is not finite arose. "checksums" does that, and compares
            every message that arrives with what was sent, and every compute copy with what its refresh wrote: slow, for the search of a
            faulty link or memory.
        nonfinite: what an optimizer's step does when a gradient that it steps is not finite on any rank: "skip" it on all ranks, count and
            say it; "raise" FloatingPointError on all ranks; "ignore" it, without the exchange that the others cost (but where weights
            were read outside of compiled graphs: ranks still compare which).
        strict: raise after a forward in which a parameter was read outside of compiled graphs: see zcompile.coverage.
        fullgraph, dynamic: as in torch.compile, for a model that compiles itself.
    """

    codegen: bool = True
    dump: str = ""
    dump_ranks: str = ""
    overlap: int = 2
    memory: int = 0
    keep: int = 0
    tokens: int = 0
    timeout: float = 600.0
    compile_timeout: float = 3600.0
    sync_init: bool = False
    checks: bool | str = False
    nonfinite: str = "skip"
    strict: bool = False
    fullgraph: bool = False
    dynamic: bool | None = None

    def __post_init__(self) -> None:
        if self.checks not in CHECKS:
            raise ValueError(f"option checks={self.checks!r}: must be one of {', '.join(map(repr, CHECKS))}")
        for name in ("codegen", "sync_init", "strict", "fullgraph"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"option {name}={getattr(self, name)!r}: must be True or False")
        if self.nonfinite not in NONFINITE:
            raise ValueError(f"option nonfinite={self.nonfinite!r}: must be one of {', '.join(NONFINITE)}")
        if self.dynamic not in (None, True, False):
            raise ValueError(f"option dynamic={self.dynamic!r}: must be None, True or False")
        for name in ("timeout", "compile_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"option {name}={value!r}: must be a positive number of seconds")
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int) or not 0 <= self.overlap <= 64:
            raise ValueError(f"option overlap={self.overlap!r}: must be a number of buckets, from 0 to 64")
        for name, none in (("memory", "for no bound"), ("keep", "to keep nothing")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"option {name}={value!r}: must be a number of bytes, or 0 {none}")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 0:
            raise ValueError(
                f"option tokens={self.tokens!r}: must be a number of tokens of a micro-batch, or 0 where nobody knows"
            )
        if self.memory and not self.overlap:
            raise ValueError(
                f"option memory={self.memory}: bounds what overlap keeps under way, which is 0; give overlap= too"
            )
        if not isinstance(self.dump, (str, os.PathLike)):
            raise ValueError(f"option dump={self.dump!r}: must be the path of a folder")
        if not isinstance(self.dump_ranks, str) or not re.fullmatch(_RANKS, self.dump_ranks):
            raise ValueError(f"option dump_ranks={self.dump_ranks!r}: {_RANKS_HELP}")

    @property
    def dump_folder(self) -> str:
        return os.fspath(self.dump) or os.environ.get("ZCOMPILE_DUMP", "")

    def dumping_ranks(self, world_size: int) -> Collection[int]:
        """The ranks that dump. ValueError where ZCOMPILE_DUMP_RANKS is no list of ranks, or this world has none of them.

        Where no dump is asked for, a ZCOMPILE_DUMP_RANKS left over from another job says nothing.
        """
        text = self.dump_ranks or (os.environ.get("ZCOMPILE_DUMP_RANKS", "") if self.dump_folder else "") or "0"
        if not re.fullmatch(_RANKS, text):
            raise ValueError(f"ZCOMPILE_DUMP_RANKS={text!r} in the environment: {_RANKS_HELP}")
        if text == "all":
            return range(world_size)
        found = {int(rank) for rank in text.split(",")}
        if beyond := sorted(rank for rank in found if rank >= world_size):
            raise ValueError(f"dump_ranks={text!r}: there is no rank {beyond[0]} in a world of {world_size}")
        return found

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        return cls()._with(given)

    def merged(self, given: Mapping[str, Any] | None) -> Options:
        """These options with those of a `torch.compile(..., options=)` in their place."""
        return self._with(given or {})

    def _with(self, given: Mapping[str, Any]) -> Options:
        known = [field.name for field in fields(self)]
        for key in given:
            if key in ("plan", "topology", "compute_dtype", "compile", "device", "init", "pretrained"):
                raise ValueError(
                    f"option {key!r}: belongs to hierarchical_zero(model, {key}=...); it is fixed when the model is wrapped"
                )
            if key not in known:
                close = get_close_matches(key, known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"unknown option {key!r}{hint}; valid: {', '.join(known)}")
        return replace(self, **given)
