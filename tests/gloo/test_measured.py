"""A profiler's trace of real steps beside what was expected: every launch and wait is found, a foreign trace is no match and said to be."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import command
from support.marks import slow
from support.paper import Tiny
from support.spawn import Pool

from zcompile import hierarchical_zero
from zcompile.debug import matching, views
from zcompile.debug.matching import match
from zcompile.debug.profile import Event

Ranks = Callable[[int], Pool]
CPU = ("cpu", 1)
ROWS = {
    "kind": ["gather", "wait", "compute"],
    "operation": ["_c10d_functional.all_gather_into_tensor", "_c10d_functional.wait_tensor", "mm"],
    "name": ["g", "w", "m"], "partner": [1, 0, -1], "level": ["pair", "pair", ""], "parameters": [["p"], ["p"], []],
}  # fmt: skip


def profiled(rank: int, folder: str, codegen: bool, threads: bool = True) -> None:
    """Three steps with a dump; the last two of them under the profiler."""
    torch._dynamo.reset()
    from zcompile.backend import Compilation

    Compilation._numbers = itertools.count()
    torch.manual_seed(0)
    model = hierarchical_zero(
        Tiny(1 if codegen else 2, 64),
        topology="2x2",
        plan="zero_topo",
        codegen=codegen,
        overlap=1,
        dump=f"{folder}/dump",
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


@pytest.mark.parametrize("codegen", [False, slow(True)])
def test_a_real_trace_is_matched(ranks: Ranks, tmp_path: Path, codegen: bool) -> None:
    ranks(4).run(profiled, str(tmp_path), codegen, timeout=400.0)
    code, shown, error = command(0, "measured", str(tmp_path / "dump"), str(tmp_path / "trace.json.gz"), "--json", "-")
    (found,) = json.loads(shown)
    assert found["notes"] == [], found["notes"]
    assert code == 0 and error == "", "what Inductor has fused has no node: that is not little"
    assert found["matched_hops"] == found["hops"] > 0 and not found["little"]
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
        assert found["share"] > 0.5 and found["matched_operations"] / found["operations"] > 0.9
    page = (tmp_path / "dump" / "report.html").read_text()
    assert (tmp_path / "dump" / "measured.json").exists() and "measured" in page


def test_a_trace_of_something_else_is_said_to_match_nothing(ranks: Ranks, tmp_path: Path) -> None:
    ranks(4).run(profiled, str(tmp_path), False, False, timeout=400.0)
    (result,) = json.loads(
        command(0, "measured", str(tmp_path / "dump"), str(tmp_path / "trace.json.gz"), "--json", "-")[1]
    )
    assert result["share"] > 0.5 and [note.partition(":")[0] for note in result["notes"]] == [
        "no hop of a refresh is in the trace"
    ]
    raw = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    events = [event for event in raw["traceEvents"] if not str(event.get("name", "")).startswith("zc graph")]
    (tmp_path / "other.json").write_text(json.dumps({"traceEvents": events}))
    code, shown, error = command(0, "measured", str(tmp_path / "dump"), str(tmp_path / "other.json"))
    assert (
        code == 1
        and "LITTLE OR NOTHING WAS MATCHED (no graph of the dump is in the trace)" in error
        and "no run of graph 0 in the trace" in shown
    )
    swapped = [
        dict(event, name="_c10d_functional::wait_tensor") if "all_gather_into" in str(event.get("name")) else event
        for event in raw["traceEvents"]
    ]
    (tmp_path / "swapped.json").write_text(json.dumps({"traceEvents": swapped}))
    code, shown, error = command(0, "measured", str(tmp_path / "dump"), str(tmp_path / "swapped.json"))
    assert code == 1 and "LITTLE OR NOTHING WAS MATCHED (graph 0 forward, graph 0 backward)" in error
    assert "in another order: none is matched" in shown and "matched: 0 of " in shown


def test_what_is_no_trace_or_no_dump_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("{")
    assert command(0, "measured", str(tmp_path), str(tmp_path / "trace.json"))[0] == 2
    (tmp_path / "dump.json.gz").write_bytes(gzip.compress(b"[[], []]"))
    code, _, error = command(0, "measured", str(tmp_path), str(tmp_path / "trace.json"))
    assert code == 2 and "is no trace of torch.profiler" in error


def test_a_devices_kernel_is_the_time_of_its_hop() -> None:
    """Where messages are the device's (NCCL), a hop is its kernel's span, found by what links it to its launch."""
    step = {
        "number": 0, "parameters": [{"name": "p"}],
        "hops": [{"phase": "inference", "launch": 0, "parameters": ["p"], "bytes": 8, "wire": "bf16", "level": "pair"}],
    }  # fmt: skip
    events = [
        Event("zc graph 0 inference", "user_annotation", CPU, 0.0, 1.0),
        Event("_c10d_functional::all_gather_into_tensor", "cpu_op", CPU, 0.1, 0.2, 7),
        Event("_c10d_functional::wait_tensor", "cpu_op", CPU, 0.3, 0.4, 8),
        Event("ncclDevKernel_AllGather", "kernel", ("gpu", 20), 0.25, 0.9, 7),
        Event("aten::mm", "cpu_op", CPU, 0.5, 0.6, 9),
    ]
    found = match(events, step, {"inference": {"rows": ROWS}})
    at = found.spans["lane"].index("pair")
    assert (found.spans["begin"][at], found.spans["end"][at]) == (0.25, 0.9)
    assert (found.matched_hops, found.hops, found.matched_operations, found.operations) == (2, 2, 1, 1)


def dumped(folder: Path, numbers: int) -> None:
    """A dump of so many evaluations, each of a gather and a product."""
    steps, graphs = [], []
    for number in range(numbers):
        hop = {"phase": "inference", "launch": 0, "parameters": ["p"], "bytes": 8, "wire": "bf16", "level": "pair"}
        spans = {"kind": ["wait"], "hop": [0], "begin": [0.0], "end": [0.5]}
        steps.append({"number": number, "title": f"graph {number}", "parameters": [{"name": "p"}], "hops": [hop],
                      "levels": [{"level": "pair"}], "spans": spans})  # fmt: skip
        graphs.append({"step": number, "stage": "inference", "rows": ROWS})
    views.write(folder / "dump.json.gz", gzip.compress(json.dumps((steps, graphs)).encode()))


def ran(number: int, *calls: str) -> list[dict[str, object]]:
    """A run of a graph in the trace, with these calls in it."""
    common = {"ph": "X", "pid": "cpu", "tid": 1}
    start = 1e6 * number
    events = [{**common, "name": f"zc graph {number} inference", "cat": "user_annotation", "ts": start, "dur": 1e5}]
    for at, name in enumerate(calls):
        events.append({**common, "name": name, "cat": "cpu_op", "ts": start + 10 * at + 1, "dur": 5})
    return events


GATHER, WAIT = "_c10d_functional::all_gather_into_tensor", "_c10d_functional::wait_tensor"


@pytest.mark.parametrize(
    ("events", "code", "complaint"),
    [
        ([*ran(0, GATHER, WAIT, "aten::mm"), *ran(1, GATHER, WAIT, "aten::mm")], 0, ""),
        ([*ran(0, GATHER, WAIT, "fused")], 0, ""),  # the other one did not run: said, and no reason to be loud
        ([*ran(0, GATHER, WAIT, "aten::mm"), *ran(1, WAIT, GATHER)], 1, "NOTHING WAS MATCHED (graph 1)"),
        ([], 1, "no graph of the dump is in the trace"),
    ],
)
def test_it_is_loud_where_hops_are_not_the_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[object], code: int, complaint: str
) -> None:
    """One compilation that is matched does not hide another that is not."""
    dumped(tmp_path, 2)
    monkeypatch.setattr(views, "has_bokeh", lambda: False)
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found, shown, error = command(0, "measured", str(tmp_path), str(tmp_path / "trace.json"))
    assert found == code and complaint in error and bool(error) == bool(complaint)
    if events:
        assert "matched: 2 of 2 launches and waits" in shown


@pytest.mark.parametrize("where", ["dump", "json"])
def test_what_cannot_be_written_is_no_match_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    dumped(tmp_path, 1)
    monkeypatch.setattr(views, "has_bokeh", lambda: False)
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": ran(0, GATHER, WAIT)}))
    if where == "dump":

        def read_only(*args: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(views, "write", read_only)
    more = () if where == "dump" else ("--json", str(tmp_path / "none" / "x.json"))
    code, _, error = command(0, "measured", str(tmp_path), str(tmp_path / "trace.json"), *more)
    assert code == 2 and "cannot be written" in error and "Traceback" not in error


def test_operations_are_matched_in_order_and_not_far_ahead() -> None:
    assert matching._in_order(["a", "b", "b", "c"], ["a", "x", "b", "c"]) == [(0, 0), (1, 2), (3, 3)]
    assert matching._in_order(["b", "a"], ["a", *["x"] * 200, "b", "a"]) == [(1, 0)], (
        "else one stray name would lose all that follow"
    )
