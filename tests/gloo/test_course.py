"""Ranks ask one another before a graph only where it is not the one that all of them expect (zcompile.course)."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.listed import SWAP, batch, wrapped
from support.patches import replaced
from support.spawn import Pool, RanksFailed

from zcompile import course, passes
from zcompile.agreement import AgreementError
from zcompile.faults import watch

Ranks = Callable[[int], Pool]


def exchanges(rank: int) -> dict[str, int]:
    """How often the ranks exchange words in some steps, one after another."""
    model, _ = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = model.zero.runtime.watch
    found: dict[str, int] = {}

    def step(name: str, rows: int = 4, micro: int = 1) -> None:
        before = watch.exchanges
        for number in range(micro):
            model.set_requires_gradient_sync(number == micro - 1)
            model(batch(rank, number, rows)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found[name] = watch.exchanges - before

    def evaluate(name: str) -> None:
        before = watch.exchanges
        with torch.no_grad():
            model(batch(rank, 9))
        found[name] = watch.exchanges - before

    step("the first")
    step("the second")
    evaluate("an evaluation")
    evaluate("another evaluation")
    step("after an evaluation")
    step("other shapes, compiled again", rows=6)
    step("two micro-batches", micro=2)
    step("two micro-batches again", micro=2)
    step("one again")
    return found


def test_a_graph_that_all_ranks_expect_is_not_asked_for(ranks: Ranks) -> None:
    first, *others = ranks(4).run(exchanges)
    assert first == {
        "the first": 4,  # at the start of the forward, before each graph, before the optimizer's step
        "the second": 2,
        "an evaluation": 2,
        "another evaluation": 1,
        "after an evaluation": 2,
        "other shapes, compiled again": 2,  # other graphs, with equal lists
        "two micro-batches": 8,  # two kinds of micro-batch, both new, each with two graphs, and what is left to sync
        "two micro-batches again": 4,
        "one again": 2,
    }
    assert all(other == first for other in others)


def parted(rank: int, odd: int, how: str) -> None:
    """In the fourth step rank `odd` has two messages swapped, for which it compiles again, or leaves the backward out."""
    watch.GRACE = 2.0  # of processes that end with this
    model, _ = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bucket, *rest = passes.LOWERED
    for step in range(4):
        other = rank == odd and step == 3
        swapped = (bucket, SWAP, *rest) if other and how == "swapped" else passes.LOWERED
        with replaced(passes, "LOWERED", swapped):
            loss = model(batch(rank, step, 6 if other else 4)).square().mean()
            if not other or how == "swapped":
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["swapped", "no backward"])
def test_fault_9_a_rank_that_leaves_the_course_says_so_and_the_others_hear_it(ranks: Ranks, how: str) -> None:
    with pytest.raises(RanksFailed) as caught:
        ranks(4).run(parted, 2, how)
    failures = caught.value.failures
    said, stage = failures[2].message, "forward" if how == "swapped" else "backward"
    assert failures[2].type == "NoAnswer", said
    known = rf"ranks disagree on collectives of this {stage}: rank 2 differs from rank [013], which runs what all ran in the step before"
    assert re.match(known, said), said
    if how == "swapped":
        assert "at `[1]" in said and "the others have" in said and "rank 2 has" in said, said
        assert "blocks.0.up.weight, blocks.0.down.weight, at paper.py:" in said and "blocks.1.up.weight" in said, said
    else:
        assert "rank 2 has left out a backward, and is at `an optimizer's step`" in said, said
    for rank in (0, 1, 3):
        assert failures[rank].type in ("FaultError", "Died"), failures[rank]  # it raised, or its watch ended it


# -- who is left behind ------------------------------------------------------------------------------------------------------------


def alone(monkeypatch: pytest.MonkeyPatch, agreed: tuple[int, ...], launched: bool, ahead: list[int]) -> str:
    """What a rank says whose second graph has identity 7 where `agreed` was expected, while others are `ahead`."""
    clock = [100.0]
    monkeypatch.setattr(course.time, "monotonic", lambda: clock[0])
    entry = SimpleNamespace(with_source=["gather of a"])
    program = SimpleNamespace(identity=7, stage="backward", name="backward 0", collectives=[entry])
    usual = SimpleNamespace(identity=8, stage="backward", name="backward 1", collectives=[])
    asked: list[tuple[int, int]] = []

    def look(number: int, place: int) -> list[int]:
        asked.append((number, place))
        return ahead

    def exchange(words: list[int], **rest: Any) -> list[list[int]]:
        since = clock[0]
        for _ in range(3):
            own.aside("a backward", since)
            assert not asked, "too early"
            clock[0] += course.LOOK / 3
        clock[0] += course.LOOK / 2
        own.aside("a backward", since)
        own.aside("a backward", since)  # not twice at once
        return [words] * 4

    engine: Any = SimpleNamespace(
        launches=SimpleNamespace(new=False, words=list, split=lambda rows: ([], rows), check=lambda order: None),
        options=SimpleNamespace(compile_timeout=1.0),
        programs=[usual, program],
        runtime=SimpleNamespace(
            rank=3, topology=SimpleNamespace(world_size=4),
            watch=SimpleNamespace(exchanges=11, ahead=look, went_on=(0, 0)),
            agreement=SimpleNamespace(exchange=exchange, asides=set()),
        ),
    )  # fmt: skip
    own = course.Course(engine)
    own._last["sync"] = agreed
    own.begin("sync", [own.word("sync")] * 4)
    own.enter(SimpleNamespace(identity=1))
    assert engine.runtime.watch.went_on == (11, 0)
    engine.launches.new = launched
    try:
        own.enter(program)
    except AgreementError as error:
        assert asked == [(11, 1)]
        return str(error)
    assert engine.runtime.watch.went_on == (11, 0), "it asked, so it did not go on unasked"
    assert asked == ([(11, 1)] if len(agreed) > 1 else [])
    return ""


@pytest.mark.parametrize(
    ("ahead", "agreed", "launched", "words"),
    [
        ([0, 1], (1, 8), False, "the others have"),
        ([0, 1], (1, 9), False, "at `` the others have another graph, rank 3 has backward 0"),
        ([0], (1, 7), True, "rank 3 launched transfers outside of compiled graphs that the others did not"),
        ([], (1, 8), False, ""),
        ([0], (1,), False, ""),  # one graph more than expected: the others are done, and their next exchange says so
    ],
)
def test_who_is_left_behind_says_what_it_runs_instead(
    monkeypatch: pytest.MonkeyPatch, ahead: list[int], agreed: tuple[int, ...], launched: bool, words: str
) -> None:
    said = alone(monkeypatch, agreed, launched, ahead)
    assert words in said
    assert (said == "") == (words == "")
    assert not said or re.match(
        r"ranks disagree on collectives of this (backward|graph): rank 3 differs from rank 0", said
    )


def test_ahead_is_who_went_on_and_has_not_come_to_this_exchange() -> None:
    def record(went_on: tuple[int, int], exchanges: int) -> dict[str, Any]:
        return {"went_on": list(went_on), "exchanges": exchanges}

    records = {
        0: record((11, 1), 12),  # went on, and not come
        1: record((11, 1), 13),  # has come, and gone on then
        2: record((11, 0), 12),  # still before
        3: record((12, 5), 12),  # in another model's course
    }
    board = SimpleNamespace(records=lambda ranks: records)
    own: Any = SimpleNamespace(_board=SimpleNamespace(again=lambda: board), world=4, exchanges=13)
    assert watch.Watch.ahead(own, 11, 1) == [0]


def test_who_expects_what_is_no_matter_where_ranks_expect_other_things(ranks: Ranks) -> None:
    """One rank that has forgotten the course: all ask."""
    found = ranks(4).run(one_forgets)
    assert found == [4, 4, 4, 4]


def one_forgets(rank: int) -> int:
    model, _ = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        before = model.zero.runtime.watch.exchanges
        if step == 2 and rank == 1:
            model.zero.course._last.clear()
            model.zero.course._phase = ""
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return int(model.zero.runtime.watch.exchanges - before)
