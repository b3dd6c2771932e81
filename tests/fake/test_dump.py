"""The dump as files: earlier jobs' are kept, several graphs stand side by side, and no trouble in it is the job's trouble."""

from __future__ import annotations

import errno
import gc
import json
import os
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import paper as world
from support.graphs import Hand, targets, unit
from support.spawn import Pool

from zcompile import wording
from zcompile.backend import hierarchical_zero_backend
from zcompile.debug import dump as files
from zcompile.debug import text
from zcompile.debug.dump import Dump
from zcompile.passes import LOWERED, runner
from zcompile.passes.nodes import ALL_GATHER, aten


def test_bytes_for_people() -> None:
    shown = [wording.size(count) for count in (0, 384, 999, 1000, 1_578_000, 25_000_000_000, 999_999)]
    assert shown == ["0 B", "384 B", "999 B", "1.00 kB", "1.58 MB", "25.0 GB", "1.00 MB"]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.weight"], "a.weight"),
        (["blocks.0.qkv.weight", "blocks.0.proj.weight"], "blocks.0.{qkv,proj}.weight"),
        (["0.weight", "0.bias", "1.weight"], "0.{weight,bias} 1.weight"),
        (["up", "down"], "up down"),
        (["a.x", "b.x", "b.y"], "{a,b}.x b.y"),
    ],
)
def test_parameter_names_are_folded(names: list[str], folded: str) -> None:
    assert wording.fold(names) == folded


def test_the_source_is_the_users_line_and_not_torchs_or_ours() -> None:
    hand = Hand("forward")
    node = hand.input("x", 4)
    inside = os.path.join(os.path.dirname(torch.__file__), "nn", "modules", "linear.py")
    node.meta["stack_trace"] = (
        f'File "/home/me/gpt.py", line 38, in forward\n  x\nFile "{inside}", line 9, in forward\n'
    )
    assert text.source(node) == "gpt.py:38"
    node.meta["stack_trace"] += f'File "{text.__file__}", line 1, in get\n'
    assert text.source(node) == "gpt.py:38"
    assert text.source(hand.input("y", 4)) == ""


def lowered() -> Hand:
    hand = Hand("forward")
    (w,) = unit({"w": (8, 8)})
    hand.output(hand.call(aten.mul.Tensor, hand.gather(w, hand.copy(w)), 2.0))
    hand.run(*LOWERED)
    return hand


def observe(place: str, number: int = 0, rank: int = 0) -> Dump:
    hand, made = lowered(), Dump(place, rank, number)
    for name in ("input", "lower"):
        made.observe(hand.gm, hand.context, name)
    made.finish(hand.context)
    return made


def tree(folder: Path) -> set[str]:
    found = (path.relative_to(folder).parts for path in folder.rglob("*.txt"))
    return {f"{parts[0]}/{parts[-2]}" for parts in found if len(parts) > 1}


def test_an_earlier_jobs_dump_is_kept_and_a_warning_says_where_the_new_one_is(tmp_path: Path) -> None:
    observe(str(tmp_path))
    observe(str(tmp_path), number=1)
    old = (tmp_path / "rank0" / "graph0.forward" / "00-input.txt").read_text()
    files._places.clear()  # as another process would find it
    with pytest.warns(UserWarning, match=r"holds another job's dump; this job's is in .*rank0\.2"):
        observe(str(tmp_path))
    observe(str(tmp_path), rank=3)
    assert tree(tmp_path) == {
        "rank0/graph0.forward",
        "rank0/graph1.forward",
        "rank0.2/graph0.forward",
        "rank3/graph0.forward",
    }
    assert (tmp_path / "rank0" / "graph0.forward" / "00-input.txt").read_text() == old


def test_a_stage_that_is_compiled_again_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    made, hand = observe(str(tmp_path)), lowered()
    made.observe(hand.gm, hand.context, "input")
    assert tree(tmp_path) == {"rank0/graph0.forward", "rank0/graph0.forward.2"}


def test_a_dump_keeps_no_graph_that_has_been_through_the_passes() -> None:
    """It lives as long as the model's code does; a graph has the tensors of its nodes."""
    hand, made = lowered(), Dump("", 0, 0)
    for name in ("input", "lower"):
        made.observe(hand.gm, hand.context, name)
    node = weakref.ref(next(iter(hand.gm.graph.nodes)))
    made.observe(hand.gm, hand.context, "verify")
    made.finish(hand.context)
    assert made.step is not None and made.step.records["forward"].rows
    del hand
    gc.collect()
    assert node() is None


def test_a_pass_that_failed_leaves_the_graph_it_left(tmp_path: Path) -> None:
    hand, made = lowered(), Dump(str(tmp_path), 0, 0)
    (wait,) = targets(hand.gm, ALL_GATHER)[0].users
    wait.replace_all_uses_with(wait.args[0])
    from zcompile.passes import verify

    with pytest.raises(runner.PassError):
        runner.run(hand.gm, [verify], hand.context, made.observe)
    shown = (tmp_path / "rank0" / "graph0.forward" / "01-verify.failed.txt").read_text()
    assert "gather> all_gather(view_2) over pair: 128 B fp32 of w" in shown


@pytest.mark.parametrize("trouble", ["a file is in the way", "read-only", "full disk", "a graph it cannot read"])
def test_trouble_in_the_dump_is_one_warning(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "dump"
    if trouble == "a file is in the way":
        place.write_text("")
    elif trouble in ("read-only", "full disk"):
        number, where = (errno.EROFS, "mkdir") if trouble == "read-only" else (errno.ENOSPC, "write_text")

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, where, refuse)
    else:
        monkeypatch.setattr(text, "lines", lambda *args: 1 / 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observe(str(place))
    assert [str(w.message).split(":")[1] for w in caught] == [f" no further dump of graph 0 to '{place}'"]


def unwritable(_: int, folder: str) -> float:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = world.wrapped(dump=folder)
        world.step(model)
    assert any("no further dump of graph 0" in str(w.message) for w in caught)
    return float(next(model.parameters()).grad.to_local().sum())


def test_a_job_whose_dump_cannot_be_written_trains_on(paper: Pool, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    paper.run(unwritable, str(tmp_path / "taken"), timeout=300)


def by_environment(_: int, folder: str) -> list[str]:
    os.environ["ZCOMPILE_DUMP"] = folder
    try:
        world.step(world.wrapped())
    finally:
        del os.environ["ZCOMPILE_DUMP"]
    return sorted(path.name for path in Path(folder, "rank0").iterdir())


def test_the_environment_variable_asks_for_a_dump_too(paper: Pool, tmp_path: Path) -> None:
    (found,) = paper.run(by_environment, str(tmp_path), timeout=300)
    assert found == ["graph0.backward", "graph0.forward", "graph0.joint"]


def second_door(_: int, folder: str) -> list[str]:
    model = torch.compile(
        world.wrapped(compile=False), backend=hierarchical_zero_backend, options={"codegen": False, "dump": folder}
    )
    world.step(model)
    with torch.no_grad():
        model(torch.ones(4, 8))
    return sorted(path.name for path in Path(folder, "rank0").iterdir())


def test_the_option_of_torch_compile_asks_for_it_and_each_graph_has_its_folder(paper: Pool, tmp_path: Path) -> None:
    (found,) = paper.run(second_door, str(tmp_path), timeout=300)
    assert found == ["graph0.backward", "graph0.forward", "graph0.joint", "graph1.inference", "graph1.joint"]


def report(_: int) -> str:
    model = world.wrapped()
    world.step(model)
    return str(model.zero.compile_report())


def test_the_compile_report_has_a_line_a_graph_and_a_total(paper: Pool) -> None:
    (shown,) = paper.run(report, timeout=300)
    rows = [line.split() for line in shown.splitlines()]
    assert rows[0][:2] == ["graph", "code"]
    assert [row[:6] for row in rows[1:3]] == [
        ["graph", "0", "forward", "interpreted", "3", "5"],
        ["graph", "0", "backward", "interpreted", "13", "5"],
    ]
    assert rows[3][:3] == ["total", "2", "interpreted"]


@pytest.mark.slow
def test_a_graph_of_ten_thousand_nodes_has_its_dump_after_every_pass(tmp_path: Path) -> None:
    """A difference of two such programs, a page and a trace of them: quadratic code would take minutes."""
    hand = Hand("forward")
    specs = [unit({"w": (8, 8)}, unit=f"u{i}")[0] for i in range(250)]
    specs = [replace(spec, name=f"w{i}") for i, spec in enumerate(specs)]
    copies = [hand.copy(spec) for spec in specs]
    x = hand.input("x", 8, 8)
    for spec, copy in zip(specs, copies, strict=True):
        x = hand.call(aten.mm.default, x, hand.gather(spec, copy))
        for _ in range(30):
            x = hand.call(aten.add.Tensor, x, 1.0)
    hand.output(x)
    made = Dump(str(tmp_path), 0, 0, specs, [spec.name for spec in specs])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.run(hand.gm, LOWERED, hand.context, made.observe)
        made.finish(hand.context)
    assert len(hand.gm.graph.nodes) > 10_000
    programs = sorted(path.name for path in (tmp_path / "rank0" / "graph0.forward").glob("[0-9]*.txt"))
    assert [name.split("-")[1] for name in programs] == ["input.txt", *(f"{each.NAME}.txt" for each in LOWERED)]
    assert len((tmp_path / "rank0" / "graph0.forward" / programs[-1]).read_text().splitlines()) > 10_000
    (step,) = json.loads((tmp_path / "ledger.json").read_text())
    assert len(step["parameters"]) == 250 and all(row["bytes"]["gather forward"]["pair"] for row in step["parameters"])
    assert (tmp_path / "report.html").stat().st_size > 10**6 and json.loads((tmp_path / "trace.json").read_text())
