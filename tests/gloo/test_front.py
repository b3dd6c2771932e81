"""The doors into zcompile, its options, and what it refuses: F29, F30, F8."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.training import batch, both, graphs, mlp, ours, refused, same, sgd, square, step, theirs, train, twins
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zcompile import Plan, full_state_dict, hierarchical_zero, ledger, mark_written
from zcompile.engine import READING

WORLD = 2
LOSS = square(4, 7)


# -- doors ---------------------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A model as a user writes it."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def _decorators(rank: int) -> None:
    bare: Any = hierarchical_zero(type("Bare", (Plain,), {}))

    @hierarchical_zero(topology="2", plan="zero3", codegen=False)
    class Arguments(Plain):
        """Says something."""

    class Sub(Arguments):  # a subclass of a decorated class is wrapped once, when all of it has been constructed
        def __init__(self) -> None:
            super().__init__(11)
            self.more = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.more(super().forward(x))
            return out

    @hierarchical_zero
    class Eager(Plain):
        pass

    assert Arguments.__name__ == "Arguments" and Arguments.__doc__ == "Says something."
    for make in (bare, Arguments, Sub, Eager):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = make()
        assert isinstance(model, make) and isinstance(model, Plain)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert hasattr(model, "more") == (make is Sub)
        if make in (Arguments, Sub):
            torch.manual_seed(0)
            dense = Plain(11) if make is Sub else Plain()
            if make is Sub:
                dense.more = nn.Linear(3, 3)
                dense = nn.Sequential(dense.body, dense.more)
                values = [p.detach().clone() for p in full_state_dict(model).values()]
                for p, value in zip(dense.parameters(), values, strict=True):
                    assert torch.equal(p, value)
                optimizers = sgd(model, dense)
                both(model, dense, LOSS, 0)
                step(optimizers)
                for found, p in zip(full_state_dict(model).values(), dense.parameters(), strict=True):
                    torch.testing.assert_close(found, p.detach(), rtol=0, atol=1e-6)
            else:
                train(model, dense, LOSS, steps=2)
            assert graphs(model) == ["forward", "backward"]


def test_decorator_bare_with_arguments_and_under_a_subclass(ranks: Any) -> None:
    ranks(WORLD).run(_decorators)


def _other_door(rank: int, backend: str) -> None:
    """torch.compile on a model wrapped with compile=False, and on one that compiles itself: options replaced, no nesting."""
    settings: dict[str, Any] = {"backend": backend, "options": {"codegen": False}}
    for mode in ("eager", "code"):  # `code` would generate code if the options were not replaced
        model, dense = twins(mlp, mode)
        compiled: Any = torch.compile(model, **settings)
        optimizers = sgd(model, dense)
        for number in range(2):
            value = LOSS(compiled, rank, number)
            value.backward()
            torch.testing.assert_close(value.detach(), theirs(dense, LOSS, number), rtol=1e-6, atol=1e-6)
            step(optimizers)
            same(model, dense)
        assert list(full_state_dict(compiled)) == list(dense.state_dict())
        assert ledger(compiled) == ledger(model)
        assert graphs(model) == ["forward", "backward"], [program.name for program in model.zero.programs]
        assert all("codegen" not in program.seconds or program.code != "generated" for program in model.zero.programs)


@pytest.mark.parametrize("backend", ["hierarchical_zero", "zcompile"])
def test_torch_compile_is_the_same_by_the_other_door(ranks: Any, backend: str) -> None:
    ranks(WORLD).run(_other_door, backend)


def _compiled_away(rank: int) -> None:
    """An unwrapped model gets an error that says what to do; a wrapped one under another compiler is right."""
    plain: Any = torch.compile(mlp(), backend="hierarchical_zero")
    refused(Exception, ("were wrapped", "hierarchical_zero(model"), lambda: plain(batch(rank, 0, 4, 7)))
    model, dense = twins(mlp, "eager")
    unknown: Any = torch.compile(model, backend="hierarchical_zero", options={"codgen": False})
    refused(Exception, ("unknown option 'codgen'", "did you mean 'codegen'"), lambda: unknown(batch(rank, 0, 4, 7)))
    torch._dynamo.reset()
    mode: Any = torch.compile(model, backend="hierarchical_zero", mode="max-autotune")
    refused(Exception, ("max-autotune",), lambda: mode(batch(rank, 0, 4, 7)))
    torch._dynamo.reset()
    train(model, dense, LOSS, steps=1)  # still whole after the errors
    assert READING.engine == ""


def test_the_backend_on_an_unwrapped_model_and_with_unknown_options(ranks: Any) -> None:
    ranks(WORLD).run(_compiled_away)


@pytest.mark.slow
def test_the_backends_names_resolve_from_a_source_tree() -> None:
    code = "import zcompile, torch; print(*[n for n in torch._dynamo.list_backends() if n in ('hierarchical_zero', 'zcompile')])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert found.stdout.split() == ["hierarchical_zero", "zcompile"], found.stderr


def test_an_unwrapped_backends_help_needs_no_process_group() -> None:
    with pytest.raises(TypeError, match="was not wrapped"):
        full_state_dict(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="was not wrapped"):
        mark_written(nn.Linear(2, 2))


# -- settings ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codgen": True}, "unknown option 'codgen'.*did you mean 'codegen'"),
        ({"whatever": 1}, "unknown option 'whatever'; valid: codegen, dump"),
        ({"codegen": 1}, "codegen=1: must be True or False"),
        ({"timeout": 0}, "timeout=0: must be a positive"),
        ({"timeout": "10"}, "timeout='10'"),
        ({"dump": 3}, "dump=3"),
        ({"dynamic": "yes"}, "dynamic='yes'"),
        ({"plan": "zero4"}, "zero4.*zero3"),
        ({"plan": 3}, "3"),
        ({"compute_dtype": torch.float16}, "float16.*bfloat16"),
        ({"compute_dtype": "bf16"}, "bf16"),
        ({"topology": "2xx2"}, "2xx2"),
        ({"topology": "0x2"}, "0"),
    ],
)  # fmt: skip
def test_f29_bad_settings_are_refused_before_anything_starts(settings: dict[str, Any], words: str) -> None:
    for target in ([], [nn.Linear(2, 2)]):
        with pytest.raises((ValueError, TypeError), match=words):
            hierarchical_zero(*target, **settings)
    assert not dist.is_initialized()


def test_f29_what_this_version_cannot_honour_is_refused() -> None:
    with pytest.raises(ValueError, match="auto"):
        Plan.preset("auto")


OPTIONS: dict[str, tuple[Any, Any]] = {
    "codegen": (False, True), "compile": (False, True), "strict": (False, True), "fullgraph": (False, True), "dynamic": (None, False),
    "timeout": (20.0, 30.0),
}  # fmt: skip
"""name -> what all but the last rank are given, and the last one"""


def _different(rank: int, case: str) -> str:
    odd = rank == WORLD - 1
    settings: dict[str, Any] = {"topology": "2", "compile": False, "timeout": 20.0}
    torch.manual_seed(0)
    model = mlp()
    if case == "plan":
        settings["plan"] = "zero3" if odd else "ddp"
    elif case in OPTIONS:
        settings[case] = OPTIONS[case][odd]
    elif case == "dtype":
        settings["compute_dtype"] = torch.bfloat16 if odd else None
    elif case == "shape" and odd:
        model[2] = nn.Linear(9, 6)
    elif case == "frozen" and odd:
        model[2].weight.requires_grad_(False)
    elif case == "values" and odd:
        with torch.no_grad():
            model[2].weight[0, 0] += 1e-6
    try:
        hierarchical_zero(model, **settings)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("plan", ("rank 1", "rank 0", "zero3", "ddp")),
        *((name, ("rank 1", f".options.{name}`", *map(json.dumps, values))) for name, values in OPTIONS.items()),
        ("dtype", ("rank 1", "bfloat16", "float32")),
        ("shape", ("rank 1", "5", "6")),
        ("frozen", ("rank 1", "true", "false")),
        ("values", ("2.weight", "rank 1", "rank 0", "sync_init")),
    ],
)
def test_f30_ranks_given_different_things_are_refused_with_the_difference(
    ranks: Any, case: str, words: tuple[str, ...]
) -> None:
    messages = ranks(WORLD).run(_different, case)
    assert messages[0] == messages[1]
    assert all(word in messages[0] for word in words), messages[0]


def _sync_init(rank: int) -> None:
    torch.manual_seed(rank)
    model = hierarchical_zero(mlp(), topology="2", compile=False, sync_init=True)
    torch.manual_seed(0)
    same(model, mlp(), 0.0)


def test_sync_init_takes_rank_zeros_values(ranks: Any) -> None:
    ranks(WORLD).run(_sync_init)


# -- refusals ------------------------------------------------------------------------------------------------------------------------


def _refusals(rank: int) -> None:
    model, dense = twins(mlp, "eager")
    again: dict[str, Any] = {"topology": "2"}
    refused(ValueError, ("wrapped already",), lambda: hierarchical_zero(model, **again))
    refused(
        ValueError,
        ("Sequential is wrapped already", "outermost"),
        lambda: hierarchical_zero(nn.Sequential(model), **again),
    )
    refused(TypeError, ("deep-copied", "full_state_dict"), lambda: copy.deepcopy(model))
    refused(TypeError, ("pickled", "full_state_dict"), lambda: pickle.dumps(model))
    refused(TypeError, ("nn.Module",), lambda: hierarchical_zero(3, **again))
    refused(TypeError, ("nn.Module",), lambda: hierarchical_zero(int, **again))
    refused(ValueError, ("no parameters",), lambda: hierarchical_zero(nn.Tanh(), **again))
    refused(ValueError, ("float64", "weight"), lambda: hierarchical_zero(nn.Linear(2, 2).double(), **again))
    refused(ValueError, ("lazy",), lambda: hierarchical_zero(nn.LazyLinear(2), **again))
    split = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    refused(ValueError, ("several devices",), lambda: hierarchical_zero(split, **again))

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            LOSS(model, rank, 0)

    refused(RuntimeError, ("autocast", "compute_dtype=torch.bfloat16"), autocast)

    def replaced() -> None:
        inner = model[0]
        before, inner._parameters["weight"] = inner._parameters["weight"], nn.Parameter(torch.zeros(9, 7))
        try:
            LOSS(model, rank, 0)
        finally:
            inner._parameters["weight"] = before

    refused(RuntimeError, ("0.weight", "replaced"), replaced)

    def resized() -> None:
        model.load_state_dict({**model.state_dict(), "0.weight": torch.zeros(10, 7)})

    refused(RuntimeError, ("0.weight", "10"), resized)
    train(model, dense, LOSS, steps=1)  # none of it did any harm


def test_what_cannot_be_done_to_a_wrapped_model_is_refused(ranks: Any) -> None:
    ranks(WORLD).run(_refusals)


def _written_between(rank: int, mode: str) -> None:
    """The backward gathers the weights again: they must be those of its forward."""
    writes: tuple[Callable[[Any], Any], ...] = (
        lambda model: sgd(model)[0].step(),
        lambda model: model[0].weight.add_(1),
        lambda model: model.load_state_dict({k: torch.zeros(v.shape) for k, v in model.state_dict().items()}),
        mark_written,
    )
    model, _ = twins(mlp, mode)
    ours(model, LOSS, 0)
    for write in writes:
        value = LOSS(model, rank, 1)
        with torch.no_grad():
            write(model)
        refused(RuntimeError, ("modified between a forward and its backward",), value.backward)
        ours(model, LOSS, 2)  # the next forward and backward are well


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_write_between_a_forward_and_its_backward_is_refused(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_written_between, mode)


def _phases(rank: int) -> str:
    model, _ = twins(mlp, "eager")
    model.set_requires_gradient_sync(rank == 0)
    try:
        LOSS(model, rank, 0)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def test_ranks_in_different_phases_are_told_so(ranks: Any) -> None:
    for message in ranks(WORLD).run(_phases):
        assert "rank 0" in message and "rank 1" in message and "accumulate" in message, message


# -- lateness ------------------------------------------------------------------------------------------------------------------------


def _late(rank: int) -> float:
    """One rank's compiler takes longer than the others would wait for an agreement."""
    model, dense = twins(mlp, "graph", timeout=1.0)
    from zcompile.passes import merge

    original = merge.run
    if rank == 1:

        def slow(*args: Any) -> None:
            time.sleep(1.5)
            original(*args)

        merge.run = slow  # type: ignore[assignment]
    begin = time.monotonic()
    try:
        train(model, dense, LOSS, steps=2)
    finally:
        merge.run = original
    return time.monotonic() - begin


@pytest.mark.slow
def test_f8_a_rank_that_compiles_late_is_waited_for(ranks: Any) -> None:
    waited = ranks(WORLD).run(_late)
    assert min(waited) > 1.5, waited
