"""lower: a bucket of semantic ops becomes its hops: `_c10d_functional` collectives, visible, each with its wait.

Requires: a graph after `bucket`.
Guarantees: no semantic op is left; every inserted node has `meta["val"]`, the names of its parameters and its transfer; one pack
before the first reduce hop, none between hops, one unpack after the last; a sync that follows its own bucket's reduce takes its
buffer as it is; attention without dropout that is computed again carries no random state (zcompile.passes.seedless).
Leaves alone: everything else. What is inserted is traced from the functions the eager ops run (zcompile.transfers): equal bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from zcompile import cost, transfers
from zcompile._torch_compat import detect_fake_mode, storage_key
from zcompile.layout import ParamSpec
from zcompile.ops import needs_wait
from zcompile.passes import seedless
from zcompile.passes.bucket import KEY
from zcompile.passes.context import Context
from zcompile.passes.nodes import (
    COLLECTIVES,
    GATHER,
    PART,
    REDUCE,
    REFRESH,
    SEMANTIC,
    SUM,
    TRAFFIC,
    TRANSFER,
    WAIT,
    WHOLE,
    WIRE,
    add_of,
    find,
    spec_of,
)
from zcompile.wire import WireFormat

NAME = "lower"
_INHERITED = (
    "stack_trace",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "seq_nr",
    "from_node",
    "custom",
    "fwd_source_fn_stack",
)
_TEMPLATES: dict[object, GraphModule] = {}
"""Traced transfers by all that shapes them, without values: equal blocks, and both halves of every graph, are traced once."""


def run(gm: GraphModule, context: Context) -> None:
    lowering = _Lowering(gm, context)
    if count := seedless.unwrap(gm, lowering.mode):
        context.note(f"{count} operations that are computed again draw nothing: no random state is kept for them")
    buckets: dict[int, list[Node]] = {}
    for node in find(gm.graph, *SEMANTIC):
        buckets.setdefault(node.meta[KEY], []).append(node)
    for group in buckets.values():
        if group[0].target is GATHER:
            lowering.gather(group)
        elif group[0].target is REDUCE:
            lowering.reduce(group)
        else:
            lowering.sync(group)
    lowering.erase()
    context.note(f"{len(buckets)} messages became {len(find(gm.graph, *COLLECTIVES))} collectives")
    if lowering.in_place:
        context.note(f"{lowering.in_place} parameters lie whole in memory that their level's ranks share: gathers of these move nothing")


def check(gm: GraphModule, context: Context) -> None:
    left = [node for node in gm.graph.nodes if getattr(node.target, "namespace", "") == "zcompile"]
    if left:
        raise AssertionError(f"semantic op left: {left[0].format_node()}")
    bare = [
        node for node in gm.graph.nodes if node.op == "call_function" and "val" not in node.meta and not _of_torch(node)
    ]
    if bare:
        raise AssertionError(f"node without a value: {bare[0].format_node()}")


def _of_torch(node: Node) -> bool:
    """torch's partitioner gives no value to what keeps the random state for a part that is recomputed, nor to its results."""
    sources = [node, *node.all_input_nodes] if node.target is operator.getitem else [node]
    return any(isinstance(source.target, torch._ops.HigherOrderOperator) for source in sources)


def _wire_of(collective: Node, spec: ParamSpec) -> WireFormat:
    """The format that the plan gives the hop of a collective; its role says which hop it is."""
    *_, level, transfer = next(arg for arg in collective.args if isinstance(arg, str)).split(".")
    wires: tuple[str, ...] = getattr(spec, transfer)
    return WireFormat.parse(wires[spec.levels.index(level)])


class _Lowering:
    def __init__(self, gm: GraphModule, context: Context):
        self.gm, self.context = gm, context
        self.mode = detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"])
        self.reduced: dict[Node, tuple[Node, int]] = {}
        """per-parameter piece -> (its bucket's buffer, pieces in it): so that a sync finds the buffer of its own reduce."""
        self.replaced: list[Node] = []
        self.in_place = 0
        """Gathers that became views of their copies."""

    def gather(self, group: list[Node]) -> None:
        specs = [spec_of(node) for node in group]
        self.in_place += len(specs) * specs[0].in_place
        wait = self.context.stage != "backward" and needs_wait(specs[0])
        given = any(user.op == "output" for node in group for user in node.users)

        def gather(copy: torch.Tensor) -> list[torch.Tensor]:
            if wait:
                copy = torch.ops._c10d_functional.wait_tensor(copy)
            wholes = transfers.gather(copy, specs)
            own = storage_key(copy)  # an output may not be a view of a copy
            return [w.clone() if given and storage_key(w) == own else w for w in wholes]

        wholes = self._insert(gather, ("gather", wait, given), [group[0].args[1]], specs, group[0])
        for node, spec in zip(wholes, specs, strict=True):
            node.meta[WHOLE] = spec.name
        self._replace(group, wholes)

    def reduce(self, group: list[Node]) -> None:
        specs = [spec_of(node) for node in group]

        def reduce(*grads: torch.Tensor) -> list[torch.Tensor]:
            flat = transfers.reduce(grads, specs)
            return [flat, *transfers.split(flat, specs)]

        flat, *parts = self._insert(reduce, ("reduce",), [node.args[0] for node in group], specs, group[-1])
        for number, part in enumerate(parts):
            self.reduced[part] = (flat, len(parts))
            if part is not flat:
                part.meta[PART] = (flat, number)
        self._replace(group, parts)

    def sync(self, group: list[Node]) -> None:
        specs = [spec_of(node) for node in group]
        totals = self._sum_onto_mains([node.args[0] for node in group])
        own = [self.reduced.get(total) for total in totals]  # type: ignore[arg-type]
        if (
            own[0] is not None
            and all(found == own[0] for found in own)
            and own[0][1] == len(group)
            and self._in_order(totals)
        ):

            def sync_buffer(flat: torch.Tensor) -> list[torch.Tensor]:
                return transfers.split(transfers.sync(flat, specs), specs)

            parts = self._insert(sync_buffer, ("sync",), [own[0][0]], specs, group[-1])
        else:

            def sync_parts(*parts: torch.Tensor) -> list[torch.Tensor]:
                return transfers.split(transfers.sync(transfers.join(parts, specs), specs), specs)

            parts = self._insert(sync_parts, ("sync", "join"), totals, specs, group[-1])
        self._replace(group, parts)

    def _sum_onto_mains(self, totals: list[Any]) -> list[Any]:
        """main + part for every part of a quantised bucket, in order: let the kernel that sums it add the mains; then the parts are
        the totals, and the sync takes the bucket's buffer as it is."""
        others = [add_of(total) for total in totals]
        if any(other is None or len(total.users) != 1 for total, other in zip(totals, others, strict=True)):
            return totals
        operands = [(a, b) if b in self.reduced else (b, a) for a, b in (total.args[:2] for total in totals)]
        mains, parts = [main for main, _ in operands], [part for _, part in operands]
        flat, count = self.reduced.get(parts[0], (None, 0))
        fits = all(
            main.op == "placeholder" and part in self.reduced and self.reduced[part][0] is flat
            for main, part in operands
        )
        if flat is None or flat.target is not SUM or not fits or count != len(parts) or not self._in_order(parts):
            return totals
        if any(len(part.users) != 1 for part in parts):
            return totals
        flat.update_arg(2, mains)
        return parts

    def _in_order(self, totals: list[Any]) -> bool:
        order = [part for part in self.reduced if part in set(totals)]
        return len(set(totals)) == len(totals) and order == totals

    def _insert(self, function: Callable[..., Any], kind: tuple[object, ...], inputs: Sequence[Any], specs: list[ParamSpec],
                anchor: Node) -> list[Node]:  # fmt: skip
        """The nodes of `function`, applied to `inputs`, before `anchor`; returns the nodes of its results."""
        values = [node.meta["val"] for node in inputs]
        shapes = tuple((tuple(v.shape), v.stride(), v.dtype, v.device) for v in values)
        columns = tuple((s.chain, s.shape, s.offset, s.unit_shard) for s in specs)
        key = (kind, shapes, columns, frozenset(self.context.decompositions))
        assert self.mode is not None
        with self.mode, torch.no_grad():
            template = _TEMPLATES.get(key)
            if template is None:
                template = make_fx(function, decomposition_table=self.context.decompositions)(*values)
                for node in template.graph.nodes:
                    node.meta.clear()
                _TEMPLATES[key] = template
            return self._copy(template, inputs, specs, anchor, str(kind[0]))

    def _copy(
        self, template: GraphModule, inputs: Sequence[Any], specs: list[ParamSpec], anchor: Node, transfer: str
    ) -> list[Node]:
        """Copy the template's nodes, with values of their own: which of them share memory is what later passes ask."""
        mapping = dict(zip((n for n in template.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        results: list[Node] = []
        names = tuple(spec.name for spec in specs)
        with self.gm.graph.inserting_before(anchor):
            for node in template.graph.nodes:
                if node.op == "output":
                    results = [mapping[result] for result in node.args[0]]
                elif node.op != "placeholder":
                    copied = self.gm.graph.node_copy(node, lambda n: mapping[n])
                    args, kwargs = map_arg((copied.args, copied.kwargs), lambda n: n.meta["val"])
                    copied.meta = {k: v for k, v in anchor.meta.items() if k in _INHERITED}
                    copied.meta["val"] = cast(Any, copied.target)(*args, **kwargs)
                    copied.meta["zc_parameters"], copied.meta[TRANSFER] = names, transfer
                    if node.target is WAIT and copied.args[0] in inputs:
                        copied.meta[REFRESH] = cost.refresh_hops(specs)
                    if node.target in TRAFFIC:
                        wire = _wire_of(copied, specs[0])
                        if wire.quantized:
                            copied.meta[WIRE] = wire.short
                    mapping[node] = copied
        return results

    def _replace(self, group: list[Node], results: list[Node]) -> None:
        for node, result in zip(group, results, strict=True):
            node.replace_all_uses_with(result)
            self.replaced.append(node)

    def erase(self) -> None:
        for node in reversed(self.replaced):
            self.gm.graph.erase_node(node)
        self.gm.graph.eliminate_dead_code()
