"""Element-wise operations over masters: DTensor is told at once that tensors which lie alike stay where they are.

Before an operation runs for the first time on tensors of some shapes, DTensor lists every combination of placements over the dimensions of
the mesh and takes the cheapest. With a dimension per level that is n^levels combinations for each operation and shape of an optimizer's
step: seconds, before the first step of a job is over (docs/training.md). Where all tensors of an element-wise operation have the same
placements, the cheapest is to leave them, so that is answered here. Everything else goes to torch; operations over lists do not come here
(zcompile.locally).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from zcompile._torch_compat import DTensorSpec, OutputSharding, propagate_by, sharding_propagator

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
    like = tensors[0]
    if like.tensor_meta is None or getattr(meta, "shape", None) != like.tensor_meta.shape:
        return None
    return OutputSharding(like.shallow_copy_with_tensor_meta(meta))


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
    return op is torch.ops.aten.copy_.default or torch.Tag.pointwise in op.tags


def _tensors(schema: Any) -> list[Any]:
    """The specs of the arguments; [] unless all that meet in one element lie alike."""
    arguments = [*schema.args_schema, *schema.kwargs_schema.values()]
    if not all(_plain(argument) for argument in arguments):
        return []
    found = [argument for argument in arguments if isinstance(argument, DTensorSpec)]
    return found if _alike(found) else []


def _plain(argument: Any) -> bool:
    """A spec, or nothing that could be a tensor."""
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
