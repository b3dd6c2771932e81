"""`zcompile overhead`: what a compile takes is measured with empty caches, the plain model's and ours alike."""

from __future__ import annotations

import json
import subprocess
import sys
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


@pytest.mark.slow
def test_the_command_compares_compile_times_and_allocates_what_torch_compile_does(tmp_path: Path) -> None:
    """It compiles each model twice, once with empty caches."""
    file = tmp_path / "found.json"
    sizes = ["--hidden", "128", "--layers", "2", "--steps", "4"]  # its activations outweigh a message's buffers
    command = [sys.executable, "-m", "zcompile.cli", "overhead", *sizes, "--json", str(file)]
    subprocess.run(command, check=True, timeout=400)
    found = json.loads(file.read_text())
    assert found["auto_seconds"] > 0
    for same in ("state_bytes", "peak_bytes", "loss"):
        assert found[same]["zcompile"] == found[same]["plain"], same
    times = found["compile_seconds"]
    assert set(times) == set(overhead.KINDS) and all(seconds > 0 for seconds in times.values())
    assert found["compile_ratio"] == times["zcompile"] / times["plain"]
