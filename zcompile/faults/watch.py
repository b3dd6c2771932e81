"""The watch of one process: a thread that says where this rank is, asks where the others are, and ends what cannot end by itself.

While nothing is wrong it replaces this rank's record on the board every `tick` seconds and looks whether anybody raised the flag. A wait
that fails or takes longer than `timeout` raises it. Then every rank that can says where it is; the first one in trouble judges
(zcompile.faults.verdict) and prints the one report; all others take its verdict, and what waits raises `FaultError`. A rank that does not
come to raise it, because it is stuck in something that is not ours, is ended after `GRACE` seconds.

Note [Closed is not dead]: a rank whose wait ran out of time closes its connections, and then looks to its neighbours as one that died.
It answers, though: dead is who has closed connections and does not answer.

Note [Last words]: Python leaves an uncaught exception in `sys.last_value` before the functions of `atexit` run, and connections are closed
after them: so nobody who sees a connection closed by an exception is too early to read which.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from zcompile import _torch_compat as compat
from zcompile.faults import errors, stacks
from zcompile.faults.board import Board
from zcompile.faults.order import Order
from zcompile.faults.sites import Listed, Site, subject, users_line
from zcompile.faults.verdict import FaultError, Trouble, Verdict, judge
from zcompile.faults.waits import closed_members

GRACE = 12.0
"""Seconds that a process has to raise once there is a verdict."""
EXIT = 20
"""Seconds that a process has to come to its end after an error, before the kernel ends it."""
SETTLE = 0.5
"""Seconds in which a rank whose connections are closed would have answered if it were alive."""
HURRY = 0.05
"""Seconds between two looks at the board once something is wrong."""
HOLDER = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
"""The rank whose process holds the job's store; under torchrun it is the agent."""
REFRESH_THREADS = "zcompile-refresh"


class Watch:
    """See the module. One of these for each default process group.

    Args:
        store: the default group's; the watch opens a connection of its own, and keeps this one: where it is in this process, others need it
            as long as they live.
        timeout: seconds that a rank may wait for another.
        on_device: collectives are waited for on a GPU: nobody sees a connection close, so an error is announced to all ranks.
    """

    def __init__(self, store: compat.Store, rank: int, world: int, timeout: float, on_device: bool = False):
        self.rank, self.world, self.timeout = rank, world, timeout
        self.verdict: Verdict | None = None
        self.caught: dict[str, Any] | None = None
        """An error that broke off a forward and that this rank's program went on from."""
        self._store, self._board = store, Board(store, rank)
        self.on_device = on_device
        self._numbers: collections.Counter[tuple[str, str]] = collections.Counter()
        self._order = 0
        self.went_on: tuple[int, int] = (0, 0)
        """(course, place in it) of the last graph that this rank ran without asking the others: see zcompile.course."""
        self.order = Order()
        """Of transfers that no graph lists."""
        self._waits: dict[int, tuple[Site, float, Callable[[], Sequence[int]]]] = {}
        """Of each thread: what it waits for, since when, and a function that says for whom."""
        self._last: Site | None = None
        self._flying: collections.deque[tuple[Site, Any, float]] = collections.deque()
        self._trouble: Trouble | None = None
        self._lock = threading.Lock()
        self._wake, self._decided, self._taken, self._said, self._all_ended = (threading.Event() for _ in range(5))
        self._closed = False
        self._end: dict[str, Any] | None = None
        self._beat = 0
        self._turn, self._judging, self._asked, self._flagged = 0, False, 0.0, False
        self._decided_at = 0.0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="zcompile-watch", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    @property
    def tick(self) -> float:
        """Seconds between two records: one request a rank, so longer where there are many."""
        return min(max(1.0, self.world / 512), 8.0, self.timeout / 4)

    @property
    def answers(self) -> float:
        """Seconds within which a rank that is alive has answered."""
        return 2 * self.tick + 1

    # -- what the groups tell ----------------------------------------------------------------------------------------------------

    def site(self, level: str, transfer: str, op: str, members: tuple[int, ...]) -> Site:
        """The collective that this thread is about to launch. FaultError if there is a verdict already."""
        self.check()
        number = self._numbers[level, transfer]
        self._numbers[level, transfer] = number + 1
        at_work = subject()
        parameters, source, stage = at_work.describe(level, transfer) if at_work is not None else ((), "", "")
        beside = transfer in ("refresh", "barrier")
        self._order += not beside
        self._last = site = Site(
            level, transfer, op, number, members, 0 if beside else self._order, parameters, source, stage
        )
        if not beside and transfer != "agreement" and not isinstance(at_work, Listed):
            self.order.note(site)
        return site

    @contextlib.contextmanager
    def waiting(self, site: Site, whom: Callable[[], Sequence[int]] = tuple) -> Iterator[None]:
        """This thread waits for `site`, and there for the ranks that `whom` says, as far as it is known."""
        self.wait_begins(site, whom)
        try:
            yield
        finally:
            self.wait_ends()

    def wait_begins(self, site: Site, whom: Callable[[], Sequence[int]]) -> None:
        """`waiting`, for what is called in every hop: `wait_ends` follows, whatever happens."""
        self._waits[threading.get_ident()] = (site, time.monotonic(), whom)

    def wait_ends(self) -> None:
        self._waits.pop(threading.get_ident(), None)

    def track(self, site: Site, work: Any) -> None:
        """A collective on a device: nobody waits for it on the host; the watch looks whether it takes too long."""
        self._flying.append((site, work, time.monotonic()))

    def check(self) -> None:
        """FaultError if there is a verdict: nothing is launched any more."""
        if self.verdict is not None:
            raise self._error(self.verdict)

    def lost(self, site: Site, error: BaseException | str, *, missing: Sequence[int] = (), closed: Sequence[int] = (),
             limit: float | None = None, since: float | None = None, ours: bool = False) -> FaultError:  # fmt: skip
        """A wait for `site` failed or took too long. Asks the other ranks, and returns what to raise.

        Args:
            missing: ranks whose part did not come, as far as known; closed: those whose connection is closed.
            limit: seconds that it might take; since: when the wait began, as of time.monotonic.
            ours: `error` is not the backend's but what this rank found out.
        """
        if since is None:
            since = self._waits.get(threading.get_ident(), (site, time.monotonic(), tuple))[1]
        with self._lock:
            if self._trouble is None:
                self._trouble = Trouble.of(
                    self.rank, site, waited=time.monotonic() - since, limit=limit or self.timeout, missing=tuple(missing),
                    closed=tuple(closed), error=str(error), ours=ours,
                )  # fmt: skip
        self._wake.set()
        if not self._decided.wait(self.answers + 2 * SETTLE + 5) and self.verdict is None:
            self._adopt(self._without_store("does not answer"), mine=self.rank == 1)
        assert self.verdict is not None
        return self._error(self.verdict)

    def _error(self, verdict: Verdict) -> FaultError:
        if not threading.current_thread().name.startswith(REFRESH_THREADS):
            self._taken.set()
        return FaultError(f"zcompile: {verdict.headline}", verdict)

    # -- questions to others -----------------------------------------------------------------------------------------------------

    def excused(self) -> bool:
        """Whether some rank is alive and compiles, so that waiting longer than `timeout` makes sense. Asks the store."""
        found = self._ask()
        return any(record["compiling"] and fresh for record, fresh in found.values())

    def alive(self, rank: int) -> bool:
        """Whether a rank's heart beats. Asks the store."""
        record, fresh = self._ask((rank,)).get(rank, (None, False))
        return record is None or fresh

    @property
    def exchanges(self) -> int:
        """Exchanges of words so far: the same number on all ranks that come from one."""
        return self._numbers["world", "agreement"]

    def ahead(self, number: int, place: int) -> list[int]:
        """Ranks that ran the graph at `place` of course `number` unasked, and have not come to the exchange that this rank is in. Asks the
        store."""
        found = self._board.again().records(range(self.world))
        return [
            rank
            for rank, record in found.items()
            if record["went_on"][0] == number and record["went_on"][1] >= place and record["exchanges"] < self.exchanges
        ]

    def _ask(self, ranks: Sequence[int] | None = None) -> dict[int, tuple[dict[str, Any], bool]]:
        """Records, and whether each rank's heart has beaten in a look that takes a few beats."""
        board = self._board.again()
        ranks = range(self.world) if ranks is None else ranks
        before = board.records(ranks)
        time.sleep(1.5 * self.tick)
        return {
            rank: (record, rank not in before or record["beat"] != before[rank]["beat"])
            for rank, record in board.records(ranks).items()
        }

    # -- the thread --------------------------------------------------------------------------------------------------------------

    def record(self, state: str = "") -> dict[str, Any]:
        """Where this rank is. `state`: running, waiting, fault (in trouble, or it has a verdict); raised and left are last words."""
        now = time.monotonic()
        waits = [
            Trouble.of(self.rank, site, waited=now - since, limit=self.timeout, missing=tuple(whom()))
            for site, since, whom in list(self._waits.values())
        ]
        if not state:
            state = "fault" if self._trouble or self.verdict else "waiting" if waits else "running"
        return {
            "state": state,
            "beat": self._beat,
            "time": time.time(),
            "waits": [asdict(wait) for wait in waits],
            "last": str(self._last) if self._last else "",
            "line": users_line(stacks.main_thread()),
            "compiling": compat.compiling(),
            "answered": self._judging or self._asked > 0,
            "caught": self.caught,
            "went_on": self.went_on,
            "exchanges": self.exchanges,  # read after `went_on`: who has come to an exchange and went on then has both
        }

    def _serve(self) -> None:
        while not self._closed:
            try:
                if self._beat >= 0:
                    self._step()
            except (RuntimeError, OSError, ValueError):  # the store is gone, and with it whoever holds it
                self._beat = -1
                self._said.set()
            if self._beat < 0 and self._trouble and self.verdict is None:
                time.sleep(SETTLE)
                self._adopt(self._without_store("is gone"), mine=self.rank == 1)
            self._enforce()
            self._wake.wait(HURRY if self._asked or self._trouble or self._end else self.tick)
            self._wake.clear()

    def _step(self) -> None:
        """One look at the board."""
        self._overdue()
        troubled = self._trouble is not None
        if (troubled or self._board.flagged()) and not self._asked:
            self._asked = time.monotonic()
        self._beat += 1
        if self._end is not None:
            self._board.publish(self._end)
            self._said.set()
            self._look_behind()
        else:
            self._board.publish(self.record())
        if not self._asked or self.verdict is not None:
            return
        found = self._board.verdict()
        if found is not None:
            self._adopt(Verdict.from_json(found), mine=False)
        elif self._trouble is not None:
            self._judge(self._trouble)

    def _judge(self, trouble: Trouble) -> None:
        now = time.monotonic()
        if not self._flagged:
            self._flagged = True
            if self._board.flag() and trouble.closed:
                # Launchers end the other processes as soon as one has died: what is known at once is said at once.
                notice = f"rank {self.rank} lost the connection to rank {trouble.closed[0]} in {trouble.site}"
                print(f"zcompile: {notice}", file=sys.stderr, flush=True)
        if not self._judging:
            if self._board.claim(self._turn):
                self._judging, self._asked = True, now
            elif now - self._asked > self.answers + 2:  # the judge did not come to an end
                self._turn, self._asked = self._turn + 1, now
        if not self._judging:
            return
        others = [rank for rank in range(self.world) if rank != self.rank]
        records = self._board.records(others)
        ended = {rank for rank, record in records.items() if record["state"] in ("raised", "left")}
        silent = [rank for rank in others if rank not in ended and not records.get(rank, {}).get("answered")]
        certain = set(trouble.closed) & (set(silent) | ended) and now - self._asked > SETTLE
        certain = certain or any(records[rank]["state"] == "raised" for rank in ended)
        if silent and not certain and now - self._asked < self.answers:
            return
        verdict = judge(trouble, {**records, self.rank: self._end or self.record()}, silent, time.time())
        held = Verdict.from_json(self._board.decide(verdict.to_json()))
        self._adopt(held, mine=held == verdict)

    def _without_store(self, what: str) -> Verdict:
        """The store's holder took the board with it, or stands still: all that is left is what this rank saw itself."""
        assert self._trouble is not None
        if HOLDER is not None:
            reason = f"{what}, and with it the job's store, which it holds"
            return Verdict("store", (HOLDER,), reason, self._trouble)
        blamed = self._trouble.closed or self._trouble.missing or (self.rank,)
        return Verdict(
            "store", blamed, f"{what}: no other rank could be asked, as the job's store does not answer", self._trouble
        )

    def _adopt(self, verdict: Verdict, mine: bool) -> None:
        with self._lock:
            if self.verdict is not None:
                return
            self.verdict, self._decided_at = verdict, time.monotonic()
        if mine:
            print(verdict.report, file=sys.stderr, flush=True)
        self._decided.set()

    def _overdue(self) -> None:
        """Collectives on a device that take too long, or failed."""
        while self._flying and self._trouble is None:
            site, work, since = self._flying[0]
            late = time.monotonic() - since > self.timeout
            try:
                done = work.is_completed()
            except RuntimeError as error:
                done, late = False, True
                said = str(error)
            else:
                said = "" if not late else f"not over after {self.timeout:g} s"
            if done:
                self._flying.popleft()
            elif late:
                waited = time.monotonic() - since
                self._trouble = Trouble.of(self.rank, site, waited=waited, limit=self.timeout, error=said)
            else:
                return

    def _enforce(self) -> None:
        """End a process that has not come to raise the verdict."""
        if self.verdict is None or self._taken.is_set() or time.monotonic() - self._decided_at < GRACE:
            return
        line = self.record()["line"] or "no line of yours"
        print(f"zcompile: rank {self.rank} is ended, {GRACE:g} s after the verdict, at {line}: {self.verdict.headline}",
              file=sys.stderr, flush=True)  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)

    def _elsewhere(self, error: BaseException) -> Site:
        """Where `error` was raised, in a collective that is not ours."""
        where = errors.described(error)["line"] or "no line of yours"
        return Site(
            "", "", f"a collective that is not zcompile's, at {where}, after {self._last or 'none of its own'}", 0, ()
        )

    # -- the end -----------------------------------------------------------------------------------------------------------------

    def broke_off(self, error: BaseException) -> None:
        """A forward or a backward ended in `error`; whether the program goes on from there is not known yet."""
        if isinstance(error, Exception) and not isinstance(error, FaultError):
            self.caught = errors.described(error)

    def in_step(self) -> None:
        """All ranks came to one point: whatever broke off a forward before did so on all of them, or did no harm."""
        self.caught = None

    def close(self) -> None:
        """Stop watching (the default process group changes)."""
        self._closed = True
        self._wake.set()
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        """See Note [Last words]."""
        if self._pid != os.getpid() or self._closed:
            return
        error = getattr(sys, "last_value", None)
        self._taken.set()
        state = "left" if error is None else "raised"
        if error is not None or self.verdict is not None:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(EXIT)
            if (
                error is not None
                and errors.of_collectives(error)
                and not errors.is_verdict(error)
                and self.verdict is None
            ):
                closed = () if "imed out" in str(error) else self._closed_in_default_group()
                self.lost(self._elsewhere(error), error, missing=closed, closed=closed)
            if errors.is_verdict(error) or self.verdict is not None:
                state = "fault"
        end = {**self.record(state), "final": True}
        if state == "raised" and error is not None:
            end["error"] = errors.described(error)
        self._end = end
        self._wake.set()
        if self._beat >= 0 and (self.verdict is None or self.verdict.kind != "store"):
            self._said.wait(3)
            if self.rank == HOLDER or (state == "raised" and self.on_device):
                self._all_ended.wait(self.answers)
        self._closed = True
        self._wake.set()
        self._thread.join(1)  # a thread that is in a call of torch's when Python ends would abort the process

    def _closed_in_default_group(self) -> Sequence[int]:
        try:
            return closed_members(compat.default_group(), range(self.world))
        except (RuntimeError, ValueError):  # it is gone, or its backend is one that has no such question
            return ()

    def _look_behind(self) -> None:
        """This rank has ended, and waits so that the others may do so too: the board is in its process, or nobody sees a connection
        close. Others that wait for it hear why they do so in vain.
        """
        if not (self.rank == HOLDER or self.on_device):
            return
        others = self._board.records([rank for rank in range(self.world) if rank != self.rank])
        if len(others) == self.world - 1 and all(record.get("final") for record in others.values()):
            self._all_ended.set()
        for record in others.values():
            for wait in record["waits"]:
                level, transfer, number = wait["key"]
                for_this = self.rank in wait["missing"] or transfer == "agreement"
                if (
                    self._trouble is None and for_this and number >= self._numbers[level, transfer]
                ):  # this rank never came to it
                    self._trouble = Trouble.from_json({**wait, "missing": [self.rank]})
