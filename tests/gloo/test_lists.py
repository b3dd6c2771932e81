"""Ranks agree on what they are about to launch, run different graphs with equal lists, and notice every planted difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.listed import SWAP, batch, wrapped
from support.patches import replaced
from support.spawn import Pool, RanksFailed

from zcompile import backend, full_state_dict, passes, transfers
from zcompile.debug import text
from zcompile.refresh import Refresher

Ranks = Callable[[int], Pool]


def train(
    model: Any, dense: torch.nn.Module, rank: int, steps: int, rows: Callable[[int], int] = lambda rank: 4
) -> float:
    """SGD steps beside the dense twin on all ranks' batches; the largest difference of a parameter at the end."""
    ours, theirs = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(dense.parameters(), lr=0.1)
    for step in range(steps):
        model(batch(rank, step, rows(rank))).square().mean().backward()
        for other in range(4):
            (dense(batch(other, step, rows(other))).square().mean() / 4).backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    full = full_state_dict(model)
    return max(float((full[name] - value).abs().max()) for name, value in dense.state_dict().items())


# -- 2, 11 -------------------------------------------------------------------------------------------------------------------------


def programs(rank: int, plan: str) -> list[tuple[str, list[Any], list[str]]]:
    """(name, ordered list, program text) of every graph this rank compiles."""
    texts: list[list[str]] = []
    init = backend.Compilation.__init__

    def patched(self: Any, *args: Any) -> None:
        def show(gm: Any, context: Any, name: str) -> None:
            if name == "verify":
                texts.append(text.lines(gm, {}, context.stage))

        init(self, *args)
        self.observer = show

    with replaced(backend.Compilation, "__init__", patched):
        model, dense = wrapped(plan)
        train(model, dense, rank, 1)
        with torch.no_grad():
            model(batch(rank, 9))
    return [
        (p.stage, [e.identity for e in p.collectives], lines)
        for p, lines in zip(model.zero.programs, texts, strict=True)
    ]


@pytest.mark.parametrize("plan", ["zero_topo", "zero3"])
def test_invariants_2_and_11_lists_and_program_texts_are_equal_on_all_ranks(ranks: Ranks, plan: str) -> None:
    first, *others = ranks(4).run(programs, plan)
    assert [stage for stage, _, _ in first] == ["forward", "backward", "inference"]
    assert all(collectives for _, collectives, _ in first)
    for other in others:
        assert other == first


# -- F9 ----------------------------------------------------------------------------------------------------------------------------


def swapped_on(rank: int, odd: int) -> tuple[str, float, int]:
    """(error, seconds, gathers launched) of a first forward, in which rank `odd` has two messages swapped."""
    bucket, *rest = passes.LOWERED
    mutated = (bucket, SWAP, *rest) if rank == odd else passes.LOWERED
    with replaced(passes, "LOWERED", mutated):
        model, _ = wrapped()
        begin, error = time.monotonic(), ""
        before = {k: v for k, v in model.zero.runtime.snapshot().items() if k[1] == "gather"}
        try:
            model(batch(rank, 0))
        except RuntimeError as found:
            error = str(found)
        after = {k: v for k, v in model.zero.runtime.snapshot().items() if k[1] == "gather"}
    launched = sum(v[0] for v in after.values()) - sum(v[0] for v in before.values())
    return error, time.monotonic() - begin, launched


def test_fault_9_two_collectives_swapped_on_one_rank_raise_on_every_rank_before_any_launch(ranks: Ranks) -> None:
    found = ranks(4).run(swapped_on, 2)
    for error, seconds, launched in found:
        assert error.startswith("ranks disagree on collectives of this forward: rank 2 differs from rank 0"), error
        assert "[1]" in error and "gather all_gather over node" in error  # position and op
        assert "blocks.0.up.weight, blocks.0.down.weight, at paper.py:" in error and "blocks.1.up.weight" in error
        assert seconds < 30
        assert launched == 0
    assert len({error for error, _, _ in found}) == 1


def test_fault_9_needs_a_swap_on_some_rank(ranks: Ranks) -> None:
    assert all(error == "" and launched for error, _, launched in ranks(4).run(swapped_on, 99))


# -- ranks with other shapes -------------------------------------------------------------------------------------------------------


def other_rows(rank: int, odd: int) -> tuple[float, int]:
    """Rank `odd` sees another number of rows from the third step on, and compiles again, alone."""
    model, dense = wrapped()
    error = train(model, dense, rank, 2)
    model_steps = train(model, dense, rank, 3, rows=lambda r: 6 if r == odd else 4)
    return max(error, model_steps), len(model.zero.programs)


def test_f5_a_rank_with_another_sequence_length_compiles_again_and_trains_on(ranks: Ranks) -> None:
    found = ranks(4).run(other_rows, 1)
    assert all(error <= 1e-6 for error, _ in found), found
    assert [count for _, count in found] == [2, 4, 2, 2], "rank 1 alone has a second forward and backward"


# -- 12 ----------------------------------------------------------------------------------------------------------------------------


def mutated(rank: int, fault: str) -> float:
    """The largest difference to the dense model after 3 steps, with one mechanism taken out on all ranks."""
    send, launch = transfers._all_to_all, Refresher.launch
    lowered = passes.LOWERED[:-1]  # verify would refuse a dropped reduction before it runs

    def keep_own(x: Any, size: int, role: str) -> Any:
        return x.view(size, -1)[0].repeat(size) if ".cluster." in role else send(x, size, role)

    def forget(self: Any, units: Any, full: Any = ()) -> None:
        units = list(units)
        if all(unit.seen == -1 for unit in units):
            launch(self, units)  # the first one, or there would be no weights at all
        for unit in units:
            unit.seen = unit.version

    owner, name, value = {
        "nothing": (passes, "LOWERED", passes.LOWERED),
        "a reduction over the slow level": (transfers, "_all_to_all", keep_own),
        "refreshes after the first": (Refresher, "launch", forget),
    }[fault]
    from zcompile.passes import lower

    lower._TEMPLATES.clear()
    try:
        with replaced(passes, "LOWERED", lowered), replaced(owner, name, value):
            model, dense = wrapped()
            return train(model, dense, rank, 3)
    finally:
        lower._TEMPLATES.clear()


@pytest.mark.slow
def test_invariant_12_a_dropped_reduction_and_a_skipped_refresh_show_in_the_weights(ranks: Ranks) -> None:
    pool = ranks(4)
    assert all(error <= 1e-6 for error in pool.run(mutated, "nothing"))
    for fault in ("a reduction over the slow level", "refreshes after the first"):
        assert max(pool.run(mutated, fault)) > 1e-4, fault


def dropped_and_verified(rank: int) -> None:
    send = transfers._all_to_all

    def drop(x: Any, size: int, role: str) -> Any:
        return x.view(size, -1)[0].repeat(size) if ".cluster." in role else send(x, size, role)

    from zcompile.passes import lower

    lower._TEMPLATES.clear()
    try:
        with replaced(transfers, "_all_to_all", drop):
            model, dense = wrapped()
            train(model, dense, rank, 1)
    finally:
        lower._TEMPLATES.clear()


def test_invariant_12_verify_refuses_a_graph_with_a_dropped_reduction(ranks: Ranks) -> None:
    with pytest.raises(RanksFailed, match=r"pass `verify` on graph \d+ backward .* differ from the closed forms"):
        ranks(4).run(dropped_and_verified)
