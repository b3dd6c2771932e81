"""A small model on four ranks whose graphs tests compare, and a pass that swaps two messages in one of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from support.paper import Tiny

from zcompile import hierarchical_zero
from zcompile.passes.nodes import GATHER, find, spec_of


def wrapped(plan: str = "zero_topo", blocks: int = 2, **settings: Any) -> tuple[Any, torch.nn.Module]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = Tiny(blocks)
    torch.manual_seed(0)
    return hierarchical_zero(Tiny(blocks), topology="2x2", plan=plan, **{"codegen": False, **settings}), dense


def batch(rank: int, step: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def swap(gm: Any, context: Any) -> None:
    """The message of one block is gathered before that of the block before it: equal bytes, another order."""
    gathers: dict[object, list[Any]] = {}
    for node in find(gm.graph, GATHER):
        gathers.setdefault(node.meta["zc_bucket"], []).append(node)
    if context.stage == "forward":
        groups = [group for group in gathers.values() if len(group) == 2 and "up.weight" in spec_of(group[0]).name]
        (anchor, *_), later = groups
        for node in later:
            anchor.prepend(node)


SWAP = SimpleNamespace(NAME="swap", run=swap, check=lambda gm, context: None)
