"""The reference that sharded training is compared with, bit for bit: a plain dense model in one process, eager, nothing sharded.

It computes the gradient of every rank and micro-batch with ordinary autograd and adds them up in the order in which the plan's hops
do, which the sharding does not change: a hop over a level of size s sums s neighbours in coordinate order, in fp32, after casting each
to the hop's wire dtype. Which rank owns which rows plays no part, so nothing here knows layouts, padding, groups or graphs.

    gradient of (rank, micro-batch)   autograd's, reads of one weight summed in autograd's order
    -> G                              hops over the levels up to G, fastest first
    accumulate                        0 + g_1 + g_2 + ... + g_K over micro-batches (K = 1: g_1 itself)
    -> world                          hops over the levels beyond G, fastest first; casts of the way back to O
    mean                              one division by the world size
    step                              the optimizer, on dense fp32 masters
    -> weights                        casts of the refresh, of the compute copy, of the gather, to the compute dtype
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zcompile.plan import ResolvedPlan

Hop = tuple[int, str]
"""(ranks that it sums, torch dtype name on the wire)"""

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> loss"""


@dataclass(frozen=True)
class Order:
    """What a plan does to the bits of one parameter. Levels of size 1 leave no trace, nor do casts to fp32: equal orders, equal bits.

    Attributes:
        reduce, sync: hops up to G, and from there to the world, in the order they run.
        back: dtypes through which the sum comes back from the world to O, fp32 left out.
        weight: dtypes through which a master becomes the weight of a forward, fp32 left out.
        compute: dtype of that weight.
    """

    reduce: tuple[Hop, ...]
    sync: tuple[Hop, ...]
    back: tuple[str, ...]
    weight: tuple[str, ...]
    compute: str

    @classmethod
    def of(cls, plan: ResolvedPlan, name: str, shape: Sequence[int], compute: str) -> Order:
        """The order of the parameter `name` of `shape`, seen as `compute` by a forward."""
        numel = torch.Size(shape).numel()
        w, g, o = plan.placement(name, shape[0] if shape else 1, numel, len(shape))
        sizes = plan.topology.sizes
        wires = {
            t: [f.torch_name for f in plan.formats(t, compute)] for t in ("gather", "reduce", "sync", "refresh", "back")
        }
        travelling = [j for j in range(len(sizes)) if sizes[j] > 1 and numel]
        gathered = [wires["gather"][j] for j in reversed(travelling) if j < w]
        casts = [wires["refresh"][j] for j in reversed(travelling) if w <= j < o]
        casts += [gathered[0] if gathered else compute, *gathered, compute]
        return cls(
            reduce=tuple((sizes[j], wires["reduce"][j]) for j in travelling if j < g),
            sync=tuple((sizes[j], wires["sync"][j]) for j in travelling if j >= g),
            back=_narrow(wires["back"][j] for j in reversed(travelling) if j >= o),
            weight=_narrow(casts),
            compute=compute,
        )

    def to_g(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """One gradient per position in the topology -> one fp32 sum per group of G, in position order."""
        return _sum(grads, self.reduce)

    def to_o(self, sums: Sequence[Tensor]) -> Tensor:
        """One sum per group of G -> the mean over all ranks, fp32."""
        (total,) = _sum(sums, self.sync)
        for name in self.back:
            total = total.to(getattr(torch, name)).to(torch.float32)
        world = 1
        for size, _ in (*self.reduce, *self.sync):
            world *= size
        return total / world if world > 1 else total

    def to_weight(self, master: Tensor) -> Tensor:
        """A dense fp32 master -> the weight that a forward sees."""
        for name in self.weight:
            master = master.to(getattr(torch, name))
        return master.to(getattr(torch, self.compute))


def _narrow(names: Iterable[str]) -> tuple[str, ...]:
    """Casts that can change a value: widening one is exact, and repeating one changes nothing more."""
    kept: list[str] = []
    for name in names:
        if name != "float32" and kept[-1:] != [name]:
            kept.append(name)
    return tuple(kept)


def _sum(parts: Sequence[Tensor], hops: Iterable[Hop]) -> list[Tensor]:
    """Each hop sums neighbours: positions count the fastest level first, so its group is `size` consecutive entries."""
    found = list(parts)
    for size, wire in hops:
        sent = [part.to(getattr(torch, wire)).to(torch.float32) for part in found]
        found = [_in_order(sent[start : start + size]) for start in range(0, len(sent), size)]
    return [part.to(torch.float32) for part in found]


def _in_order(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class Reference:
    """Dense masters, one optimizer over them, and steps that see every rank's micro-batches.

    Attributes:
        masters: parameter name -> fp32 nn.Parameter of its plain shape; tied weights appear once, under their first name.
        orders: parameter name -> its Order.
        loss: (model, batch) -> loss.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ResolvedPlan,
        optimizer: MakeOptimizer,
        *,
        loss: Loss = lambda model, batch: model(*batch),
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            model: plain, unsharded; copied. Its buffers must not change in a forward: ranks are computed one after another.
            optimizer: makes an optimizer from the masters.
            loss: of the model for one micro-batch.
            compute_dtype: as in hierarchical_zero; batches are passed as they are.
        """
        self.plan = plan
        self.loss = loss
        self._model = copy.deepcopy(model)
        self._weights = dict(self._model.named_parameters())
        self.orders: dict[str, Order] = {}
        self.masters: dict[str, nn.Parameter] = {}
        for name, weight in self._weights.items():
            compute = str(compute_dtype or weight.dtype).removeprefix("torch.")
            self.orders[name] = Order.of(plan, name, tuple(weight.shape), compute)
            master = weight.detach().to(torch.float32, copy=True)
            self.masters[name] = nn.Parameter(master, requires_grad=weight.requires_grad)
        self._optimizer = optimizer(self.masters.values())

    def step(self, batches: Sequence[Sequence[Any]]) -> Tensor:
        """One optimizer step over `batches[rank][micro-batch]`.

        Returns:
            the loss of each, [ranks, micro-batches] fp32. Gradients stay in `masters[name].grad` until the next step; None where no
            rank had one.
        """
        self._refresh()
        topology = self.plan.topology
        micro_batches = len(batches[0])
        losses = torch.empty(len(batches), micro_batches)
        at_g: dict[str, list[Tensor]] = {}
        for k in range(micro_batches):
            grads: dict[str, list[Tensor | None]] = {name: [] for name in self._weights}
            for position in range(topology.world_size):
                rank = position if topology.order is None else topology.order[position]
                losses[rank, k] = self._backward(batches[rank][k], grads)
            for name, found in grads.items():
                if all(grad is None for grad in found):
                    continue
                weight = self._weights[name]
                whole = [torch.zeros_like(weight) if grad is None else grad for grad in found]
                reduced = self.orders[name].to_g(whole)
                if micro_batches > 1:
                    before = at_g.get(name) or [torch.zeros_like(part) for part in reduced]
                    reduced = [main + part for main, part in zip(before, reduced, strict=True)]
                at_g[name] = reduced
        for name, master in self.masters.items():
            master.grad = self.orders[name].to_o(at_g[name]) if name in at_g else None
        self._optimizer.step()
        return losses

    def _refresh(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.data = self.orders[name].to_weight(self.masters[name]).clone()

    def _backward(self, batch: Any, grads: dict[str, list[Tensor | None]]) -> Tensor:
        loss = self.loss(self._model, batch)
        loss.backward()
        for name, weight in self._weights.items():
            grads[name].append(weight.grad)
            weight.grad = None
        return loss.detach().to(torch.float32)
