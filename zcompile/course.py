"""The course of a step: which graphs run after a forward has begun, and how the ranks agree on them.

Before a compiled graph runs, every rank must be about to run one with the same ordered list of collectives. Asking before each graph makes
every rank wait for the slowest, and the words of the question wait on the wire behind the refreshes that have just been launched. So at the
start of a forward, in an exchange that is made anyway, the ranks say which course the last step of this kind took. Where all say the same,
a graph that comes next in it runs unasked. At the first that does not (a graph that is new, transfers outside of graphs since), and in all
that follow in this step, the ranks ask.

Note [Left behind]: a rank that is about to run something else than all agreed on asks, while the others, if they keep to the course, do not
answer: they wait for its messages. The same is true of one that leaves a graph out, and comes to the next exchange. Such a rank sees on the
board that others went on without it, and raises; what it says is in the report that all ranks hear. One that only compiles again, for
shapes that it alone has, comes to an equal list, and asks nobody.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zcompile.agreement import AgreementError, first_difference

if TYPE_CHECKING:
    from zcompile.engine import Engine

LOOK = 2.0
"""Seconds between two looks of a rank that may be left behind, in a small world; in a large one more: each asks the store for all."""
_WORLD = 16


class Course:
    """One model's. A course is the identities of the graphs, in the order in which they ran."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._last: dict[str, tuple[int, ...]] = {}
        """Of each phase, the one that the last forward in it began."""
        self._phase = ""
        self._ran: list[int] = []
        self._agreed: tuple[int, ...] | None = None
        """What all ranks expect from this forward on; None: they ask."""
        self._number = 0
        self._program: Any = None
        """The one that is asked for."""
        self._looked = -math.inf
        """When it last did."""
        engine.runtime.agreement.asides.add(self)

    def word(self, phase: str) -> int:
        """For the exchange at the start of a forward: equal on ranks that expect the same; 0 for nothing."""
        expected = self._last_of(phase)
        return int.from_bytes(hashlib.sha256(repr(expected).encode()).digest()[:7], "big") if expected else 0

    def _last_of(self, phase: str) -> tuple[int, ...]:
        return tuple(self._ran) if phase == self._phase else self._last.get(phase, ())

    def begin(self, phase: str, words: Sequence[int]) -> None:
        """A forward begins. words: every rank's `word` of this phase."""
        agreed = len(set(words)) == 1 and words[0] != 0
        self._last[self._phase] = tuple(self._ran)
        self._agreed = self._last_of(phase) if agreed else None
        self._phase, self._ran = phase, []
        watch = self._engine.runtime.watch
        self._number = 0 if watch is None else watch.exchanges

    def enter(self, program: Any) -> None:
        """Before a compiled graph runs. AgreementError unless every rank is about to run one with the same ordered collective list."""
        place, agreed, watch = len(self._ran), self._agreed, self._engine.runtime.watch
        if agreed is not None and agreed[place : place + 1] == (program.identity,) and not self._engine.launches.new:
            self._ran.append(program.identity)
            if watch is not None:
                watch.went_on = (self._number, place)
            return
        self._program = program
        try:
            self._ask(program)
        finally:
            self._program = self._agreed = None  # all have left the course
        self._ran.append(program.identity)

    def _ask(self, program: Any) -> None:
        engine = self._engine
        patience = engine.options.compile_timeout  # another rank may still be compiling
        words = [*engine.launches.words(), program.identity]
        said = engine.runtime.agreement.exchange(words, step=f"a {program.stage}", patience=patience)
        order, rows = engine.launches.split(said)
        engine.launches.check(order)
        if all(row[0] == program.identity for row in rows):
            return
        engine.runtime.agreement.compare(f"collectives of this {program.stage}", _listed(program))
        raise RuntimeError(f"zcompile: the ranks run different graphs ({program.name}), but their lists read the same")

    def aside(self, step: str, since: float) -> None:
        """Called now and then while this rank waits in the exchange `step`, from `since` on. AgreementError if it is left behind: see Note
        [Left behind]."""
        watch, now, place, expected = self._engine.runtime.watch, time.monotonic(), len(self._ran), self._agreed
        if watch is None or expected is None or place >= len(expected):  # nobody can be further
            return
        pause = LOOK * max(1.0, self._engine.runtime.topology.world_size / _WORLD)
        if now < max(self._looked, since) + pause:
            return
        self._looked = now
        ahead = watch.ahead(self._number, place)
        if ahead:
            raise AgreementError(self._text(ahead[0], step, expected[place]))

    def _text(self, other: int, step: str, identity: int) -> str:
        rank, program = self._engine.runtime.rank, self._program
        usual = next((p for p in reversed(self._engine.programs) if p.identity == identity), None)
        stage = "graph" if usual is None else usual.stage
        if program is None:
            reason = f"rank {rank} has left out a {stage}, and is at `{step}`"
        elif identity == program.identity:
            reason = f"rank {rank} launched transfers outside of compiled graphs that the others did not"
        else:
            found = None if usual is None else first_difference(_listed(usual), _listed(program))
            path, left, right = found or ("", f"another {stage}", program.name)
            reason = f"at `{path}` the others have {left}, rank {rank} has {right}"
        return (
            f"ranks disagree on collectives of this {stage}: rank {rank} differs from rank {other}, which runs what all ran in the step "
            f"before: {reason}"
        )


def _listed(program: Any) -> list[Any]:
    return [entry.with_source for entry in program.collectives]
