"""Jobs that fail: real processes without a launcher's care, each ended by what it does itself, or counted as left behind.

One process imports what all jobs need, and forks their ranks: milliseconds a rank. A rank runs a function of a test module as a script
would: what it raises ends the process, with a trace on stderr. Whoever is still there at the end, a stopped one above all, is killed.

Most of such a job's time is waiting. So a module's fixture starts the jobs of all its tests that will run (`chosen`), and each test
looks at the end of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = str(Path(__file__).parent.parent)


@dataclass(frozen=True)
class Rank:
    """How one rank ended.

    Attributes:
        code: of its exit, negative for a signal; None: it had to be killed.
        seconds: from the fault (or, without one, the start) to the end.
    """

    code: int | None
    seconds: float
    output: str


class Jobs:
    """`run(function, world, *arguments)` -> how each rank ended. Functions are found by module file and name: fn(rank, *arguments)."""

    def __init__(self) -> None:
        command = "import sys; sys.path.insert(0, sys.argv[1]); from support.faulty import serve; serve()"
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", command, TESTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self._asked: dict[int, Future[list[Rank]]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(
        self, function: Any, world: int, *arguments: Any, limit: float = 120.0, env: dict[str, str] | None = None
    ) -> Future[list[Rank]]:
        """Args: limit: seconds after which ranks that are still there are killed."""
        module = sys.modules[function.__module__]
        number = len(self._asked)
        order = {
            "number": number, "where": [function.__module__, module.__file__, function.__qualname__], "world": world,
            "arguments": arguments, "limit": limit, "env": env or {},
        }  # fmt: skip
        self._asked[number] = found = Future()
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return found

    def run(self, function: Any, world: int, *arguments: Any, **settings: Any) -> list[Rank]:
        return self.start(function, world, *arguments, **settings).result()

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            answer = json.loads(line)
            self._asked[answer["number"]].set_result([Rank(**rank) for rank in answer["ranks"]])
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(RuntimeError("the process that forks the ranks has ended"))

    def close(self) -> None:
        """Jobs that nobody waited for are killed."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(20)
        self._reader.join(5)


@contextlib.contextmanager
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    try:
        yield made
    finally:
        made.close()


def of_module(request: pytest.FixtureRequest) -> list[Any]:
    """The tests with parameters in the asking fixture's module that this session will run."""
    tests = [
        item for item in request.session.items if isinstance(item, pytest.Function) and item.module is request.module
    ]
    return [test for test in tests if hasattr(test, "callspec")]


def chosen(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of that parameter in those tests."""
    found = [test.callspec.params.get(parameter) for test in of_module(request)]
    return list(dict.fromkeys(value for value in found if value is not None))


def fault() -> None:
    """A rank calls it right before it fails: time counts from here."""
    Path(os.environ["FAULT_AT"]).write_text(str(time.monotonic()))


AT_ONCE = 8
STARTING = 2
"""Jobs that there may be at once, and those of them that may be on the way to their fault, which takes the processor's time; later they
wait. Two jobs of four ranks are enough for two cores."""


def serve() -> None:
    """The server's loop: one order a line, and for each an answer, in the order in which the jobs end. No thread but this one: it forks."""
    import torch

    from zcompile.ranks import _function

    torch.set_num_threads(1)
    orders, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    text, waiting, running = b"", list[dict[str, Any]](), list[_Job]()
    while True:
        if select.select([orders], [], [], 0.02 if running else None)[0]:
            found = os.read(orders, 1 << 16)
            if not found:
                break
            *lines, text = (text + found).split(b"\n")
            waiting += [json.loads(line) for line in lines]
        while waiting and len(running) < AT_ONCE and sum(not job.failed for job in running) < STARTING:
            order = waiting.pop(0)
            _function(*order["where"])  # imports the module once for all ranks
            gc.freeze()  # what was imported stays, also when a rank ends
            running.append(_Job(order))
        for job in running:
            if job.over():
                answers.write(json.dumps({"number": job.order["number"], "ranks": job.ranks()}) + "\n")
                answers.flush()
        running = [job for job in running if job.left]
    for job in running:
        job.kill()


class _Job:
    """Ranks that were forked, and how they end. Stopped ones are killed once all others have ended."""

    def __init__(self, order: dict[str, Any]) -> None:
        from zcompile.ranks import _function

        self.order = order
        self._folder = tempfile.mkdtemp(prefix="faulty")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pids = []
        for rank in range(order["world"]):
            pid = os.fork()
            if pid == 0:  # what it raises ends it: nothing around here may clean up behind it
                _become(rank, order, port, self._folder)
                _function(*order["where"])(rank, *order["arguments"])
                sys.exit(0)
            self._pids.append(pid)
        self._start = time.monotonic()
        self._ends: dict[int, tuple[int | None, float]] = {}
        self._stopped: set[int] = set()

    @property
    def failed(self) -> bool:
        return Path(self._folder, "fault").exists()

    @property
    def left(self) -> list[int]:
        return [pid for pid in self._pids if pid not in self._ends]

    def over(self) -> bool:
        """One look at the ranks."""
        for pid in self.left:
            found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                self._stopped.add(pid)
            elif found:
                self._ends[pid] = (os.waitstatus_to_exitcode(status), time.monotonic())
        if set(self.left) <= self._stopped or time.monotonic() - self._start > self.order["limit"]:
            self.kill()
        return not self.left

    def kill(self) -> None:
        for pid in self.left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._ends[pid] = (None, time.monotonic())

    def ranks(self) -> list[dict[str, Any]]:
        mark = Path(self._folder, "fault")
        begin = float(mark.read_text()) if mark.exists() else self._start
        found = []
        for rank, pid in enumerate(self._pids):
            code, at = self._ends[pid]
            found.append({"code": code, "seconds": at - begin, "output": Path(self._folder, str(rank)).read_text()})
        shutil.rmtree(self._folder)
        return found


def _become(rank: int, order: dict[str, Any], port: int, folder: str) -> None:
    out = os.open(os.path.join(folder, str(rank)), os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(order["world"]), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        FAULT_AT=os.path.join(folder, "fault"), **order["env"],
    )  # fmt: skip
