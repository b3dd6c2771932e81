"""The state of optimizers under the names of the parameters, as torch.distributed.checkpoint.state_dict nests it.

    {"state": {name: {"exp_avg": DTensor, "step": tensor}}, "param_groups": [{"params": [names], "lr": ...}]}

torch's own `get_optimizer_state_dict` makes state that is missing by a step with zero gradients; here there is what was saved and no
more, so that a parameter which has never had a gradient still has no state after a load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from zcompile.engine import Engine
from zcompile.params import Slot
from zcompile.storage import CheckpointError, paths, template

Optimizers = Sequence[torch.optim.Optimizer]


def listed(optimizer: torch.optim.Optimizer | Optimizers | None) -> list[torch.optim.Optimizer]:
    """One optimizer, several, or none, as a list. TypeError names what is no optimizer."""
    found: list[Any] = (
        list(optimizer) if isinstance(optimizer, (list, tuple)) else [] if optimizer is None else [optimizer]
    )
    for each in found:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f"{type(each).__name__} is not a torch.optim.Optimizer")
    return found


def named_state(engine: Engine, optimizers: Optimizers) -> dict[str, Any]:
    """What `optimizers` hold, to be saved: the tensors are the state itself. {} without optimizers."""
    out: dict[str, Any] = {"state": {}, "param_groups": []}
    for optimizer in optimizers:
        names = [name for group in _names(engine, optimizer) for name in group]
        found = optimizer.state_dict()
        for number, state in found["state"].items():
            if names[number] in out["state"]:
                raise ValueError(f"two optimizers hold state of parameter {names[number]!r}")
            out["state"][names[number]] = state
        out["param_groups"] += [
            {**group, "params": [names[i] for i in group["params"]]} for group in found["param_groups"]
        ]
    return out if optimizers else {}


def empty_state(engine: Engine, optimizers: Optimizers, index: Metadata) -> dict[str, Any]:
    """What a checkpoint has for these optimizers, tensors empty, those of a parameter's shape sharded as it is: for dcp.load to fill."""
    if not optimizers:
        return {}
    slots = {slot.name: slot for slot in engine.slots}
    known = {name: slots[name] for optimizer in optimizers for group in _names(engine, optimizer) for name in group}
    out: dict[str, Any] = {"state": {}, "param_groups": template(index, "optimizer", "param_groups")}
    if not out["param_groups"]:
        raise CheckpointError(
            "the checkpoint has no optimizer state; load without an optimizer to take the weights alone"
        )
    for flat, path in paths(index).items():
        if path[:2] != ("optimizer", "state"):
            continue
        slot = known.get(str(path[2]))
        if slot is None:
            raise CheckpointError(
                f"the checkpoint has optimizer state of {path[2]!r}, which none of the optimizers here steps"
            )
        entry: Any = index.state_dict_metadata[flat]
        state = out["state"].setdefault(slot.name, {})
        for key in path[3:-1]:
            state = state.setdefault(key, {})
        state[path[-1]] = None if not hasattr(entry, "size") else _empty(slot, str(path[-1]), entry)
    return out


def _empty(slot: Slot, key: str, entry: Any) -> Tensor:
    if key != "step" and tuple(entry.size) == tuple(slot.master.shape):
        return torch.zeros_like(slot.master, dtype=entry.properties.dtype, requires_grad=False)
    return torch.zeros(entry.size, dtype=entry.properties.dtype)


def check_groups(engine: Engine, optimizers: Optimizers, groups: list[dict[str, Any]]) -> None:
    """CheckpointError unless the checkpoint's `groups` have one of the same parameters for each group of these optimizers."""
    saved = {frozenset(group["params"]) for group in groups}
    for optimizer in optimizers:
        for group in _names(engine, optimizer):
            if frozenset(group) not in saved:
                near = max(saved, key=lambda other: len(other & set(group)), default=frozenset())
                odd = sorted(near ^ set(group))[:3]
                raise CheckpointError(
                    f"{type(optimizer).__name__} has a parameter group that the checkpoint has not: it differs in {', '.join(odd)} from "
                    "the nearest. Make the groups as they were when it was saved."
                )


def restore(engine: Engine, optimizers: Optimizers, state: dict[str, Any]) -> None:
    """Hand the filled state to the optimizers, groups matched by the parameters they hold: see `check_groups`."""
    saved = {frozenset(group["params"]): group for group in state["param_groups"]} if optimizers else {}
    for optimizer in optimizers:
        numbered: dict[str, Any] = {"state": {}, "param_groups": []}
        names = _names(engine, optimizer)
        for group in names:
            first = sum(len(g["params"]) for g in numbered["param_groups"])
            settings = {key: value for key, value in saved[frozenset(group)].items() if key != "params"}
            numbered["param_groups"].append({**settings, "params": list(range(first, first + len(group)))})
        for number, name in enumerate(name for group in names for name in group):
            if name in state["state"]:
                numbered["state"][number] = state["state"][name]
        optimizer.load_state_dict(numbered)


def _names(engine: Engine, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters of each group, in its order."""
    slots = {id(slot.master): slot.name for slot in engine.slots}
    out = []
    for group in optimizer.param_groups:
        names = [slots.get(id(parameter)) for parameter in group["params"]]
        if None in names:
            raise ValueError(
                f"{type(optimizer).__name__} holds a parameter of shape {tuple(group['params'][names.index(None)].shape)} that is not one "
                "of this model's: make it from model.parameters(), after wrapping"
            )
        out.append([name for name in names if name is not None])
    return out
