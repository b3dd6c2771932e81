"""The books of a dump: what of a step is counted how often, whose memory it is, and what becomes of a weight after the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.paper import Block, Tiny
from support.spawn import Pool
from torch import Tensor, nn

from zcompile import Plan, cost, ledger, paper
from zcompile.debug import chrome, page, tables
from zcompile.debug.dump import collecting
from zcompile.timeline import OWNERS
from zcompile.topology import Topology


class Broken(nn.Module):
    """Two graphs; both read the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(8), Block(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.first(x))
        torch._dynamo.graph_break()
        out: Tensor = self.head(self.second(x))
        return out


def half_frozen() -> nn.Module:
    model = Tiny(2)
    model.blocks[0].requires_grad_(False)
    return model


def dumped(make: Any, plan: Any = "zero_topo", micro_batches: int = 1, backward: bool = True,
           **settings: Any) -> tuple[Any, list[Any]]:  # fmt: skip
    """The wrapped model after a step on paper, and its compilations."""
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()
    with collecting() as steps:
        model = paper.dump(
            make(), torch.ones(4, 8), Topology.parse("2x2x2"), plan, 0, micro_batches, backward, **settings
        )
    for step in steps:
        step.count()
    return model, steps


def added_up(_: int, kind: str, micro_batches: int) -> tuple[list[Any], list[tuple[int, int]], str]:
    """(level, transfer, bytes by the dump, by the ledger) where they differ; (number, runs) of the compilations; the tables."""
    model, steps = dumped(Broken if kind == "broken" else Tiny, "zero_topo", micro_batches)
    books, found = ledger(model)["levels"], [step.as_dict() for step in steps]
    wrong = []
    for level, transfers in books.items():
        for transfer, columns in transfers.items():
            rows = sum(row["bytes"][transfer] for step in found for row in step["levels"] if row["level"] == level)
            hops = sum(hop["bytes"] * hop["runs"] for step in found for hop in step["hops"]
                       if hop["level"] == level and hop["transfer"].replace("back", "sync") == transfer)  # fmt: skip
            shares = sum(by.get(level, 0) for step in found for row in step["parameters"]
                         for key, by in row["bytes"].items() if key.split()[0] == transfer)  # fmt: skip
            if not rows == hops == shares == columns["counted"]:
                wrong.append((level, transfer, rows, hops, shares, columns["counted"]))
    for step in found:
        assert sum(row["exposed"] for row in step["levels"]) == pytest.approx(step["exposed"])
        assert sum(row["exposed"] for row in step["parameters"]) == pytest.approx(step["exposed"])
        assert step["computing"] + step["exposed"] == pytest.approx(step["seconds"])
    return wrong, [(step.number - steps[0].number, step.runs) for step in steps], tables.as_text(found)


@pytest.mark.parametrize(
    ("kind", "micro_batches", "runs"),
    [
        ("whole", 1, [(0, 1)]),
        ("whole", 2, [(0, 1), (1, 1)]),
        ("whole", 5, [(0, 4), (1, 1)]),
        ("broken", 3, [(0, 2), (1, 2), (2, 1), (3, 1)]),
    ],
)
def test_compilations_add_up_to_the_step(
    paper: Pool, kind: str, micro_batches: int, runs: list[tuple[int, int]]
) -> None:
    """What repeats is counted as often as it runs, the refresh once, however many graphs there are."""
    (found,) = paper.run(added_up, kind, micro_batches, timeout=300)
    assert found[0] == [] and found[1] == runs
    assert (" backward, 4 times: " in found[2]) == (micro_batches == 5)


def further(_: int) -> tuple[float, ...]:
    (_, (once, _)), (_, (often, _)) = dumped(Tiny, micro_batches=2), dumped(Tiny, micro_batches=4)
    one, three = once.as_dict()["seconds"], often.as_dict()["seconds"]
    return one, three, often._further.finish().seconds


def test_further_runs_do_not_wait_for_refreshes(paper: Pool) -> None:
    ((one, three, again),) = paper.run(further, timeout=300)
    assert again < one and three == pytest.approx(one + 2 * again)


def frozen(_: int) -> dict[str, Any]:
    model, (step,) = dumped(half_frozen)
    engine, book = model.zero, step.as_dict()
    specs = [slot.spec for slot in engine.slots]
    trained = [spec for spec in specs if not spec.name.startswith("blocks.0")]
    refreshed: dict[str, int] = {}
    for spec in trained:
        for (level, _), amount in cost.transfer_bytes(spec, "refresh").items():
            refreshed[level] = refreshed.get(level, 0) + amount
    return {
        "refreshed": refreshed,
        "rows": {row["level"]: row["bytes"]["refresh"] for row in book["levels"] if row["bytes"]["refresh"]},
        "weights": step.timeline.memory[0].bytes["weights"],
        "expected": sum(engine.memory()[key] for key in ("master", "copy")) + sum(8 * spec.layout.shard for spec in trained),
        "peak": book["memory"]["owners"]["weights"],
    }  # fmt: skip


def test_frozen_parameters_have_no_refresh_and_no_moments(paper: Pool) -> None:
    (found,) = paper.run(frozen, timeout=300)
    assert found["rows"] == found["refreshed"] and found["rows"]
    assert found["weights"] == found["expected"] == found["peak"]


def main_gradients(_: int) -> tuple[list[int], int]:
    model, steps = dumped(Tiny, micro_batches=2)
    mains = [min(memory.bytes.get("gradients", 0) for memory in step.timeline.memory) for step in steps]
    (single,) = dumped(Tiny)[1]
    return [*mains, min(memory.bytes.get("gradients", 0) for memory in single.timeline.memory)], sum(
        4 * slot.spec.layout.width(slot.spec.g) for slot in model.zero.slots
    )


def test_main_gradients_are_in_memory_while_micro_batches_add_up(paper: Pool) -> None:
    (((accumulating, synchronising, single), mains),) = paper.run(main_gradients, timeout=300)
    assert mains > 0 and (accumulating, synchronising, single) == (mains, mains, 0)


def fates(_: int, plan: str, keep: int) -> dict[str, str]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.unused = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x).relu())
            return out

    (step,) = dumped(Net, plan, keep=keep)[1]
    return {row["name"]: row["backward"] for row in step.parameters()}


@pytest.mark.parametrize(
    ("plan", "keep", "expected"),
    [
        ("zero3", 0, {"last.weight": "gathered again", "first.bias": "not needed", "unused.weight": "not read"}),
        ("zero3", 10**6, {"last.weight": "kept", "unused.weight": "not read"}),
        ("ddp", 0, {"last.weight": "whole", "first.bias": "whole", "unused.weight": "not read"}),
    ],
)
def test_what_becomes_of_a_weight_after_the_forward(
    paper: Pool, plan: str, keep: int, expected: dict[str, str]
) -> None:
    (found,) = paper.run(fates, plan, keep, timeout=300)
    assert {name: found[name] for name in expected} == expected


def evaluated(_: int) -> list[tuple[str, str, int]]:
    (step,) = dumped(lambda: Tiny(2, 8), Plan.preset("zeropp"), backward=False)[1]
    rows = step.records["inference"].rows
    return [
        (hop["waiting"], rows[hop["wait"]].kind if hop["wait"] >= 0 else "", hop["exposed"] > 0)
        for hop in step.hops() if hop["phase"] == "refresh"
    ]  # fmt: skip


def test_a_refresh_that_an_evaluation_waits_for_has_its_line(paper: Pool) -> None:
    (found,) = paper.run(evaluated, timeout=300)
    waited = [each for each in found if each[2]]
    assert waited and all(each == ("inference", "wait", True) for each in waited)


def viewed(_: int) -> dict[str, Any]:
    """The trace, the page's data and the books of one step."""
    model, steps = dumped(half_frozen, micro_batches=2)
    step = steps[-1]
    return {
        "trace": chrome.trace([step]), "page": page.step_data(step), "book": step.as_dict(), "memory": ledger(model)["memory"],
        "moments": sum(8 * slot.spec.layout.shard for slot in model.zero.slots if slot.name in model.zero.trained),
        "mains": sum(4 * slot.spec.layout.width(slot.spec.g) for slot in model.zero.slots if slot.name in model.zero.trained),
    }  # fmt: skip


@pytest.fixture(scope="module")
def views(paper: Pool) -> dict[str, Any]:
    found: dict[str, Any] = paper.run(viewed, timeout=300)[0]
    return found


def test_the_trace_names_its_processes_and_threads(views: dict[str, Any]) -> None:
    events = views["trace"]["traceEvents"]
    (process,) = (event for event in events if event["name"] == "process_name")
    assert process["args"]["name"].endswith("zero_topo on 2x2x2, as expected of one generic")
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads == {0: "compute", 1: "pair links", 2: "node links", 3: "cluster links"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in events} == {process["pid"]} and {span["tid"] for span in spans} == set(threads)


def test_the_bytes_of_the_trace_and_of_the_page_are_the_ledgers(views: dict[str, Any]) -> None:
    hops = [event for event in views["trace"]["traceEvents"] if event["ph"] == "X" and event["tid"] > 0]
    columns = views["page"]["spans"]
    for row in views["book"]["levels"]:
        level, expected = row["level"], sum(row["bytes"].values())
        assert expected > 0
        assert sum(hop["args"]["bytes"] for hop in hops if hop["args"]["level"] == level) == expected
        drawn = sum(amount for lane, amount in zip(columns["lane"], columns["bytes"], strict=True) if lane == level)
        assert drawn == expected


def test_the_memory_of_every_view_is_what_the_ledger_holds(views: dict[str, Any]) -> None:
    """Model state: what the engine keeps, and the moments that an optimizer will."""
    kept, book = views["memory"], views["book"]["memory"]
    weights = kept["master"] + kept["copy"] + kept["image"] + kept["feedback"] + views["moments"]
    counters = [event["args"] for event in views["trace"]["traceEvents"] if event["ph"] == "C"]
    owners = views["page"]["owners"]
    assert book["owners"]["weights"] == weights
    assert {each["weights"] for each in counters} == set(owners["weights"]) == {weights}
    assert min(each["gradients"] for each in counters) == min(owners["gradients"]) == views["mains"]
    totals = [sum(each.values()) for each in counters]
    drawn = [sum(owners[owner][i] for owner in OWNERS) for i in range(len(owners["at"]))]
    assert max(totals) == max(drawn) == book["peak"] == sum(book["owners"].values())
