"""The semantic ops: `gather`, `reduce`, `sync`. What a transfer means; `lower` decides how, by the plan.

    gather(leaf, copy, main, states, spec, phase) -> whole   leaf: the autograd edge to the master; copy: the unit's compute copy
    reduce(grad, spec)                            -> at G    whole gradient in, fp32 out
    sync(total, spec)                             -> at O    what the master's `.grad` wants

Each has a fake and a real implementation that performs the transfer, so a graph that no pass of ours has seen is slow, not wrong.
The backward of `gather` is written in terms of the other two; `phase` was fixed at forward:

    accumulate   main += reduce(grad); the leaf is an empty token, so is its gradient
    sync         leaf.grad = sync(main + reduce(grad)); main = 0
    direct       leaf.grad = sync(reduce(grad)): no micro-batch before this one, no main grad in memory

Note [Error feedback]: with error feedback the first `states` are one tensor for a quantised reduce and one for a quantised sync. What is
about to be sent has the state added first, and the state becomes beta times itself and 1 - beta times what quantising loses of the
sum. Reads of one parameter are then not merged in a graph: each is sent, and its loss kept, on its own.

Note [Watched gradients]: one state more than that is a flag, which is raised when a gradient arrives that is not finite.

Note [Main grads are not saved tensors]: `main` (`states` likewise) is mutated between a forward and its backward whenever several
micro-batches are in flight, so it must not be version-checked: it is stashed on ctx, never passed to save_for_backward (facts: torch
2.13 raises "modified by an inplace operation" otherwise), and the `tag` pass exempts it in compiled graphs.

Note [Tokens]: AOTAutograd detaches an input whose gradient is None, and a forward all of whose inputs are detached has no backward
at all. So an accumulating forward reads through a leaf of shape [0], whose gradient, also [0], says that something was accumulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zcompile import transfers
from zcompile._torch_compat import storage_key
from zcompile.faults.sites import Parameters, about
from zcompile.layout import ParamSpec

ACCUMULATE, SYNC, DIRECT, NONE = "accumulate", "sync", "direct", "none"
PHASES = (ACCUMULATE, SYNC, DIRECT, NONE)

torch.library.define(
    "zcompile::gather", "(Tensor leaf, Tensor copy, Tensor? main, Tensor[] states, str spec, str phase) -> Tensor"
)
torch.library.define("zcompile::reduce", "(Tensor grad, str spec) -> Tensor")
torch.library.define("zcompile::sync", "(Tensor total, str spec) -> Tensor")


def needs_wait(spec: ParamSpec) -> bool:
    """True if a refresh may be under way when a forward starts: it sends something, or others read what it writes."""
    return bool(spec.refresh_levels() or spec.peer_level)


def _gather(leaf: Tensor, copy: Tensor, main: Tensor | None, states: list[Tensor], spec: str, phase: str) -> Tensor:
    param = ParamSpec.parse(spec)
    if needs_wait(param):
        copy = torch.ops._c10d_functional.wait_tensor(copy)
    with about(Parameters((param.name,), "", "a forward"), unless_said=True):
        whole = transfers.gather(copy, [param])[0]
    # A functional op may not return a view of its input.
    shared = storage_key(whole) == storage_key(copy)
    return whole.clone() if shared else whole


def _gather_fake(
    leaf: Tensor, copy: Tensor, main: Tensor | None, states: list[Tensor], spec: str, phase: str
) -> Tensor:
    param = ParamSpec.parse(spec)
    return copy.new_empty(param.shape, dtype=transfers.dtype(param.compute))


def _reduce(grad: Tensor, spec: str) -> Tensor:
    param = ParamSpec.parse(spec)
    with about(Parameters((param.name,), "", "a backward"), unless_said=True):
        out = transfers.reduce([grad], [param])
    return out.clone() if storage_key(out) == storage_key(grad) else out


def _reduce_fake(grad: Tensor, spec: str) -> Tensor:
    param = ParamSpec.parse(spec)
    return grad.new_empty((param.layout.width(param.g),), dtype=torch.float32)


def _sync(total: Tensor, spec: str) -> Tensor:
    param = ParamSpec.parse(spec)
    with about(Parameters((param.name,), "", "a backward"), unless_said=True):
        out = transfers.sync(total, [param]).reshape(-1)
    return out.clone() if storage_key(out) == storage_key(total) else out


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
    _, _, ctx.main, ctx.states, ctx.spec, ctx.phase = inputs  # see Note [Main grads are not saved tensors]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    spec = ParamSpec.parse(ctx.spec)
    widths = spec.feedback_widths()
    errors = dict(zip(widths, ctx.states, strict=False))
    for flag in ctx.states[len(widths) :]:
        watch(flag, grad)
    reduced = torch.ops.zcompile.reduce(compensated(grad, errors, spec, "reduce"), ctx.spec)
    return finish(ctx.main, errors, reduced, ctx.spec, ctx.phase), None, None, [None] * len(ctx.states), None, None


def watch(flag: Tensor, grad: Tensor) -> None:
    """See Note [Watched gradients]."""
    strange = (~torch.isfinite(grad)).any().to(flag.dtype).view(1)
    flag.copy_(torch.maximum(flag, strange))


def compensated(x: Tensor, errors: Mapping[str, Tensor], spec: ParamSpec, transfer: str) -> Tensor:
    """`x` with the state of the error feedback added, which is brought up to date: see Note [Error feedback]."""
    error = errors.get(transfer)
    if error is None:
        return x
    assert spec.feedback is not None
    total = x.to(torch.float32) + error.view(x.shape)
    lost = transfers.residual(total, spec, transfer).view(error.shape)
    error.copy_(spec.feedback * error + (1 - spec.feedback) * lost if spec.feedback else lost)
    return total


def finish(main: Tensor | None, errors: Mapping[str, Tensor], reduced: Tensor, spec: str, phase: str) -> Tensor:
    """What the backward of a gather does with the gradient at G: the leaf's gradient at O, or a token's (see Note [Tokens])."""
    if phase == ACCUMULATE:
        assert main is not None
        main.add_(reduced)
        return torch.zeros(0, dtype=reduced.dtype, device=reduced.device)
    if phase == DIRECT:
        total = reduced
    else:
        assert main is not None
        total = main + reduced
        main.zero_()
    return torch.ops.zcompile.sync(compensated(total, errors, ParamSpec.parse(spec), "sync"), spec)


torch.library.register_autograd("zcompile::gather", _gather_backward, setup_context=_setup)
