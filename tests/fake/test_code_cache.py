"""Through Inductor: a warm cache equals a cold one, any other plan misses it, and the order in the graph is that of the code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import paper as world
from support.patches import replaced
from support.spawn import Pool, RanksFailed

from zcompile import Plan, Rule, ledger, passes
from zcompile._torch_compat import generated_code
from zcompile.passes import pin
from zcompile.passes.nodes import ALL_GATHER, WAIT, find

pytestmark = pytest.mark.slow


class Generates(BaseException):
    """Raised where Inductor would generate code. Nobody between there and the test catches it."""


def counts() -> dict[str, int]:
    from torch._dynamo.utils import counters

    found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
    counters.clear()
    return found


def job(_: int, cache: str, dump: str) -> dict[str, Any]:
    """A step of Tiny with generated code; everything there is to know of it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    counts()
    checked: list[list[str]] = []
    check = pin.check_code

    def counted(source: str, expected: list[str]) -> None:
        check(source, expected)
        checked.append(expected)

    printed = io.StringIO()
    with replaced(pin, "check_code", counted), contextlib.redirect_stderr(printed):
        model = world.wrapped(codegen=True, dump=dump)
        world.step(model)
    root = Path(dump, "rank0")
    texts = {str(p.relative_to(root)): p.read_text() for p in root.rglob("*.txt") if p.name != "times.txt"}
    return {
        "counts": counts(),
        "ledger": ledger(model),
        "lists": [[e.identity for e in program.collectives] for program in model.zero.programs],
        "dump": texts,
        "sources": [generated_code(program._code) for program in model.zero.programs],
        "checked": checked,
        "origin": [program.code for program in model.zero.programs],
        "seconds": [program.seconds["codegen"] for program in model.zero.programs],
        "report": model.zero.compile_report(),
        "printed": printed.getvalue(),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="module")
def cold(paper: Pool, cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return paper.run(job, cache, str(tmp_path_factory.mktemp("cold")), timeout=300)[0]


def test_invariant_5_a_warm_cache_equals_a_cold_one(cold: dict[str, Any], cache: str, tmp_path: Path) -> None:
    pool = Pool(1, backend=None)  # another process: nothing is warm but the folder
    try:
        (warm,) = pool.run(job, cache, str(tmp_path), timeout=300)
    finally:
        pool.close()
    assert cold["counts"] == {"hit": 0, "miss": 2, "bypass": 0}
    assert warm["counts"] == {"hit": 2, "miss": 0, "bypass": 0}
    assert cold["origin"] == ["generated"] * 2 and warm["origin"] == ["loaded"] * 2
    for part in ("ledger", "lists", "dump", "sources", "checked"):
        assert warm[part] == cold[part], part
    assert [len(entries) for entries in cold["lists"]] == [3, 12]
    assert len(cold["dump"]) == 20


OTHER: dict[str, Any] = {
    "weights": Plan("whole", "node", "world"),
    "gradients": Plan("pair", "pair", "world"),
    "optimizer": Plan("pair", "node", "node"),
    "gather": Plan(gather="bf16"),
    "reduce": Plan(reduce="bf16", sync="fp32"),
    "sync": Plan(sync="bf16"),
    "refresh": Plan(refresh="bf16"),
    "back": Plan(back="bf16"),
    "full_refresh_every": Plan(full_refresh_every=3),
    "error_feedback": Plan(error_feedback=0.5),
    "peer_gather": Plan(peer_gather=True),
    "rules": Plan(rules=(Rule("*", max_elements=8, weights="whole", gradients="whole"),)),
    "bucket_bytes": Plan(bucket_bytes=64),
    "name": Plan(name="another name"),
}


def lookup(_: int, cache: str, plan: Plan | str, topology: str = "2x2x2") -> dict[str, int]:
    """Only looks the forward up: stops where code would be generated."""
    from torch._inductor import compile_fx

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Generates

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    counts()
    try:
        with replaced(compile_fx, "fx_codegen_and_compile", stop):
            model = world.wrapped(plan=plan, codegen=True, topology=topology)
            model(torch.ones(4, 8))
    except Generates:
        pass
    return counts()


def test_invariant_5_every_field_of_a_plan_has_its_case() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(Plan)}


def test_invariant_5_changing_any_field_of_the_plan_misses(paper: Pool, cold: dict[str, Any], cache: str) -> None:
    assert paper.run(lookup, cache, "zero_topo") == [{"hit": 1, "miss": 0, "bypass": 0}], (
        "the plan of the cold run hits"
    )
    for field, plan in OTHER.items():
        assert paper.run(lookup, cache, plan) == [{"hit": 0, "miss": 1, "bypass": 0}], field
    assert paper.run(lookup, cache, "zero_topo", "2x4") == [{"hit": 0, "miss": 1, "bypass": 0}]


def test_invariant_6_no_semantic_op_is_left_in_the_generated_code(cold: dict[str, Any]) -> None:
    for source in cold["sources"]:
        assert "_c10d_functional.all_gather_into_tensor" in source
        assert "torch.ops.zcompile" not in source


def calls(source: str) -> dict[int, str]:
    """Number and text of the lines that launch or wait, in the simplest reading: not with the pass's own eyes."""
    code = {number: line.split("#")[0] for number, line in enumerate(source.splitlines())}
    return {n: line for n, line in code.items() if "torch.ops._c10d_functional." in line and ".default(" in line}


def test_invariant_7_the_order_in_the_generated_code_is_the_pinned_order(cold: dict[str, Any]) -> None:
    assert len(cold["checked"]) == 2, "check_code ran for the forward and for the backward"
    for source, order in zip(cold["sources"], cold["checked"], strict=True):
        found = calls(source).values()
        assert len(found) == len(order) > 0
        for call, expected in zip(found, order, strict=True):
            op, _, role = expected.partition(" ")
            assert f"_c10d_functional.{op}" in call and role in call


def test_invariant_7_swapped_lines_of_real_code_are_refused(cold: dict[str, Any]) -> None:
    lines = cold["sources"][1].splitlines()
    launches = {number: line for number, line in calls(cold["sources"][1]).items() if "wait" not in line}
    gather, reduce = (next(n for n, line in launches.items() if what in line) for what in ("all_gather", "all_to_all"))
    lines[gather], lines[reduce] = lines[reduce], lines[gather]
    with pytest.raises(AssertionError, match="departs from the graph's order at collective 0"):
        pin.check_code("\n".join(lines), cold["checked"][1])


def test_compile_times_are_recorded_and_reported(cold: dict[str, Any]) -> None:
    assert all(seconds > 0 for seconds in cold["seconds"])
    rows = [line.split() for line in cold["report"].splitlines()]
    assert [row[3] for row in rows[1:3]] == ["generated", "generated"]
    assert float(rows[1][-1]) == pytest.approx(cold["seconds"][0], abs=0.01)
    for stage in ("forward", "backward"):
        assert re.search(rf"zcompile: graph 0 {stage}: code generated in \d+\.\d s, passes \d+\.\d s", cold["printed"])


def early(gm: Any, context: Any) -> None:
    """Launch every gather of a forward as early as its input is there: a prefetch as far as it goes."""
    if context.stage == "forward":
        for node in find(gm.graph, ALL_GATHER):
            source = node
            chain = []
            while source.op != "placeholder":
                chain.append(source)
                source = source.all_input_nodes[0]
            last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
            launched = [n for n in find(gm.graph, ALL_GATHER, WAIT) if n in chain]
            assert launched
            anchor = getattr(gm, "_anchor", last)
            for link in reversed(chain):
                anchor.append(link)
                anchor = link
            gm._anchor = anchor


EARLY = SimpleNamespace(NAME="early", run=early, check=lambda gm, context: None)


def prefetched(_: int, cache: str, keep: bool) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    bucket, lower, *rest = passes.LOWERED
    patches = pin.PATCHES if keep else {"reorder_for_peak_memory": True}
    with replaced(passes, "LOWERED", (bucket, lower, EARLY, *rest)), replaced(pin, "PATCHES", patches):
        model = world.wrapped(codegen=True, plan="zero3", blocks=2, overlap=0)
        model(torch.ones(4, 8))


def test_pitfall_inductor_moves_gathers_for_peak_memory_unless_it_is_told_not_to(paper: Pool, cache: str) -> None:
    paper.run(prefetched, cache, True, timeout=300)
    with pytest.raises(RanksFailed, match="generated code departs from the graph's order"):
        paper.run(prefetched, cache, False, timeout=300)
