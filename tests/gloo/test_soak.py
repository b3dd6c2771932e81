"""F38: restarts in a row, as a command with a JSON result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from zcompile import cli, soak


@pytest.mark.slow
def test_restarts_end_with_the_bits_of_a_run_without_a_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, result = tmp_path / "soak", tmp_path / "result"
    settings = ["--restarts", "3", "--steps", "1", "--topology", "2", "--eager", "--folder", str(folder)]
    code = cli.main(["soak", *settings, "--json", str(result)])
    said = capsys.readouterr().out
    assert code == 0, said
    found = json.loads(result.read_text())
    assert found["ok"] and found["same_bits"] and found["passed"] == 3 and found["failures"] == []
    assert found["last"]["step"] == 3 and found["uninterrupted"] == found["last"]
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]
    assert "3 of 3" in said and "the same bits" in said


@pytest.mark.parametrize(
    ("ends", "weights", "passed", "same", "lost", "said"),
    [
        ([2, RuntimeError("node 3 is gone"), 4], "ab", 2, True, 0, "the same bits after step 4"),
        ([2, 2], "ab", 2, True, 2, "2 steps of starts that passed"),
        ([2, 4], "cd", 2, False, 0, "other bits after step 4"),
        ([2, 4], "ab", 2, True, 0, "the same bits after step 4"),
    ],
    ids=["a failed start", "a lost checkpoint", "other bits", "well"],
)
def test_a_failed_start_a_lost_checkpoint_and_other_bits_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: list[Any], weights: str, passed: int,
    same: bool, lost: int, said: str,
) -> None:  # fmt: skip
    """After a failed start the run goes on from the checkpoint before; what is compared is what the last one ended with."""
    steps = iter(ends)

    def job(*arguments: Any, **keywords: Any) -> Any:
        count, _, save = arguments[5:]
        if not save:  # the run without a stop
            return [{"step": count, "loss": 1.0, "weights": "ab"}]
        step = next(steps)
        if isinstance(step, Exception):
            raise step
        return [{"step": step, "loss": 1.0, "weights": weights}]

    monkeypatch.setattr(soak.ranks, "run", job)
    code = cli.main(["soak", "--restarts", str(len(ends)), "--json", str(tmp_path / "result")])
    result = json.loads((tmp_path / "result").read_text())
    assert (result["passed"], result["same_bits"], result["lost_steps"]) == (passed, same, lost)
    assert result["ok"] == (code == 0) == (passed == len(ends) and same and not lost)
    if passed < len(ends):
        assert result["failures"] == [{"restart": 1, "error": "RuntimeError: node 3 is gone"}]
    assert said in capsys.readouterr().out


def test_a_command_of_the_users_own(tmp_path: Path) -> None:
    count = tmp_path / "count"
    script = f"open({str(count)!r}, 'a').write('x'); import sys; print('start'); sys.exit(len(open({str(count)!r}).read()) == 2)"
    code = cli.main(["soak", "--restarts", "3", "--json", str(tmp_path / "r"), "--", sys.executable, "-c", script])
    result = json.loads((tmp_path / "r").read_text())
    assert code == 1 and result["passed"] == 2 and result["failures"][0]["restart"] == 1
    assert result["failures"][0]["error"] == "RuntimeError: exit code 1\nstart\n"
    late = ["soak", "--restarts", "1", "--timeout", "0.2", "--json", str(tmp_path / "r"), "--", "sleep", "60"]
    assert cli.main(late) == 1
    assert "none after 0.2 s" in json.loads((tmp_path / "r").read_text())["failures"][0]["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--restarts", "0"], "must be positive"),
        (["--timeout", "0"], "must be positive"),
        (["--plan", "zero9"], "zero9"),
        (["--topology", "2xx2"], "2xx2"),
        (["--folder", "/"], "is not empty"),
        (["--", "no-such-program"], "no such command"),
    ],
)
def test_bad_arguments_start_nothing(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["soak", *arguments]) == 2
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_restarts_with_a_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["soak", "--restarts", "2", "--steps", "1", "--topology", "2", "--json", "-"])
    assert code == 0 and json.loads(capsys.readouterr().out)["same_bits"]
