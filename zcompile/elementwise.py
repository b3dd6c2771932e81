"""Element-wise operations over masters: DTensor is told at once that tensors which lie alike stay where they are.

Before an operation runs for the first time on tensors of some shapes, DTensor lists every combination of placements over the dimensions of
the mesh and takes the cheapest. With a dimension per level that is n^levels combinations for each operation and shape of an optimizer's
step: seconds, before the first step of a job is over (docs/training.md). Where all tensors of an element-wise operation have the same
placements, the cheapest is to leave them, so that is answered here. Everything else goes to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from zcompile._torch_compat import DTensorSpec, OutputSharding, propagate_by, sharding_propagator

_LISTS = frozenset(
    f"aten::_foreach_{name}{mark}"
    for name in (
        "abs", "add", "addcdiv", "addcmul", "clamp_max", "clamp_min", "copy", "div", "exp", "lerp", "log", "maximum", "minimum", "mul",
        "neg", "pow", "reciprocal", "rsqrt", "sign", "sqrt", "sub",
    )
    for mark in ("", "_")
)  # fmt: skip
"""Those over lists of tensors: torch tags none of them as element-wise."""
_installed = False


def shortcut() -> None:
    """From now on element-wise operations over DTensors that lie alike are not searched for placements. Of the process; once."""
    global _installed
    if not _installed:
        propagator = sharding_propagator()
        propagate_by(_first(propagator, propagator.propagate_op_sharding_non_cached))
        _installed = True


def _first(propagator: Any, torchs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def propagate(schema: Any) -> Any:
        found = stays(propagator, schema)
        return torchs(schema) if found is None else found

    return propagate


def stays(propagator: Any, schema: Any) -> Any:
    """Where the result of an element-wise operation over tensors that lie alike is (an OutputSharding); None: ask torch."""
    if schema.op is torch.ops.aten.new_empty_strided.default:
        return _empty(propagator, schema)
    tensors = _tensors(schema) if _elementwise(schema.op) else None
    if not tensors:
        return None
    meta = propagator._propagate_tensor_meta_non_cached(schema)
    if isinstance(tensors[0], DTensorSpec):
        like = tensors[0]
        if like.tensor_meta is None or getattr(meta, "shape", None) != like.tensor_meta.shape:
            return None
        return OutputSharding(like.shallow_copy_with_tensor_meta(meta))
    if meta is None:  # in place
        return OutputSharding(None)
    if len(meta) != len(tensors[0]):
        return None
    specs = zip(tensors[0], meta, strict=True)
    return OutputSharding(tuple(spec.shallow_copy_with_tensor_meta(each) for spec, each in specs))


def _empty(propagator: Any, schema: Any) -> Any:
    """Where an empty tensor of a sharded one's shape is: where that is. None unless rows are sharded, and lie one after another.

    autograd copies a gradient into one if somebody else holds the gradient too, which may be so on some ranks only. There torch 2.11
    replicates what does not divide evenly, and the copy gathers: no other rank comes to that. 2.12 answers as this does.
    """
    like, shape = schema.args_schema[:2]
    if not isinstance(like, DTensorSpec) or like.tensor_meta is None or tuple(shape) != tuple(like.tensor_meta.shape):
        return None
    rows = [placement for placement in like.placements if type(placement) is Shard and placement.dim == 0]
    whole = [placement for placement in like.placements if type(placement) is Replicate]
    meta = propagator._propagate_tensor_meta_non_cached(schema)
    if not rows or len(rows) + len(whole) != len(like.placements) or meta.stride[0] != max(meta.stride):
        return None
    spec = like.shallow_copy_with_tensor_meta(meta)
    local = propagator._adjust_shape_and_stride_args(meta, schema, spec)  # the local shape in the global one's place
    return OutputSharding(spec, local, needs_redistribute=True, use_val_from_redistribute_schema=True)


def _elementwise(op: Any) -> bool:
    name = op.name().partition(".")[0]
    return name in _LISTS or name == "aten::copy_" or torch.Tag.pointwise in op.tags


def _tensors(schema: Any) -> list[Any]:
    """The specs of the arguments, those of lists as lists; [] unless all that meet in one element lie alike."""
    arguments = [*schema.args_schema, *schema.kwargs_schema.values()]
    if not all(_plain(argument) for argument in arguments):
        return []
    lists = [
        argument
        for argument in arguments
        if isinstance(argument, (list, tuple)) and any(isinstance(each, DTensorSpec) for each in argument)
    ]
    found = [argument for argument in arguments if isinstance(argument, DTensorSpec)]
    if not lists:
        return found if _alike(found) else []
    if not all(isinstance(spec, DTensorSpec) for each in lists for spec in each):
        return []
    if len({len(each) for each in lists}) != 1 or not all(_alike([*met, *found]) for met in zip(*lists, strict=True)):
        return []
    return lists


def _plain(argument: Any) -> bool:
    """A spec, or nothing that could be a tensor."""
    if isinstance(argument, (list, tuple)):
        return all(_plain(each) for each in argument)
    return argument is None or isinstance(argument, (DTensorSpec, bool, int, float, complex, torch.dtype, str))


def _alike(specs: list[Any]) -> bool:
    """Equal shapes on one mesh with equal placements, whole or sharded; a number that every rank has in full may come after the first."""
    if not specs or any(type(placement) not in (Shard, Replicate) for spec in specs for placement in spec.placements):
        return False
    first, *rest = specs
    return all(
        spec.mesh == first.mesh
        and (
            (spec.placements == first.placements and spec.tensor_meta.shape == first.tensor_meta.shape)
            or (not spec.tensor_meta.shape and all(type(placement) is Replicate for placement in spec.placements))
        )
        for spec in rest
    )
