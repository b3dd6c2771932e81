"""The books of a dump: what of a step is counted how often, whose memory it is, and what becomes of a weight after the forward."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import paper as world
from support.commands import TIMEOUT
from support.paper import Block, Tiny
from support.spawn import Pool
from torch import Tensor, nn

import zcompile
from zcompile import Plan, Rule, cost, hierarchical_zero, ledger, paper
from zcompile.debug import chrome, page, tables
from zcompile.debug import views as dumps
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
    """(level, transfer, bytes by levels, hops and parameters, by the ledger) where they differ; (number, runs) of each; the tables."""
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
            if len({rows, hops, shares, *columns.values()}) > 1:
                wrong.append((level, transfer, rows, hops, shares, columns))
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
        "repr": repr(found)
    }  # fmt: skip


def test_explain_shows_a_model_that_was_compiled_without_a_dump(paper: Pool) -> None:
    (found,) = paper.run(explained, timeout=TIMEOUT)
    assert "blocks.1.{up,down}.weight" in found["text"] and "hops that were not hidden" in found["text"]
    assert "gather> all_gather(" in found["program"]
    assert found["html"].startswith("<iframe srcdoc=") and "graph 0 backward" in found["repr"]


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
    (data,), graphs = dumps.load(tmp_path, 1)
    assert [graph["stage"] for graph in graphs] == ["joint", "inference"]
    assert page.render([data], graphs).count("<script") > 8


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
