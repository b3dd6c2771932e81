"""Where a thread is, and whether something is compiled: what a rank's watch says of it once a second, beside whatever runs."""

from __future__ import annotations

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


def blocked(entered: threading.Event, leave: threading.Event) -> None:
    entered.set()
    leave.wait()


def test_another_thread_s_calls_innermost_first() -> None:
    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=blocked, args=(entered, leave))
    thread.start()
    assert entered.wait(10)
    try:
        assert thread.ident is not None
        found = stacks.calls(thread.ident)
        here = blocked.__code__.co_firstlineno
        mine = [line for file, line in found if file == __file__]
        assert len(mine) == 1 and here < mine[0] <= here + 2
        assert Path(found[0][0]).name == Path(found[-1][0]).name == "threading.py", "waits there; began there"
        assert users_line(found) == f"test_stacks.py:{mine[0]}"
    finally:
        leave.set()
        thread.join()
    assert stacks.calls(1) == []


def test_the_main_thread_s_calls_are_its_own() -> None:
    found: list[list[tuple[str, int]]] = []
    thread = threading.Thread(target=lambda: found.append(stacks.main_thread()))
    thread.start()
    thread.join()
    assert any(file == __file__ for file, _ in found[0]) and not any("lambda" in file for file, _ in found[0])


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
