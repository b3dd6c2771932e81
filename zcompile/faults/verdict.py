"""From what the ranks said to who is to blame, and the report of it. Pure: no process group, no clock.

Blame goes, in this order, to a rank that raised an error of its own (the first one), that died (its connections are closed and it left
no word), whose program ended while others waited for it, that does not answer, that is in no collective while others wait, and last, when
all wait, to those that wait somewhere else than most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from zcompile.faults.sites import Site

Record = Mapping[str, Any]
"""What a rank leaves on the board; see zcompile.faults.watch.Watch.record."""

_AT_MOST = 12
"""Lines about the other ranks in a report."""


@dataclass(frozen=True)
class Trouble:
    """What one rank noticed: a wait that failed or took too long.

    Attributes:
        site, key, order, level, transfer, op, parameters, source: the collective: see zcompile.faults.sites.Site.
        missing: ranks whose part had not come; () where the backend does not tell.
        closed: of them, those whose connection is closed.
        error: what the backend said; `ours`: what that rank itself found out.
    """

    rank: int
    site: str
    key: tuple[Any, ...] = ()
    order: int = 0
    level: str = ""
    transfer: str = ""
    op: str = ""
    parameters: tuple[str, ...] = ()
    source: str = ""
    waited: float = 0.0
    limit: float = 0.0
    missing: tuple[int, ...] = ()
    closed: tuple[int, ...] = ()
    error: str = ""
    ours: bool = False

    @classmethod
    def of(cls, rank: int, site: Site, **more: Any) -> Trouble:
        return cls(
            rank,
            str(site),
            site.key,
            site.order,
            site.level,
            site.transfer,
            site.op,
            site.parameters,
            site.source,
            **more,
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Trouble:
        return cls(**_tuples(found))


@dataclass(frozen=True)
class Verdict:
    """Who is to blame and why. `kind`: raised, died, left, silent, busy, apart, slow or store."""

    kind: str
    ranks: tuple[int, ...]
    reason: str
    trouble: Trouble
    details: tuple[str, ...] = ()
    others: tuple[str, ...] = field(default=())

    @property
    def headline(self) -> str:
        """One line: the ranks, the reason, and the collective in which they were missed."""
        them = "it" if len(self.ranks) == 1 else "them"
        return f"{_ranks(self.ranks)} {self.reason}; rank {self.trouble.rank} missed {them} in {self.trouble.site}"

    @property
    def report(self) -> str:
        """For people: what to read first comes first."""
        t = self.trouble
        waited = f", which waited {t.waited:.1f} s of at most {t.limit:g} s" if t.transfer and t.limit else ""
        lines = [
            f"zcompile: {_ranks(self.ranks)} {self.reason}",
            f"  missed in  {t.site}",
            f"  by         rank {t.rank}{waited}",
            *(f"  {line}" for line in self.details),
        ]
        if t.error:
            said = t.error.splitlines()[0]
            lines.append(f"  which says {said[:600]}" if t.ours else f"  torch said {said[:200]}")
        lines += [
            f"  others     {line}" if number == 0 else f"             {line}" for number, line in enumerate(self.others)
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Verdict:
        return cls(**{**_tuples(found), "trouble": Trouble.from_json(found["trouble"])})


def _tuples(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def judge(trouble: Trouble, records: Mapping[int, Record], silent: Sequence[int], now: float) -> Verdict:
    """See the module.

    Args:
        records: the last record of each rank that ever left one.
        silent: ranks that were asked and did not answer.
        now: the time of the judging rank's clock, for "so long ago".
    """

    def verdict(kind: str, ranks: Sequence[int], reason: str, details: Sequence[str] = ()) -> Verdict:
        return Verdict(
            kind, tuple(ranks), reason, _earliest(trouble, ranks, records), tuple(details), _others(records, ranks)
        )

    def state(name: str) -> list[int]:
        return sorted(rank for rank, record in records.items() if record["state"] == name)

    raised = sorted(state("raised"), key=lambda rank: records[rank]["time"])
    if raised:
        error = records[raised[0]]["error"]
        also = f"; ranks {_listed(raised[1:])} raised too, later" if raised[1:] else ""
        where = f" at {error['line']}" if error["line"] else ""
        reason = f"raised {error['type']}: {error['message']}{where}{also}"
        details = [*(f"memory     {line}" for line in error.get("memory", ())), *_last(records, raised[0], now)]
        return verdict("raised", raised[:1], reason, details)
    gone = [rank for rank in trouble.closed if rank in silent or rank not in records]
    if gone:
        return verdict("died", gone, "died: connections are closed, no word was left", _last(records, gone[0], now))
    left = [rank for rank in state("left") if not trouble.missing or rank in trouble.missing]
    if left:
        return verdict("left", left, "ended while others still waited: the program came to its end, or sys.exit was called",
                       _last(records, left[0], now))  # fmt: skip
    if silent:
        reason = f"{_verb(silent, 'does', 'do')} not answer: stopped, gone with the host, or Python is held up"
        return verdict("silent", sorted(silent), reason, _last(records, min(silent), now))
    apart = [rank for rank, record in sorted(records.items()) if not _same(record, trouble)]
    swallowed = [rank for rank, record in sorted(records.items()) if record.get("caught")]
    if swallowed and apart:  # the rank that went on may be the one whose patience ended first
        error = records[swallowed[0]]["caught"]
        reason = f"went on after {error['type']}: {error['message']} at {error['line']} had broken off its forward or backward"
        details = [*(f"memory     {line}" for line in error.get("memory", ())), *_last(records, swallowed[0], now)]
        return verdict("apart", swallowed, reason, details)
    busy = [rank for rank, record in sorted(records.items()) if not record["waits"] and record["state"] != "fault"]
    if busy:
        record = records[busy[0]]
        verb = (
            _verb(busy, "compiles", "compile")
            if record["compiling"]
            else f"{_verb(busy, 'is', 'are')} in no collective"
        )
        return verdict("busy", busy, f"{verb}: Python is at {record['line'] or 'no line of yours'}",
                       _last(records, busy[0], now))  # fmt: skip
    inside = [rank for rank in apart if not trouble.missing or rank in trouble.missing] or apart
    if not inside:
        reason = (
            "waited longer than the limit where all ranks have come to: one of them is slow there, or the network is"
        )
        return verdict("slow", [trouble.rank], reason)
    reason = f"{_verb(inside, 'waits', 'wait')} at another place: the ranks do not run the same sequence of collectives"
    return verdict("apart", inside, reason, _last(records, inside[0], now))


def _earliest(trouble: Trouble, blamed: Sequence[int], records: Mapping[int, Record]) -> Trouble:
    """Of all waits for the blamed ranks the one that comes first in the order of the collectives: that far these ranks have come."""
    waits = [Trouble.from_json(wait) for record in records.values() for wait in record["waits"]]
    found = [wait for wait in (trouble, *waits) if set(wait.missing) & set(blamed) and wait.rank not in blamed]
    in_line = [wait for wait in found if wait.order] or found
    return min(in_line, key=lambda wait: wait.order, default=trouble)


def _same(record: Record, trouble: Trouble) -> bool:
    """Whether a rank waits where the trouble was noticed, and for the same parameters."""
    return any(
        tuple(wait["key"]) == trouble.key and tuple(wait["parameters"]) == trouble.parameters
        for wait in record["waits"]
    )


def _last(records: Mapping[int, Record], rank: int, now: float) -> list[str]:
    record = records.get(rank)
    if record is None:
        return ["last seen  never: it left no word since the process groups were made"]
    where = [f"waiting in {wait['site']}" for wait in record["waits"][:2]]
    where += [f"after {record['last']}"] if record["last"] and not where else []
    where += [f"Python at {record['line']}"] if record["line"] else []
    ago = f"{max(now - record['time'], 0):.1f} s ago"
    return [f"last seen  {ago}, {'; '.join(where) or 'before its first collective'}"]


def _others(records: Mapping[int, Record], blamed: Sequence[int]) -> tuple[str, ...]:
    """What the other ranks were doing, ranks that did the same together."""
    groups: dict[str, list[int]] = {}
    for rank, record in sorted(records.items()):
        if rank in blamed:
            continue
        waits = [wait["site"] for wait in record["waits"][:2]]
        doing = f"waiting in {' and '.join(waits)}" if waits else f"at {record['line'] or 'no line of yours'}"
        doing = "ended" if record.get("final") else doing
        groups.setdefault(doing, []).append(rank)
    lines = [f"{_ranks(ranks)}: {doing}" for doing, ranks in groups.items()]
    return tuple(lines[:_AT_MOST] + ([f"and {len(lines) - _AT_MOST} more"] if len(lines) > _AT_MOST else []))


def _verb(ranks: Sequence[int], one: str, many: str) -> str:
    return one if len(ranks) == 1 else many


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    """ "0-3, 7": runs joined, cut after eight of them."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    shown = ", ".join("-".join(map(str, run)) for run in runs[:8])
    return shown + (f" and {len(runs) - 8} more" if len(runs) > 8 else "")


class FaultError(RuntimeError):
    """The job cannot go on: a rank is gone, stopped, failed or somewhere else. `verdict` says which one; the text is its headline."""

    def __init__(self, text: str, verdict: Verdict | None = None):
        super().__init__(text)
        self.verdict = verdict
