"""A workload under a plan as lowered graphs: stretches of computing, and between them the hops of the plan's units.

The graphs go through the real `schedule` pass and are played by the simulator as compiled ones are. A stretch is one node that says its
seconds itself (zcompile.times.SECONDS); a hop is the collective that `lower` would put there, with the bytes of the same closed forms
(zcompile.cost) and the same unit, so a plan is costed without being traced. Kernels around the hops (packing, sums, quantisers) take the
bytes that they move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from zcompile import cost, times
from zcompile.layout import ParamSpec, side_by_side
from zcompile.params import grouped
from zcompile.passes import schedule
from zcompile.passes.context import Context
from zcompile.passes.nodes import ALL_GATHER, ALL_TO_ALL, REFRESH, TRANSFER, WAIT, WIRE
from zcompile.passes.work import WEIGHTS
from zcompile.planner.workload import Workload
from zcompile.resolved import ResolvedPlan
from zcompile.simulator import Refresh, refreshes
from zcompile.times import SECONDS
from zcompile.wire import WireFormat

FLOAT = 4


@dataclass(frozen=True)
class Piece:
    """One unit of a plan, and when the workload needs it (numbers of its operations; -1: never). `read`, `again` and `reduced` are those of
    its parameters that forward reads, that backward reads, and that have a gradient: what travels."""

    specs: tuple[ParamSpec, ...]
    read: tuple[ParamSpec, ...]
    again: tuple[ParamSpec, ...]
    reduced: tuple[ParamSpec, ...]
    trainable: bool
    forward: int
    backward: int
    gradient: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    def travelling(self, transfer: str, backward: bool = False) -> tuple[ParamSpec, ...]:
        """The parameters that a transfer carries; a gather in forward or in backward."""
        if transfer == "gather":
            return self.again if backward else self.read
        return self.specs if transfer == "refresh" else self.reduced

    def hops(self, transfer: str, backward: bool = False) -> list[tuple[str, str, int, str, int]]:
        """(kind, level, size of the level, wire format, bytes that one rank receives) of each hop of a transfer, in order; the kind is the
        transfer, or "back" on the way back of a sync."""
        specs = self.travelling(transfer, backward)
        if not specs:
            return []
        first = specs[0]
        found: list[tuple[str, str, int, str, int]] = []
        for level, wire, kind in cost.transfer_levels(first, transfer):
            received = sum(cost.hop_bytes(spec.layout, level, wire, kind) for spec in specs)
            if received:
                found.append((kind, first.levels[level - 1], first.sizes[level - 1], wire.short, received))
        return found


class _Nodes:
    """Makes nodes of one graph."""

    def __init__(self, context: Context):
        self.graph, self.context = Graph(), context

    def input(self, name: str, size: int) -> Node:
        first = next(iter(self.graph.nodes), None)  # inputs stand before everything
        with self.graph.inserting_before(first) if first else contextlib.nullcontext():
            node = self.graph.placeholder(name)
        node.meta["val"] = _bytes(size)
        return node

    def work(
        self, name: str, inputs: Sequence[Node], size: int, seconds: float, flops: float = 0.0, transfer: str = ""
    ) -> Node:
        """Something that takes seconds of the device and makes `size` bytes."""
        node = self.graph.call_function(stretch, tuple(inputs))
        node.meta.update({"val": _bytes(size), SECONDS: (seconds, flops)})
        if transfer:
            node.meta[TRANSFER] = transfer
        return node

    def moved(
        self, what: str, inputs: Sequence[Node], size: int, read: int, transfer: str, names: tuple[str, ...]
    ) -> Node:
        """A kernel around a hop: as long as the memory takes for what it reads and writes."""
        device = self.context.plan.topology.device
        node = self.work(
            what, inputs, size, max((read + size) / device.memory_bandwidth, device.overhead), 0.0, transfer
        )
        node.meta["zc_parameters"] = names
        return node

    def hop(self, source: Node, hop: Any, transfer: str, names: tuple[str, ...], message: int) -> Node:
        """The collective of a hop and its wait; returns the wait."""
        kind, level, size, wire, received = hop
        role = f"zc.{level}.{kind}"
        if transfer == "gather" or kind == "back":
            launch = self.graph.call_function(ALL_GATHER, (source, size, role))
        else:
            part = message // size
            launch = self.graph.call_function(ALL_TO_ALL, (source, [part] * size, [part] * size, role))
        format = WireFormat.parse(wire)
        launch.meta.update({TRANSFER: transfer, "zc_parameters": names, **({WIRE: wire} if format.quantized else {})})
        launch.meta["val"] = _bytes(received * size // (size - 1), format)
        wait = self.graph.call_function(WAIT, (launch,))
        wait.meta.update({"val": launch.meta["val"], TRANSFER: transfer, "zc_parameters": names})
        return wait

    def wait_for_copy(self, copy: Node, names: tuple[str, ...], hops: Sequence[Any]) -> Node:
        """hops: of the copy's refresh."""
        node = self.graph.call_function(WAIT, (copy,))
        refresh = tuple((level, received) for _, level, _, _, received in hops)
        node.meta.update({"val": copy.meta["val"], TRANSFER: "gather", "zc_parameters": names, REFRESH: refresh})
        return node

    def done(self, outputs: Sequence[Node]) -> Graph:
        self.graph.output(tuple(outputs))
        schedule.place(self.graph, self.context)
        return self.graph


def stretch(*inputs: Any) -> Any:
    """Stands for a stretch of computing in a skeleton; never called."""
    raise RuntimeError("a skeleton is played, not run")


def _bytes(size: int, format: WireFormat | None = None) -> torch.Tensor:
    """So many bytes; as elements of a native format where one is given."""
    dtype = torch.uint8 if format is None or format.quantized else getattr(torch, format.torch_name)
    return torch.empty(max(size, 0) // dtype.itemsize, dtype=dtype, device="meta")


class Skeleton:
    """A workload under a resolved plan.

    Args:
        overlap, memory: as in zcompile.options.Options.
        known: the plan's pieces, where they have been made before.
    """

    def __init__(
        self,
        workload: Workload,
        plan: ResolvedPlan,
        overlap: int = 0,
        memory: int = 0,
        known: list[Piece] | None = None,
    ):
        self.workload, self.plan, self.overlap, self.memory = workload, plan, overlap, memory
        self.pieces = pieces(workload, plan) if known is None else known
        self.clock = workload.clock(plan.topology.device)
        self.flops = [op.flops for op in workload.ops]

    @property
    def specs(self) -> list[ParamSpec]:
        return [spec for piece in self.pieces for spec in piece.specs]

    @property
    def _trained(self) -> list[ParamSpec]:
        return [spec for piece in self.pieces if piece.trainable for spec in piece.specs]

    def refreshes(self) -> list[Refresh]:
        """Of one step, in unit order: what a frozen parameter does not need, it does not get."""
        return refreshes(self._trained)

    def state(self, accumulating: bool) -> dict[str, int]:
        """Model-state bytes on one rank, by zcompile.cost.step_state."""
        return cost.step_state(self.specs, {spec.name for spec in self._trained}, accumulating)

    # -- graphs ------------------------------------------------------------------------------------------------------------------

    def forward(self) -> Graph:
        """Its outputs are what is kept for backward."""
        workload, nodes = self.workload, self._nodes("forward")
        events = sorted((piece.forward, number) for number, piece in enumerate(self.pieces) if piece.forward >= 0)
        wholes: list[Node] = []
        kept: list[Node] = []
        last = 0
        marks = [at for at, _ in events[1:]] + [workload.split]
        for (at, number), until in zip(events, marks, strict=True):
            if at > last and not kept:  # before the first weight
                kept.append(self._stretch(nodes, (), last, at, self._growth(last, at)))
            wholes.append(self._gather(nodes, self.pieces[number], fresh=False))
            if until > at:
                before = kept[-1:]
                kept.append(self._stretch(nodes, (*before, *wholes), at, until, self._growth(at, until)))
                wholes = []
            last = until
        return nodes.done(kept)

    def backward(self, accumulate: bool) -> Graph:
        """accumulate: its gradients stop at G and are added to the main grads; else they go on to O."""
        workload, nodes = self.workload, self._nodes("backward")
        end = len(workload.ops)
        events: list[tuple[int, int, int]] = []
        for number, piece in enumerate(self.pieces):
            if piece.backward >= 0:
                events.append((piece.backward, 0, number))
            if piece.trainable and piece.gradient >= 0:
                events.append((piece.gradient + 1, 1, number))
        events.sort()
        marks = sorted({workload.split, end, *(at for at, _, _ in events)})
        saved = [self._growth(a, b) for a, b in self._forward_marks()]
        inputs = [nodes.input(f"saved_{number}", size) for number, size in enumerate(saved)]
        wholes: list[Node] = []
        outputs: list[Node] = []
        previous: list[Node] = []
        by_place: dict[int, list[tuple[int, int]]] = {}
        for at, kind, number in events:
            by_place.setdefault(at, []).append((kind, number))
        for index, at in enumerate(marks):
            for kind, number in by_place.get(at, ()):
                if kind == 0:
                    wholes.append(self._gather(nodes, self.pieces[number], fresh=True))
                elif previous:
                    outputs += self._reduce(nodes, self.pieces[number], previous[-1], accumulate)
            if index + 1 == len(marks):
                break
            until = marks[index + 1]
            done = (until - workload.split) / max(end - workload.split, 1)
            taken = max(0, round((1 - done) * len(inputs)))
            reads, inputs = inputs[taken:], inputs[:taken]
            made = sum(
                spec.layout.numel
                for kind, number in by_place.get(until, ())
                for spec in (self.pieces[number].specs if kind == 1 else ())
                if workload.uses[spec.name].product
            )
            node = self._stretch(nodes, (*previous[-1:], *wholes, *reads), at, until, 0, made)
            previous.append(node)
            wholes = []
        return nodes.done([*outputs, *previous[-1:]])

    def _nodes(self, stage: str) -> _Nodes:
        return _Nodes(
            Context(
                stage, self.plan, name="skeleton", overlap=self.overlap, memory=self.memory, tokens=self.workload.tokens
            )
        )

    def _forward_marks(self) -> list[tuple[int, int]]:
        at = sorted({0, self.workload.split, *(piece.forward for piece in self.pieces if piece.forward >= 0)})
        return list(pairwise(at))

    @cached_property
    def _kept(self) -> list[int]:
        """After each operation of the forward: bytes alive by then that stay to its end."""
        forward = self.workload.live[: self.workload.split]
        return list(reversed(list(accumulate(reversed(forward), min))))

    def _growth(self, begin: int, end: int) -> int:
        """Bytes of what a stretch of the forward leaves to the backward."""
        return self._kept[end - 1] - (self._kept[begin - 1] if begin else 0) if end else 0

    def _stretch(self, nodes: _Nodes, inputs: Sequence[Node], begin: int, end: int, keeps: int,
                 made: int = 0) -> Node:  # fmt: skip
        """made: elements of the gradients that its products make."""
        seconds, flops = self.clock[end] - self.clock[begin], sum(self.flops[begin:end])
        node = nodes.work(f"{begin}..{end}", inputs, keeps, seconds, flops)
        node.meta[WEIGHTS] = made + sum(op.weights for op in self.workload.ops[begin:end])
        return node

    def _gather(self, nodes: _Nodes, piece: Piece, fresh: bool) -> Node:
        """fresh: the copy is known to be (in a backward), else the graph waits for it."""
        specs = piece.travelling("gather", backward=fresh)
        first, names = specs[0], tuple(spec.name for spec in specs)
        rows = first.held
        size = sum(rows * spec.stored.bytes(spec.layout.shard) for spec in specs)
        x = nodes.input(f"copy_{first.unit}", size)
        x.meta[TRANSFER] = "gather"
        if not fresh and first.has_copy:
            x = nodes.wait_for_copy(x, names, piece.hops("refresh"))
        hops = piece.hops("gather", backward=fresh)
        for hop in hops:
            x = nodes.hop(x, hop, "gather", names, 0)
        width = torch.empty(0, dtype=getattr(torch, first.compute)).itemsize
        if hops and (first.stored.quantized or not all(spec.layout.dense for spec in specs) or len(specs) > 1):
            x = nodes.moved("unpack", [x], numel(specs) * width, _size(x), "gather", names)
        return x

    def _reduce(self, nodes: _Nodes, piece: Piece, gradient: Node, accumulate: bool) -> list[Node]:
        first, names = piece.reduced[0], tuple(spec.name for spec in piece.reduced)
        width = torch.empty(0, dtype=getattr(torch, first.compute)).itemsize
        x, whole = gradient, numel(piece.reduced)
        message = whole * width
        rows = first.layout.extents[-1]
        for transfer in ("reduce",) if accumulate else ("reduce", "sync"):
            for hop in piece.hops(transfer):
                kind, _, size, wire, received = hop
                sent = received * size // (size - 1)
                if kind == "back":
                    x = nodes.hop(x, hop, "sync", names, 0)
                    message = sent
                    continue
                if message != sent or WireFormat.parse(wire).quantized or x is gradient:
                    x = nodes.moved("pack", [x], sent, message, transfer, names)
                x = nodes.hop(x, hop, transfer, names, sent)
                rows //= size
                message = FLOAT * whole * rows // first.layout.extents[-1]
                x = nodes.moved("sum", [x], message, sent, transfer, names)
        if accumulate:
            x = nodes.moved("accumulate", [x], 0, 2 * FLOAT * whole // first.layout.extents[first.g], "reduce", names)
        return [x]


def numel(specs: Sequence[ParamSpec]) -> int:
    """Elements with padding: what a gather makes whole."""
    return sum(spec.layout.shards * spec.layout.shard for spec in specs)


def _size(node: Node) -> int:
    return times.value_bytes(node.meta["val"])


def pieces(workload: Workload, plan: ResolvedPlan) -> list[Piece]:
    """The units that wrapping the model would make, in their order."""
    found = []
    for number, run in enumerate(grouped(workload.module, plan, workload.compute)):
        bare = [ParamSpec(**fields, unit=f"u{number}", offset=0, unit_shard=0) for _, fields in run]
        uses = [workload.uses[spec.name] for spec in bare]
        specs = side_by_side(bare)
        read, again, reduced = (
            tuple(spec for spec, use in zip(specs, uses, strict=True) if getattr(use, when) >= 0)
            for when in ("forward", "backward", "gradient")
        )
        found.append(
            Piece(
                tuple(specs),
                read,
                again,
                reduced,
                run[0][0].requires_grad,
                min((use.forward for use in uses if use.forward >= 0), default=-1),
                min((use.backward for use in uses if use.backward >= 0), default=-1),
                max((use.gradient for use in uses), default=-1),
            )
        )
    return found
