"""The dump of one small model, pass by pass, against tests/golden: read those files to see what the compiler does.

UPDATE_GOLDEN=1 writes them anew; read the difference before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import paper as world
from support.spawn import Pool

from zcompile import Plan

GOLDEN = Path(__file__).parents[1] / "golden"
STAGES = {
    "joint": ("00-input", "01-merge", "02-tag"),
    "forward": ("00-input", "01-bucket", "02-lower", "03-quantize", "04-schedule", "05-pin", "06-verify"),
    "backward": ("00-input", "01-bucket", "02-lower", "03-quantize", "04-schedule", "05-pin", "06-verify"),
}
QUANTIZED = [(s, f) for s in ("forward", "backward") for f in ("02-lower.txt", "03-quantize.txt", "summary.txt")]
"""Of the same model with int8 gathers and int4 reductions in blocks of 32: in tests/golden/quantized."""
SHOWN = [(stage, f"{number}.txt") for stage, files in STAGES.items() for number in (*files, "summary")]


def dump(_: int, folder: str, rank: int, plan: Any = "zero_topo", width: int = 8) -> list[str]:
    """A step of Tiny on `rank`; returns the paths of the dump's files."""
    world.step(world.wrapped(rank, plan=plan, width=width, dump=folder, dump_ranks=str(rank)))
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.*") if path.is_file())


@pytest.fixture(scope="module")
def dumped(paper: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps of ranks 0 and 5 of the same job."""
    folder = tmp_path_factory.mktemp("dump")
    for rank in (0, 5):
        paper.run(dump, str(folder), rank, timeout=300)
    return folder


@pytest.fixture(scope="module")
def dumped_quantized(paper: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    paper.run(dump, str(folder), 0, Plan.preset("zero_topo", gather="int8/32", reduce="int4/32"), 16, timeout=300)
    return folder


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="graphs of another torch have other ops")
@pytest.mark.parametrize(("stage", "file"), SHOWN, ids=[f"{stage}-{file}" for stage, file in SHOWN])
def test_dump_after_each_pass(dumped: Path, stage: str, file: str) -> None:
    found = (dumped / "rank0" / f"graph0.{stage}" / file).read_text()
    golden = GOLDEN / f"{stage}-{file}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="graphs of another torch have other ops")
@pytest.mark.parametrize(("stage", "file"), QUANTIZED, ids=[f"{stage}-{file}" for stage, file in QUANTIZED])
def test_dump_of_quantised_hops(dumped_quantized: Path, stage: str, file: str) -> None:
    """Format and block on every hop; a requantise between two of them."""
    found = (dumped_quantized / "rank0" / f"graph0.{stage}" / file).read_text()
    golden = GOLDEN / "quantized" / f"{stage}-{file}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text()


def test_every_file_of_the_dump_is_there(dumped: Path) -> None:
    found = {path.relative_to(dumped / "rank0").as_posix() for path in (dumped / "rank0").rglob("*.txt")}
    assert found == {f"graph0.{s}/{f}" for s, f in SHOWN} | {f"graph0.{s}/times.txt" for s in STAGES}


def test_two_ranks_dumps_are_equal_byte_for_byte_apart_from_times(dumped: Path) -> None:
    """Invariant 11: graphs hold no rank constant."""
    files = [path for path in (dumped / "rank0").rglob("*") if path.is_file() and path.name != "times.txt"]
    assert len(files) >= len(SHOWN)
    for path in files:
        other = dumped / "rank5" / path.relative_to(dumped / "rank0")
        assert path.read_bytes() == other.read_bytes(), path


def test_a_diff_leads_from_each_program_to_the_next(dumped: Path) -> None:
    place = dumped / "rank0" / "graph0.forward"
    changed = {path.name for path in place.glob("*.diff")}
    assert changed == {"01-bucket.diff", "02-lower.diff", "04-schedule.diff"}, (
        "quantize has nothing to fuse, pin and verify change nothing"
    )
    text = (place / "02-lower.diff").read_text()
    assert any(line.startswith("-blocks.0.up.gather ") for line in text.splitlines())
    assert any(line.startswith("+blocks.0.up.gather_pair ") for line in text.splitlines())
