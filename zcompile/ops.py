"""The semantic ops: `gather`, `reduce`, `sync`. What a transfer means; `lower` decides how, by the plan.

    gather(leaf, copy, main, spec, phase) -> whole      leaf: the autograd edge to the master; copy: the unit's compute copy
    reduce(grad, spec)                    -> at G       whole gradient in, fp32 out
    sync(total, spec)                     -> at O       what the master's `.grad` wants

Each has a fake and a real implementation that performs the transfer, so a graph that no pass of ours has seen is slow, not wrong.
The backward of `gather` is written in terms of the other two; `phase` was fixed at forward:

    accumulate   main += reduce(grad); the leaf is an empty token, so is its gradient
    sync         leaf.grad = sync(main + reduce(grad)); main = 0
    direct       leaf.grad = sync(reduce(grad)): no micro-batch before this one, no main grad in memory

Note [Main grads are not saved tensors]: `main` is mutated between a forward and its backward whenever several micro-batches are in
flight, so it must not be version-checked: it is stashed on ctx, never passed to save_for_backward (facts: torch 2.13 raises "modified
by an inplace operation" otherwise), and the `tag` pass exempts it in compiled graphs.

Note [Tokens]: AOTAutograd detaches an input whose gradient is None, and a forward all of whose inputs are detached has no backward
at all. So an accumulating forward reads through a leaf of shape [0], whose gradient, also [0], says that something was accumulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zcompile import transfers
from zcompile.layout import ParamSpec

ACCUMULATE, SYNC, DIRECT, NONE = "accumulate", "sync", "direct", "none"
PHASES = (ACCUMULATE, SYNC, DIRECT, NONE)

torch.library.define("zcompile::gather", "(Tensor leaf, Tensor copy, Tensor? main, str spec, str phase) -> Tensor")
torch.library.define("zcompile::reduce", "(Tensor grad, str spec) -> Tensor")
torch.library.define("zcompile::sync", "(Tensor total, str spec) -> Tensor")


def needs_wait(spec: ParamSpec) -> bool:
    """True if the copy is not the master itself: a refresh writes it, and may be under way when a forward starts."""
    return any(spec.sizes[level - 1] > 1 for level in range(spec.w + 1, spec.o + 1))


def _gather(leaf: Tensor, copy: Tensor, main: Tensor | None, spec: str, phase: str) -> Tensor:
    param = ParamSpec.parse(spec)
    if needs_wait(param):
        copy = torch.ops._c10d_functional.wait_tensor(copy)
    whole = transfers.gather(transfers.columns(copy, [param]), [param])[0]
    # A functional op may not return a view of its input.
    shared = whole.untyped_storage()._cdata == copy.untyped_storage()._cdata
    return whole.clone() if shared else whole


def _gather_fake(leaf: Tensor, copy: Tensor, main: Tensor | None, spec: str, phase: str) -> Tensor:
    param = ParamSpec.parse(spec)
    return copy.new_empty(param.shape, dtype=transfers.dtype(param.compute))


def _reduce(grad: Tensor, spec: str) -> Tensor:
    param = ParamSpec.parse(spec)
    out = transfers.reduce([grad], [param])
    return out.clone() if out.untyped_storage()._cdata == grad.untyped_storage()._cdata else out


def _reduce_fake(grad: Tensor, spec: str) -> Tensor:
    param = ParamSpec.parse(spec)
    return grad.new_empty((param.layout.width(param.g),), dtype=torch.float32)


def _sync(total: Tensor, spec: str) -> Tensor:
    out = transfers.sync(total, [ParamSpec.parse(spec)]).reshape(-1)
    return out.clone() if out.untyped_storage()._cdata == total.untyped_storage()._cdata else out


def _sync_fake(total: Tensor, spec: str) -> Tensor:
    return total.new_empty((ParamSpec.parse(spec).layout.shard,), dtype=torch.float32)


for _name, _real, _fake in (
    ("gather", _gather, _gather_fake),
    ("reduce", _reduce, _reduce_fake),
    ("sync", _sync, _sync_fake),
):
    torch.library.impl(f"zcompile::{_name}", "CompositeExplicitAutograd", _real)
    torch.library.register_fake(f"zcompile::{_name}", _fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.main, ctx.spec, ctx.phase = inputs  # see Note [Main grads are not saved tensors]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
    return finish(ctx.main, torch.ops.zcompile.reduce(grad, ctx.spec), ctx.spec, ctx.phase), None, None, None, None


def finish(main: Tensor | None, reduced: Tensor, spec: str, phase: str) -> Tensor:
    """What the backward of a gather does with the gradient at G: the leaf's gradient at O, or a token's (see Note [Tokens])."""
    if phase == DIRECT:
        return torch.ops.zcompile.sync(reduced, spec)
    assert main is not None
    if phase == ACCUMULATE:
        main.add_(reduced)
        return torch.zeros(0, dtype=reduced.dtype, device=reduced.device)
    total = main + reduced
    main.zero_()
    return torch.ops.zcompile.sync(total, spec)


torch.library.register_autograd("zcompile::gather", _gather_backward, setup_context=_setup)
