"""Where a thread is, and whether something is compiled: what a rank's watch says of it once a second, beside whatever runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import zcompile
from zcompile import _torch_compat as compat
from zcompile.faults import stacks
from zcompile.faults.sites import users_line


def test_the_main_thread_s_calls_innermost_first() -> None:
    found: list[list[tuple[str, int]]] = []
    thread = threading.Thread(target=lambda: found.append(stacks.main_thread()))
    thread.start()
    thread.join()
    here = test_the_main_thread_s_calls_innermost_first.__code__.co_firstlineno
    mine = [line for file, line in found[0] if file == __file__]
    assert len(mine) == 1 and here + 3 <= mine[0] <= here + 4, "this test's start or join; the other thread's calls are not there"
    assert Path(found[0][0][0]).name == "threading.py", "waits there"
    assert users_line(found[0]) == f"test_stacks.py:{mine[0]}"


def test_the_thread_that_forks_is_the_main_thread_of_the_child() -> None:
    script = """
import os, threading
from zcompile.faults import stacks

def forks():
    if not os.fork():
        found = []
        looks = threading.Thread(target=lambda: found.extend(stacks.main_thread()))
        looks.start()
        looks.join()
        forking = forks.__code__.co_firstlineno
        os._exit(0 if any(file == "<string>" and forking < line < forking + 7 for file, line in found) else 3)
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))

threading.Thread(target=forks).start()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


COMERS = """
#include <pthread.h>
int PyGILState_Ensure(void);
void PyGILState_Release(int);
static void* come_and_go(void* nothing) { for (;;) PyGILState_Release(PyGILState_Ensure()); return nothing; }
void start(int threads) { pthread_t thread; while (threads--) pthread_create(&thread, 0, come_and_go, 0); }
"""


def test_a_look_beside_threads_that_come_to_hold_the_interpreter_s_lock(tmp_path: Path) -> None:
    """As those of torch's groups do, more rarely. In Python 3.11 a dump of all threads ends the process within a second here."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "comers.c").write_text(COMERS)
    subprocess.run(
        [compiler, "-shared", "-fPIC", str(tmp_path / "comers.c"), "-o", str(tmp_path / "comers.so"), "-lpthread"],
        check=True,
    )
    script = f"""
import ctypes, os, time
from zcompile.faults import stacks

ctypes.CDLL({str(tmp_path / "comers.so")!r}).start(4)
for _ in range(2000):
    assert stacks.main_thread()
    time.sleep(0)
os._exit(0)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_dumps_of_every_kind_are_read() -> None:
    text = """Thread 0x00007fd81f7fe6c0 [Thread-1 (serve)] (most recent call first):
  File "/home/me/other.py", line 1 in f

Current thread 0x00007fd86aa736c0 (most recent call first):
  File "/home/me/a "b".py", line 7 in g
  File "/home/me/a.py", line ??? in h
  File "/home/me/train.py", line 93 in <module>
  ...
"""
    assert stacks.of_text(text, 0x7FD86AA736C0) == [('/home/me/a "b".py', 7), ("/home/me/train.py", 93)]
    assert stacks.of_text(text, 0x7FD81F7FE6C0) == [("/home/me/other.py", 1)]
    assert stacks.of_text(text, 1) == []
    alone = text.split("\n\n")[1].replace("Current thread 0x00007fd86aa736c0 (", "Stack (")
    assert stacks.of_text(alone, 1) == stacks.of_text(text, 0x7FD86AA736C0)


def test_nobody_makes_frame_objects_of_another_thread() -> None:
    """Under torch.compile a process may die of them, once in thousands of looks."""
    package = Path(zcompile.__file__).parent
    sources = [path for path in package.rglob("*.py") if "_current_frames" in path.read_text()]
    assert sources == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiling_is_said_while_a_frame_or_a_backward_is_compiled(dynamic: bool) -> None:
    torch._dynamo.reset()
    seen: dict[str, bool] = {}

    def compiler(which: str) -> Any:
        def compile_graph(gm: torch.fx.GraphModule, inputs: Any) -> Any:
            seen[which] = compat.compiling()

            def run(*args: Any) -> Any:
                seen[f"{which} runs"] = compat.compiling()
                return gm(*args)

            return run

        return compile_graph

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))

    @torch.compile(backend=backend, dynamic=dynamic)
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin().sum()

    assert not compat.compiling()
    function(torch.ones(3, requires_grad=True)).backward()
    assert seen.pop("forward runs") is False and seen.pop("backward runs") is False
    assert seen == {"forward": True, "backward": True}
    assert not compat.compiling()
    torch._dynamo.reset()
