"""A compile cache that one rank cannot use, and a code generator that chooses otherwise on one rank: the same graphs, no hang (F6, F7)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.spawn import Pool
from support.training import mlp, received, square, train, twins

pytestmark = pytest.mark.slow
WORLD = 2


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(WORLD)
    yield made
    made.close()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Any]]:
    """(a folder for each rank, filled; what the ranks found)."""
    folders = [str(tmp_path_factory.mktemp(f"rank{rank}")) for rank in range(WORLD)]
    pool = Pool(WORLD)
    try:
        return folders, pool.run(steps, folders, "", {}, timeout=500)
    finally:
        pool.close()


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


def test_f6_a_rank_starts_with_an_empty_cache(pool: Pool, warm: Any, tmp_path: Path) -> None:
    folders, before = warm
    found = pool.run(steps, [folders[0], str(tmp_path)], "", {}, timeout=500)
    assert [codes for _, codes, _, _ in found] == [["loaded", "loaded"], ["generated", "generated"]]
    assert all(one[0] == before[0][0] and one[3] == before[0][3] for one in found)


@pytest.mark.parametrize("spoil", ["graphs", "code"])
def test_f6_a_rank_has_corrupt_entries(pool: Pool, warm: Any, tmp_path: Path, spoil: str) -> None:
    folders, before = warm
    found = pool.run(steps, folders, spoil, {}, timeout=500)
    assert [codes for _, codes, _, _ in found] == [["loaded", "loaded"], ["generated", "generated"]]
    assert (found[1][2] == folders[1]) == (spoil == "graphs"), "torch itself passes over a graph that cannot be read"
    assert all(one[0] == before[0][0] and one[3] == before[0][3] for one in found)


def test_f6_a_rank_has_a_cache_that_cannot_be_written(pool: Pool, warm: Any) -> None:
    folders, before = warm
    found = pool.run(steps, [folders[0], "/proc/nowhere"], "", {}, timeout=500)
    assert [codes for _, codes, _, _ in found] == [["loaded", "loaded"], ["generated", "generated"]]
    assert "zcompile-inductor-" in found[1][2]
    assert all(one[0] == before[0][0] for one in found)


def test_f7_another_choice_of_the_code_generator_on_one_rank(pool: Pool, warm: Any) -> None:
    """Vector width and fusions are the code generator's affair: the schedule is a function of the graph and the machine's data."""
    folders, before = warm
    found = pool.run(steps, folders, "", {"cpp.simdlen": 1, "max_fusion_size": 1}, timeout=500)
    assert [codes for _, codes, _, _ in found] == [["loaded", "loaded"], ["generated", "generated"]]
    assert all(one[0] == before[0][0] and one[3] == before[0][3] for one in found)


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
