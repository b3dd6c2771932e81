"""The four transfers as pure functions of tensors: what the eager ops run and what `lower` traces into the graph.

One text for both is why compiled equals eager bit for bit. A bucket is a list of parameters whose shards stand side by side on
the last axis ([..., shard_1 | shard_2 | ...]); a single parameter is a bucket of one. Every hop's result is contiguous, so there
is one pack before the first hop, none between hops, and one unpack after the last.

Gathers go outermost level first, reductions innermost first. A reduce hop is an all-to-all and a local fp32 sum in group order:
its bits do not depend on bucketing. Levels of size 1 have no hop.

A quantised hop sends a message (uint8) of records; zcompile.kernels.ops makes and reads them. The bits are those of the blocks of
each parameter alone, so they do not depend on bucketing either. Here each kernel does one thing; the `quantize` pass fuses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zcompile._torch_compat import all_gather, resolve_group
from zcompile.kernels import ops as kernels
from zcompile.kernels.geometry import Cut, Geometry, Piece
from zcompile.kernels.ordered_sum import ordered_sum
from zcompile.layout import Layout, ParamSpec
from zcompile.wire import COMPUTE_FORMATS, WireFormat

_c10d = torch.ops._c10d_functional
_FP32 = WireFormat.parse("fp32")


def dtype(name: str) -> torch.dtype:
    """torch.float32 for "float32" and for the wire format "fp32"; uint8 for those of codes."""
    return getattr(torch, name if name in COMPUTE_FORMATS else WireFormat.parse(name).torch_name)


def flat_geometry(rows: int, specs: Sequence[ParamSpec], pieces: bool = False) -> Geometry:
    """Of [rows, shards of `specs` side by side]; `pieces`: their pieces (a shard's share of one replica) instead."""
    return Geometry.of_rows(rows, tuple(spec.layout.piece if pieces else spec.layout.shard for spec in specs))


def whole_geometry(specs: Sequence[ParamSpec], pieces: bool = False) -> Geometry:
    """Of whole parameters beside messages that have a row for each shard (`pieces`: for each shard and replica)."""
    first = specs[0].layout
    parts = first.replicas if pieces else 1
    return Geometry(first.shards * parts, tuple(shard_piece(spec.layout, parts) for spec in specs), False)


def shard_piece(layout: Layout, parts: int) -> Piece:
    """A whole parameter beside rows that hold a `parts`-th of a shard each."""
    n = layout.shard // parts
    cut = Cut(n, layout.rows, layout.row, parts, layout.cuts)
    return Piece(n, layout.numel, () if layout.dense else cut)


def convert(x: Tensor, have: WireFormat, want: WireFormat, geometry: Geometry) -> Tensor:
    """Flat values or a message in one format -> in another; itself if they are the same. `geometry` is flat."""
    have, want = have.whole, want.whole
    if have == want:
        return x
    if have.quantized:
        plain = dtype(want.text) if not want.quantized else torch.float32
        x = kernels.dequantize(x, geometry.text, have.code.text, plain)
        return kernels.quantize([x], geometry.text, want.code.text) if want.quantized else x
    return kernels.quantize([x], geometry.text, want.code.text) if want.quantized else x.to(dtype(want.text))


def gather_hops(
    x: Tensor, have: WireFormat, hops: Iterable[tuple[int, str]], specs: Sequence[ParamSpec], transfer: str, rows: int
) -> tuple[Tensor, WireFormat, int]:
    """Gather over levels, each hop (level, wire format) in turn; what a hop sends as it came is not touched.

    Args:
        x: flat [rows, shards] (for "back": pieces) in the format `have`.

    Returns:
        all rows, their format and their number: group-major.
    """
    first, pieces = specs[0], transfer == "back"
    for level, text in hops:
        size = first.sizes[level - 1]
        if size == 1 or x.numel() == 0:
            continue
        wire = WireFormat.parse(text)
        x = convert(x, have, wire, flat_geometry(rows, specs, pieces))
        x = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x, size, first.role(level, transfer)))
        have, rows = wire.whole, rows * size
    return x, have, rows


def gather_in_place(mine: Tensor, whole: Tensor, level: int, spec: ParamSpec, transfer: str) -> Tensor:
    """One hop outside of graphs: every member's `mine`, which lies in its place in `whole` already, into `whole`; returns that."""
    all_gather(whole, mine, resolve_group(spec.role(level, transfer))).wait()
    return whole


def reduce_hops(
    x: Tensor | None, grads: Sequence[Tensor], levels: range, specs: Sequence[ParamSpec], transfer: str
) -> Tensor:
    """Reduce over levels.

    Args:
        x: flat [rows, pieces] fp32, or None: then of the whole `grads`, which the first hop packs or quantises.

    Returns:
        flat fp32, this rank's rows, summed in group order.
    """
    first = specs[0]
    wires = first.reduce if transfer == "reduce" else first.sync
    rows = first.layout.extents[-1] // first.layout.extents[levels.start - 1]
    empty = all(spec.layout.numel == 0 for spec in specs)
    for level in levels:
        size = first.sizes[level - 1]
        if size == 1 or empty:
            continue
        wire, role = WireFormat.parse(wires[level - 1]), first.role(level, transfer)
        rows //= size
        if wire.quantized:
            code, flat = wire.code.text, flat_geometry(rows, specs, pieces=True)
            if x is None:
                message = kernels.quantize(list(grads), whole_geometry(specs, pieces=True).text, code)
            else:
                message = kernels.quantize([x], flat_geometry(rows * size, specs, pieces=True).text, code)
            x = kernels.reduce(_all_to_all(message, size, role), size, [], flat.text, code)
        else:
            x = pack(grads, specs) if x is None else x
            x = ordered_sum(_all_to_all(x.to(dtype(wire.text)), size, role).view(size, x.numel() // size))
    return (pack(grads, specs) if x is None else x).to(torch.float32)


def _all_to_all(x: Tensor, size: int, role: str) -> Tensor:
    n = x.numel() // size
    return _c10d.wait_tensor(_c10d.all_to_all_single(x, [n] * size, [n] * size, role))


def gather(copy: Tensor, specs: Sequence[ParamSpec]) -> list[Tensor]:
    """Placement W down to whole.

    Args:
        copy: the compute copy of the unit of `specs`: [E_o / E_w, unit_shard], or [.., unit_record] bytes; all ranks' in one buffer where
            they are `in_place`.
        specs: parameters of one unit, in its order.

    Returns:
        each whole parameter in its own shape and the compute dtype; quantised ones share one buffer.
    """
    first = specs[0]
    if first.in_place:
        return [unpack(shards_in(copy, spec), spec.layout).to(dtype(spec.compute)) for spec in specs]
    if reads_peers(specs):
        level, geometry = first.peer_level, whole_geometry(specs)
        role, size = first.role(level, "gather"), first.sizes[level - 1]
        code = first.stored.code.text if first.stored.quantized else ""
        return _wholes(
            kernels.peer_gather(copy, size, role, geometry.text, code, dtype(first.compute)), geometry, specs
        )
    hops = ((level, first.gather[level - 1]) for level in range(first.w, 0, -1))
    mine = (
        columns(copy, specs).reshape(-1).contiguous()
    )  # columns of one element would be a view with a stride (torch < 2.13 refuses it)
    x, have, rows = gather_hops(mine, first.stored, hops, specs, "gather", first.held)
    if have.quantized:
        geometry = whole_geometry(specs)
        return _wholes(kernels.dequantize(x, geometry.text, have.code.text, dtype(first.compute)), geometry, specs)
    x = x.view(rows, -1)
    pieces = [x] if len(specs) == 1 else x.split([spec.layout.shard for spec in specs], dim=1)
    return [unpack(piece, spec.layout).to(dtype(spec.compute)) for piece, spec in zip(pieces, specs, strict=True)]


def reads_peers(specs: Sequence[ParamSpec]) -> bool:
    """Whether a gather of these copies what other ranks have in their memory: only whole units are, parts of one travel as messages."""
    first = specs[0]
    return bool(first.peer_level) and not first.in_place and first.unit_shard == sum(spec.layout.shard for spec in specs)


def shards_in(copy: Tensor, spec: ParamSpec) -> Tensor:
    """[E_o, shard]: one parameter of an `in_place` unit in the buffer of all ranks' copies."""
    shards, shard = spec.layout.shards, spec.layout.shard
    return copy.narrow(0, shards * spec.offset, shards * shard).view(shards, shard)


def _wholes(buffer: Tensor, geometry: Geometry, specs: Sequence[ParamSpec]) -> list[Tensor]:
    """The parameters in the buffer that a kernel wrote."""
    return [
        buffer.narrow(0, at, spec.layout.numel).view(spec.shape)
        for at, spec in zip(geometry.starts, specs, strict=False)
    ]


def barrier(spec: ParamSpec, device: torch.device) -> None:
    """All ranks that read one another's copies of this parameter have come here: a byte from each to each."""
    level = spec.peer_level
    token = torch.zeros(1, dtype=torch.uint8, device=device)
    _c10d.wait_tensor(_c10d.all_gather_into_tensor(token, spec.sizes[level - 1], spec.role(level, "barrier")))


def reduce(grads: Sequence[Tensor], specs: Sequence[ParamSpec]) -> Tensor:
    """Whole up to placement G, summed over the ranks of G's level.

    Args:
        grads: one whole gradient per parameter, in its shape.

    Returns:
        [E_o / E_g, replicas, sum of pieces] fp32, flat: the buckets' main-grad layout.
    """
    return reduce_hops(None, grads, range(1, specs[0].g + 1), specs, "reduce")


def sync(x: Tensor, specs: Sequence[ParamSpec]) -> Tensor:
    """Placement G to O, averaged over the world; the hops go on to the world and back where O is narrower.

    Args:
        x: flat [E_o / E_g, replicas, sum of pieces] fp32.

    Returns:
        [replicas, sum of pieces] fp32: divided once, here, by the world size (the mean over ranks, as DDP).
    """
    first = specs[0]
    levels = len(first.sizes)
    x = reduce_hops(x, (), range(first.g + 1, levels + 1), specs, "sync")
    back = ((level, first.back[level - 1]) for level in range(levels, first.o, -1))
    x, have, rows = gather_hops(x, _FP32, back, specs, "back", 1)
    x = convert(x, have, _FP32, flat_geometry(rows, specs, pieces=True))
    world = first.layout.extents[-1]
    if world > 1:
        x = x / world
    return x.view(first.layout.replicas, -1)


def residual(x: Tensor, spec: ParamSpec, transfer: str) -> Tensor:
    """What the first hop of a reduce or sync loses of `x` by quantising it: the new part of an error feedback's state.

    Args:
        x: the whole gradient (reduce), or flat at G (sync), fp32.
    """
    hop = spec.first_hop(transfer)
    assert hop is not None
    code = hop[1].code.text
    if transfer == "reduce":
        geometry = whole_geometry([spec], pieces=True)
    else:
        geometry = flat_geometry(spec.layout.extents[-1] // spec.layout.extents[spec.g], [spec], pieces=True)
    sent = kernels.dequantize(kernels.quantize([x], geometry.text, code), geometry.text, code, torch.float32)
    return x - sent.narrow(0, 0, x.numel()).view(x.shape)


def pack(grads: Sequence[Tensor], specs: Sequence[ParamSpec]) -> Tensor:
    """Whole gradients -> flat [E_o, replicas, sum of pieces]: the one copy before the first reduce hop."""
    parts = [
        pack_one(grad.reshape(-1), spec.layout).view(spec.layout.shards, spec.layout.replicas, spec.layout.piece)
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
    parts = []
    for _, padded, length, shards in layout.segments:
        if shards == 1:
            parts.append(flat.narrow(0, padded, length))
        else:
            rows = flat.narrow(0, padded, shards * layout.shard).view(shards, layout.shard)
            parts.append(rows.narrow(1, 0, length).reshape(-1))
    if len(parts) == 1:
        return parts[0].view(layout.shape)
    if not parts:
        return flat.new_empty(layout.shape)
    return torch.cat(parts).view(layout.shape)


def pack_one(flat: Tensor, layout: Layout) -> Tensor:
    """One parameter, flat: [numel] -> [shards * shard], zeros in the holes."""
    if layout.dense:
        return flat
    parts, end = [], 0
    for start, padded, length, shards in layout.segments:
        if padded > end:
            parts.append(flat.new_zeros(padded - end))
        values = flat.narrow(0, start, shards * length)
        if shards == 1:
            parts.append(values)
            end = padded + length
        else:
            holes = flat.new_zeros(shards, layout.shard - length)
            parts.append(torch.cat([values.view(shards, length), holes], dim=1).view(-1))
            end = padded + shards * layout.shard
    total = layout.shards * layout.shard
    if total > end:
        parts.append(flat.new_zeros(total - end))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else flat.new_zeros(0)


def columns(copy: Tensor, specs: Sequence[ParamSpec]) -> Tensor:
    """The columns of `specs` out of their unit's copy [E_o / E_w, unit_shard], or [.., unit_record] bytes."""
    first = specs[0]
    coded = first.stored.quantized
    rows = copy.view(first.held, first.unit_record if coded else first.unit_shard)
    runs: list[list[int]] = []
    for spec in specs:
        start = spec.record if coded else spec.offset
        end = start + spec.stored.bytes(spec.layout.shard) if coded else start + spec.layout.shard
        if runs and runs[-1][1] == start:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    parts = [rows.narrow(1, start, end - start) for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
