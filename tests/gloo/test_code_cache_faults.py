"""A compile cache that one rank cannot use, and a code generator that chooses otherwise on one rank: the same graphs, no hang (F6, F7)."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.spawn import run
from support.training import received, square, train, twins
from torch import nn

from zcompile._torch_compat import generated_code

pytestmark = pytest.mark.slow


@dataclass
class Case:
    """What is wrong on one rank."""

    folder: str = "warm"
    """Its cache: a copy of one that is filled, "empty", or a path."""
    spoil: str = ""
    """Entries that are damaged: "graphs" or "code"."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of its code generator."""


CASES = {
    "nothing": Case(),
    "empty": Case("empty"),
    "graphs": Case(spoil="graphs"),
    "code": Case(spoil="code"),
    "unwritable": Case("/proc/nowhere"),
    "choice": Case(config={"cpp.simdlen": 1, "max_fusion_size": 1}),
}
WORLD = len(CASES)
"""A rank for each."""


@dataclass
class Outcome:
    """Folders of the ranks' caches; what each rank found there and, in the job before, without a fault."""

    folders: dict[str, str]
    before: dict[str, Found]
    found: dict[str, Found]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One job for all faults: the ranks have caches of their own, and each generates for itself what it cannot load."""
    warm = tmp_path_factory.mktemp("warm")
    before = run(steps, WORLD, [str(warm)] * WORLD, [Case()] * WORLD, timeout=500)
    root = tmp_path_factory.mktemp("ranks")
    given = {"warm": "", "empty": ""}
    folders = {name: given.get(case.folder, case.folder) or str(root / name) for name, case in CASES.items()}
    for name, case in CASES.items():
        if case.folder == "warm":
            shutil.copytree(warm, folders[name])
    found = run(steps, WORLD, list(folders.values()), list(CASES.values()), timeout=500)
    return Outcome(folders, dict(zip(CASES, before, strict=True)), dict(zip(CASES, found, strict=True)))


@dataclass(frozen=True)
class Found:
    """Of the two graphs of one rank: identities, where the code came from, the code; the folder in use at the end; bytes of gathers."""

    identities: list[int]
    origins: list[str]
    sources: list[str]
    folder: str
    gathered: dict[str, int]


def model() -> nn.Module:
    """One kernel in each direction: the compiler of C++ is what the time here goes to. A row a rank, so that nothing is padded."""
    return nn.Sequential(nn.Linear(7, WORLD, bias=False), nn.Tanh())


def steps(rank: int, folders: list[str], cases: list[Case]) -> Found:
    """Two steps through Inductor."""
    case = cases[rank]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folders[rank]
    tempfile.tempdir = str(Path(folders[0]).parent)  # a killed rank cleans up nothing
    entries = [path for path in Path(folders[rank]).rglob("*") if path.is_file()] if case.spoil else []
    for path in entries:
        if ("fxgraph" in path.parts) == (case.spoil == "graphs"):
            path.write_bytes(b"spoiled")
    from torch._inductor import config as inductor

    with inductor.patch(case.config):
        wrapped, dense = twins(model, "code", timeout=120.0)
        train(wrapped, dense, square(4, 7), steps=2)
    programs = wrapped.zero.programs
    return Found(
        [p.identity for p in programs],
        [p.code for p in programs],
        [generated_code(p._code) for p in programs],
        os.environ["TORCHINDUCTOR_CACHE_DIR"],
        received(wrapped, "gather"),
    )


@pytest.mark.parametrize("fault", CASES)
def test_f6_f7_a_rank_generates_its_own_code_of_the_same_graphs(outcome: Outcome, fault: str) -> None:
    """Vector width and fusions are the code generator's affair: the schedule is a function of the graph and the machine's data."""
    found, before = outcome.found[fault], outcome.before["nothing"]
    assert found.origins == (["loaded"] * 2 if fault == "nothing" else ["generated"] * 2)
    assert found.identities == before.identities and found.gathered == before.gathered
    assert (found.sources == before.sources) == (fault != "choice")


def test_f6_a_cache_that_is_of_no_use_is_left(outcome: Outcome) -> None:
    for fault in ("graphs", "code"):  # torch itself passes over a graph that cannot be read
        assert (outcome.found[fault].folder == outcome.folders[fault]) == (fault == "graphs")
    assert "zcompile-inductor-" in outcome.found["unwritable"].folder


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
