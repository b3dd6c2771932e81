"""What a forward leaves saved for its backward: in eager torch by the graph behind the loss, compiled by what the forward graph returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from support.patches import replaced
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from zcompile.backend import Compilation
from zcompile.passes.nodes import COLLECTIVES, derived, find


def nodes_behind(loss: Tensor) -> Iterator[Any]:
    """Every node of autograd's graph, once."""
    todo: list[Any] = [loss.grad_fn]
    done = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in done:
            done.add(node)
            todo += [each for each, _ in node.next_functions]
            yield node


def raw_saved(node: Any) -> Iterator[Tensor]:
    """What it holds, without unpacking: of hooks what they packed it into, if that is a tensor."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            raw = getattr(node, name)
            for each in raw if isinstance(raw, tuple) else (raw,):
                value = getattr(each, "data", None)
                if isinstance(value, Tensor):
                    yield value


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[int, bool]]]:
    """Of each forward that is compiled inside: bytes that it computes and saves, and whether a gathered weight is one."""
    run, saved = Compilation.half, []

    def half(self: Any, gm: Any, *args: Any, **kwargs: Any) -> Any:
        out = run(self, gm, *args, **kwargs)
        if not (kwargs.get("is_backward") or kwargs.get("is_inference")):
            kept = [node for node in next(iter(reversed(gm.graph.nodes))).args[0] if isinstance(node, torch.fx.Node)]
            gathered = [node for node in find(gm.graph, *COLLECTIVES) if "gather" in str(node.args[2])]
            weights = derived(user for node in gathered for user in node.users)
            size = sum(n.meta["val"].numel() * n.meta["val"].itemsize for n in kept if n.op != "placeholder")
            saved.append((int(size), bool(weights & set(kept))))
        return out

    with replaced(Compilation, "half", half):
        yield saved


def keep_products(context: Any, op: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
    """Selective checkpointing: products are saved, all else is computed again."""
    keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
