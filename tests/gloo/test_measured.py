"""A profiler's trace of real steps beside what was expected: every launch and wait is found, a foreign trace is no match and said to be."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.paper import Tiny
from support.spawn import Pool

from zcompile import hierarchical_zero
from zcompile.cli import main
from zcompile.debug import measured

Ranks = Callable[[int], Pool]


def profiled(rank: int, folder: str, codegen: bool, threads: bool = True) -> None:
    """Three steps with a dump; the last two of them under the profiler."""
    torch._dynamo.reset()
    from zcompile.backend import Compilation

    Compilation._numbers = itertools.count()
    torch.manual_seed(0)
    model = hierarchical_zero(
        Tiny(2, 64), topology="2x2", plan="zero_topo", codegen=codegen, overlap=1, dump=f"{folder}/dump"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(64, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True) if threads else None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=everywhere
    ) as profile:
        step()
        step()
    if rank == 0:
        profile.export_chrome_trace(f"{folder}/trace.json.gz")


def command(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("codegen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_real_trace_is_matched(ranks: Ranks, tmp_path: Path, codegen: bool) -> None:
    ranks(4).run(profiled, str(tmp_path), codegen, timeout=400.0)
    code, shown, error = command("measured", str(tmp_path / "dump"), str(tmp_path / "trace.json.gz"), "--json", "-")
    (found,) = json.loads(shown)
    assert found["notes"] == [], found["notes"]
    assert code == (0 if found["share"] >= measured.LITTLE else 1), error
    (step,) = json.loads((tmp_path / "dump" / "ledger.json").read_text())
    spans = found["spans"]
    carried = {hop for hop, lane in zip(spans["hop"], spans["lane"], strict=True) if lane != "compute"}
    assert carried == set(range(len(step["hops"]))), "every hop has its measured span, refreshes too"
    assert all(0 <= begin <= end for begin, end in zip(spans["begin"], spans["end"], strict=True))
    launched = [
        (spans["begin"][i], spans["row"][i])
        for i, lane in enumerate(spans["lane"])
        if lane != "compute" and spans["phase"][i] == "backward"
    ]
    assert [row for _, row in sorted(launched)] == sorted(row for _, row in launched), "in the graph's order"
    if not codegen:
        assert found["share"] > 0.5 and found["matched"] / found["nodes"] > 0.9
    page = (tmp_path / "dump" / "report.html").read_text()
    assert (tmp_path / "dump" / "measured.json").exists() and "measured" in page


def test_a_trace_of_something_else_is_said_to_match_nothing(ranks: Ranks, tmp_path: Path) -> None:
    ranks(4).run(profiled, str(tmp_path), False, False, timeout=400.0)
    (result,) = json.loads(
        command("measured", str(tmp_path / "dump"), str(tmp_path / "trace.json.gz"), "--json", "-")[1]
    )
    assert result["share"] > 0.5 and [note.partition(":")[0] for note in result["notes"]] == [
        "no hop of a refresh is in the trace"
    ]
    raw = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    events = [event for event in raw["traceEvents"] if not str(event.get("name", "")).startswith("zc graph")]
    (tmp_path / "other.json").write_text(json.dumps({"traceEvents": events}))
    code, shown, error = command("measured", str(tmp_path / "dump"), str(tmp_path / "other.json"))
    assert (
        code == 1
        and "LITTLE OR NOTHING WAS MATCHED (0 % of the graphs' time)" in error
        and "no run of graph 0 in the trace" in shown
    )
    swapped = [
        dict(event, name="_c10d_functional::wait_tensor") if "all_gather_into" in str(event.get("name")) else event
        for event in raw["traceEvents"]
    ]
    (tmp_path / "swapped.json").write_text(json.dumps({"traceEvents": swapped}))
    _, shown, _ = command("measured", str(tmp_path / "dump"), str(tmp_path / "swapped.json"))
    assert "in another order: none is matched" in shown


def test_what_is_no_trace_or_no_dump_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("{")
    assert command("measured", str(tmp_path), str(tmp_path / "trace.json"))[0] == 2
    (tmp_path / "dump.json.gz").write_bytes(gzip.compress(b"[[], []]"))
    code, _, error = command("measured", str(tmp_path), str(tmp_path / "trace.json"))
    assert code == 2 and "is no trace of torch.profiler" in error


def test_a_devices_kernel_is_the_time_of_its_hop() -> None:
    """Where messages are the device's (NCCL), a hop is its kernel's span, found by what links it to its launch."""
    rows = {
        "kind": ["gather", "wait", "compute"],
        "operation": ["_c10d_functional.all_gather_into_tensor", "_c10d_functional.wait_tensor", "mm"],
        "name": ["g", "w", "m"], "partner": [1, 0, -1], "level": ["pair", "pair", ""], "parameters": [["p"], ["p"], []],
    }  # fmt: skip
    step = {
        "number": 0, "parameters": [{"name": "p"}],
        "hops": [{"phase": "inference", "launch": 0, "parameters": ["p"], "bytes": 8, "wire": "bf16", "level": "pair"}],
    }  # fmt: skip
    cpu = ("cpu", 1)
    events = [
        measured.Event("zc graph 0 inference", "user_annotation", cpu, 0.0, 1.0),
        measured.Event("_c10d_functional::all_gather_into_tensor", "cpu_op", cpu, 0.1, 0.2, 7),
        measured.Event("_c10d_functional::wait_tensor", "cpu_op", cpu, 0.3, 0.4, 8),
        measured.Event("ncclDevKernel_AllGather", "kernel", ("gpu", 20), 0.25, 0.9, 7),
        measured.Event("aten::mm", "cpu_op", cpu, 0.5, 0.6, 9),
    ]
    found = measured.match(events, step, {"inference": {"rows": rows}})
    at = found.spans["lane"].index("pair")
    assert (found.spans["begin"][at], found.spans["end"][at], found.matched) == (0.25, 0.9, 3)


def test_operations_are_matched_in_order_and_not_far_ahead() -> None:
    assert measured._in_order(["a", "b", "b", "c"], ["a", "x", "b", "c"]) == [(0, 0), (1, 2), (3, 3)]
    assert measured._in_order(["b", "a"], ["a", *["x"] * 200, "b", "a"]) == [(1, 0)], (
        "else one stray name would lose all that follow"
    )
