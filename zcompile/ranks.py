"""Ranks on this machine: processes that live on between calls, with a deadline, and errors that say which rank and where.

Pool(4).run(fn, *args)       -> [fn(0, *args), ..., fn(3, *args)], each in its own process, gloo already initialised
run(fn, 4, *args)            -> the same in processes of its own, for functions that break them

`fn` must be a module-level function; arguments and results are pickled. What `zcompile verify` and the tests run on.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Failure:
    """An exception of one rank, as text: the object itself may not survive pickling."""

    type: str
    message: str
    trace: str


_LAST = ("Died", "FaultError", "NoAnswer")
"""Failures after which a rank runs nothing more."""


class RanksFailed(AssertionError):
    """Some ranks raised or did not finish. `failures[rank]`; `results[rank]` of the others."""

    def __init__(self, failures: dict[int, Failure], results: dict[int, Any]) -> None:
        self.failures = failures
        self.results = results
        super().__init__(
            "\n".join(f"--- rank {rank}: {f.type}: {f.message}\n{f.trace}" for rank, f in sorted(failures.items()))
        )

    @property
    def cause(self) -> tuple[int, Failure]:
        """(rank, failure) that the others follow from: a rank that died makes others raise, and those make others late."""
        order = {"Died": 0, "FaultError": 2, "NoAnswer": 2, "Late": 3}
        return min(self.failures.items(), key=lambda item: (order.get(item[1].type, 1), item[0]))


class Pool:
    """`world` processes, started at the first `run` and again after a run that killed them.

    `backend` None leaves the process group to the function; the store's address is in MASTER_ADDR and MASTER_PORT of
    every rank.
    """

    def __init__(self, world: int, *, backend: str | None = "gloo") -> None:
        self.world = world
        self.backend = backend
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._store: TCPStore | None = None
        self._stacks = tempfile.TemporaryDirectory(prefix="ranks")

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, grace: float = 10.0) -> list[Any]:
        """Results by rank. RanksFailed if a rank raises; the others then have `grace` seconds left, and all of them
        `timeout` in the first place.

        Ranks that are late are killed, with their stacks in the error, and the pool starts afresh at the next run.
        """
        if "<locals>" in fn.__qualname__:
            raise ValueError(f"{fn.__qualname__} must be a module-level function: other processes look it up by name")
        if not self._ranks:
            self._start()
        where = (fn.__module__, str(sys.modules[fn.__module__].__file__), fn.__qualname__)
        for _, pipe in self._ranks:
            pipe.send((where, pickle.dumps(args)))
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        deadline = time.monotonic() + timeout
        waiting = dict(enumerate(self._ranks))
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait([pipe for _, pipe in waiting.values()], left)
            for rank, (process, pipe) in list(waiting.items()):
                if pipe not in ready:
                    continue
                del waiting[rank]
                try:
                    worked, value = pickle.loads(pipe.recv())
                except EOFError:
                    process.join(5)
                    worked, value = False, Failure("Died", f"exit code {process.exitcode}", self._stack(rank, process))
                if worked:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + grace)
        for rank, (process, _) in waiting.items():
            failures[rank] = Failure(
                "Late",
                f"no answer after {timeout:g} s, or {grace:g} s after another rank failed",
                self._stack(rank, process),
            )
        if waiting or any(failure.type in _LAST for failure in failures.values()):
            self.close()
        if failures:
            raise RanksFailed(failures, results)
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        """Kill the ranks."""
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks, self._store = [], None

    def _start(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # The server imports once, and each rank is a fork of it: milliseconds instead of seconds. None of these imports starts a thread.
        # But they ask whether there is a GPU, and where there is one torch refuses to use it in a fork of a process that has asked.
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["torch.distributed.tensor", "torch._inductor.compile_fx", "zcompile"])
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            stacks = str(Path(self._stacks.name) / str(rank))
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world, self._store.port, self.backend, stacks), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _stack(self, rank: int, process: BaseProcess) -> str:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.3)
        return (Path(self._stacks.name) / str(rank)).read_text()


def run(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 60.0,
    grace: float = 10.0,
    backend: str | None = "gloo",
) -> list[Any]:
    """`fn(rank, *args)` in `world` processes of its own; results by rank."""
    pool = Pool(world, backend=backend)
    try:
        return pool.run(fn, *args, timeout=timeout, grace=grace)
    finally:
        pool.close()


def _serve(pipe: Connection, rank: int, world: int, port: int, backend: str | None, stacks: str) -> None:
    record = open(stacks, "w")  # noqa: SIM115 (open for the process's life)
    faulthandler.enable(file=record)
    faulthandler.register(signal.SIGUSR1, file=record, all_threads=True)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: collections during a compile need not look at it
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if backend is not None:
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        dist.init_process_group(backend, rank=rank, world_size=world, store=store)
    while True:
        try:
            where, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = pickle.dumps((True, _function(*where)(rank, *pickle.loads(args))))
        except BaseException as error:
            answer = pickle.dumps((False, Failure(type(error).__name__, str(error), traceback.format_exc())))
        pipe.send(answer)


def _function(module: str, path: str, name: str) -> Callable[..., Any]:
    """The function; a module that cannot be imported (a test file) is loaded by path, under the name it has in the caller."""
    if module not in sys.modules and _importable(module, path):
        importlib.import_module(module)
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None, path
        sys.modules[module] = loaded = importlib.util.module_from_spec(spec)
        parts = module.split(".")
        for end in range(1, len(parts)):  # unpickling what the module defines imports its parents by name
            parent = ".".join(parts[:end])
            sys.modules.setdefault(parent, types.ModuleType(parent))
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[module]  # half of it would answer the next call
            raise
    function: Any = sys.modules[module]
    for part in name.split("."):
        function = getattr(function, part)
    return function  # type: ignore[no-any-return]


def _importable(module: str, path: str) -> bool:
    """Whether importing `module` by its name gives the file at `path`: then its package is a real one, with the siblings it imports."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(path).resolve()
