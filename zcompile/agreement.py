"""Agreement: do all ranks say the same? A few words exchanged over a CPU group of the world, and an error that says who
differs, and where.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from zcompile import _torch_compat as compat
from zcompile.faults import errors
from zcompile.faults.sites import Site
from zcompile.faults.verdict import FaultError
from zcompile.faults.waits import closed_members, poll
from zcompile.faults.watch import Watch

PATIENT = 7 * 86400.0
"""Seconds that the group's own exchanges may take by its backend: whoever waits for one has a limit of its own, and looks around."""
_FRAME = 16  # words of the first message; two of them are the header (number of words, checksum of the step's name)
_BODY = _FRAME - 2


class AgreementError(RuntimeError):
    """Ranks disagree, or one did not answer. The text is the same on all ranks that got an answer."""


class NoAnswer(FaultError, AgreementError):
    """A rank did not come to an agreement in time: the verdict says which."""


class Exchange:
    """An exchange under way; `result()` waits for it. Take results in the order of the launches."""

    def __init__(self, agreement: Agreement, words: list[int], step: str) -> None:
        self._agreement = agreement
        self._words = words
        self._step = step
        self._values: list[list[int]] | None = None
        head = [len(words), zlib.crc32(step.encode())]
        self._frame = agreement._launch(_padded(head + words[:_BODY], _FRAME))

    def result(self, timeout: float | None = None, patience: float = 0.0) -> list[list[int]]:
        """The words of every rank, by rank. AgreementError if a rank is at another step, or after `timeout` seconds; `patience` seconds
        while some rank compiles.
        """
        if self._values is None:
            self._values = self._take(timeout, patience)
        return self._values

    def _take(self, timeout: float | None, patience: float) -> list[list[int]]:
        agreement, step = self._agreement, self._step
        frames = agreement._finish(self._frame, step, timeout, patience)
        strangers = [rank for rank, frame in enumerate(frames) if frame[1] != zlib.crc32(step.encode())]
        if strangers:
            raise AgreementError(
                f"agreement step `{step}` on rank {agreement.rank}: rank {_ranks(strangers)} is at another "
                "step; all ranks must reach the same steps in the same order"
            )
        lengths = [frame[0] for frame in frames]
        if max(lengths) > _BODY:
            launched = agreement._launch(_padded(self._words, max(lengths)))
            frames = [[0, 0, *tail] for tail in agreement._finish(launched, step, timeout)]
        return [frame[2 : 2 + length] for frame, length in zip(frames, lengths, strict=True)]


class Agreement:
    """Small exchanges between all ranks of the world, over a CPU group of their own.

    With one rank, or on the fake backend, there is nobody to ask: every rank is taken to say what this one says.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        rank: int,
        world_size: int,
        timeout: float = 300.0,
        watch: Watch | None = None,
    ) -> None:
        self.group = group
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.watch = watch
        self.asides: weakref.WeakSet[Any] = weakref.WeakSet()
        """Whose `aside(step, since)` is called now and then by an exchange that is waited for; it may raise AgreementError."""

    def exchange(
        self, words: list[int], *, step: str = "exchange", timeout: float | None = None, patience: float = 0.0
    ) -> list[list[int]]:
        """Every rank's `words` (int64, any number, it may differ between ranks), by rank. Raises after `timeout` seconds (None: those of
        this object); while some rank compiles, after `patience`; and what one of `asides` raises.
        """
        return self.launch(words, step=step).result(timeout, patience)

    def launch(self, words: list[int], *, step: str = "exchange") -> Exchange:
        """`exchange` without waiting."""
        return Exchange(self, [int(word) for word in words], step)

    def compare(self, title: str, value: Any, *, timeout: float | None = None) -> None:
        """Raise AgreementError on all ranks alike unless `value` (what JSON can hold) is the same on all of them.

        The error names the ranks that differ from the most common value, the path of the first difference, and both
        values there. Costs one small exchange when all agree.
        """
        text = json.dumps([title, value], sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(text).digest()
        words = [int.from_bytes(digest[8 * i : 8 * i + 8], "little", signed=True) for i in range(4)] + [len(text)]
        said = [tuple(answer) for answer in self.exchange(words, step="compare", timeout=timeout)]
        if len(set(said)) == 1:
            return
        counts = Counter(said)
        usual = max(counts, key=lambda answer: (counts[answer], -said.index(answer)))
        odd = [rank for rank, answer in enumerate(said) if answer != usual]
        first, other = said.index(usual), odd[0]
        title, expected = self._broadcast(text, first, said[first][4], timeout)
        other_title, found = self._broadcast(text, other, said[other][4], timeout)
        if title != other_title:
            raise AgreementError(
                f"ranks compare different things: rank {_ranks(odd)} differs from rank {first}: "
                f"rank {first} compares `{title}`, rank {other} compares `{other_title}`"
            )
        path, left, right = first_difference(expected, found) or ("", expected, found)
        raise AgreementError(
            f"ranks disagree on {title}: rank {_ranks(odd)} differs from rank {first}: at `{title}{path}` "
            f"rank {first} has {left}, rank {other} has {right}"
        )

    def texts(self, mine: str, sources: Sequence[int]) -> list[str]:
        """What the ranks `sources` say, on every rank; every rank calls it with its own text."""
        text = json.dumps(mine).encode()
        lengths = [row[0] for row in self.exchange([len(text)], step="texts")]
        return [self._broadcast(text, source, lengths[source], None) for source in sources]

    def _broadcast(self, text: bytes, source: int, length: int, timeout: float | None) -> Any:
        """The JSON text of rank `source`, read; `length` in bytes is known to all."""
        assert self.group is not None, "one rank cannot differ from itself"
        buffer = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8)
            if source == self.rank
            else torch.empty(length, dtype=torch.uint8)
        )
        work = dist.broadcast(buffer, group=self.group, group_src=source, async_op=True)
        self._wait(work, "compare", timeout)
        return json.loads(bytes(buffer.tolist()))

    def _launch(self, words: list[int]) -> tuple[torch.Tensor, dist.Work | None]:
        mine = torch.tensor(words, dtype=torch.int64)
        if self.group is None:
            return mine.repeat(self.world_size), None
        gathered = torch.empty(self.world_size * len(words), dtype=torch.int64)
        # An all-gather of gloo's goes round a ring: as many messages, but one after another.
        return gathered, dist.all_to_all_single(gathered, mine.repeat(self.world_size), group=self.group, async_op=True)

    def _finish(
        self, launched: tuple[torch.Tensor, dist.Work | None], step: str, timeout: float | None, patience: float = 0.0
    ) -> list[list[int]]:
        gathered, work = launched
        self._wait(work, step, timeout, patience)
        rows: list[list[int]] = gathered.view(self.world_size, -1).tolist()
        return rows

    def _wait(self, work: dist.Work | None, step: str, timeout: float | None, patience: float = 0.0) -> None:
        if work is None:
            return
        limit = self.timeout if timeout is None else timeout
        start = time.monotonic()
        site = self._site(step)
        error: Exception | str = f"no answer after {limit:g} s"
        with contextlib.nullcontext() if self.watch is None else self.watch.waiting(site):
            try:
                while not poll(work, limit, self.watch, lambda: self._aside(step, start)):
                    if self.watch is None or time.monotonic() - start > patience:
                        break
                    if self.watch.excused():
                        continue
                    if poll(work, min(limit, 2.0), self.watch):  # it may have come while we asked
                        return
                    break
                else:
                    return
            except FaultError as known:
                raise NoAnswer(str(known), known.verdict) from None
            except RuntimeError as found:
                error = found
            what = f"agreement step `{step}` on rank {self.rank}: no answer from all {self.world_size} ranks after "
            what += f"{time.monotonic() - start:.1f} s (limit {limit:g} s)"
            if self.watch is None or self.group is None:
                raise AgreementError(f"{what}; a rank is late, gone or at another step. torch said: {error}") from None
            closed = () if isinstance(error, str) else closed_members(self.group, site.members)
            ours = isinstance(error, AgreementError)  # of `asides`, who know more than that nobody answers
            fault = self.watch.lost(site, error, closed=closed, limit=limit, since=start, ours=ours)
        raise NoAnswer(f"{error if ours else what}. {fault}", fault.verdict) from None

    def _aside(self, step: str, since: float) -> None:
        for each in list(self.asides):
            each.aside(step, since)

    @contextlib.contextmanager
    def lend(self, step: str) -> Iterator[dist.ProcessGroup | None]:
        """The group, for collectives of torch's own that all ranks call inside (a checkpoint's); None with one rank. Each of them may take
        the timeout of this object; NoAnswer, where torch would only say that one has failed.
        """
        if self.group is None or self.watch is None:
            yield self.group
            return
        site = self._site(step)
        compat.set_group_timeout(self.group, self.timeout)
        with self.watch.waiting(site):
            try:
                yield self.group
            except RuntimeError as error:
                if errors.is_verdict(error) or not errors.of_collectives(error):
                    raise
                closed = () if "imed out" in str(error) else closed_members(self.group, site.members)
                fault = self.watch.lost(site, error, missing=closed, closed=closed)
                raise NoAnswer(f"agreement step `{step}` on rank {self.rank}. {fault}", fault.verdict) from error
            finally:
                compat.set_group_timeout(self.group, PATIENT)

    def _site(self, step: str) -> Site:
        members = tuple(range(self.world_size))
        return (
            Site("world", "agreement", step, 0, members)
            if self.watch is None
            else self.watch.site("world", "agreement", step, members)
        )


def first_difference(left: Any, right: Any, path: str = "") -> tuple[str, str, str] | None:
    """Path (`[3].bytes`) and both values at the first place where two JSON values differ; None if they are equal."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):
            if key not in left or key not in right:
                return f"{path}.{key}", _shown(left, key), _shown(right, key)
            if found := first_difference(left[key], right[key], f"{path}.{key}"):
                return found
        return None
    if isinstance(left, list) and isinstance(right, list):
        for position, (a, b) in enumerate(zip(left, right, strict=False)):
            if found := first_difference(a, b, f"{path}[{position}]"):
                return found
        if len(left) == len(right):
            return None
        position = min(len(left), len(right))
        return f"{path}[{position}]", _shown(left, position), _shown(right, position)
    if type(left) is type(right) and left == right:
        return None
    return path, json.dumps(left), json.dumps(right)


def _shown(container: Any, key: Any) -> str:
    missing = key not in container if isinstance(container, dict) else key >= len(container)
    return "nothing" if missing else json.dumps(container[key])


def _ranks(ranks: list[int]) -> str:
    """`3`, or `3 (also 5, 7)`, cut after eight."""
    if len(ranks) == 1:
        return str(ranks[0])
    rest = ", ".join(str(rank) for rank in ranks[1:9]) + (f" and {len(ranks) - 9} more" if len(ranks) > 9 else "")
    return f"{ranks[0]} (also {rest})"


def _padded(words: list[int], length: int) -> list[int]:
    return words + [0] * (length - len(words))


_FLAGS = 62  # flags in one word: an int64 without its sign, and one bit to spare


def pack_flags(flags: Sequence[bool]) -> list[int]:
    """Flags as words of an exchange; `set_anywhere` reads them."""
    return [
        sum(1 << i for i, flag in enumerate(flags[start : start + _FLAGS]) if flag)
        for start in range(0, len(flags), _FLAGS)
    ]


def set_anywhere(rows: Sequence[Sequence[int]], count: int) -> list[bool]:
    """Which of `count` flags some rank has set; `rows` are the packed flags of every rank."""
    words = [0] * -(-count // _FLAGS)
    for row in {tuple(row) for row in rows}:  # most ranks say the same: the work is of ranks or of flags, not of both
        words = [have | word for have, word in zip(words, row, strict=True)]
    return [bool(words[i // _FLAGS] >> (i % _FLAGS) & 1) for i in range(count)]
