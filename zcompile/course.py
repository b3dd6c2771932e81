"""The course of a step: which graphs run after a forward has begun, and how the ranks agree on them.

Before a compiled graph runs, every rank must be about to run one with the same ordered list of collectives. Asking before each graph makes
every rank wait for the slowest, and the words of the question wait on the wire behind the refreshes that have just been launched. So at the
start of a forward, in an exchange that is made anyway, the ranks say which course the last step of this kind took. Where all say the same,
a graph that comes next in it runs unasked. At the first that does not (a graph that is new, transfers outside of graphs since), and in all
that follow in this step, the ranks ask.

Note [Left behind]: a rank that is about to run something else than all agreed on asks, while the others, if they keep to the course, do not
answer: they wait for its messages. It sees on the board that they went on, and raises; then its connections close, and they hear why.
One that only compiles again, for shapes that it alone has, comes to an equal list, and asks nobody.
"""

from __future__ import annotations

import hashlib
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

    def word(self, phase: str) -> int:
        """For the exchange at the start of a forward: equal on ranks that expect the same; 0 for nothing."""
        if self._phase:
            self._last[self._phase], self._phase = tuple(self._ran), ""
        expected = self._last.get(phase, ())
        return int.from_bytes(hashlib.sha256(repr(expected).encode()).digest()[:7], "big") if expected else 0

    def begin(self, phase: str, words: Sequence[int]) -> None:
        """A forward begins. words: every rank's `word` of this phase."""
        agreed = len(set(words)) == 1 and words[0] != 0
        self._phase, self._ran = phase, []
        self._agreed = self._last[phase] if agreed else None
        watch = self._engine.runtime.watch
        self._number = 0 if watch is None else watch.exchanges

    def enter(self, program: Any) -> None:
        """Before a compiled graph runs. AgreementError unless every rank is about to run one with the same ordered collective list."""
        place, agreed = len(self._ran), self._agreed
        self._ran.append(program.identity)
        expected = agreed is not None and agreed[place : place + 1] == (program.identity,)
        if expected and not self._engine.launches.new:
            watch = self._engine.runtime.watch
            if watch is not None:
                watch.went_on = (self._number, place)
            return
        self._agreed = None
        try:
            self._ask(
                program, None if agreed is None else _LeftBehind(self._engine, program, (self._number, place), agreed)
            )
        except AgreementError as error:
            self._engine.runtime.broke_off(error)
            raise

    def _ask(self, program: Any, left_behind: _LeftBehind | None) -> None:
        engine = self._engine
        patience = engine.options.compile_timeout  # another rank may still be compiling
        words = [*engine.launches.words(), program.identity]
        said = engine.runtime.agreement.exchange(
            words, step=f"a {program.stage}", patience=patience, meanwhile=left_behind
        )
        order, rows = engine.launches.split(said)
        engine.launches.check(order)
        if all(row[0] == program.identity for row in rows):
            return
        engine.runtime.agreement.compare(f"collectives of this {program.stage}", _listed(program))
        raise RuntimeError(f"zcompile: the ranks run different graphs ({program.name}), but their lists read the same")


class _LeftBehind:
    """Called again and again by a rank that asks where it may be that nobody answers: see Note [Left behind]."""

    def __init__(self, engine: Engine, program: Any, place: tuple[int, int], agreed: tuple[int, ...]):
        self._engine, self._program, self._place, self._agreed = engine, program, place, agreed
        self._pause = LOOK * max(1.0, engine.runtime.topology.world_size / _WORLD)
        self._next = time.monotonic() + self._pause

    def __call__(self) -> None:
        watch = self._engine.runtime.watch
        if watch is None or time.monotonic() < self._next:
            return
        ahead = watch.ahead(self._place)
        self._next = time.monotonic() + self._pause
        if ahead:
            raise AgreementError(self._text(ahead[0]))

    def _text(self, other: int) -> str:
        program, place = self._program, self._place[1]
        rank = self._engine.runtime.rank
        identity = self._agreed[place] if place < len(self._agreed) else None
        if identity == program.identity:
            reason = "it launched transfers outside of compiled graphs that the others did not"
        elif identity is None:
            reason = f"{program.name} is one graph more than the last step ran"
        else:
            usual = next((p for p in reversed(self._engine.programs) if p.identity == identity), None)
            found = None if usual is None else first_difference(_listed(usual), _listed(program))
            path, left, right = found or ("", "another graph", program.name)
            reason = f"at `{path}` the others have {left}, rank {rank} has {right}"
        return (
            f"ranks disagree on collectives of this {program.stage}: rank {rank} differs from rank {other}, which runs what all ran in the "
            f"step before: {reason}"
        )


def _listed(program: Any) -> list[Any]:
    return [entry.with_source for entry in program.collectives]
