"""pin: the order of the collectives in the graph, and of the gathers that read other ranks' memory, is the order in the generated code.

Requires: a lowered graph.
Guarantees: `PATCHES` (the code generator moves no launch or wait past another for memory, overlap or a fusion, and makes no buckets of
its own) and, after code generation, `check_code`: launches, waits and peer gathers stand in the source in the graph's order, or the
compile fails. A peer gather waits for nobody and needs no launch, but where it stands is how long its weights are in memory.
Leaves alone: the order itself; it is that of the graph.
"""

from __future__ import annotations

import re
from typing import Any

from torch.fx import GraphModule

from zcompile._torch_compat import KeepOrder
from zcompile.passes.context import Context
from zcompile.passes.nodes import ALL_GATHER, ALL_TO_ALL, PEER_GATHER, TRAFFIC, WAIT, find

NAME = "pin"
PATCHES: dict[str, Any] = {
    "_pre_fusion_custom_pass": KeepOrder(PEER_GATHER),
    "reorder_for_peak_memory": False,
    "reorder_for_locality": False,
    "reorder_for_compute_comm_overlap": False,
    "bucket_all_gathers_fx": "none",
    "bucket_reduce_scatters_fx": "none",
    "bucket_all_reduces_fx": "none",
}
_CALL = re.compile(
    r"(?:_c10d_functional\.(?=all_|wait)|zcompile_kernels\.(?=peer))"
    r"(all_gather_into_tensor|all_to_all_single|wait_tensor|peer_gather)(?:_out)?\.(?:default|out)\((.*)"
)
_ROLE = re.compile(r"'(zc\.[^']+)'")
_SHORT: dict[Any, str] = {
    ALL_GATHER: "all_gather_into_tensor", ALL_TO_ALL: "all_to_all_single", WAIT: "wait_tensor", PEER_GATHER: "peer_gather"
}  # fmt: skip


def run(gm: GraphModule, context: Context) -> None:
    context.note(f"{len(order(gm))} launches and waits in order")


def check(gm: GraphModule, context: Context) -> None:
    """The real check needs the generated code: see check_code."""


def order(gm: GraphModule) -> list[str]:
    """Launches and peer gathers (op and role) and waits, in graph order."""
    found = []
    for node in find(gm.graph, *TRAFFIC, WAIT):
        role = next((arg for arg in node.args if isinstance(arg, str)), "")
        found.append(f"{_SHORT[node.target]} {role}".strip())
    return found


def check_code(source: str, expected: list[str]) -> None:
    """Raise AssertionError where the generated `source` does not launch and wait in the `expected` order."""
    found = []
    for line in source.splitlines():
        match = _CALL.search(line)
        if match and not line.lstrip().startswith("#"):
            role = _ROLE.search(match[2])
            found.append(f"{match[1]} {role[1] if role else ''}".strip())
    if found != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
        )
        have = found[at] if at < len(found) else "nothing"
        want = expected[at] if at < len(expected) else "nothing"
        raise AssertionError(
            f"generated code departs from the graph's order at collective {at}: {have} where the graph has {want}"
        )
