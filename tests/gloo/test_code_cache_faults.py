"""A compile cache that one rank cannot use, and a code generator that chooses otherwise on one rank: the same graphs, no hang (F6, F7)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.spawn import run
from support.training import mlp, received, square, train, twins

pytestmark = pytest.mark.slow
WORLD = 2


@dataclass
class Case:
    """What is wrong on rank 1."""

    folder: str = "warm"
    """Its cache: a copy of one that is filled, "empty", or a path."""
    spoil: str = ""
    """Entries that are damaged: "graphs" or "code"."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of its code generator."""


CASES = {
    "empty": Case("empty"),
    "graphs": Case(spoil="graphs"),
    "code": Case(spoil="code"),
    "unwritable": Case("/proc/nowhere"),
    "choice": Case(config={"cpp.simdlen": 1, "max_fusion_size": 1}),
}
"""All of them generate code on one rank, for which one core is enough: two at a time."""


@dataclass
class Outcome:
    """folders of the ranks' caches; what each rank found there and without a fault."""

    folders: list[str]
    before: list[Any]
    found: list[Any]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Outcome]]:
    warm = [str(tmp_path_factory.mktemp(f"rank{rank}")) for rank in range(WORLD)]
    before = run(steps, WORLD, warm, "", {}, timeout=500)

    def ran(name: str) -> Outcome:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        folders = [str(shutil.copytree(source, folder / Path(source).name)) for source in warm]
        if case.folder != "warm":
            folders[1] = str(folder / "empty") if case.folder == "empty" else case.folder
        return Outcome(folders, before, run(steps, WORLD, folders, case.spoil, case.config, timeout=500))

    with ThreadPoolExecutor(2) as executor:
        found = {name: executor.submit(ran, name) for name in CASES}
        yield lambda name: found[name].result()


def steps(rank: int, folders: list[str], spoil: str, config: dict[str, Any]) -> tuple[list[int], list[str], str, Any]:
    """Two steps through Inductor: (identities of the graphs, where the code came from, folder in use at the end, bytes of gathers)."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folders[rank]
    tempfile.tempdir = str(Path(folders[0]).parent)  # a killed rank cleans up nothing
    entries = [path for path in Path(folders[rank]).rglob("*") if path.is_file()] if rank == 1 and spoil else []
    for path in entries:
        if ("fxgraph" in path.parts) == (spoil == "graphs"):
            path.write_bytes(b"spoiled")
    from torch._inductor import config as inductor

    with inductor.patch(config if rank == 1 else {}):
        model, dense = twins(mlp, "code", topology="2", timeout=120.0)
        train(model, dense, square(4, 7), steps=2)
    programs = model.zero.programs
    return (
        [p.identity for p in programs],
        [p.code for p in programs],
        os.environ["TORCHINDUCTOR_CACHE_DIR"],
        received(model, "gather"),
    )


@pytest.mark.parametrize("fault", CASES)
def test_f6_f7_a_rank_generates_its_own_code_of_the_same_graphs(outcome: Any, fault: str) -> None:
    """Vector width and fusions are the code generator's affair: the schedule is a function of the graph and the machine's data."""
    there = outcome(fault)
    assert [codes for _, codes, _, _ in there.found] == [["loaded", "loaded"], ["generated", "generated"]]
    for identities, _, _, bytes_ in there.found:
        assert identities == there.before[0][0] and bytes_ == there.before[0][3]


def test_f6_a_cache_that_is_of_no_use_is_left(outcome: Any) -> None:
    for fault in ("graphs", "code"):  # torch itself passes over a graph that cannot be read
        there = outcome(fault)
        assert (there.found[1][2] == there.folders[1]) == (fault == "graphs")
    assert "zcompile-inductor-" in outcome("unwritable").found[1][2]


def test_a_folder_that_cannot_be_written_is_left_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from zcompile import code_cache

    monkeypatch.setenv(code_cache.FOLDER, str(tmp_path))
    code_cache.keep_writable()
    assert os.environ[code_cache.FOLDER] == str(tmp_path)
    monkeypatch.setenv(code_cache.FOLDER, "/proc/nowhere")
    code_cache.keep_writable()
    assert Path(os.environ[code_cache.FOLDER]).is_dir()
    assert "TORCHINDUCTOR_CACHE_DIR=/proc/nowhere cannot be written" in capsys.readouterr().err


def test_errors_of_generating_are_not_taken_for_those_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from zcompile import code_cache

    misses, tries = [0], [0]
    monkeypatch.setattr(code_cache, "code_cache_misses", lambda: misses[0])
    monkeypatch.setenv(code_cache.FOLDER, "/somewhere")

    def generating() -> None:
        tries[0] += 1
        misses[0] += 1
        raise ValueError("no such instruction")

    with pytest.raises(ValueError, match="no such instruction"):
        code_cache.loaded_or_made(generating)
    assert tries == [1] and os.environ[code_cache.FOLDER] == "/somewhere"
