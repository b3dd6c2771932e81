"""The reference that sharded training is compared with, bit for bit: a plain dense model in one process, eager, nothing sharded.

It computes the gradient of every rank and micro-batch with ordinary autograd and adds them up in the order in which the plan's hops
do, which the sharding does not change: a hop over a level of size s sums s neighbours in coordinate order, in fp32, after sending each
through the hop's wire format. Which rank owns which rows plays no part, so nothing here knows padding, groups or graphs; of a quantised
format it has to know where its blocks begin, and codes and decodes them with the torch reference (zcompile.kernels.reference).

    gradient of (rank, micro-batch)   autograd's, reads of one weight summed in autograd's order
    -> G                              hops over the levels up to G, fastest first
    accumulate                        0 + g_1 + g_2 + ... + g_K over micro-batches (K = 1: g_1 itself)
    -> world                          hops over the levels beyond G, fastest first; casts of the way back to O
    mean                              one division by the world size
    step                              the optimizer, on dense fp32 masters
    -> weights                        casts of the refresh (or its delta), of the compute copy, of the gather, to the compute dtype
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zcompile.kernels import reference as quantisers
from zcompile.kernels.geometry import Geometry
from zcompile.layout import Layout
from zcompile.params import kind_of, named_owners
from zcompile.resolved import ResolvedPlan
from zcompile.transfers import shard_piece
from zcompile.wire import COMPUTE_FORMATS, WireFormat

Hop = tuple[int, str]
"""(ranks that it sums, wire format)"""

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> loss"""


@dataclass(frozen=True)
class Order:
    """What a plan does to the bits of one parameter. Levels of size 1 leave no trace, nor do casts to fp32: equal orders, equal bits.

    Attributes:
        reduce, sync: hops up to G, and from there to the world, in the order they run.
        back: formats through which the sum comes back from the world to O, fp32 left out.
        delta: format of a delta refresh, "" for none; after `full_every` of them in a row there is a full one (0: never).
        weight: formats through which a master (with a delta refresh: its image) becomes the weight of a forward, fp32 left out.
        compute: dtype of that weight.
        blocks: where quantisation blocks lie in the parameter (`Geometry.text`), "" if nothing is quantised.
        feedback: beta of the error feedback, None for none.
    """

    reduce: tuple[Hop, ...]
    sync: tuple[Hop, ...]
    back: tuple[str, ...]
    delta: str
    full_every: int
    weight: tuple[str, ...]
    compute: str
    blocks: str
    feedback: float | None

    @classmethod
    def of(cls, plan: ResolvedPlan, name: str, shape: Sequence[int], compute: str, kind: str = "matrix") -> Order:
        """The order of the parameter `name` of `shape`, of a kind (zcompile.plan.KINDS), seen as `compute` by a forward."""
        numel = torch.Size(shape).numel()
        w, g, o = plan.placement(name, shape[0] if shape else 1, numel, len(shape))
        sizes = plan.topology.sizes
        wires = plan.wires(name, shape, compute, kind)
        travelling = [j for j in range(len(sizes)) if sizes[j] > 1 and numel]
        gathered = [wires.gather[j].text for j in reversed(travelling) if j < w]
        refreshed = [wires.refresh[j] for j in reversed(travelling) if w <= j < o]
        native = COMPUTE_FORMATS[compute]
        delta = refreshed[0].text if refreshed and refreshed[0].delta else ""
        if refreshed and refreshed[0].lossless:  # as if the weights themselves had been sent
            delta, refreshed = "", []
        casts = [] if delta else [wire.text for wire in refreshed]
        casts += [gathered[0] if gathered else native, *gathered, native]
        layout = Layout(tuple(shape), sizes, o, wires.block)
        blocks = Geometry(layout.shards * layout.replicas, (shard_piece(layout, layout.replicas),), False)
        return cls(
            reduce=tuple((sizes[j], wires.reduce[j].text) for j in travelling if j < g),
            sync=tuple((sizes[j], wires.sync[j].text) for j in travelling if j >= g),
            back=_narrow(wires.back[j].text for j in reversed(travelling) if j >= o),
            delta=delta,
            full_every=plan.plan.full_refresh_every if delta else 0,
            weight=_narrow(casts),
            compute=compute,
            blocks=blocks.text if wires.block > 1 else "",
            feedback=plan.plan.error_feedback,
        )

    def sent(self, x: Tensor, wire: str) -> Tensor:
        """What arrives of `x` in a wire format, fp32."""
        how = WireFormat.parse(wire)
        if not how.quantized:
            return x.to(getattr(torch, how.torch_name)).to(torch.float32)
        geometry, code = Geometry.parse(self.blocks), how.code
        message = quantisers.quantize([x.to(torch.float32)], geometry, code)
        return quantisers.dequantize(message, geometry, code, torch.float32)[: x.numel()].view(x.shape)

    def to_g(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """One gradient per position in the topology -> one fp32 sum per group of G, in position order."""
        return self._sum(grads, self.reduce)

    def to_o(self, sums: Sequence[Tensor]) -> Tensor:
        """One sum per group of G -> the mean over all ranks, fp32."""
        (total,) = self._sum(sums, self.sync)
        for wire in self.back:
            total = self.sent(total, wire)
        world = 1
        for size, _ in (*self.reduce, *self.sync):
            world *= size
        return total / world if world > 1 else total

    def to_weight(self, master: Tensor) -> Tensor:
        """A dense fp32 master (or image) -> the weight that a forward sees."""
        for wire in self.weight:
            master = self.sent(master, wire)
        return master.to(getattr(torch, self.compute))

    def to_image(self, master: Tensor, image: Tensor | None) -> Tensor:
        """What the holders of the compute copy have after a refresh: the master in the compute dtype, or `image` and a delta."""
        if image is None:
            return master.to(getattr(torch, self.compute), copy=True)
        wide = image.to(torch.float32)
        return (wide + self.sent(master - wide, self.delta)).to(image.dtype)

    def compensated(self, x: Tensor, error: Tensor, hops: Sequence[Hop]) -> tuple[Tensor, Tensor]:
        """Error feedback: (x + error, the next error), for what the first of `hops` is about to send."""
        assert self.feedback is not None
        total = x.to(torch.float32) + error
        lost = total - self.sent(total, hops[0][1])
        return total, self.feedback * error + (1 - self.feedback) * lost if self.feedback else lost

    def compensates(self, hops: Sequence[Hop]) -> bool:
        return self.feedback is not None and bool(hops) and WireFormat.parse(hops[0][1]).quantized

    def _sum(self, parts: Sequence[Tensor], hops: Iterable[Hop]) -> list[Tensor]:
        """Each hop sums neighbours: positions count the fastest level first, so its group is `size` consecutive entries."""
        found = list(parts)
        for size, wire in hops:
            arrived = [self.sent(part, wire) for part in found]
            found = [_in_order(arrived[start : start + size]) for start in range(0, len(arrived), size)]
        return [part.to(torch.float32) for part in found]


def _narrow(wires: Iterable[str]) -> tuple[str, ...]:
    """Formats that can change a value: fp32 is exact, and going on in the same one changes nothing more."""
    kept: list[str] = []
    before = ""
    for wire in wires:
        if wire not in ("fp32", before):
            kept.append(wire)
        before = wire
    return tuple(kept)


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
        self._fresh = False
        self._images: dict[str, Tensor] = {}
        self._deltas: dict[str, int] = {}
        self._errors: dict[tuple[str, str, int], Tensor] = {}
        """State of the error feedback by name, "reduce" or "sync", and position (or group of G)."""
        owners = {found[0][0]: [module for _, module, _ in found] for found in named_owners(self._model).values()}
        self.orders: dict[str, Order] = {}
        self.masters: dict[str, nn.Parameter] = {}
        for name, weight in self._weights.items():
            compute = str(compute_dtype or weight.dtype).removeprefix("torch.")
            kind = kind_of(tuple(weight.shape), owners[name])
            self.orders[name] = Order.of(plan, name, tuple(weight.shape), compute, kind)
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
                reduced = self.orders[name].to_g(self._compensate(name, "reduce", whole))
                if micro_batches > 1:
                    before = at_g.get(name) or [torch.zeros_like(part) for part in reduced]
                    reduced = [main + part for main, part in zip(before, reduced, strict=True)]
                at_g[name] = reduced
        for name, master in self.masters.items():
            sums = self._compensate(name, "sync", at_g[name]) if name in at_g else None
            master.grad = None if sums is None else self.orders[name].to_o(sums)
        self._optimizer.step()
        self._fresh = False
        return losses

    def current(self) -> nn.Module:
        """The model with the weights that a forward would see now: for an evaluation. They are its own until the next step."""
        self._refresh()
        return self._model

    def _compensate(self, name: str, transfer: str, parts: list[Tensor]) -> list[Tensor]:
        order = self.orders[name]
        hops = order.reduce if transfer == "reduce" else order.sync
        if not order.compensates(hops):
            return parts
        out = []
        for position, part in enumerate(parts):
            key = (name, transfer, position)
            error = self._errors.get(key, torch.zeros(part.shape))
            total, self._errors[key] = order.compensated(part, error, hops)
            out.append(total)
        return out

    def _refresh(self) -> None:
        if self._fresh:
            return
        self._fresh = True
        with torch.no_grad():
            for name, weight in self._weights.items():
                order, source = self.orders[name], self.masters[name].detach()
                if order.delta:
                    full = name not in self._images or 0 < order.full_every <= self._deltas[name]
                    self._deltas[name] = 0 if full else self._deltas[name] + 1
                    source = self._images[name] = order.to_image(source, None if full else self._images[name])
                weight.data = order.to_weight(source).clone()

    def _backward(self, batch: Any, grads: dict[str, list[Tensor | None]]) -> Tensor:
        loss = self.loss(self._model, batch)
        loss.backward()
        for name, weight in self._weights.items():
            grads[name].append(weight.grad)
            weight.grad = None
        return loss.detach().to(torch.float32)
