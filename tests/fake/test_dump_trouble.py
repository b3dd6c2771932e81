"""Dumps of real jobs that meet trouble: full disks, other jobs' folders, ranks that are not there."""

from __future__ import annotations

import os
import resource
import warnings
from pathlib import Path

import pytest
import torch
from support import paper as world
from support.commands import TIMEOUT
from support.spawn import Pool

import zcompile
from zcompile.debug import dump, record, views


def unrecorded(_: int) -> tuple[list[str], str]:
    """Trouble in the books of a job that asked for no dump: (warnings, what explain says)."""
    before = record.rows
    record.rows = lambda *args: 1 / 0
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = world.wrapped()
            world.step(model)
    finally:
        record.rows = before
    with pytest.raises(ValueError) as said:
        zcompile.explain(model)
    return [str(w.message) for w in caught if "zcompile" in str(w.message)], str(said.value)


def test_who_asked_for_no_dump_hears_nothing_of_its_trouble_but_from_explain(paper: Pool) -> None:
    ((heard, said),) = paper.run(unrecorded, timeout=TIMEOUT)
    assert (
        heard == [] and said == "zcompile.explain: graph 0 could not be recorded: ZeroDivisionError: division by zero"
    )


def moving(_: int, folder: str) -> list[str]:
    """A job with a relative folder that changes its working directory between two compilations."""
    before = os.getcwd()
    Path(folder, "other").mkdir()
    try:
        os.chdir(folder)
        model = world.wrapped(dump="dump")
        world.step(model)
        os.chdir("other")
        with torch.no_grad():
            model(torch.ones(4, 8))
    finally:
        os.chdir(before)
    return sorted(path.name for path in Path(folder, "dump", "rank0").iterdir())


def test_a_relative_folder_stays_what_it_was(paper: Pool, tmp_path: Path) -> None:
    (found,) = paper.run(moving, str(tmp_path), timeout=TIMEOUT)
    assert found == ["graph0.backward", "graph0.forward", "graph0.joint", "graph1.inference", "graph1.joint"]
    assert list((tmp_path / "other").iterdir()) == []


def limited(_: int, folder: str) -> list[str]:
    """A job whose disk has no room for files of more than 4 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = world.wrapped(blocks=2, dump=folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            world.step(model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert next(model.parameters()).grad is not None
    return [str(w.message) for w in caught if "zcompile" in str(w.message)]


def test_a_full_disk_is_a_warning_and_leaves_no_half_views(paper: Pool, tmp_path: Path) -> None:
    ((warning,),) = paper.run(limited, str(tmp_path), timeout=TIMEOUT)
    assert "no further dump of graph 0" in warning and "File too large" in warning
    assert [path.name for path in tmp_path.iterdir()] == ["rank0"]


def test_a_view_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views.write(tmp_path / "ledger.json", "old")

    def full(self: Path, content: bytes) -> int:
        with open(self, "wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        views.write(tmp_path / "ledger.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"] and (
        tmp_path / "ledger.json"
    ).read_text() == "old"


def test_views_of_another_rank_do_not_replace_an_earlier_jobs(tmp_path: Path) -> None:
    first = dump.Place(tmp_path, 0, True)
    assert first.views is not None
    views.write(first.views.path("ledger.json"), "[]")
    other = dump.Place(tmp_path, 3, True)
    assert other.root.name == "rank3" and other.views is not None
    assert other.views.path("report.html").name == "report.2.html"


def test_a_second_jobs_views_stand_beside_the_firsts(paper: Pool, tmp_path: Path) -> None:
    paper.run(once, str(tmp_path), timeout=TIMEOUT)
    paper.run(forgetful, str(tmp_path), timeout=TIMEOUT)
    assert {"ledger.json", "ledger.2.json", "report.html", "report.2.html", "rank0", "rank0.2"} <= {
        p.name for p in tmp_path.iterdir()
    }


def once(_: int, folder: str) -> None:
    world.step(world.wrapped(dump=folder))


def forgetful(_: int, folder: str) -> None:
    dump._places.clear()  # as another process would find it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once(0, folder)


@pytest.mark.parametrize(
    ("value", "complaint"), [("0-3", "must be ranks"), ("9", "there is no rank 9 in a world of 8")]
)
def test_ranks_that_do_not_exist_are_refused(paper: Pool, value: str, complaint: str) -> None:
    (error,) = paper.run(refused, value, timeout=TIMEOUT)
    assert complaint in error


def left_over(_: int) -> None:
    os.environ["ZCOMPILE_DUMP_RANKS"] = "8"
    try:
        world.step(world.wrapped())
    finally:
        del os.environ["ZCOMPILE_DUMP_RANKS"]


def test_ranks_left_over_in_the_environment_are_nothing_to_a_job_without_a_dump(paper: Pool) -> None:
    paper.run(left_over, timeout=TIMEOUT)


def refused(_: int, ranks: str) -> str:
    try:
        world.step(world.wrapped(dump="unused", dump_ranks=ranks))
    except Exception as error:
        return str(error)
    return ""
