"""A graph as text, one node a line, in the words of the design: what a dump, a golden test and an error show.

    #  name                    value             what                                                        source
    7  all_gather_into_tensor  fp32[192]         gather> all_gather pair 384 B fp32 blocks.0.{qkv,proj}.weight  gpt.py:38
    8  wait_tensor             fp32[192]         gather< pair blocks.0.{qkv,proj}.weight                     gpt.py:38

`gather>` launches, `gather<` waits. Bytes are those that one rank receives. Nothing in the text depends on the rank, on the run or
on addresses: two ranks' texts are equal byte for byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from zcompile import cost
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
    Collective,
    collective_of,
    find,
    phase_of,
    spec_of,
)
from zcompile.wire import WireFormat

TRANSFER: dict[Any, str] = {GATHER: "gather", REDUCE: "reduce", SYNC: "sync"}
DTYPES = {
    "float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8",
}  # fmt: skip
_WIDTHS = (26, 16, 76)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_OURS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep)


def dtype(value: torch.dtype | str) -> str:
    """torch.float32 or "float32" -> "fp32"; names that the plan uses where it has one."""
    name = str(value).removeprefix("torch.")
    return DTYPES.get(name, name)


def wire(entry: Collective) -> str:
    """What a collective sends: the wire format of a quantised message, else the dtype."""
    return entry.wire or dtype(entry.dtype)


def size(count: int) -> str:
    """Bytes for people: "384 B", "1.58 MB" (decimal, three digits)."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.{max(0, 3 - len(str(int(amount))))}f} {unit}"


def fold(names: Iterable[str]) -> str:
    """["blocks.0.qkv.weight", "blocks.0.proj.weight"] -> "blocks.0.{qkv,proj}.weight"; names that share nothing stand side by side."""
    groups: list[
        tuple[list[str], int, list[str]]
    ] = []  # segments of the first name, the one that varies (-1: none yet), its values
    for name in names:
        parts = name.split(".")
        if groups:
            first, at, values = groups[-1]
            differing = [i for i, (a, b) in enumerate(zip(first, parts, strict=False)) if a != b]
            if len(first) == len(parts) > 1 and len(differing) == 1 and at in (-1, differing[0]):
                groups[-1] = (first, differing[0], [*(values or [first[differing[0]]]), parts[differing[0]]])
                continue
        groups.append((parts, -1, []))
    return " ".join(
        ".".join("{" + ",".join(values) + "}" if i == at else part for i, part in enumerate(first))
        for first, at, values in groups
    )


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
        if not os.path.abspath(path).startswith(_OURS):
            return f"{os.path.basename(path)}:{line}"
    return ""


def describe_inputs(gm: GraphModule) -> dict[str, str]:
    """placeholder name -> what it is: by the semantic ops that read it a leaf, a unit's compute copy or a main grad, else an input."""
    found: dict[str, dict[str, list[str]]] = {}
    for node in find(gm.graph, GATHER):
        name = spec_of(node).name
        leaf = "token of" if phase_of(node) == ACCUMULATE else "leaf of"
        errors = [
            (f"feedback of {t}", a)
            for t, a in zip(spec_of(node).feedback_widths(), cast(Any, node.args[3]), strict=False)
        ]
        for role, argument in (*zip((leaf, "copy of", "main grad of"), node.args[:3], strict=True), *errors):
            if isinstance(argument, Node):
                names = found.setdefault(argument.name, {}).setdefault(role, [])
                if name not in names:
                    names.append(name)
    known = {key: "; ".join(f"{role} {fold(names)}" for role, names in roles.items()) for key, roles in found.items()}
    others = (node.name for node in gm.graph.nodes if node.op == "placeholder" and not node.name.startswith("tangents"))
    return {name: "input" for name in others} | known


def what(node: Node, inputs: Mapping[str, str], stage: str) -> str:
    """What a node does, in one line; in a joint graph also what the partitioner was told about it.

    Args:
        inputs: what is known of placeholders by name, see `describe_inputs`.
    """
    if node.op == "placeholder":
        mark = ", may be written before the backward" if node.meta.get("saved_tensor_with_no_vc_check") else ""
        kind = "gradient of an output" if node.name.startswith("tangents") else "input"
        return inputs.get(node.name, "saved by the forward" if stage == "backward" and kind == "input" else kind) + mark
    if node.op == "output":
        return _returned(node, stage)
    again = stage == "joint" and getattr(node.meta.get("recompute"), "name", "") == "MUST_RECOMPUTE"
    return _what(node, inputs) + ("   again in backward" if again else "")


def _what(node: Node, inputs: Mapping[str, str]) -> str:
    if node.target in SEMANTIC:
        return _semantic(node)
    if node.target in COLLECTIVES:
        entry = collective_of(node)
        sent = f"{entry.op} {entry.level} {size(entry.bytes)} {wire(entry)}"
        return f"{entry.transfer}> {sent} {fold(entry.parameters)}"
    if node.target is WAIT:
        origin = node.args[0]
        if isinstance(origin, Node) and origin.target in COLLECTIVES:
            entry = collective_of(origin)
            return f"{entry.transfer}< {entry.level} {fold(entry.parameters)}"
        return f"wait {inputs.get(origin.name, origin.name) if isinstance(origin, Node) else origin}"
    if node.target in QUANTIZERS:
        return _quantizer(node)
    return _call(node)


def _quantizer(node: Node) -> str:
    """A kernel around hops: what it reads, and the formats it reads and writes (geometry says nothing that shapes do not)."""
    name = cast(Any, node.target)._opname
    if node.target is QUANTIZE:
        return f"quantize {_argument(node.args[0])} to {_code(node.args[2])}"
    if node.target is DEQUANTIZE:
        return f"dequantize {_argument(node.args[0])} from {_code(node.args[2])}"
    if node.target is REQUANTIZE:
        return f"requantize sum of {node.args[1]} in {_argument(node.args[0])} from {_code(node.args[3])} to {_code(node.args[4])}"
    mains = f" onto {_argument(node.args[2])}" if node.args[2] else ""
    return f"{'sum' if name == 'reduce' else name} of {node.args[1]} in {_argument(node.args[0])} from {_code(node.args[4])}{mains}"


def _code(text: Any) -> str:
    return WireFormat.parse(str(text)).short if not str(text).startswith("e4m3") else str(text)


def _semantic(node: Node) -> str:
    spec, transfer = spec_of(node), TRANSFER[node.target]
    hops = []
    for level, how, kind in cost.transfer_levels(spec, transfer):
        if amount := cost.hop_bytes(spec.layout, level, how, kind):
            hops.append(f"{'back ' * (kind == 'back')}{spec.levels[level - 1]} {size(amount)} {how.short}")
    operand = "" if node.target is GATHER else f" of {_argument(node.args[0])}"
    phase = f", {phase_of(node)}" if node.target is GATHER else ""
    message = f"   message {node.meta['zc_bucket']}" if "zc_bucket" in node.meta else ""
    return f"{transfer} {spec.name}{operand} ({', '.join(hops) or 'no hop'}{phase}){message}"


def _returned(node: Node, stage: str) -> str:
    values = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
    visible = node.meta.get("user_visible_output_idxs")
    if stage != "forward" or visible is None:
        return f"return {', '.join(_argument(v) for v in values)}"
    shown = [_argument(v) for i, v in enumerate(values) if i in visible]
    saved = [_argument(v) for i, v in enumerate(values) if i not in visible]
    return f"return {', '.join(shown)}; for backward {', '.join(saved)}"


def _call(node: Node) -> str:
    target: Any = node.target
    name = getattr(target, "__name__", str(target))
    if name == "getitem":
        return f"{_argument(node.args[0])}[{_argument(node.args[1])}]"
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname if target.namespace == "aten" else f"{target.namespace}.{target._opname}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def _argument(argument: Any) -> str:
    if isinstance(argument, Node):
        return argument.name
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_argument(a) for a in argument)}]"
    if isinstance(argument, torch.dtype):
        return dtype(argument)
    if isinstance(argument, float):
        return f"{argument:g}"
    text = repr(argument) if isinstance(argument, str) else str(argument)
    return text if len(text) <= 40 else text[:37] + "..."


def lines(gm: GraphModule, inputs: Mapping[str, str], stage: str) -> list[str]:
    """One line a node, without its index (so that lines of two passes can be compared); arguments as of `what`."""
    return [_columns((node.name, value(node), what(node, inputs, stage), source(node))) for node in gm.graph.nodes]


def numbered(rows: Sequence[str]) -> list[str]:
    """`lines` with their indices, under a heading."""
    heading = f"    #  {_columns(('name', 'value', 'what', 'source'))}"
    return [heading, *(f"{index:5d}  {row}" for index, row in enumerate(rows))]


def _columns(cells: Sequence[str]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False)]
    return "  ".join([*padded, cells[-1]]).rstrip()
