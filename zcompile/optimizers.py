"""Which optimizers may step the masters: those made after wrapping and right on shards, never one that is wrong in silence.

Masters are DTensors, so what an optimizer says of a whole matrix (a product, a norm, a factor) DTensor does on the whole matrix, with
communication of its own. Measured on torch 2.13 against a dense twin (tests/gloo/test_optimizers.py): the element-wise optimizers are
right and send nothing; Muon is right; the ones below are not, and are refused by a hook that torch documents, before the step has
changed anything. Parameters that the plan leaves whole (`ddp`, or a Rule with optimizer="whole") are plain for an optimizer.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zcompile.writes import unit_of

REFUSED = {
    "Adafactor": "it takes norms of parameters and updates with .item(), which reads one shard's part of a DTensor's norm",
    "Rprop": "it assigns through boolean masks, which DTensor has no rule for",
    "LBFGS": "it stops by the loss of its own rank, so ranks would take different numbers of steps, and flattens uneven shards",
}
_ANY_WORLD = {"LBFGS"}
"""Wrong on whole parameters too, where the ranks see different batches."""
_hook: Any = None


def guard() -> None:
    """From now on the first step of a refused optimizer over sharded masters raises."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_check)


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    name = next((cls.__name__ for cls in type(optimizer).__mro__ if cls.__name__ in REFUSED), None)
    if name is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if unit_of(parameter) is not None and (name in _ANY_WORLD or _sharded(parameter)):
                cure = (
                    "Use an element-wise optimizer (AdamW, SGD, Adagrad, ...) or torch.optim.Muon"
                    if name in _ANY_WORLD
                    else "Use an element-wise optimizer (AdamW, SGD, Adagrad, ...) or torch.optim.Muon, or keep these parameters whole: "
                    "plan='ddp', or Plan(..., rules=(Rule('name.*', optimizer='whole', gradients='whole', weights='whole'),))"
                )
                raise RuntimeError(
                    f"zcompile: {type(optimizer).__name__} cannot step a sharded parameter of shape {tuple(parameter.shape)}: "
                    f"{REFUSED[name]}. {cure}."
                )


def _sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and any(
        isinstance(placement, Shard) and size > 1
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    )


def refuse_earlier(model: nn.Module) -> None:
    """Raise ValueError if an optimizer holds parameters of `model`, which is about to be wrapped: it would step what nobody reads."""
    ours = {id(p) for p in model.parameters()}

    def found() -> Any:
        for thing in gc.get_objects():
            # isinstance would follow a weak proxy, and raise where its object is gone
            if issubclass(type(thing), torch.optim.Optimizer) and any(
                id(p) in ours for group in thing.param_groups for p in group["params"]
            ):
                return type(thing).__name__
        return None

    if found():
        gc.collect()  # one that nobody holds any more does no harm
        name = found()
        if name:
            raise ValueError(
                f"hierarchical_zero: a {name} was made from this model's parameters before it was wrapped and would step "
                "tensors that are no longer used. Wrap first, then make the optimizer from model.parameters()."
            )
