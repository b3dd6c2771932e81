"""Operations over lists of masters run on what this rank holds of them, at once.

An optimizer's step is a few operations over lists of all parameters. DTensor looks at every tensor of every list before it runs one,
and makes placements of its own for every plain number among them (the counts of steps): some 30 us for each parameter and step, in
which a device has nothing to do, as a step begins when a backward is over. Where all tensors that meet in one element lie alike,
sharded or whole, what such an operation does to a shard is what it does to the whole. Everything else goes by DTensor's way.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from zcompile._torch_compat import by_dtensor, handle_by, wrap_local
from zcompile.params import local_of

_FUSED = ("_fused_adam_", "_fused_adamw_", "_fused_adagrad_", "_fused_sgd_")
_LISTS = (
    "abs", "add", "addcdiv", "addcmul", "clamp_max", "clamp_min", "copy", "div", "exp", "lerp", "log", "maximum", "minimum", "mul", "neg",
    "pow", "reciprocal", "rsqrt", "sign", "sqrt", "sub",
)  # fmt: skip
"""What `_foreach_` does element by element. torch tags none of them so."""
_installed = False


def shortcut() -> None:
    """From now on in this process; once."""
    global _installed
    if _installed:
        return
    _installed = True
    for name in (*_FUSED, *(f"_foreach_{each}{mark}" for each in _LISTS for mark in ("", "_"))):
        packet = getattr(torch.ops.aten, name, None)
        for overload in () if packet is None else packet.overloads():
            if overload != "out":
                handle_by(getattr(packet, overload), _run)


def _run(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    like = next((each for each in lists if isinstance(each[0], DTensor)), None)
    alone = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if like is None or not _lie_alike(like, lists, alone):
        return by_dtensor(op, args, kwargs)
    with torch.no_grad():
        found = op(*map(_local, args), **{name: _local(value) for name, value in kwargs.items()})
    if found is None:  # in place
        return None
    if any(each.dtype != whole.dtype for each, whole in zip(found, like, strict=True)):  # integers and a fraction
        return by_dtensor(op, args, kwargs)
    return [wrap_local(each, whole) for each, whole in zip(found, like, strict=True)]


def _local(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [local_of(each) for each in value]
    return local_of(value)


_MET: OrderedDict[tuple[int, ...], list[Any]] = OrderedDict()
"""Placements of lists that were found to lie alike, for the next step; by the number of lists, their length, and what comes first."""
_MOST = 64


def _lie_alike(like: Sequence[Any], lists: Sequence[Sequence[Any]], alone: Sequence[Tensor]) -> bool:
    """All that meet in one element have equal placements on one mesh, none partial, and are of one shape and dtype; or are plain numbers,
    which every rank has."""
    if not all(_is_a_number(value) for value in alone):
        return False
    if any(len(each) != len(like) for each in lists):
        return False
    specs = [value._spec if isinstance(value, DTensor) else value.dim() for each in lists for value in each]
    key = (len(lists), len(like), id(specs[0]))
    met = _MET.get(key)
    if met is not None and len(met) == len(specs) and all(map(operator.is_, met, specs)):
        return True
    for place, spec in enumerate(specs):
        first = like[place % len(like)]
        if not isinstance(first, DTensor) or not (spec == 0 if isinstance(spec, int) else _meets(first._spec, spec)):
            return False
    _MET[key] = specs
    if len(_MET) > _MOST:
        _MET.popitem(last=False)
    return True


def _meets(first: Any, spec: Any) -> bool:
    if any(type(placement) not in (Shard, Replicate) for placement in first.placements):
        return False
    alike: bool = (
        spec.mesh == first.mesh and spec.placements == first.placements and spec.tensor_meta == first.tensor_meta
    )
    return alike


def _is_a_number(value: Tensor) -> bool:
    whole = not isinstance(value, DTensor) or all(type(each) is Replicate for each in value._spec.placements)
    return whole and value.dim() == 0
