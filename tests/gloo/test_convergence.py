"""The command that compares plans, run as a user runs it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "examples" / "convergence.py"


def run(*arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(COMMAND), *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


SETTINGS = (
    "--plans", "native", "paper-delta-feedback", "--seeds", "1", "--steps", "6", "--layers", "1", "--hidden", "64",
    "--heads", "2", "--context", "32", "--micro-batch", "1", "--accumulate", "2", "--validation-windows", "16",
)  # fmt: skip


@pytest.mark.slow
def test_two_plans_of_one_seed(tmp_path: Path) -> None:
    found, table = tmp_path / "new" / "result.json", tmp_path / "table.md"
    result = run(*SETTINGS, "--json", str(found), "--markdown", str(table))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    report = json.loads(found.read_text())
    assert set(report) == {"topology", "preset", "settings", "seconds", "plans"}
    assert report["settings"]["steps"] == 6 and report["settings"]["dtype"] == "bfloat16"
    assert list(report["plans"]) == ["native", "paper-delta-feedback"]
    for plan in report["plans"].values():
        (only,) = plan["runs"]
        assert only["seed"] == 0 and len(only["losses"]) == 6
        assert all(math.isfinite(loss) for loss in (*only["losses"], only["train_loss"], only["validation_loss"]))
        assert only["losses"][-1] < only["losses"][0]
        assert set(plan["bytes"]) == {"pair", "node", "cluster"} and min(plan["bytes"].values()) > 0
    native, quantized = report["plans"].values()
    for difference in native["difference"].values():
        assert difference == {"mean": 0, "min": 0, "max": 0}
    assert quantized["runs"][0]["losses"] != native["runs"][0]["losses"]
    assert all(quantized["bytes"][level] < native["bytes"][level] for level in native["bytes"])
    assert table.read_text().count("\n") == 4
    assert "native, seed 0: step 6 of 6" in result.stdout

    alone = tmp_path / "alone.json"
    result = run(*SETTINGS, "--reference", "--json", str(alone))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for name, plan in json.loads(alone.read_text())["plans"].items():
        (mine,), (sharded,) = plan["runs"], report["plans"][name]["runs"]
        # the same losses, averaged over the ranks in another order
        for key in ("losses", "train_loss", "validation_loss"):
            assert mine[key] == pytest.approx(sharded[key], rel=1e-6), (name, key)


def test_a_bad_shape_is_refused_before_anything_starts() -> None:
    result = run("--hidden", "100", "--heads", "3", timeout=120)
    assert result.returncode == 2
    assert result.stdout.startswith("error: --hidden 100") and "Traceback" not in result.stderr
