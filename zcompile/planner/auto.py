"""`plan="auto"`: the planner's choice for a model that is being wrapped.

A function of the model's shapes, the topology and the settings: equal on every rank, without communication; the ranks then agree on the
plan as on any other. Units, and with them placements, formats and buckets, are laid out when the model is wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zcompile.params import named_owners
from zcompile.plan import Auto, Plan
from zcompile.planner.search import RESERVE, Request, describe, search
from zcompile.planner.workload import Op, Use, Workload, of_module
from zcompile.topology import Topology

ASSUMED_TOKENS = 2048
"""Of a micro-batch, where no example says: only the ratio of computing to transfers depends on it."""
LEFT_FOR_ACTIVATIONS = 0.5
"""Part of a device's memory that a plan leaves alone where no example says what activations take."""


def choose(
    model: nn.Module, auto: Auto, topology: Topology, compute: Mapping[str, torch.dtype], example: Any = None
) -> tuple[Plan, dict[str, int], str]:
    """The plan, the options that go with it (overlap, and tokens where an example says them), and a line that says what was chosen and why.

    Args:
        compute: parameter -> dtype in which it is gathered.
        example: inputs of one micro-batch, run once on fake tensors; None: from the parameters' shapes alone.

    Raises:
        WorkloadError: the model does not run on fake tensors. NothingFits: no plan fits the memory.
    """
    main = next(iter(compute.values()))
    if example is None:
        workload, part = of_parameters(model, compute), LEFT_FOR_ACTIVATIONS
    else:
        given = example if isinstance(example, (tuple, list)) else (example,)
        workload, part = of_module(type(model).__name__, model, given, main), 0.0
    memory = auto.memory or topology.device.memory * (1 - RESERVE)
    request = Request(auto.micro_batches, int(memory * (1 - part)), auto.formats)
    answer = search(workload, topology, request, str(main).removeprefix("torch."), quick=True)
    best = answer.best
    assert best.result is not None
    where = "from the parameters' shapes" if example is None else "from the example"
    text = (
        f"plan auto, {where}: {describe(best.plan, best.overlap)}; expected {best.result.seconds * 1e3:.3g} ms a step, "
        f"{best.result.share:.0%} of it exposed, {best.result.bytes / 1e9:.3g} GB a device"
    )
    options = {"overlap": best.overlap, "tokens": 0 if example is None else workload.tokens}
    return replace(best.plan, name="auto", wire=None), options, text


def of_parameters(model: nn.Module, compute: Mapping[str, torch.dtype]) -> Workload:
    """Closed forms: parameters are read in the order in which they are registered, each in 2 FLOPs per element and token, twice that in
    backward, in the other order. What activations take is not known."""
    names = {found[0][0]: parameter for parameter, found in named_owners(model).items()}
    ops: list[Op] = []
    uses: dict[str, Use] = {}
    for name, parameter in names.items():
        uses[name] = Use(name, forward=len(ops), product=parameter.dim() > 1)
        ops.append(_product(parameter, compute[name], 1))
    split = len(ops)
    for name, parameter in reversed(names.items()):
        uses[name].backward = len(ops)
        uses[name].gradient = len(ops) if parameter.requires_grad else -1
        ops.append(_product(parameter, compute[name], 2))
    return Workload(type(model).__name__, model, dict(compute), ops, split, uses, [0] * len(ops), ASSUMED_TOKENS)


def _product(parameter: nn.Parameter, dtype: torch.dtype, factor: int) -> Op:
    size = parameter.numel() * dtype.itemsize
    weights = parameter.numel() if parameter.dim() > 1 else 0
    count = 2.0 * factor * weights * ASSUMED_TOKENS
    return Op(count, [(size, -1)], size, str(dtype).removeprefix("torch."), False, False, weights)
