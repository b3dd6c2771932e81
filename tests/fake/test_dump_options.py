"""What the options of `zcompile dump` do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import run
from support.spawn import Pool

MODEL = """
import torch

def make():
    layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(4)]
    return torch.nn.Sequential(*layers).to("meta"), torch.ones(4, 8)
"""


@pytest.fixture
def dump(paper: Pool, tmp_path: Path) -> Any:
    (tmp_path / "mine.py").write_text(MODEL)

    def made(*options: str) -> str:
        code, shown, error = run(
            paper, "dump", f"{tmp_path}/mine.py:make", "--topology", "2", "--plan", "zero3", *options
        )
        assert code == 0, error
        return shown

    return made


def books(dump: Any, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dump(*options, "--json", "-"))
    return found


def flying(step: dict[str, Any]) -> int:
    """Gathers of the forward that are under way at once, at most."""
    hops = [hop for hop in step["hops"] if hop["phase"] == "forward"]
    return max(sum(each["launch"] <= hop["launch"] < each["wait"] for each in hops) for hop in hops)


def test_eval_is_one_graph_without_gradients(dump: Any) -> None:
    (step,) = books(dump, "--eval")
    assert [title.split()[-1] for title in step["graphs"]] == ["inference"]
    assert {hop["transfer"] for hop in step["hops"]} == {"gather"}


def test_overlap_and_memory_bound_what_is_under_way(dump: Any) -> None:
    asked = (("--overlap", "0"), ("--overlap", "1"), ("--overlap", "3"), ("--overlap", "3", "--memory", "512"))
    found = [flying(books(dump, *options)[0]) for options in asked]
    assert found == [1, 2, 4, 2], "with what is launched early; 512 bytes are two weights"


def test_keep_leaves_weights_for_the_backward(dump: Any) -> None:
    for kept, expected in (("0", 0), ("256", 1), ("1000000", 4)):
        (step,) = books(dump, "--keep", kept)
        assert sum(row["backward"] == "kept" for row in step["parameters"]) == expected


def test_the_compute_dtype_is_that_of_the_gathers(dump: Any) -> None:
    whole, half = ((books(dump, "--compute-dtype", dtype)[0]) for dtype in ("fp32", "bf16"))
    assert {row["compute"] for row in half["parameters"]} == {"bf16"}
    assert 2 * half["levels"][0]["bytes"]["gather"] == whole["levels"][0]["bytes"]["gather"] > 0


def test_micro_batches_are_counted(dump: Any) -> None:
    accumulating, last = books(dump, "--micro-batches", "3")
    assert (accumulating["runs"], last["runs"]) == (2, 1)
    assert accumulating["levels"][0]["bytes"]["gather"] == 2 * last["levels"][0]["bytes"]["gather"] > 0


def test_sort_and_rows_are_of_the_tables(dump: Any) -> None:
    shown = dump("--sort", "name", "--rows", "2").splitlines()
    at = next(i for i, line in enumerate(shown) if line.startswith("4 parameters; the first 2 by name"))
    assert [line.split()[0] for line in shown[at + 4 :] if line.strip()] == ["0.weight", "1.weight"]


def test_the_rank_is_whose_programs_are_written(dump: Any, tmp_path: Path) -> None:
    shown = dump("--rank", "1", "--out", str(tmp_path / "out"))
    assert "report.html in a browser" in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["rank1"]
