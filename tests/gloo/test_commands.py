"""The commands that print figures, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.commands import TIMEOUT, command
from support.spawn import Pool

from zcompile.shapes import SHAPES, Decoder

TWENTY = "gpt-neox-20b"
LAYERS = 6
"""Of its 44: the passes see the same graph again for each."""


@pytest.fixture(scope="module")
def alone() -> Iterator[Pool]:
    """A process whose peak of memory is that of these tests."""
    pool = Pool(1, backend=None)
    yield pool
    pool.close()


def traced(alone: Pool, run: Callable[..., Any], *arguments: str) -> dict[str, Any]:
    code, shown, error = alone.run(run, "trace", *arguments, "--json", "-", timeout=TIMEOUT)[0]
    assert code == 0, error[-2000:]
    found: dict[str, Any] = json.loads(shown)
    for level in found["ledger"]["levels"].values():
        for columns in level.values():
            assert columns["predicted"] == columns["compiled"]
    return found


def shorter(rank: int, *arguments: str) -> tuple[int, str, str]:
    """The command, for the shape of 20 billion with fewer layers."""
    SHAPES[TWENTY] = replace(SHAPES[TWENTY], layers=LAYERS)
    return command(rank, *arguments)


@pytest.mark.slow
def test_trace_of_a_world_on_paper(alone: Pool) -> None:
    found = traced(alone, command, "--model", "tiny", "--topology", "frontier:2", "--micro-batches", "2")
    assert found["ranks"] == 16
    assert [graph["stage"] for graph in found["graphs"]] == ["forward", "backward"] * 2, "one graph each way and phase"
    levels = found["ledger"]["levels"]
    assert levels["pair"]["gather"]["compiled"] > 0 and levels["cluster"]["gather"]["compiled"] == 0
    assert levels["cluster"]["sync"]["compiled"] > 0


@pytest.mark.slow
def test_trace_of_gpt_neox_20b_on_384_ranks(alone: Pool) -> None:
    """Without arguments, as the README has it, but for the number of layers."""
    with torch.device("meta"):
        whole = sum(p.numel() for p in Decoder(SHAPES[TWENTY]).parameters())
        fewer = sum(p.numel() for p in Decoder(replace(SHAPES[TWENTY], layers=LAYERS)).parameters())
    assert 20.5e9 < whole < 20.6e9
    found = traced(alone, shorter)
    assert found["ranks"] == 384 and found["parameters"] == fewer
    assert len(found["graphs"]) == 2
    assert found["peak_bytes"] < 4e9 < 2 * fewer, "less than the weights would take in bf16"
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
    command = [sys.executable, "-m", "zcompile.cli", "trace", "--model", "gpt-5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 2
    assert "known shapes are gpt-neox-20b" in result.stderr and "Traceback" not in result.stderr
