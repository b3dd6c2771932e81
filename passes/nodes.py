"""What passes ask of a node: is it one of ours, which parameter, which collective. Never by its name."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from zcompile import ops  # noqa: F401  (defines the semantic ops)
from zcompile.layout import ParamSpec

aten = torch.ops.aten
_c10d = torch.ops._c10d_functional

GATHER = torch.ops.zcompile.gather.default
REDUCE = torch.ops.zcompile.reduce.default
SYNC = torch.ops.zcompile.sync.default
SEMANTIC = (GATHER, REDUCE, SYNC)
ALL_GATHER = _c10d.all_gather_into_tensor.default
ALL_TO_ALL = _c10d.all_to_all_single.default
WAIT = _c10d.wait_tensor.default
_kernels = torch.ops.zcompile_kernels
QUANTIZE = _kernels.quantize.default
DEQUANTIZE = _kernels.dequantize.default
SUM = _kernels.reduce.default
REQUANTIZE = _kernels.requantize.default
ACCUMULATE_INTO = _kernels.accumulate.default
PEER_GATHER = _kernels.peer_gather.default
"""Reads the compute copies of a level's ranks where they lie. No message: it waits for nobody, as the wait on its copy has done so."""
QUANTIZERS = (QUANTIZE, DEQUANTIZE, SUM, REQUANTIZE, ACCUMULATE_INTO)
COLLECTIVES = (ALL_GATHER, ALL_TO_ALL)
WIRE = "zc_wire"
"""meta key of a collective whose message is quantised: its wire format, `WireFormat.short`."""
TRANSFER = "zc_transfer"
"""meta key of a node that belongs to a transfer: "gather", "reduce" or "sync"."""
REFRESH = "zc_refresh"
"""meta key of a forward's wait for a copy: the hops of its refresh (level, bytes that one rank receives), in their order."""
PART = "zc_part"
"""meta key of one parameter's part of a bucket's reduced buffer: (the buffer's node, number of the part)."""
WHOLE = "zc_whole"
"""meta key of a node that is a gathered weight, its parameter's name: its unpack may be a copy, which no view leads to."""

VIEWS_AND_CASTS = {
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten._unsafe_view.default,
    aten.reshape.default, aten.slice.Tensor, aten.select.int, aten.expand.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.alias.default, aten.detach.default,
    aten.clone.default, aten._to_copy.default, aten.as_strided.default, aten.split.Tensor, aten.unbind.int,
    aten.split_with_sizes.default, torch.ops.prims.convert_element_type.default, torch.ops.zcompile_kernels.dequantize.default,
}  # fmt: skip


TRAFFIC = (*COLLECTIVES, PEER_GATHER)
"""What brings bytes from other ranks, and has an entry in a graph's list."""


def find(graph: Graph, *targets: Any) -> list[Node]:
    """Nodes that call one of `targets`, in graph order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


_KNOWN = {"aten", "prims", "inductor", "_c10d_functional", "zcompile", "zcompile_kernels"}
"""Namespaces of operations that differentiate nothing on their own."""


def foreign(graph: Graph) -> list[Node]:
    """Calls of what may be written in Python by anybody: custom operations, and those that take functions."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node.target is not operator.getitem
        and getattr(node.target, "namespace", "") not in _KNOWN
    ]


def spec_of(node: Node) -> ParamSpec:
    """The parameter of a semantic op."""
    text = node.args[4] if node.target is GATHER else node.args[1]
    assert isinstance(text, str)
    return ParamSpec.parse(text)


def phase_of(gather: Node) -> str:
    """The phase of a gather: see zcompile.ops."""
    phase = gather.args[5]
    assert isinstance(phase, str)
    return phase


def buffers_of(gather: Node) -> list[Node]:
    """Its compute copy, main grad and states of error feedback: what may be written between its forward and its backward."""
    _, copy, main, errors, *_ = gather.args
    return [node for node in (copy, main, *cast(Any, errors)) if isinstance(node, Node)]


def derived(sources: Iterable[Node]) -> set[Node]:
    """`sources` and every node that is one of them through views and casts alone."""
    found = set(sources)
    queue = list(found)
    while queue:
        for user in queue.pop().users:
            is_item = user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem"
            if user not in found and (user.target in VIEWS_AND_CASTS or is_item):
                found.add(user)
                queue.append(user)
    return found


@dataclass(frozen=True)
class Collective:
    """One entry of a graph's ordered collective list: equal on all ranks. `bytes` are those that one rank receives.

    `wire` is the wire format, where it says more than the dtype: the bytes of a quantised message do not tell its block. `source` is the
    user's line behind it, for errors: two ranks may have it in different files.
    The parameters are part of it: two gathers of equal size that stand in another order on one rank would else pass for equal lists, and
    each rank would take one weight for the other.
    """

    level: str
    transfer: str
    op: str
    dtype: str
    bytes: int
    parameters: tuple[str, ...]
    wire: str = ""
    source: str = field(default="", compare=False)

    def __str__(self) -> str:
        names = ", ".join(self.parameters)
        return f"{self.transfer} {self.op} over {self.level}, {self.wire or self.dtype}, {self.bytes} bytes, of {names}"

    @property
    def with_source(self) -> str:
        """The text, and the user's line behind it where it is known."""
        return f"{self}, at {self.source}" if self.source else str(self)

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.level, self.transfer, self.op, self.dtype, self.bytes, self.parameters, self.wire)


def collective_of(node: Node) -> Collective:
    """What a collective node sends: read from its arguments and its output's shape, not from the plan."""
    value, copies = node.meta["val"], 1
    if node.target is PEER_GATHER:
        copy, size, role = cast(Any, node.args[:3])
        value, copies, op = copy.meta["val"], size, "peer_read"
    elif node.target is ALL_GATHER:
        size, role, op = node.args[1], node.args[2], "all_gather"
    else:
        size, role, op = len(node.args[1]), node.args[3], "all_to_all"  # type: ignore[arg-type]
    assert isinstance(size, int) and isinstance(role, str)
    total = copies * math.prod(value.shape) * value.dtype.itemsize
    *_, level, transfer = role.split(".")
    names = tuple(node.meta.get("zc_parameters", ()))
    dtype = str(value.dtype).removeprefix("torch.")
    return Collective(level, transfer, op, dtype, total - total // size, names, node.meta.get(WIRE, ""))


def reorder(graph: Graph, groups: list[list[Node]]) -> None:
    """Move nodes so that the members of each group stand side by side, at the place of the last one; the rest keeps its order.

    Nodes that use a member wait for the group. Raises RuntimeError if a member depends on another of its group.
    """
    group_of = {node: group for group in groups for node in group}
    seen: set[Node] = set()
    done: set[Node] = set()
    order: list[Node] = []
    waiting: list[Node] = []

    def ready(node: Node) -> bool:
        return all(arg in done for arg in node.all_input_nodes)

    def emit(node: Node) -> bool:
        group = group_of.get(node)
        if group is None:
            if not ready(node):
                return False
            done.add(node)
            order.append(node)
            return True
        seen.add(node)
        if not all(member in seen and ready(member) for member in group):
            return False
        done.update(group)
        order.extend(group)
        return True

    for node in list(graph.nodes):
        if not emit(node):
            waiting.append(node)
            continue
        progress = bool(waiting)
        while progress:
            progress = False
            for other in list(waiting):
                if other in done or emit(other):
                    waiting.remove(other)
                    progress = True
    if waiting:
        raise RuntimeError(
            f"zcompile: cannot place {waiting[0].format_node()}: a member of a bucket depends on another one"
        )
    arrange(graph, order)


def arrange(graph: Graph, order: list[Node]) -> None:
    """Put all nodes of a graph into this order."""
    cursor: Node | None = None
    for node in order:
        if cursor is None:
            first = next(iter(graph.nodes))
            if first is not node:
                first.prepend(node)
        else:
            cursor.append(node)
        cursor = node


def add_of(node: Node) -> Callable[[Node], Node] | None:
    """If `node` is a plain sum of two nodes: a function from one operand to the other; else None."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    left, right = node.args[:2]
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    return lambda one: right if one is left else left
