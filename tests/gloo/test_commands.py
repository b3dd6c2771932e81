"""The commands that print figures, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from support.commands import command


def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zcompile.cli", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def traced(*arguments: str, timeout: float = 300) -> dict[str, Any]:
    result = run("trace", *arguments, "--json", "-", timeout=timeout)
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout)
    for level in found["ledger"]["levels"].values():
        for columns in level.values():
            assert columns["predicted"] == columns["compiled"]
    return found


def test_trace_of_a_world_on_paper() -> None:
    found = traced("--model", "tiny", "--topology", "frontier:2", "--micro-batches", "2")
    assert found["ranks"] == 16
    assert [graph["stage"] for graph in found["graphs"]] == ["forward", "backward"] * 2, "one graph each way and phase"
    levels = found["ledger"]["levels"]
    assert levels["pair"]["gather"]["compiled"] > 0 and levels["cluster"]["gather"]["compiled"] == 0
    assert levels["cluster"]["sync"]["compiled"] > 0


@pytest.mark.slow
def test_trace_of_gpt_neox_20b_on_384_ranks() -> None:
    found = traced(timeout=900)
    assert found["ranks"] == 384 and 20.5e9 < found["parameters"] < 20.6e9
    assert len(found["graphs"]) == 2
    assert found["peak_bytes"] < 4e9
    levels = found["ledger"]["levels"]
    padded = levels["pair"]["reduce"]["compiled"] / 4 * 2  # fp32 halves over the pair
    assert 0 <= padded / found["parameters"] - 1 < 1e-3
    assert levels["cluster"]["gather"]["compiled"] == levels["cluster"]["reduce"]["compiled"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trace", "--model", "gpt-5"), "known shapes are gpt-neox-20b"),
        (("trace", "--model", "tiny", "--topology", "frontier"), "the number of nodes is not known"),
        (("trace", "--model", "tiny", "--topology", "2x2", "--plan", "zero9"), "zero_topo"),
        (("trace", "--model", "tiny", "--topology", "2x2", "--sequence", "4096"), "at most 32"),
        (("overhead", "--hidden", "100"), "multiple of 64"),
        (("nonsense",), "invalid choice"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], said: str) -> None:
    code, _, error = command(0, *arguments)
    assert code == 2
    assert said in error and "Traceback" not in error


def test_a_bad_argument_in_a_shell() -> None:
    result = run("trace", "--model", "gpt-5")
    assert result.returncode == 2
    assert "known shapes are gpt-neox-20b" in result.stderr and "Traceback" not in result.stderr
