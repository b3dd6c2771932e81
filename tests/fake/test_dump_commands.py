"""`zcompile dump`, `zcompile diff`, `zcompile.explain`: what they say, and what they refuse."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import paper as world
from support.commands import TIMEOUT, command, run
from support.spawn import Pool, RanksFailed
from torch import nn

import zcompile
from zcompile import Plan, Rule, hierarchical_zero, ledger
from zcompile.debug import compare, dump, page, record, views

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


def two(_: int, folder: str, plan: str, ranks: str) -> None:
    for rank in (int(text) for text in ranks.split(",")):
        world.step(world.wrapped(rank, plan=plan, dump=folder, dump_ranks=ranks))


def test_diff_says_where_plans_part_first_and_that_ranks_do_not(paper: Pool, tmp_path: Path) -> None:
    for plan, ranks in (("zero_topo", "0,5"), ("zero3", "0,5")):
        paper.run(two, str(tmp_path / plan), plan, ranks, timeout=TIMEOUT)
    code, shown, _ = run(paper, "diff", str(tmp_path / "zero_topo"))
    assert code == 0 and shown.startswith("equal"), shown
    code, shown, _ = run(paper, "diff", str(tmp_path / "zero_topo"), str(tmp_path / "zero3"))
    assert code == 1
    first, *rest = shown.splitlines()
    assert "they part at graph 0 joint, plan" in first
    assert "  -  weights:   pair" in rest and "  +  weights:   world (8 ranks, up to cluster)" in rest
    changed = tmp_path / "zero_topo" / "rank5" / "graph0.forward" / "02-lower.txt"
    changed.write_text(changed.read_text().replace("= relu(", "= gelu("))
    code, shown, _ = run(paper, "diff", str(tmp_path / "zero_topo"), "--json", "-")
    (pair,) = json.loads(shown)["pairs"]
    assert code == 1 and [part["part"] for part in pair["differing"]] == ["graph 0 forward, lower"]
    assert pair["differing"][0]["first"]["a"].partition("=")[2].strip().startswith("relu(blocks.0.up.mm)")


def dumps(folder: Path, **ranks: str) -> None:
    """A dump: rank -> a line of its program."""
    for rank, line in ranks.items():
        place = folder / rank / "graph0.forward"
        place.mkdir(parents=True)
        (place / "00-input.txt").write_text(f"title\n\n    0  {line}\n")


def test_diff_says_so_where_it_compares_other_ranks(tmp_path: Path) -> None:
    dumps(tmp_path / "a", rank0="x")
    dumps(tmp_path / "b", rank5="x")
    dumps(tmp_path / "c", rank0="x", rank5="y")
    note = "they have no rank in common: rank0 is compared with rank5"
    code, shown, _ = command(0, "diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 0 and shown.startswith(note)
    assert note in command(0, "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "-")[1]
    code, shown, _ = command(0, "diff", str(tmp_path / "b"), str(tmp_path / "c"))
    assert code == 1 and shown.startswith("differ") and "c/rank5" in shown, "with its own rank, not with the first"
    code, shown, _ = command(0, "diff", str(tmp_path / "a" / "rank0"), str(tmp_path / "c" / "rank5"))
    assert code == 1 and shown.startswith("differ"), "who names two ranks means them"


def test_diff_refuses_what_is_no_dump(paper: Pool, tmp_path: Path) -> None:
    assert run(paper, "diff", str(tmp_path / "none"))[::2] == (2, f"zcompile diff: {tmp_path / 'none'} is no folder\n")
    code, _, error = run(paper, "diff", str(tmp_path), str(tmp_path))
    assert code == 2 and "holds no dump" in error
    (tmp_path / "rank0" / "graph0.forward").mkdir(parents=True)
    assert "holds one rank's dump" in run(paper, "diff", str(tmp_path))[2]


def test_one_line_more_is_one_line_in_a_diff(tmp_path: Path) -> None:
    """Numbers of lines are not compared."""
    for name, lines in (("a", ["x", "y"]), ("b", ["w", "x", "y"])):
        place = tmp_path / name / "graph0.forward"
        place.mkdir(parents=True)
        (place / "00-input.txt").write_text("title\n\n" + "".join(f"{i:5d}  {line}\n" for i, line in enumerate(lines)))
    (part,) = compare.compare(tmp_path / "a", tmp_path / "b").differing
    assert (part.added, part.removed, part.first) == (1, 0, (0, "x", "w"))


def again(_: int, *arguments: str) -> tuple[int, str, str]:
    """The command in what is another process for the dump."""
    dump._places.clear()
    return command(0, *arguments)


def test_a_second_dump_into_a_folder_names_its_own_page(paper: Pool, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    arguments = ("dump", f"{tmp_path}/mine.py:make", *TINY, "--out", str(tmp_path / "out"))
    for name in ("report.html", "report.2.html"):
        code, shown, _ = paper.run(again, *arguments, timeout=TIMEOUT)[0]
        assert code == 0 and f"open {tmp_path}/out/{name} in a browser" in shown
    trace = tmp_path / "trace.json"
    trace.write_text('{"traceEvents": []}')
    for job, written in (((), "measured.2.json"), (("--job", "1"), "measured.json")):
        assert not (tmp_path / "out" / written).exists()
        _, _, error = run(paper, "measured", str(tmp_path / "out"), str(trace), *job)
        assert (tmp_path / "out" / written).exists() and "of 2 jobs in" in error, error
    code, _, error = run(paper, "measured", str(tmp_path / "out"), str(trace), "--job", "3")
    assert code == 2 and "--job 3" in error and "holds 1, 2" in error


def test_views_of_another_rank_do_not_replace_an_earlier_jobs(tmp_path: Path) -> None:
    places = [dump.Place(tmp_path, rank, True) for rank in (0,)]
    assert places[0].views is not None
    views.write(places[0].views.path("ledger.json"), "[]")
    other = dump.Place(tmp_path, 3, True)
    assert other.root.name == "rank3" and other.views is not None
    assert other.views.path("report.html").name == "report.2.html"


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


def explained(_: int) -> dict[str, Any]:
    model = world.wrapped(blocks=2, overlap=1)
    with pytest.raises(ValueError, match="nothing was compiled"):
        zcompile.explain(model)
    world.step(model)
    found = zcompile.explain(model, sort="name")
    with pytest.raises(ValueError, match="valid: joint, forward, backward"):
        found.program("inference")
    with pytest.raises(ValueError, match="sort='size'"):
        zcompile.explain(model, sort="size")
    with pytest.raises(TypeError, match="was not wrapped"):
        zcompile.explain(nn.Linear(2, 2))
    return {
        "text": str(found), "program": found.program("backward"), "html": found._repr_html_(), "step": found.ledger()[0],
        "repr": repr(found), "ledger": ledger(model),
    }  # fmt: skip


def test_explain_shows_a_model_that_was_compiled_without_a_dump(paper: Pool) -> None:
    (found,) = paper.run(explained, timeout=TIMEOUT)
    assert "blocks.1.{up,down}.weight" in found["text"] and "hops that were not hidden" in found["text"]
    assert "gather> all_gather(" in found["program"]
    assert found["html"].startswith("<iframe srcdoc=") and "graph 0 backward" in found["repr"]


def test_numbers_of_every_view_are_the_ledgers(paper: Pool) -> None:
    """Levels, hops and the parameters' shares add up to what zcompile.ledger counts, by level and transfer."""
    (found,) = paper.run(explained, timeout=TIMEOUT)
    step, books = found["step"], found["ledger"]["levels"]
    assert {row["level"] for row in step["levels"]} == set(books)
    for row in step["levels"]:
        for transfer, amount in row["bytes"].items():
            columns = books[row["level"]][transfer]
            assert columns["predicted"] == columns["compiled"] == columns["counted"] == amount, (row["level"], transfer)
            hops = (
                h
                for h in step["hops"]
                if h["level"] == row["level"] and h["transfer"].replace("back", "sync") == transfer
            )
            assert sum(hop["bytes"] for hop in hops) == amount
            shares = (
                by.get(row["level"], 0)
                for p in step["parameters"]
                for key, by in p["bytes"].items()
                if key.split()[0] == transfer
            )
            assert sum(shares) == amount
    assert sum(row["exposed"] for row in step["levels"]) == pytest.approx(step["exposed"])
    assert sum(row["exposed"] for row in step["parameters"]) == pytest.approx(step["exposed"])
    assert step["computing"] + step["exposed"] == pytest.approx(step["seconds"])


PLANS: dict[str, Any] = {
    "ddp": "ddp",
    "zeropp": "zeropp",
    "quantised": Plan.preset("zero_topo", gather="int8/32", reduce="int4/32"),
    "error feedback": Plan.preset("zero_topo", reduce="int4/32", error_feedback=0.5),
    "peer gather": Plan.preset("zero_topo", peer_gather=True),
    "narrower than the world": Plan("pair", "node", "node"),
    "small parameters whole": Plan(rules=(Rule("*", max_elements=8, weights="whole", gradients="whole"),)),
}


def of_every_plan(_: int, folder: str) -> dict[str, list[Any]]:
    """plan -> (level, transfer, bytes of the parameters' shares, of the level's row, of the ledger) where they are not all equal."""
    wrong: dict[str, list[Any]] = {}
    for name, plan in PLANS.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="zcompile")
            model = world.wrapped(plan=plan, width=16, overlap=1, dump=f"{folder}/{name}")
            world.step(model)
        (step,), books = zcompile.explain(model).ledger(), ledger(model)["levels"]
        shares: dict[tuple[str, str], int] = {}
        for row in step["parameters"]:
            for transfer, by in row["bytes"].items():
                for level, amount in by.items():
                    key = (level, transfer.split()[0])
                    shares[key] = shares.get(key, 0) + amount
        found = [
            (
                row["level"],
                transfer,
                shares.get((row["level"], transfer), 0),
                amount,
                books[row["level"]][transfer]["counted"],
            )
            for row in step["levels"]
            for transfer, amount in row["bytes"].items()
        ]
        wrong[name] = [each for each in found if len(set(each[2:])) > 1]
    return wrong


@pytest.mark.slow
def test_every_kind_of_plan_has_its_dump_with_the_ledgers_numbers(paper: Pool, tmp_path: Path) -> None:
    (wrong,) = paper.run(of_every_plan, str(tmp_path), timeout=600)
    assert wrong == {name: [] for name in PLANS}
    assert all((tmp_path / name / "report.html").exists() for name in PLANS)


def nothing_gathered(_: int, folder: str) -> None:
    """A graph without a single transfer or operation, and one without a module."""
    world.world(0, 8)

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0

    with torch.no_grad():
        hierarchical_zero(Idle(), topology="2x2x2", codegen=False, dump=folder)(torch.ones(2, 8))


def test_an_empty_graph_has_its_dump(paper: Pool, tmp_path: Path) -> None:
    paper.run(nothing_gathered, str(tmp_path), timeout=TIMEOUT)
    (step,) = json.loads((tmp_path / "ledger.json").read_text())
    assert step["parameters"][0]["backward"] == "" and step["exposed"] == 0.0
    (data,), graphs = views.load(tmp_path, 1)
    assert [graph["stage"] for graph in graphs] == ["joint", "inference"]
    assert page.render([data], graphs).count("<script") > 8


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


def test_a_second_jobs_views_stand_beside_the_firsts(paper: Pool, tmp_path: Path) -> None:
    paper.run(two, str(tmp_path), "zero_topo", "0", timeout=TIMEOUT)
    paper.run(forgetful, str(tmp_path), timeout=TIMEOUT)
    assert {"ledger.json", "ledger.2.json", "report.html", "report.2.html", "rank0", "rank0.2"} <= {
        p.name for p in tmp_path.iterdir()
    }


def forgetful(_: int, folder: str) -> None:
    dump._places.clear()  # as another process would find it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        two(0, folder, "zero_topo", "0")


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


@pytest.mark.slow
def test_without_bokeh_the_rest_is_written(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, sys; real = u.find_spec; u.find_spec = lambda n, *a: None if n == 'bokeh' else real(n, *a);"
        "from zcompile.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["dump", "tiny", "--topology", "2x2x2", "--sequence", "4", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert "no report.html: it needs bokeh (pip install 'zcompile[report]')" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "rank0",
        "ledger.json",
        "ledger.txt",
        "trace.json",
        "dump.json.gz",
    }


def gradients(_: int, device: str) -> list[str]:
    world.world(0, 8)
    inputs, labels = torch.ones(4, 8, device=device), torch.zeros(4, dtype=torch.int64, device=device)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 5, device=device)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(torch.nn.functional.dropout(self.linear(x), 0.1), labels)

    model = hierarchical_zero(Loss(), topology="2x2x2", codegen=False, device="meta" if device == "meta" else None)
    model(inputs).backward()
    lines = zcompile.explain(model).program("backward").splitlines()
    return [line.split("  ")[0] for line in lines if "reduce>" in line or "mm(" in line or "nll_loss" in line]


def test_the_meta_device_has_the_gradients_of_any_other(paper: Pool) -> None:
    """Composite ops, as the cross entropy, would have none there; torch gives zeros, with a warning."""
    (meta,), (cpu,) = (paper.run(gradients, device, timeout=TIMEOUT) for device in ("meta", "cpu"))
    assert meta == cpu and any("nll_loss_backward" in name for name in meta)
