"""A graph as text, one node a line, in the words of the design: what a dump, a golden test and an error show.

    29  up.gather_pair       fp32[256]  = gather> all_gather(up.view_2) over pair: 512 B fp32 of {up,down}.weight    # gpt.py:38
    30  up.gather_pair_wait  fp32[256]  = gather< pair {up,down}.weight                                              # gpt.py:38

`gather>` launches, `gather<` waits. Bytes are those that one rank receives. Names are those of zcompile.debug.names. Nothing in the
text depends on the rank, on the run or on addresses: two ranks' texts are equal byte for byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from zcompile import cost
from zcompile.debug.names import Names, printable
from zcompile.ops import ACCUMULATE
from zcompile.passes.nodes import (
    COLLECTIVES,
    DEQUANTIZE,
    GATHER,
    QUANTIZE,
    QUANTIZERS,
    REDUCE,
    REQUANTIZE,
    SEMANTIC,
    SYNC,
    WAIT,
    collective_of,
    find,
    phase_of,
    spec_of,
)
from zcompile.wire import WireFormat
from zcompile.wording import dtype, fold, size, wire

TRANSFER: dict[Any, str] = {GATHER: "gather", REDUCE: "reduce", SYNC: "sync"}
_SHAPES = os.path.join("zcompile", "shapes.py")
Inputs = dict[str, list[str]]
"""Of a placeholder: role -> the parameters for which it has it."""
_ROLES = {"main": "main grad", "feedback reduce": "feedback of the reduce", "feedback sync": "feedback of the sync"}
INDEX = 5
"""Digits before each line of a file."""
_WIDTHS = (36, 14, 96)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_OURS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep)


def value(node: Node) -> str:
    """dtype and shape of what a node yields: "fp32[4,16]"; several tensors in parentheses."""
    return _value(node.meta.get("val"))


def _value(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{dtype(val.dtype)}[{','.join(str(n) for n in val.shape)}]"
    if isinstance(val, (list, tuple)):
        kinds = list(dict.fromkeys(_value(v) for v in val))
        return f"{len(val)} x {kinds[0]}" if len(kinds) == 1 else f"{len(val)} tensors"
    return "" if val is None else type(val).__name__.replace("SymInt", "int")


def source(node: Node) -> str:
    """The user's innermost line behind a node, "gpt.py:38": not torch's, not ours."""
    trace = node.meta.get("stack_trace")
    frames = _FRAME.findall(trace) if isinstance(trace, str) else []
    for path, line in reversed(frames):
        if is_users(path):
            return f"{printable(os.path.basename(path))}:{line}"
    return ""


@cache
def is_users(path: str) -> bool:
    """Whether a file is neither torch's nor ours; the models that have a name are taken for a user's."""
    return not os.path.abspath(path).startswith(_OURS) or path.endswith(_SHAPES)


def describe_inputs(gm: GraphModule) -> dict[str, Inputs]:
    """placeholder name -> what semantic ops take it for: a leaf, a unit's compute copy, a main grad, a feedback's state; {}: nothing."""
    plain = (node.name for node in gm.graph.nodes if node.op == "placeholder" and not node.name.startswith("tangents"))
    found: dict[str, Inputs] = {name: {} for name in plain}
    for node in find(gm.graph, GATHER):
        spec = spec_of(node)
        leaf = "token" if phase_of(node) == ACCUMULATE else "leaf"
        errors = [(f"feedback {t}", a) for t, a in zip(spec.feedback_widths(), cast(Any, node.args[3]), strict=False)]
        for role, argument in (*zip((leaf, "copy", "main"), node.args[:3], strict=True), *errors):
            if isinstance(argument, Node):
                names = found[argument.name].setdefault(role, [])
                if spec.name not in names:
                    names.append(spec.name)
    return found


def input_name(roles: Inputs) -> str:
    """What to call such a placeholder: "copy.blocks.0.up.weight"."""
    role, names = next(iter(roles.items()))
    return f"{role.replace(' ', '.')}.{printable(names[0])}"


class Text:
    """Lines of one graph.

    Args:
        names: what to call its nodes.
        inputs: what is known of placeholders by FX name, see `describe_inputs`.
        stage: "joint", "forward", "backward" or "inference".
    """

    def __init__(self, names: Names, inputs: Mapping[str, Inputs], stage: str) -> None:
        self.names, self.inputs, self.stage = names, inputs, stage

    def line(self, node: Node) -> str:
        return _columns((self.names(node), value(node), self.what(node), source(node)))

    def what(self, node: Node) -> str:
        """What a node does, in one line; in a joint graph also what the partitioner was told about it."""
        if node.op == "placeholder":
            return printable(self._input(node))
        if node.op == "output":
            return self._returned(node)
        again = self.stage == "joint" and getattr(node.meta.get("recompute"), "name", "") == "MUST_RECOMPUTE"
        return printable(self._what(node)) + ("   again in backward" if again else "")

    def _input(self, node: Node) -> str:
        mark = ", may be written before the backward" if node.meta.get("saved_tensor_with_no_vc_check") else ""
        if roles := self.inputs.get(node.name):
            return "; ".join(f"{_ROLES.get(role, role)} of {fold(names)}" for role, names in roles.items()) + mark
        if node.name.startswith("tangents"):
            return "gradient of an output" + mark
        return ("saved by the forward" if self.stage == "backward" and node.name not in self.inputs else "input") + mark

    def _what(self, node: Node) -> str:
        if node.target in SEMANTIC:
            return self._semantic(node)
        if node.target in COLLECTIVES:
            entry = collective_of(node)
            sent = f"{entry.op}({self._argument(node.args[0])}) over {entry.level}: {size(entry.bytes)} {wire(entry)}"
            return f"{entry.transfer}> {sent} of {fold(entry.parameters)}"
        if node.target is WAIT:
            origin = cast(Node, node.args[0])
            if origin.target in COLLECTIVES:
                entry = collective_of(origin)
                return f"{entry.transfer}< {entry.level} {fold(entry.parameters)}"
            return f"wait for {self.names(origin)}"
        if node.target in QUANTIZERS:
            return self._quantizer(node)
        return self._call(node)

    def _quantizer(self, node: Node) -> str:
        """A kernel around hops: what it reads, and the formats it reads and writes (geometry says nothing that shapes do not)."""
        name, argument = cast(Any, node.target)._opname, self._argument
        if node.target is QUANTIZE:
            return f"quantize({argument(node.args[0])}) to {_code(node.args[2])}"
        if node.target is DEQUANTIZE:
            return f"dequantize({argument(node.args[0])}) from {_code(node.args[2])}"
        if node.target is REQUANTIZE:
            return f"requantize(sum of {node.args[1]} in {argument(node.args[0])}) from {_code(node.args[3])} to {_code(node.args[4])}"
        mains = f" onto {argument(node.args[2])}" if node.args[2] else ""
        return f"{'sum' if name == 'reduce' else name}({node.args[1]} in {argument(node.args[0])}) from {_code(node.args[4])}{mains}"

    def _semantic(self, node: Node) -> str:
        spec, transfer = spec_of(node), TRANSFER[node.target]
        hops = []
        for level, how, kind in cost.transfer_levels(spec, transfer):
            if amount := cost.hop_bytes(spec.layout, level, how, kind):
                hops.append(f"{'back ' * (kind == 'back')}{spec.levels[level - 1]} {size(amount)} {how.short}")
        operand = node.args[1] if node.target is GATHER else node.args[0]
        phase = f", {phase_of(node)}" if node.target is GATHER else ""
        message = f"   message {node.meta['zc_bucket']}" if "zc_bucket" in node.meta else ""
        return f"{transfer}({self._argument(operand)}) of {spec.name}: {', '.join(hops) or 'no hop'}{phase}{message}"

    def _returned(self, node: Node) -> str:
        values = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
        visible = node.meta.get("user_visible_output_idxs")
        if self.stage != "forward" or visible is None:
            return f"return {', '.join(self._argument(v) for v in values)}"
        shown = [self._argument(v) for i, v in enumerate(values) if i in visible]
        saved = [self._argument(v) for i, v in enumerate(values) if i not in visible]
        return f"return {', '.join(shown)}; for backward {', '.join(saved)}"

    def _call(self, node: Node) -> str:
        name = operator_name(node)
        if name == "getitem":
            return f"{self._argument(node.args[0])}[{self._argument(node.args[1])}]"
        arguments = [self._argument(a) for a in node.args] + [
            f"{k}={self._argument(v)}" for k, v in node.kwargs.items()
        ]
        return f"{name}({', '.join(arguments)})"

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, Node):
            return self.names(argument)
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(self._argument(a) for a in argument)}]"
        if isinstance(argument, torch.dtype):
            return dtype(argument)
        if isinstance(argument, float):
            return f"{argument:g}"
        text = repr(argument) if isinstance(argument, str) else str(argument)
        return text if len(text) <= 40 else text[:37] + "..."


def operator_name(node: Node) -> str:
    """An ATen operator by its name alone, others with their namespace: "mm", "zcompile_kernels.quantize", "getitem"."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._opname) if target.namespace == "aten" else f"{target.namespace}.{target._opname}"
    return str(getattr(target, "__name__", target))


def _code(text: Any) -> str:
    return WireFormat.parse(str(text)).short if not str(text).startswith("e4m3") else str(text)


def lines(gm: GraphModule, inputs: Mapping[str, Inputs], stage: str, names: Names | None = None) -> list[str]:
    """One line a node, without its index (so that lines of two passes can be compared); arguments as of `Text`, names new if None."""
    names = names or Names()
    names.update(gm)
    text = Text(names, inputs, stage)
    return [text.line(node) for node in gm.graph.nodes]


def line(name: str, value: str, what: str, source: str) -> str:
    """The same from what is known of a node."""
    return _columns((name, value, what, source))


def numbered(rows: Sequence[str]) -> list[str]:
    """`lines` with their indices."""
    return [f"{index:{INDEX}d}  {row}" for index, row in enumerate(rows)]


def _columns(cells: tuple[str, str, str, str]) -> str:
    name, value, what, where = cells
    line = f"{name.ljust(_WIDTHS[0])}  {value.ljust(_WIDTHS[1])}  = {what}"
    return f"{line.ljust(sum(_WIDTHS) + 6)}  # {where}" if where else line
