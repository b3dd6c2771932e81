"""A machine that exists on paper: one rank of a fake process group in this process, for which the compiler does all that it would do.

Nothing is sent and, on the meta device, nothing is allocated: what a plan makes of a model on 384 GPUs is seen on a laptop.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from zcompile import wrap
from zcompile.bench.systems import load
from zcompile.plan import Plan
from zcompile.topology import Topology


class Stopped(BaseException):
    """Ends a script after its first step; no `except Exception` of the script's catches it."""


@contextlib.contextmanager
def world(topology: Topology, rank: int = 0) -> Iterator[None]:
    """This process is `rank` of a fake process group as large as the topology.

    Raises:
        RuntimeError: it is in a process group already.
        ValueError: there is no such rank.
    """
    if dist.is_initialized():
        raise RuntimeError("a world on paper needs a process without a process group: it makes a fake one")
    if not 0 <= rank < topology.world_size:
        raise ValueError(f"rank {rank}: {topology.key} has ranks 0 to {topology.world_size - 1}")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=topology.world_size, store=FakeStore())
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def step(model: nn.Module, inputs: Any, micro_batches: int = 1, backward: bool = True) -> None:
    """A step of a wrapped model: forward and backward of each micro-batch, the last one synchronising.

    Args:
        inputs: a tuple or list of arguments, a dict of named ones, or a single one; moved to the meta device where the model is there.
        backward: False: a forward without gradient.

    Raises:
        ValueError: the output holds no tensor with a gradient.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
    arguments = inputs if isinstance(inputs, (tuple, list)) else () if isinstance(inputs, dict) else (inputs,)
    named = inputs if isinstance(inputs, dict) else {}
    wrapped: Any = model
    if not backward:
        with torch.no_grad():
            wrapped(*arguments, **named)
        return
    for number in range(micro_batches):
        wrapped.set_requires_gradient_sync(number == micro_batches - 1)
        output = wrapped(*arguments, **named)
        trained = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not trained:
            raise ValueError(
                "the model's output holds no tensor that requires a gradient; --eval dumps a forward alone"
            )
        loss = next((leaf for leaf in trained if leaf.numel() == 1), None)
        total = loss if loss is not None else torch.stack([leaf.float().mean() for leaf in trained]).sum()
        total.sum().backward()


def dump(model: nn.Module, inputs: Any, topology: Topology, plan: Plan | str, rank: int = 0, micro_batches: int = 1, backward: bool = True,
         **settings: Any) -> Any:  # fmt: skip
    """Wrap a model on paper and run a step; returns the wrapped model. `settings` go to hierarchical_zero.

    Raises:
        ValueError, TypeError: as hierarchical_zero and `step`.
    """
    meta = any(p.is_meta for p in model.parameters())  # stays there: nothing is computed on paper
    defaults = {"codegen": False, "fullgraph": False, **({"device": "meta"} if meta else {})}
    with world(topology, rank):
        wrapped = wrap.hierarchical_zero(model, topology=topology, plan=plan, **{**defaults, **settings})
        step(wrapped, inputs, micro_batches, backward)
        return wrapped


def script(path: Path, arguments: Sequence[str], topology: Topology, rank: int, settings: Mapping[str, Any]) -> bool:
    """Run a training script as `rank` of a world on paper until its first optimizer step after a backward of ours.

    `settings` stand in the place of what the script says to hierarchical_zero; a process group that it starts is this one.

    Returns:
        whether it came to a step (False: it ended before).
    """

    def started(*args: Any, **kwargs: Any) -> None:
        """The group is there: a script that starts it has what it asked for."""

    def stop(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        raise Stopped

    environment = {
        "RANK": str(rank), "WORLD_SIZE": str(topology.world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    with world(topology, rank), wrap.replacing({**settings, "topology": topology}), contextlib.ExitStack() as stack:
        before = {name: os.environ.get(name) for name in environment}
        stack.callback(os.chdir, os.getcwd())
        stack.callback(_restore_environment, before)
        os.environ.update(environment)
        for place, name, value in (
            (sys, "argv", [str(path), *arguments]),
            (sys, "path", [str(path.resolve().parent), *sys.path]),
            (dist, "init_process_group", started),
        ):
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        stack.callback(register_optimizer_step_post_hook(stop).remove)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Stopped:
            return True
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise RuntimeError(f"{path} ended with exit code {ended.code}") from ended
    return False


def _restore_environment(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def target(text: str) -> Callable[[], Any]:
    """The function of `module:function` or `file.py:function`.

    Raises:
        ValueError: it is of another form, or there is no such thing.
    """
    if ".py:" in text:
        return cast(Callable[[], Any], load("model", text))
    module, _, name = text.partition(":")
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "path", sys.path)
        sys.path = [os.getcwd(), *sys.path]
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            raise ValueError(f"model {text!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"model {text!r}: the module {module} has no function {name!r}")
    return cast(Callable[[], Any], found)
