"""What views know of one graph: its nodes as rows, its program after each pass. Plain data, taken before code is generated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from zcompile.cost import Bytes
from zcompile.debug import text
from zcompile.debug.names import Names, module_of, printable
from zcompile.passes.nodes import QUANTIZERS, TRAFFIC, TRANSFER, VIEWS_AND_CASTS, WAIT, Collective, collective_of
from zcompile.wording import wire

KINDS = ("input", "output", "compute", "quantize", "wait", "gather", "reduce", "sync", "back")
"""Of a row: what it is drawn as. A launch is of the kind of its transfer."""


@dataclass
class Row:
    """One node.

    Attributes:
        name: as in the text; `fx`: in the graph.
        kind: one of KINDS.
        module: path of the module that it belongs to; `backward`: to its backward.
        transfer: of nodes that a transfer consists of: "gather", "reduce", "sync"; "" of others.
        level, wire, bytes: of launches and waits: of the hop. parameters: of all nodes of a transfer.
        inputs: numbers of the rows that it reads.
        partner: of a launch its wait, and the other way round; -1: none.
        users: of a gather's launch: the nodes that read what it brings; of a reduction's: those that made what it sends.
        source, code: the user's line behind it, "gpt.py:38", and what it says.
    """

    name: str
    fx: str
    kind: str
    operation: str
    module: str
    backward: bool
    value: str
    what: str
    source: str
    code: str
    inputs: list[int] = field(default_factory=list)
    transfer: str = ""
    level: str = ""
    wire: str = ""
    bytes: int = 0
    parameters: tuple[str, ...] = ()
    partner: int = -1
    users: list[int] = field(default_factory=list)


@dataclass
class Program:
    """A graph after one pass.

    Attributes:
        name: of the pass; "input" before the first.
        lines: of the nodes.
        changes: a unified diff against the pass before, without its heading.
        notes: what the pass says that it did. seconds: how long it took; 0 for the input.
    """

    name: str
    lines: list[str]
    changes: list[str]
    notes: list[str]
    seconds: float


@dataclass
class Record:
    """One graph: `title` is what it is called, `rows` are its nodes after the last pass, `traffic` and `collectives` what these send."""

    title: str
    number: int
    stage: str
    programs: list[Program] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    traffic: Bytes = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    code: str = ""
    """Where its code came from."""

    _at: dict[str, int] = field(default_factory=dict, repr=False)

    def at(self, fx: str) -> int:
        """The number of the row of an FX node; -1: none."""
        if len(self._at) != len(self.rows):
            self._at = {row.fx: number for number, row in enumerate(self.rows)}
        return self._at.get(fx, -1)


def rows(gm: GraphModule, names: Names, inputs: Mapping[str, text.Inputs], stage: str) -> list[Row]:
    """A row for each node, in order."""
    nodes = list(gm.graph.nodes)
    at = {node: number for number, node in enumerate(nodes)}
    words = text.Text(names, inputs, stage)
    found = [_row(node, names, words, at) for node in nodes]
    for node in nodes:
        if node.target is WAIT:
            launch = node.args[0]
            if isinstance(launch, Node) and launch.target in TRAFFIC:
                found[at[node]].partner, found[at[launch]].partner = at[launch], at[node]
                gathers = found[at[launch]].kind == "gather"
                found[at[launch]].users = [at[user] for user in (_readers(node) if gathers else _makers(launch))]
    return found


def _row(node: Node, names: Names, words: text.Text, at: Mapping[Node, int]) -> Row:
    module, backward = module_of(node)
    row = Row(
        names(node), node.name, _kind(node), text.operator_name(node) if node.op == "call_function" else node.op, module, backward,
        text.value(node), words.what(node), text.source(node), _code(node), [at[arg] for arg in node.all_input_nodes],
        str(node.meta.get(TRANSFER, "")), parameters=tuple(map(printable, node.meta.get("zc_parameters", ()))),
    )  # fmt: skip
    hop = node.args[0] if node.target is WAIT else node
    if isinstance(hop, Node) and hop.target in TRAFFIC:
        entry = collective_of(hop)
        row.level, row.wire, row.bytes = entry.level, wire(entry), entry.bytes
        row.transfer, row.parameters = entry.transfer, tuple(map(printable, entry.parameters))
    return row


def _kind(node: Node) -> str:
    if node.op == "output":
        return "output"
    if node.op != "call_function":
        return "input"
    if node.target in TRAFFIC:
        return collective_of(node).transfer
    if node.target is WAIT:
        return "wait"
    return "quantize" if node.target in QUANTIZERS else "compute"


def _readers(wait: Node) -> list[Node]:
    """Who reads what a transfer brings: the first nodes behind a wait that are no part of a transfer and no mere view of it."""
    return _beyond(wait, lambda node: node.users)


def _makers(launch: Node) -> list[Node]:
    """Who made what a transfer sends: the last nodes before it that are no part of a transfer and no mere view."""
    return [node for node in _beyond(launch, lambda node: node.all_input_nodes) if node.op == "call_function"]


def _beyond(start: Node, neighbours: Callable[[Node], Iterable[Node]]) -> list[Node]:
    found: dict[Node, None] = {}
    seen = {start}
    queue = [start]
    while queue:
        for node in neighbours(queue.pop()):
            if TRANSFER not in node.meta and node.target not in VIEWS_AND_CASTS:
                found[node] = None
            elif node not in seen:
                seen.add(node)
                queue.append(node)
    return list(found)


_FRAME_CODE = re.compile(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]+)')


def _code(node: Node) -> str:
    """The text of the user's line."""
    trace: Any = node.meta.get("stack_trace")
    for path, _, code in reversed(_FRAME_CODE.findall(trace) if isinstance(trace, str) else []):
        if text.is_users(path):
            return printable(code.strip())
    return ""
