"""The four transfers as pure functions of tensors: what the eager ops run and what `lower` traces into the graph.

One text for both is why compiled equals eager bit for bit. A bucket is a list of parameters whose shards stand side by side on
the last axis ([..., shard_1 | shard_2 | ...]); a single parameter is a bucket of one. Every hop's result is contiguous, so there
is one pack before the first hop, none between hops, and one unpack after the last.

Gathers go outermost level first, reductions innermost first. A reduce hop is an all-to-all and a local fp32 sum in group order:
its bits do not depend on bucketing, and it has the shape of a quantised hop. Levels of size 1 have no hop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zcompile.kernels.ordered_sum import ordered_sum
from zcompile.layout import Layout, ParamSpec

_c10d = torch.ops._c10d_functional


def dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _gather_hop(x: Tensor, wire: str, spec: ParamSpec, level: int, transfer: str) -> Tensor:
    """[n] -> [s_level * n] in the wire dtype, group-major; a level of size 1 has no hop and no cast."""
    size = spec.sizes[level - 1]
    if size == 1 or x.numel() == 0:
        return x
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.to(dtype(wire)), size, spec.role(level, transfer)))


def _reduce_hop(x: Tensor, wire: str, spec: ParamSpec, level: int, transfer: str) -> Tensor:
    """[s_level * n] -> [n] fp32: this rank's slice, summed in group order."""
    size = spec.sizes[level - 1]
    if size == 1 or x.numel() == 0:
        return x.to(torch.float32)
    n = x.numel() // size
    received = _c10d.all_to_all_single(x.to(dtype(wire)), [n] * size, [n] * size, spec.role(level, transfer))
    return ordered_sum(_c10d.wait_tensor(received).view(size, n))


def gather(columns: Tensor, specs: Sequence[ParamSpec]) -> list[Tensor]:
    """Placement W down to whole.

    Args:
        columns: [E_o / E_w, sum of shards], the compute copies of `specs` side by side.
        specs: parameters with equal chains.

    Returns:
        each whole parameter in its own shape and the compute dtype.
    """
    first = specs[0]
    x = columns.reshape(-1)
    for level in range(first.w, 0, -1):
        x = _gather_hop(x, first.gather[level - 1], first, level, "gather")
    shards = first.layout.shards
    x = x.view(shards, -1)
    if len(specs) == 1:
        return [unpack(x, first.layout).to(dtype(first.compute))]
    pieces = x.split([spec.layout.shard for spec in specs], dim=1)
    return [unpack(piece, spec.layout).to(dtype(spec.compute)) for piece, spec in zip(pieces, specs, strict=True)]


def reduce(grads: Sequence[Tensor], specs: Sequence[ParamSpec]) -> Tensor:
    """Whole up to placement G, summed over the ranks of G's level.

    Args:
        grads: one whole gradient per parameter, in its shape.

    Returns:
        [E_o / E_g, replicas, sum of pieces] fp32, flat: the buckets' main-grad layout.
    """
    return _reduce(pack(grads, specs), specs[0], range(1, specs[0].g + 1), "reduce")


def sync(x: Tensor, specs: Sequence[ParamSpec]) -> Tensor:
    """Placement G to O, averaged over the world; the hops go on to the world and back where O is narrower.

    Args:
        x: flat [E_o / E_g, replicas, sum of pieces] fp32.

    Returns:
        [replicas, sum of pieces] fp32: divided once, here, by the world size (the mean over ranks, as DDP).
    """
    first = specs[0]
    levels = len(first.sizes)
    x = _reduce(x, first, range(first.g + 1, levels + 1), "sync")
    for level in range(levels, first.o, -1):
        x = _gather_hop(x, first.back[level - 1], first, level, "back").to(torch.float32)
    world = first.layout.extents[-1]
    if world > 1:
        x = x / world
    return x.view(first.layout.replicas, -1)


def _reduce(x: Tensor, first: ParamSpec, levels: range, transfer: str) -> Tensor:
    wires = first.reduce if transfer == "reduce" else first.sync
    for level in levels:
        x = _reduce_hop(x, wires[level - 1], first, level, transfer)
    return x.to(torch.float32)


def pack(grads: Sequence[Tensor], specs: Sequence[ParamSpec]) -> Tensor:
    """Whole gradients -> flat [E_o, replicas, sum of pieces]: the one copy before the first reduce hop."""
    parts = [
        _pad(grad.reshape(-1), spec.layout).view(spec.layout.shards, spec.layout.replicas, spec.layout.piece)
        for grad, spec in zip(grads, specs, strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).reshape(-1)


def join(parts: Sequence[Tensor], specs: Sequence[ParamSpec]) -> Tensor:
    """Flat per-parameter tensors at G -> the bucket's flat tensor at G (for a sync that does not follow its own reduce)."""
    if len(parts) == 1:
        return parts[0].reshape(-1)
    first = specs[0]
    shape = (first.layout.shards // first.layout.extents[first.g], first.layout.replicas)
    views = [p.view(*shape, spec.layout.piece) for p, spec in zip(parts, specs, strict=True)]
    return torch.cat(views, dim=2).reshape(-1)


def split(x: Tensor, specs: Sequence[ParamSpec]) -> list[Tensor]:
    """The inverse of `join`: flat per-parameter tensors, views where the bucket has one parameter or one row."""
    if len(specs) == 1:
        return [x.reshape(-1)]
    total = sum(spec.layout.piece for spec in specs)
    pieces = x.view(x.numel() // max(total, 1), total).split([spec.layout.piece for spec in specs], dim=1)
    return [p.reshape(-1) for p in pieces]


def unpack(x: Tensor, layout: Layout) -> Tensor:
    """[shards, shard] with holes -> the whole parameter: a view where there are none and x is contiguous."""
    if layout.dense:
        return x.reshape(layout.shape)
    flat = x.reshape(-1)
    parts = [flat.narrow(0, padded, length) for _, padded, length in layout.segments]
    if len(parts) == 1:
        return parts[0].view(layout.shape)
    if not parts:
        return flat.new_empty(layout.shape)
    return torch.cat(parts).view(layout.shape)


def _pad(flat: Tensor, layout: Layout) -> Tensor:
    """[numel] -> [shards * shard], zeros in the holes."""
    if layout.dense:
        return flat
    parts, end = [], 0
    for start, padded, length in layout.segments:
        if padded > end:
            parts.append(flat.new_zeros(padded - end))
        parts.append(flat.narrow(0, start, length))
        end = padded + length
    total = layout.shards * layout.shard
    if total > end:
        parts.append(flat.new_zeros(total - end))
    return torch.cat(parts) if parts else flat.new_zeros(0)


def columns(copy: Tensor, specs: Sequence[ParamSpec]) -> Tensor:
    """The columns of `specs` out of their unit's copy [E_o / E_w, unit_shard]; the whole copy if `specs` is the whole unit."""
    first = specs[0]
    rows = copy.view(first.layout.shards // first.layout.extents[first.w], first.unit_shard)
    runs: list[list[int]] = []
    for spec in specs:
        if runs and runs[-1][1] == spec.offset:
            runs[-1][1] = spec.offset + spec.layout.shard
        else:
            runs.append([spec.offset, spec.offset + spec.layout.shard])
    parts = [rows.narrow(1, start, end - start) for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
