"""`zcompile dump`: what it says, and what it refuses."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import TIMEOUT, command, run
from support.patches import replaced
from support.spawn import Pool, RanksFailed

from zcompile.debug import views

MODEL = """
import torch

def make():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    return model.to("meta"), torch.ones(4, 8)

def nothing():
    return 3
"""


TINY = ("--topology", "2", "--plan", "zero3")


SCRIPT = """
import sys, torch, torch.distributed as dist
from zcompile import hierarchical_zero

dist.init_process_group("gloo")
assert dist.get_world_size() == 8 and sys.argv[1:] == ["--steps", "9"]
model = hierarchical_zero(torch.nn.Linear(8, 8), topology="2x2", plan="zero3")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(9):
    try:
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        print("step", step)
    except Exception:
        print("a script that goes on whatever happens")
"""


def test_dump_of_a_function_on_a_machine_that_is_not_here(paper: Pool, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    out = tmp_path / "out"
    code, shown, _ = run(
        paper, "dump", f"{tmp_path}/mine.py:make", "--topology", "frontier:2", "--plan", "zero3", "--out", str(out)
    )
    assert code == 0
    assert {"rank0", "report.html", "ledger.json", "ledger.txt", "trace.json", "dump.json.gz"} == {
        p.name for p in out.iterdir()
    }
    (step,) = json.loads((out / "ledger.json").read_text())
    assert step["topology"] == "2x4x2" and step["parameters"][0]["weights"] == "cluster"
    assert [row["backward"] for row in step["parameters"] if row["name"] == "2.weight"] == ["gathered again"]
    for word in (
        "levels: bytes that one rank receives",
        "memory at its peak",
        "hops that were not hidden",
        "parameters",
        "report.html",
    ):
        assert word in shown, word


def test_dump_of_a_script_stops_after_its_first_step(paper: Pool, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = ("--topology", "2x2x2", "--plan", "zero_topo", "--json", "-", "--", "--steps", "9")
    code, shown, error = run(paper, "dump", str(script), *arguments)
    assert code == 0, error
    assert not shown.startswith("step"), "it is stopped in the first optimizer step"
    (step,) = json.loads(shown)
    assert step["topology"] == "2x2x2" and step["plan"][0].startswith("plan zero_topo"), (
        "what the command says stands for what it says"
    )
    assert not torch.distributed.is_initialized() and os.environ.get("WORLD_SIZE") is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("nowhere:make",), "No module named 'nowhere'"),
        (("missing.py",), "missing.py: there is no such script"),
        (("tiny", "--plan", "zero4"), "zero4"),
        (("tiny", "--topology", "2x"), "2x"),
        (("tiny", "--rank", "9", "--topology", "2x2x2"), "rank 9"),
        (("tiny", "--sequence", "99"), "takes 1 to 32"),
        (("tiny", "--micro-batches", "0"), "must be 1 or more"),
        (("tiny", "--", "--steps", "3"), "only a script takes any"),
        (("{folder}/mine.py:nothing", "--topology", "2"), "must return (model, inputs)"),
    ],
)
def test_bad_arguments_of_a_dump(paper: Pool, tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    code, _, error = run(paper, "dump", *(text.replace("{folder}", str(tmp_path)) for text in arguments))
    assert code == 2 and complaint in error, error


BAD = """
import torch

class Bad(torch.nn.Linear):
    def forward(self, x):
        raise {error}("the user's own mistake")

def make():
    return Bad(8, 8), torch.ones(4, 8)

def early():
    raise {error}("the user's own mistake")
"""


@pytest.mark.parametrize("function", ["make", "early"])
@pytest.mark.parametrize("error", ["ValueError", "TypeError"])
def test_an_error_of_the_users_code_keeps_its_traceback(paper: Pool, tmp_path: Path, function: str, error: str) -> None:
    (tmp_path / "bad.py").write_text(BAD.format(error=error))
    with pytest.raises(RanksFailed) as caught:
        run(paper, "dump", f"{tmp_path}/bad.py:{function}", *TINY)
    (failure,) = caught.value.failures.values()
    assert "the user's own mistake" in failure.message and "bad.py" in failure.trace


ENDS = """
import os, torch
from zcompile import hierarchical_zero

os.chdir("/")
model = hierarchical_zero(torch.nn.Linear(8, 8), codegen=False)
model(torch.ones(4, 8)).sum().backward()
"""


def test_a_script_that_makes_no_step_is_said_to_and_may_change_its_folder(paper: Pool, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    code, shown, error = run(paper, "dump", str(tmp_path / "ends.py"), *TINY, "--out", str(tmp_path / "out"))
    assert code == 1 and "ended before an optimizer's step" in error and "graph 0 forward" in shown
    assert (tmp_path / "out" / "rank0" / "graph0.backward").is_dir() and [
        p.name for p in tmp_path.iterdir() if p.is_dir()
    ] == ["out"]


def test_a_second_dump_into_a_folder_names_its_own_page(paper: Pool, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    arguments = ("dump", f"{tmp_path}/mine.py:make", *TINY, "--out", str(tmp_path / "out"))
    for name in ("report.html", "report.2.html"):
        code, shown, _ = run(paper, *arguments)
        assert code == 0 and f"open {tmp_path}/out/{name} in a browser" in shown
    trace = tmp_path / "trace.json"
    trace.write_text('{"traceEvents": []}')
    for job, written in (((), "measured.2.json"), (("--job", "1"), "measured.json")):
        assert not (tmp_path / "out" / written).exists()
        _, _, error = run(paper, "measured", str(tmp_path / "out"), str(trace), *job)
        assert (tmp_path / "out" / written).exists() and "of 2 jobs in" in error, error
    code, _, error = run(paper, "measured", str(tmp_path / "out"), str(trace), "--job", "3")
    assert code == 2 and "--job 3" in error and "holds 1, 2" in error


@pytest.mark.parametrize("trouble", ["a file is in the way", "read-only"])
def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    (tmp_path / "mine.py").write_text("def make():\n    raise AssertionError('traced')\n")
    (tmp_path / "taken").write_text("")
    out, complaint = tmp_path / "taken" / "out", "Not a directory"
    if trouble == "read-only":
        out, complaint = tmp_path / "out", "Read-only file system"

        def read_only(*args: Any, **settings: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(views.tempfile, "TemporaryFile", read_only)
    code, _, error = command(0, "dump", f"{tmp_path}/mine.py:make", *TINY, "--out", str(out))
    assert code == 2 and error == f"zcompile dump: --out {out} cannot be written to: {complaint}\n"


def full_disk(_: int, *arguments: str) -> tuple[int, str, str]:
    """The command on a disk that is full before the views."""
    before = views.write

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    views.write = full
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return command(0, *arguments)
    finally:
        views.write = before


def test_a_dump_that_is_not_all_is_said_to_be(paper: Pool, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    arguments = ("dump", f"{tmp_path}/mine.py:make", *TINY, "--out", str(tmp_path / "out"))
    code, _, error = paper.run(full_disk, *arguments, timeout=TIMEOUT)[0]
    assert code == 1 and "is not all: OSError: [Errno 28] No space left on device" in error, error


def without_bokeh(_: int, *arguments: str) -> tuple[int, str, str]:
    """The command where Python finds no bokeh."""
    real = importlib.util.find_spec
    with replaced(importlib.util, "find_spec", lambda name, *rest: None if name == "bokeh" else real(name, *rest)):
        return command(0, *arguments)


def test_without_bokeh_the_rest_is_written(paper: Pool, tmp_path: Path) -> None:
    arguments = ("dump", "tiny", "--topology", "2x2x2", "--sequence", "4", "--out", str(tmp_path))
    code, _, error = paper.run(without_bokeh, *arguments, timeout=TIMEOUT)[0]
    assert code == 0, error
    assert "no report.html: it needs bokeh (pip install 'zcompile[report]')" in error
    assert {path.name for path in tmp_path.iterdir()} == {
        "rank0",
        "ledger.json",
        "ledger.txt",
        "trace.json",
        "dump.json.gz",
    }
