"""N + N steps in fresh processes are 2N, bit for bit; and each part of the state, left out of a restore, is missed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.patches import replaced
from support.spawn import Pool
from support.state import VOCABULARY, Awkward, same_bits, whole_state
from support.training import MODES

import zcompile
from zcompile import Plan, checkpoint, feedback, hierarchical_zero, resume

WORLD = 4
MICRO = 2
"""Micro-batches of a step."""
END = 4 * MICRO
QUANTISED: dict[str, Any] = {"gather": "int8/32", "reduce": "int4/32", "error_feedback": 0.5}

Case = tuple[str, str, Plan, int, bool]
CASES: dict[str, Case] = {
    "after a step": ("eager", "2x2", Plan.preset("zero_topo"), 2 * MICRO, True),
    "between micro-batches": ("eager", "2x2", Plan.preset("zero_topo"), 2 * MICRO + 1, True),
    "between synced micro-batches": ("eager", "4", Plan.preset("zero3"), 2 * MICRO + 1, False),
    "feedback": ("eager", "2x2", Plan.preset("zero_topo", **QUANTISED), 2 * MICRO + 1, True),
    "delta": ("eager", "2x2", Plan.preset("zero_topo", **QUANTISED, refresh="int4-delta/32"), 2 * MICRO, True),
    "delta, copies fresh": (
        "eager", "2x2", Plan.preset("zero_topo", **QUANTISED, refresh="int4-delta/32", full_refresh_every=3), 2 * MICRO + 1, True,
    ),
    "delta of native gathers": ("eager", "2x2", Plan.preset("zero_topo", refresh="int8-delta/32"), 2 * MICRO, True),
}  # fmt: skip
"""name -> mode, topology, plan, micro-batches before the save, whether micro-batches run under no_sync"""
COMPILED: Case = ("code", "2x2", Plan.preset("zero_topo", **QUANTISED, refresh="int4-delta/32"), 2 * MICRO + 1, True)


class Run:
    """A training loop whose every draw counts: data from all three libraries' generators, dropout from torch's, its place in `at`."""

    def __init__(self, rank: int, case: Case) -> None:
        mode, topology, plan, _, self.window = case
        torch._dynamo.reset()
        torch.manual_seed(0)
        plain = Awkward(width=24, dropout=0.2)
        self.model: Any = hierarchical_zero(plain, topology=topology, plan=plan, **MODES[mode])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.branches = mode == "eager"
        """The first micro-batch of a step reads weights that the others do not."""
        self.at = 0
        self.losses: list[float] = []
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(100 + rank)

    def train(self, end: int) -> None:
        while self.at < end:
            last = self.at % MICRO == MICRO - 1
            self.model.set_requires_gradient_sync(last or not self.window)
            ids = torch.randint(0, VOCABULARY, (2, 5)) + random.randrange(VOCABULARY) + numpy.random.randint(VOCABULARY)
            loss = self.model(ids % VOCABULARY, self.branches and self.at % MICRO == 0)
            loss.backward()
            self.losses.append(loss.item())
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
            self.at += 1

    def save(self, folder: str) -> None:
        zcompile.save(
            self.model,
            self.optimizer,
            folder,
            {"at": self.at, "scheduler": self.scheduler.state_dict()},
            own={"losses": self.losses},
        )

    def resume(self, folder: str) -> None:
        found = zcompile.load(self.model, self.optimizer, folder)
        assert found.exact, found.notices
        self.at, self.losses = found.extra["at"], found.own["losses"]
        self.scheduler.load_state_dict(found.extra["scheduler"])

    def result(self) -> dict[str, Any]:
        return {**whole_state(self.model, self.optimizer), "losses": self.losses, "drawn": torch.rand(3)}


def _whole(rank: int, folder: str, cases: dict[str, Case]) -> dict[str, Any]:
    """2N steps without a stop; and N steps with a save at their end. With generated code, which takes long to make, both are one run."""
    expected = {}
    for name, case in cases.items():
        begun = Run(rank, case)
        begun.train(case[3])
        begun.save(f"{folder}/{name}")
        run = begun if case[0] == "code" else Run(rank, case)
        run.train(END)
        expected[name] = run.result()
    return expected


def _rest(rank: int, folder: str, cases: dict[str, Case]) -> dict[str, Any]:
    """In a fresh process: the other N steps."""
    found = {}
    for name, case in cases.items():
        run = Run(rank, case)
        run.train(1)  # whatever was done before the restore does not matter
        run.resume(f"{folder}/{name}")
        run.train(END)
        found[name] = run.result()
    return found


def _nothing(*arguments: Any) -> Any:
    return None


BREAKS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "random states": ("after a step", checkpoint.resume, "set_random_state", _nothing),
    "moments": ("after a step", checkpoint.optimizers, "restore", _nothing),
    "main grads": ("between micro-batches", checkpoint.resume, "empty_gradients", lambda *_: {}),
    "which were touched": ("between micro-batches", checkpoint.resume, "take_gradients", _nothing),
    "synced gradients": ("between synced micro-batches", checkpoint.resume, "take_gradients", _nothing),
    "error feedback": ("feedback", checkpoint.feedback, "load", lambda engine, *_: feedback.reset(engine) or ""),
    "images": ("delta", checkpoint.resume, "take_images", _nothing),
    "images of fresh copies": ("delta, copies fresh", checkpoint.resume, "take_images", _nothing),
    "images of others": ("delta of native gathers", resume, "spread_image", _nothing),
}
"""what a restore leaves out -> the case that must miss it, and how it is left out: module, function, what stands in its place"""


def _broken(rank: int, folder: str, cases: list[str]) -> dict[str, dict[str, Any]]:
    out = {}
    for name, (case, module, function, instead) in BREAKS.items():
        if case not in cases:
            continue
        with replaced(module, function, instead):
            out[name] = _rest(rank, folder, {case: CASES[case]})[case]
    return out


def _equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    try:
        same_bits(found, expected)
    except AssertionError:
        return False
    return True


def halves(folder: str, cases: dict[str, Case], timeout: float) -> None:
    first, second = Pool(WORLD), Pool(WORLD)
    try:
        expected = first.run(_whole, folder, cases, timeout=timeout)
        first.close()
        found = second.run(_rest, folder, cases, timeout=timeout)
        for mine, other in zip(found, expected, strict=True):
            for name in cases:
                same_bits(mine[name], other[name])
        results = second.run(_broken, folder, list(cases), timeout=timeout)
        for name in results[0]:
            pairs = zip(results, expected, strict=True)
            noticed = not all(_equal(mine[name], other[BREAKS[name][0]]) for mine, other in pairs)
            assert noticed, f"a restore without {name} goes unnoticed"
    finally:
        first.close()
        second.close()


QUICK = ("between micro-batches",)


def test_n_and_n_steps_are_2n_and_a_broken_restore_is_not(tmp_path: Path) -> None:
    halves(str(tmp_path), {name: CASES[name] for name in QUICK}, 300)


@pytest.mark.slow
def test_n_and_n_steps_are_2n_in_every_state_of_a_run(tmp_path: Path) -> None:
    halves(str(tmp_path), {name: case for name, case in CASES.items() if name not in QUICK}, 400)


@pytest.mark.slow
def test_n_and_n_steps_are_2n_with_generated_code(tmp_path: Path) -> None:
    halves(str(tmp_path), {"compiled": COMPILED}, 600)
