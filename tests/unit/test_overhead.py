"""`zcompile overhead`: what a compile takes is measured with empty caches, the plain model's and ours alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zcompile import overhead

GIVEN: dict[str, Any] = {
    "hidden": 64, "layers": 1, "batch": 1, "sequence": 8, "device": "cpu", "dtype": "float32"
}  # fmt: skip


def test_each_compile_has_a_process_and_empty_caches_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(command: list[str], env: dict[str, str], **rest: Any) -> Any:
        for name in overhead.CACHES:
            folder = Path(env[name])
            assert not folder.exists() and folder.parent.is_dir()
            seen.append(str(folder))
        assert command[-2:] == ["zcompile", json.dumps(GIVEN)]
        return SimpleNamespace(returncode=0, stdout="a notice\n1.5\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert [overhead._cold("zcompile", GIVEN) for _ in range(2)] == [1.5, 1.5]
    assert len(set(seen)) == 2 * len(overhead.CACHES) and not any(Path(folder).parent.exists() for folder in seen)


def test_a_compile_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr="no compiler"))
    with pytest.raises(RuntimeError, match=r"plain in a process of its own failed: no compiler"):
        overhead._cold("plain", GIVEN)


COLD = "from zcompile import overhead; import json, sys; print(overhead._cold('zcompile', json.loads(sys.argv[1])))"
COMMAND = """
import sys
from zcompile import cli, overhead
overhead._cold = lambda kind, given: {"plain": 2.0, "zcompile": 3.0}[kind]
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A compile with empty caches, and the command on a model whose activations outweigh a message's buffers: both at a time."""
    sizes = ("--hidden", "128", "--layers", "1", "--steps", "4")
    codes = {"cold": (COLD, json.dumps(GIVEN)), "command": (COMMAND, "overhead", *sizes, "--json", "-")}
    begun = {
        name: subprocess.Popen([sys.executable, "-c", *code], stdout=subprocess.PIPE, text=True)
        for name, code in codes.items()
    }
    yield begun
    for process in begun.values():
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_compile_with_empty_caches_takes_its_time(runs: dict[str, subprocess.Popen[str]]) -> None:
    shown, _ = runs["cold"].communicate(timeout=400)
    assert runs["cold"].returncode == 0 and float(shown.split()[-1]) > 1.0, "a C++ compiler has run"


@pytest.mark.slow
def test_the_command_compares_compile_times_and_allocates_what_torch_compile_does(
    runs: dict[str, subprocess.Popen[str]],
) -> None:
    """But for the compiles with empty caches, which have tests of their own."""
    shown, _ = runs["command"].communicate(timeout=400)
    assert runs["command"].returncode == 0
    found = json.loads(shown)
    assert found["auto_seconds"] > 0
    for same in ("state_bytes", "peak_bytes", "loss"):
        assert found[same]["zcompile"] == found[same]["plain"], same
    assert found["compile_seconds"] == {"plain": 2.0, "zcompile": 3.0} and found["compile_ratio"] == 1.5
