"""Jobs that fail: real processes without a launcher's care, each ended by what it does itself, or counted as left behind.

One process imports what all jobs need, and forks their ranks: milliseconds a rank. A rank runs a function of a test module as a script
would: what it raises ends the process, with a trace on stderr. Whoever is still there at the end, a stopped one above all, is killed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def run(
        self, function: Any, world: int, *arguments: Any, limit: float = 120.0, env: dict[str, str] | None = None
    ) -> list[Rank]:
        """Args: limit: seconds after which ranks that are still there are killed."""
        module = sys.modules[function.__module__]
        order = {
            "where": [function.__module__, module.__file__, function.__qualname__], "world": world, "arguments": arguments,
            "limit": limit, "env": env or {},
        }  # fmt: skip
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return [Rank(**rank) for rank in json.loads(self._server.stdout.readline())]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(20)


@contextlib.contextmanager
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    try:
        yield made
    finally:
        made.close()


def fault() -> None:
    """A rank calls it right before it fails: time counts from here."""
    Path(os.environ["FAULT_AT"]).write_text(str(time.monotonic()))


def serve() -> None:
    """The server's loop: one order a line, one answer a line."""
    import torch

    from zcompile.ranks import _function

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, also when a rank ends
    answers = os.fdopen(os.dup(1), "w")
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        folder = tempfile.mkdtemp(prefix="faulty")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(order["world"]):
            pid = os.fork()
            if pid == 0:  # what it raises ends it: nothing around here may clean up behind it
                _become(rank, order, port, folder)
                _function(*order["where"])(rank, *order["arguments"])
                sys.exit(0)
            pids.append(pid)
        *ends, start = _wait(pids, order["limit"])
        mark = Path(folder, "fault")
        begin = float(mark.read_text()) if mark.exists() else start
        ranks = [
            {"code": code, "seconds": at - begin, "output": Path(folder, str(rank)).read_text()}
            for rank, (code, at) in enumerate(ends)
        ]
        shutil.rmtree(folder)
        answers.write(json.dumps(ranks) + "\n")
        answers.flush()


def _become(rank: int, order: dict[str, Any], port: int, folder: str) -> None:
    out = os.open(os.path.join(folder, str(rank)), os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(order["world"]), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        FAULT_AT=os.path.join(folder, "fault"), **order["env"],
    )  # fmt: skip


def _wait(pids: list[int], limit: float) -> list[Any]:
    """(exit code, time) of each process, and last the time of the start. Stopped ones are killed once all others have ended."""
    start = time.monotonic()
    ends: dict[int, tuple[int | None, float]] = {}
    stopped: set[int] = set()
    while len(ends) < len(pids):
        for pid in pids:
            if pid in ends:
                continue
            found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif found:
                ends[pid] = (os.waitstatus_to_exitcode(status), time.monotonic())
        left = [pid for pid in pids if pid not in ends]
        if left and (set(left) <= stopped or time.monotonic() - start > limit):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ends[pid] = (None, time.monotonic())
        time.sleep(0.02)
    return [*(ends[pid] for pid in pids), start]
