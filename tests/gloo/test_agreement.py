"""Agreement between real ranks: exchanges, and errors that name the rank, the place and both values."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from support.spawn import Pool, run

from zcompile import _torch_compat as compat
from zcompile.agreement import AgreementError, first_difference
from zcompile.runtime import Runtime
from zcompile.topology import Topology

Ranks = Callable[[int], Pool]


def _agreement() -> Any:
    return Runtime.get(Topology.parse("2x2"), timeout=30).agreement


def _exchange(rank: int) -> Any:
    agreement = _agreement()
    first = agreement.launch([rank, -(2**62)], step="first")
    second = agreement.launch(list(range(rank * 10)), step="second")  # 0, 10, 20, 30 words
    return first.result(), second.result(), agreement.exchange([])


def test_exchange_brings_every_ranks_words_of_any_number(ranks: Ranks) -> None:
    for first, second, nothing in ranks(4).run(_exchange):
        assert first == [[rank, -(2**62)] for rank in range(4)]
        assert second == [list(range(rank * 10)) for rank in range(4)]
        assert nothing == [[]] * 4


def _compare(rank: int, values: list[Any], titles: list[str]) -> str:
    try:
        _agreement().compare(titles[rank], values[rank])
        return "equal"
    except AgreementError as error:
        return str(error)


LIST = [{"role": "pair", "bytes": 128}, {"role": "node", "bytes": 64}]


def test_equal_values_agree(ranks: Ranks) -> None:
    assert ranks(4).run(_compare, [LIST] * 4, ["collectives"] * 4) == ["equal"] * 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            [LIST, LIST, LIST, [LIST[0], {"role": "node", "bytes": 63}]],
            ["rank 3 differs from rank 0", "`collectives[1].bytes`", "rank 0 has 64", "rank 3 has 63"],
        ),
        (
            [[], LIST, LIST, LIST],
            ["rank 0 differs from rank 1", "`collectives[0]`", "rank 0 has nothing", '"bytes": 128'],
        ),
        (
            [LIST, LIST[::-1], LIST, LIST[::-1]],
            ["rank 1 (also 3) differs from rank 0", "`collectives[0].bytes`", "rank 0 has 128", "rank 1 has 64"],
        ),
        ([1, 1, 1.0, 1], ["rank 2 differs from rank 0", "rank 0 has 1,", "rank 2 has 1.0"]),
        (
            [{}, {"x": None}, {}, {}],
            ["rank 1 differs from rank 0", "`collectives.x`", "rank 0 has nothing", "rank 1 has null"],
        ),
    ],
)
def test_a_mismatch_names_rank_position_and_both_values(ranks: Ranks, values: list[Any], expected: list[str]) -> None:
    answers = ranks(4).run(_compare, values, ["collectives"] * 4)
    assert len(set(answers)) == 1, "all ranks raise the same"
    for part in expected:
        assert part in answers[0]


def test_different_titles_are_a_mismatch(ranks: Ranks) -> None:
    answers = ranks(4).run(_compare, [LIST] * 4, ["plan", "plan", "graph", "plan"])
    assert set(answers) == {
        "ranks compare different things: rank 2 differs from rank 0: rank 0 compares `plan`, rank 2 compares `graph`"
    }


def _steps(rank: int) -> str:
    try:
        _agreement().exchange([1], step="compile" if rank == 2 else "version")
        return "passed"
    except AgreementError as error:
        return str(error)


def test_ranks_at_different_steps_are_told_so(ranks: Ranks) -> None:
    answers = ranks(4).run(_steps)
    for rank in (0, 1, 3):
        assert "step `version`" in answers[rank] and "rank 2 is at another step" in answers[rank]
    assert "step `compile`" in answers[2] and "rank 0 (also 1, 3)" in answers[2]


def _late(rank: int) -> str:
    agreement, store = _agreement(), compat.default_store()
    if rank == 3:
        store.wait(
            ["given up 0", "given up 1", "given up 2"], timedelta(seconds=50)
        )  # on its way until nobody waits for it
        return ""
    try:
        agreement.exchange([1], step="version", timeout=1)
        return "passed"
    except AgreementError as error:
        store.set(f"given up {rank}", "")
        return str(error)


def test_a_missing_rank_ends_the_step_by_name_in_time() -> None:
    for text in run(_late, 4)[:3]:
        assert "step `version`" in text and "limit 1 s" in text


@pytest.mark.parametrize(
    ("left", "right", "difference"),
    [
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}, None),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, (".a[1].b", "2", "3")),
        ([1, 2], [1], ("[1]", "2", "nothing")),
        ({"a": 1}, [1], ("", '{"a": 1}', "[1]")),
        (True, 1, ("", "true", "1")),
    ],
)
def test_first_difference(left: Any, right: Any, difference: Any) -> None:
    assert first_difference(left, right) == difference
