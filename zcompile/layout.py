"""Shard and padding arithmetic: where each row of a parameter lies, at every placement. Pure functions, no torch.

One parameter of R rows is cut over the levels 1..o of its optimizer placement exactly as a DTensor with `Shard(0)` on each
of them is (nested `torch.chunk`, fastest level first), so the pair coordinate is the most significant digit of the shard index

    index = sum_j c_j E_o / E_j          (j = 1..o)

Shards are padded to one size, `shard` elements, so that every hop moves equal, contiguous pieces:

    whole   = [E_o, shard]               index-major: the order of the rows, with holes where a shard is short
    at k    = [E_o / E_k, shard]         what a rank holds at placement k <= o
    at o    = [shard]                    = [replicas, piece]

`replicas` = E_m / E_o ranks hold the same shard; a sync goes on over them in `piece`s, so `shard` is a multiple of `replicas`.
Where values are quantised, a piece is a multiple of the block too, so that no block straddles two shards or two replicas.
Several parameters travel together by standing side by side on the last axis: no copy between hops, one unpack after the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

from zcompile.kernels.geometry import nested
from zcompile.wire import COMPUTE_FORMATS, WireFormat


def extents(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """E_0..E_m: ranks inside one group of each level, E_0 = 1."""
    out = [1]
    for size in sizes:
        out.append(out[-1] * size)
    return tuple(out)


ALIKE = 16
"""Equal shards in a row from which on a pack or unpack takes them in one operation, not one each: graphs do not grow with the machine."""


def _runs(rows: int, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(shards, rows of each) of nested chunks in their order; equal neighbours are one run, and chunks that are cut alike are cut once."""
    if not sizes:
        return ((1, rows),)
    size, inner = sizes[0], sizes[1:]
    each = -(-rows // size)
    full = rows // each if each else size
    short = rows - full * each
    found: list[tuple[int, int]] = []
    equal, tail = _runs(each, inner), _runs(short, inner) if short else ()
    repeated = ((equal[0][0] * full, equal[0][1]),) if len(equal) == 1 else equal * full
    empty = (size - full - bool(short)) * math.prod(inner)
    for shards, length in (*repeated, *tail, (empty, 0)):
        if not shards:
            continue
        if found and found[-1][1] == length:
            found[-1] = (found[-1][0] + shards, length)
        else:
            found.append((shards, length))
    return tuple(found)


@dataclass(frozen=True)
class Layout:
    """Where the elements of one parameter are. `sizes` are the level sizes, fastest first; `o` its optimizer placement.

    Attributes:
        shape: of the plain parameter; dimension 0 is cut, a scalar counts as one row.
        sizes: level sizes s_1..s_m.
        o: optimizer placement (0 = whole .. m).
        block: values per quantisation block, 1 if nothing is quantised.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    o: int
    block: int = 1

    @cached_property
    def extents(self) -> tuple[int, ...]:
        return extents(self.sizes)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @cached_property
    def row(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    @cached_property
    def shards(self) -> int:
        """E_o: how many different shards there are."""
        return self.extents[self.o]

    @cached_property
    def replicas(self) -> int:
        """E_m / E_o: how many ranks hold the same shard."""
        return self.extents[-1] // self.shards

    @cached_property
    def shard_rows(self) -> int:
        """Rows of the longest shard: ceil(R / E_o)."""
        return -(-self.rows // self.shards)

    @cached_property
    def piece(self) -> int:
        """Elements of a shard that one of its replicas sums in a sync: whole blocks."""
        return -(-self.shard_rows * self.row // (self.replicas * self.block)) * self.block

    @cached_property
    def shard(self) -> int:
        """Elements of a padded shard: a multiple of `replicas`."""
        return self.piece * self.replicas

    def width(self, placement: int) -> int:
        """Elements (padding included) that a rank holds at `placement` <= o."""
        return self.shard * (self.shards // self.extents[placement])

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """How many chunks each level makes of one, fastest level first."""
        return self.sizes[: self.o]

    def index(self, coordinates: tuple[int, ...]) -> int:
        """Shard index of the rank at `coordinates` (c_1..c_m): the coordinates beyond o do not matter."""
        index = 0
        for size, c in zip(self.sizes[: self.o], coordinates, strict=False):
            index = index * size + c
        return index

    def local_rows(self, coordinates: tuple[int, ...]) -> tuple[int, int]:
        """(first row, rows) that the rank at `coordinates` owns; rows may be 0 at the tail of an uneven cut."""
        return nested(self.rows, self.cuts, self.index(coordinates))

    @cached_property
    def dense(self) -> bool:
        """True if the padded whole has no holes: the whole parameter is then a view of it."""
        return self.shards * self.shard == self.numel

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int, int], ...]:
        """(first element, first element in the padded whole, elements, shards), in order, without empty ones; static, equal on all ranks.

        Neighbours without a hole between them are one segment of one shard. From `ALIKE` equal shards on, with a hole behind each, they
        are one segment too: so many `shards` of so many elements each.
        """
        merged: list[tuple[int, int, int, int]] = []

        def add(source: int, target: int, length: int) -> None:
            if merged:
                first, padded, before, shards = merged[-1]
                if shards == 1 and first + before == source and padded + before == target:
                    merged[-1] = (first, padded, before + length, 1)
                    return
            merged.append((source, target, length, 1))

        source = target = 0
        for shards, rows in _runs(self.rows, self.cuts):
            length = rows * self.row
            if length and length == self.shard:
                add(source, target, shards * length)
            elif length and shards >= ALIKE:
                merged.append((source, target, length, shards))
            else:
                for each in range(shards if length else 0):
                    add(source + each * length, target + each * self.shard, length)
            source, target = source + shards * length, target + shards * self.shard
        return tuple(merged)


@dataclass(frozen=True)
class ParamSpec:
    """All that the graph needs to know of one parameter; travels in the graph as text, so every compile key has it.

    Attributes:
        name: the first of its names in the model.
        shape, sizes, w, g, o: shape, level sizes, placements (0 = whole .. m).
        levels: level names, fastest first.
        topology: key of the topology, part of every role name.
        compute: torch dtype name of the whole weight ("float32", "bfloat16").
        gather, reduce, sync, back, refresh: wire format (`WireFormat.text`), one per level.
        block: what its shards are padded to a multiple of, for quantisation; 1 for none.
        feedback: beta of the error feedback of its gradient, None for none.
        peer: whether a gather reads the copies of the other ranks where they lie: see `peer_level`.
        mapped: whether those copies are memory that this rank's processor reads like its own: see `in_place`.
        unit: which unit's buffers hold it; `offset` and `unit_shard` say where: columns [offset, offset + shard) of unit_shard.
        record, unit_record: the same of a compute copy that is stored as codes, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    levels: tuple[str, ...]
    topology: str
    w: int
    g: int
    o: int
    compute: str
    gather: tuple[str, ...]
    reduce: tuple[str, ...]
    sync: tuple[str, ...]
    back: tuple[str, ...]
    refresh: tuple[str, ...]
    unit: str
    offset: int
    unit_shard: int
    block: int = 1
    feedback: float | None = None
    record: int = 0
    unit_record: int = 0
    peer: bool = False
    mapped: bool = False

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.shape, self.sizes, self.o, self.block)

    @cached_property
    def stored(self) -> WireFormat:
        """How the compute copy is stored: as the first gather hop that communicates sends it, in the compute dtype if none does."""
        for level in range(self.w, 0, -1):
            if self.sizes[level - 1] > 1 and self.layout.numel:
                return WireFormat.parse(self.gather[level - 1])
        return WireFormat.parse(COMPUTE_FORMATS[self.compute])

    @cached_property
    def held(self) -> int:
        """Shards of it in one rank's compute copy: E_o / E_w."""
        return self.layout.shards // self.layout.extents[self.w]

    @cached_property
    def has_copy(self) -> bool:
        """Whether there is a compute copy of its own: else the master is what gathers send."""
        return self.stored.text != "fp32" or self.layout.extents[self.w] != self.layout.shards

    @cached_property
    def peer_level(self) -> int:
        """The level whose ranks' memory a gather reads directly. 0: it is sent messages, because the plan says so, or because its ranks are
        those of several levels, or the copy is the master itself."""
        hops = [level for level in range(1, self.w + 1) if self.sizes[level - 1] > 1]
        return hops[0] if self.peer and len(hops) == 1 and self.layout.numel and self.has_copy else 0

    @cached_property
    def in_place(self) -> bool:
        """Whether the copies of the ranks of `peer_level` are parts of one buffer that all of them have mapped, [E_o, shard] for each
        parameter of a unit, one behind another: a gather is a view of it, and moves nothing. Plain values can lie so; codes are
        dequantised by each rank, and an image is its own."""
        return self.mapped and bool(self.peer_level) and not self.stored.quantized and not self.imaged

    @cached_property
    def delta(self) -> bool:
        """Whether a refresh sends what has changed. The deltas of one parameter are one format over all levels."""
        return bool(self.refresh_levels()) and WireFormat.parse(self.refresh[self.w]).delta

    @cached_property
    def lossless(self) -> bool:
        """Whether that brings the very bits of the weights: then what the holders have is the copy itself, whatever was sent before."""
        return self.delta and WireFormat.parse(self.refresh[self.w]).lossless

    @cached_property
    def imaged(self) -> bool:
        """Whether the holders keep an image: see Note [Images] in zcompile.params."""
        return self.delta and not self.lossless

    def first_hop(self, transfer: str) -> tuple[int, WireFormat] | None:
        """(level, wire format) of the first hop of a reduce or a sync that communicates; None if none does."""
        return next(iter(self._reduce_hops(transfer)), None)

    def _reduce_hops(self, transfer: str) -> list[tuple[int, WireFormat]]:
        """(level, wire format) of the hops of a reduce or a sync that communicate, in the order they run."""
        inside = transfer == "reduce"
        levels = range(1, self.g + 1) if inside else range(self.g + 1, len(self.sizes) + 1)
        wires = self.reduce if inside else self.sync
        return [(j, WireFormat.parse(wires[j - 1])) for j in levels if self.sizes[j - 1] > 1 and self.layout.numel]

    def feedback_widths(self) -> dict[str, int]:
        """Elements of the error feedback's state on one rank: of the whole gradient before a quantised reduce, of that at G before a
        quantised sync. {} without error feedback.

        Raises ValueError where a later hop is quantised and the first is not: what is lost there no state could hold.
        """
        if self.feedback is None:
            return {}
        found = {}
        for transfer, width in (("reduce", self.layout.numel), ("sync", self.layout.width(self.g))):
            hops = self._reduce_hops(transfer)
            if hops and hops[0][1].quantized:
                found[transfer] = width
            elif any(wire.quantized for _, wire in hops):
                level, wire = hops[0]
                raise ValueError(
                    f"error_feedback with {self.name!r}: the first hop of its {transfer} ({self.levels[level - 1]}) is {wire.short} "
                    "and a later one is quantised; give the first one a quantised format too, or leave error_feedback out"
                )
        return found

    def refresh_levels(self) -> list[int]:
        """Levels over which a refresh communicates, outermost first."""
        return [level for level in range(self.o, self.w, -1) if self.sizes[level - 1] > 1]

    @cached_property
    def text(self) -> str:
        """The argument of the semantic ops; `ParamSpec.parse` is its inverse."""
        return json.dumps([getattr(self, f) for f in self.__dataclass_fields__], separators=(",", ":"))

    @staticmethod
    @cache
    def parse(text: str) -> ParamSpec:
        values: list[Any] = [tuple(v) if isinstance(v, list) else v for v in json.loads(text)]
        return ParamSpec(*values)

    def role(self, level: int, transfer: str) -> str:
        """Name under which every rank registered its own group of `level` (1..m) for `transfer`."""
        return role_name(self.topology, self.levels[level - 1], transfer)

    @cached_property
    def chain(self) -> tuple[object, ...]:
        """Parameters with equal chains can share messages: same placements, formats and levels."""
        return (
            self.topology, self.w, self.g, self.o, self.compute, self.gather, self.reduce, self.sync, self.back, self.refresh,
            self.block, self.feedback, self.peer, self.mapped
        )  # fmt: skip


def side_by_side(bare: Sequence[ParamSpec]) -> list[ParamSpec]:
    """Parameters that share a unit, each told where in the unit's buffers it lies."""
    shards = list(accumulate((spec.layout.shard for spec in bare), initial=0))
    sizes = (spec.stored.bytes(spec.layout.shard) if spec.stored.quantized else 0 for spec in bare)
    records = list(accumulate(sizes, initial=0))
    return [
        replace(spec, offset=shards[i], unit_shard=shards[-1], record=records[i], unit_record=records[-1])
        for i, spec in enumerate(bare)
    ]


TRANSFERS = ("gather", "reduce", "sync", "refresh", "back")


def role_name(topology: str, level: str, transfer: str) -> str:
    return f"zc.{topology}.{level}.{transfer}"
