"""Masters, compute copies and main grads: the buffers behind a wrapped model's parameters, grouped into units.

A *unit* is a run of parameters of one block (vectors: of several) with equal placements and formats. Its masters lie side by side in one
fp32 buffer, its compute copies in another, so that a unit is one message without a copy in. A *slot* is one parameter: its spec, its
master (an `nn.Parameter` holding a DTensor whose local tensor is a view of the unit's buffer) and what a forward reads.

Note [Images]: with a delta refresh the holders of a copy keep its *image*, in the compute dtype, to which deltas are added. A rank's own
row of its image is what all other holders have of its masters, to the bit, since all of them add the same message: so the owner needs
no state beside it to know what to send. Where gathers are native the copy is the image; where they are quantised the copy is made from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from zcompile import transfers
from zcompile._torch_compat import local_tensor, wrap_local
from zcompile.layout import ParamSpec, side_by_side
from zcompile.plan import TRANSFERS
from zcompile.resolved import ResolvedPlan
from zcompile.wire import COMPUTE_FORMATS

MASTER = torch.float32
VECTOR_BYTES = 1 << 20
"""What a message of vectors (biases, norms) may grow to. Alone, those of a block are a few KB, whose cost is all latency; together, they
are gathered a few blocks earlier, which this bounds."""


@dataclass(eq=False)
class Slot:
    """One parameter. `leaf` is set for the time of a forward, `main` while micro-batches accumulate."""

    engine: str
    spec: ParamSpec
    names: list[str]
    unit: Unit
    master: nn.Parameter
    text: str
    shard: Tensor = field(init=False)
    """The master's own local tensor, for its version counter."""
    padded: Tensor = field(init=False)
    """This rank's padded shard of the master [shard]: a view of the unit's buffer."""
    leaf: Tensor | None = None
    token: Tensor | None = None
    """What an accumulating forward reads through: see Note [Tokens] in zcompile.ops."""
    main: Tensor | None = None
    errors: dict[str, Tensor] = field(default_factory=dict)
    """State of the error feedback by transfer ("reduce", "sync"): zcompile.feedback."""
    flag: Tensor | None = None
    """With the option checks: [1] int32, not zero once this rank's own gradient was not finite."""
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    source: str = ""
    """The user's line that reads it, for errors; "" until it is known."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def states(self) -> list[Tensor]:
        """What a backward writes beside gradients, as `zcompile::gather` takes it."""
        return [*self.errors.values(), *(() if self.flag is None else (self.flag,))]

    def local(self, padded: Tensor, coordinates: tuple[int, ...]) -> Tensor:
        """The rows that this rank owns of a padded shard [shard]: a view."""
        layout = self.spec.layout
        _, rows = layout.local_rows(coordinates)
        return _beginning(padded, (rows, *layout.shape[1:]) if layout.shape else ())

    def trimmed(self, padded: Tensor) -> Tensor:
        """The same, once the master is made: like its local tensor."""
        return _beginning(padded, self.shard.shape)

    def own_rows(self, whole: Tensor, coordinates: tuple[int, ...]) -> Tensor:
        """The rows that this rank owns of the whole parameter: a view."""
        start, rows = self.spec.layout.local_rows(coordinates)
        return whole.narrow(0, start, rows) if self.spec.layout.shape else whole


def _beginning(padded: Tensor, shape: Sequence[int]) -> Tensor:
    """As many elements from the first on as `shape` has: a view."""
    length = math.prod(shape)
    return (padded if length == padded.numel() else padded.narrow(0, 0, length)).view(tuple(shape))


@dataclass(eq=False)
class Unit:
    """Parameters that travel together: `master` [unit_shard] fp32; `copy`, stored as the first gather hop sends it, [E_o / E_w, unit_shard]
    or [E_o / E_w, unit_record] bytes (the master itself if they agree), or with other ranks' in one buffer (`ParamSpec.in_place`)."""

    name: str
    specs: list[ParamSpec]
    master: Tensor
    copy: Tensor
    image: Tensor | None
    """[E_o / E_w, unit_shard] in the compute dtype, with a delta refresh that is not lossless: see Note [Images]."""
    index: int
    """Which of the E_o shards is that of this rank's masters."""
    full_every: int
    slots: list[Slot] = field(default_factory=list)
    writes: int = 0
    """Optimizer steps and other writes that were announced, not counted by torch: see zcompile.writes."""
    seen: int = -1
    """Version of the master that the copy holds; -1: none."""
    stepped: int = -1
    """Version after the last optimizer step or refresh: if the version has moved on, something else wrote."""
    foreign: bool = True
    """Something else than an optimizer has written since the last refresh (or there was none): a delta has to be a full refresh."""
    deltas: int = 0
    """Delta refreshes since the last full one."""
    message: Tensor | None = None
    """What this rank sends in a lossless delta refresh that is about to be launched: see zcompile.lossless."""
    _copied: tuple[Tensor, list[Tensor]] | None = None
    """A copy, and the parts of it that are this rank's."""

    @property
    def first(self) -> ParamSpec:
        return self.specs[0]

    @property
    def row(self) -> int:
        """Which row of copy and image is that of this rank's masters."""
        return self.index % self.first.held

    @property
    def copied(self) -> list[Tensor]:
        """This rank's own part of the copy: [E_o / E_w, shard] for each parameter where it is `in_place`, else all of it."""
        if not self.first.in_place:
            return [self.copy]
        if self._copied is None or self._copied[0] is not self.copy:
            begin = self.index - self.row
            parts = [transfers.shards_in(self.copy, spec).narrow(0, begin, spec.held) for spec in self.specs]
            self._copied = self.copy, parts
        return self._copied[1]

    @property
    def rows(self) -> list[Tensor]:
        """The same of each parameter [E_o / E_w, shard], wherever it lies; not for copies of codes."""
        if self.first.in_place:
            return self.copied
        shards = [spec.layout.shard for spec in self.specs]
        return list(self.copy.view(self.first.held, -1).split(shards, dim=1))

    @property
    def cached(self) -> bool:
        """True if the copy is a cache: it differs from the master in placement or format and has to be refreshed."""
        return self.copy is not self.master

    @property
    def version(self) -> int:
        """Moves with every write that torch counts: to a master DTensor, to its local tensor (each counts its own), to our buffer."""
        return self.writes + self.master._version + sum(s.master._version + s.shard._version for s in self.slots)

    @property
    def stale(self) -> bool:
        return self.cached and self.seen != self.version

    @property
    def wants_full(self) -> bool:
        """The next refresh cannot be a delta: nothing was sent yet, something else than an optimizer wrote, or it is time for one."""
        due = 0 < self.full_every <= self.deltas
        return self.first.delta and (self.foreign or self.stepped != self.version or due)

    @property
    def coded(self) -> bool:
        """True if the copy is made from the image, not the image itself."""
        return self.image is not None and self.first.stored.text != COMPUTE_FORMATS[self.first.compute]

    def refresh_hops(self) -> list[int]:
        """Levels of the refresh that communicate, outermost first."""
        return self.first.refresh_levels()


def placements(spec: ParamSpec) -> tuple[Placement, ...]:
    """Shard(0) on every level up to O, Replicate outside: what a DTensor of the master says."""
    return tuple(Shard(0) if level <= spec.o else Replicate() for level in range(1, len(spec.sizes) + 1))


def _blocks(model: nn.Module) -> dict[nn.Module, str]:
    """module -> the block it belongs to: the outermost child of a list-like container that holds it ('' outside any)."""
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    found: dict[nn.Module, str] = {}

    def visit(module: nn.Module, prefix: str, block: str) -> None:
        found.setdefault(module, block)
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            visit(child, path + ".", block or (path if isinstance(module, containers) else ""))

    visit(model, "", "")
    return found


def named_owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module, str]]]:
    """parameter -> every (full name, owning module, attribute) under which it is registered, in registration order."""
    found: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=True):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(parameter, []).append((name, module, attribute))
    return found


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def kind_of(shape: Sequence[int], owners: Iterable[nn.Module]) -> str:
    """What a parameter is to the plan's quantised formats, one of zcompile.plan.KINDS: by every module that holds it."""
    holders = list(owners)
    if any(isinstance(module, _EMBEDDINGS) for module in holders):
        return "embedding"
    if any(isinstance(module, _NORMS) for module in holders):
        return "norm"
    return "matrix" if len(shape) > 1 else "vector"


def grouped(
    model: nn.Module, plan: ResolvedPlan, compute: dict[str, torch.dtype]
) -> Iterator[list[tuple[nn.Parameter, dict[str, Any]]]]:
    """Runs of parameters that share a unit, with the fields of their specs that do not depend on the unit."""
    blocks = _blocks(model)
    sizes, bucket = plan.topology.sizes, plan.bucket
    open_runs: dict[object, list[tuple[nn.Parameter, dict[str, Any]]]] = {}
    order: list[list[tuple[nn.Parameter, dict[str, Any]]]] = []
    filled: dict[object, int] = {}
    visit: tuple[object, int] = (None, 0)
    for parameter, owners in named_owners(model).items():
        name, module, _ = owners[0]
        shape = tuple(parameter.shape)
        w, g, o = plan.placement(name, shape[0] if shape else 1, parameter.numel(), len(shape))
        dtype = compute[name]
        text = str(dtype).removeprefix("torch.")
        wires = plan.wires(name, shape, text, kind_of(shape, (owner for _, owner, _ in owners)))
        formats = {t: tuple(wire.text for wire in getattr(wires, t)) for t in TRANSFERS}
        fields = {
            "name": name, "shape": shape, "sizes": sizes, "levels": plan.topology.names, "topology": plan.topology.key,
            "w": w, "g": g, "o": o, "compute": text, **formats, "block": wires.block, "feedback": plan.plan.error_feedback,
            "peer": plan.plan.peer_gather,
        }  # fmt: skip
        vector = len(shape) <= 1
        if not vector and blocks[module] != visit[0]:
            # What comes back to a block after others (an embedding, then the head) is used at another time than what came before.
            visit = (blocks[module], visit[1] + 1)
        # Of vectors a block has too few for a message: they travel with those of the next blocks.
        block, limit = (None, min(VECTOR_BYTES, bucket)) if vector else (visit, bucket)
        size = parameter.numel() * dtype.itemsize
        # What has no elements says of no unit how its copy lies: nothing of it travels.
        key = (block, w, g, o, dtype, parameter.requires_grad, vector, parameter.device, wires, not size)
        if key not in open_runs or (filled[key] + size > limit and filled[key]):
            open_runs[key] = []
            filled[key] = 0
            order.append(open_runs[key])
        open_runs[key].append((parameter, fields))
        filled[key] += size
    yield from order


def build(model: nn.Module, plan: ResolvedPlan, mesh: DeviceMesh, coordinates: tuple[int, ...], engine: str,
          compute: dict[str, torch.dtype], device: torch.device, mapped: bool = False) -> tuple[list[Unit], list[Slot]]:  # fmt: skip
    """Shard every parameter of `model` in place: its Parameter becomes a DTensor master under the same name.

    Args:
        compute: name -> dtype in which a forward sees the parameter.
        device: of the masters. Those of parameters on the meta device begin at zero: see zcompile.deferred.
        mapped: of the specs; zcompile.peers then provides the copies of those that are `in_place`.

    Returns:
        units and slots in registration order. The plain parameters are emptied, so that a forgotten reference fails loudly.
    """
    owners = named_owners(model)
    units: list[Unit] = []
    slots: list[Slot] = []
    for number, run in enumerate(list(grouped(model, plan, compute))):
        unit_name = f"u{number}"
        bare = [ParamSpec(**fields, unit=unit_name, offset=0, unit_shard=0, mapped=mapped) for _, fields in run]
        specs = side_by_side(bare)
        first = specs[0]
        for spec in specs:
            spec.feedback_widths()  # raises where error feedback cannot be had
        master = torch.zeros(first.unit_shard, dtype=MASTER, device=device)
        stored = transfers.dtype(first.stored.text)
        row_width = first.unit_record if first.stored.quantized else first.unit_shard
        copy = torch.zeros(first.held * row_width, dtype=stored, device=device) if first.has_copy else master
        image = None
        if first.imaged:
            as_seen = transfers.dtype(first.compute)
            image = copy if stored == as_seen else torch.zeros(first.held * first.unit_shard, dtype=as_seen, device=device)
            image = image.view(first.held, -1)
        unit = Unit(
            unit_name, specs, master, copy, image, first.layout.index(coordinates), plan.plan.full_refresh_every
        )
        units.append(unit)
        for (plain, _), spec in zip(run, specs, strict=True):
            slot = _slot(plain, spec, unit, mesh, coordinates, engine)
            slot.owners = [(module, attribute) for _, module, attribute in owners[plain]]
            slot.names = [name for name, _, _ in owners[plain]]
            unit.slots.append(slot)
            slots.append(slot)
            for module, attribute in slot.owners:
                module._parameters[attribute] = slot.master
    position = {name: i for i, name in enumerate(found[0][0] for found in owners.values())}
    return units, sorted(slots, key=lambda slot: position[slot.name])


def _slot(
    plain: nn.Parameter, spec: ParamSpec, unit: Unit, mesh: DeviceMesh, coordinates: tuple[int, ...], engine: str
) -> Slot:
    layout = spec.layout
    padded = unit.master.narrow(0, spec.offset, layout.shard)
    slot = Slot(engine, spec, [spec.name], unit, plain, spec.text)
    local = slot.local(padded, coordinates)
    with torch.no_grad():
        if local.is_meta or not plain.is_meta:
            local.copy_(slot.own_rows(plain.detach(), coordinates))
        local = at_start(local)
        stride = torch.empty(layout.shape, device="meta").stride()
        master = DTensor.from_local(
            local, mesh, placements(spec), run_check=False, shape=torch.Size(layout.shape), stride=stride
        )
        slot.master = nn.Parameter(master, requires_grad=plain.requires_grad)
        slot.shard = local_of(slot.master)
        slot.padded = padded
    _keep_marks(plain, slot.master)
    plain.data = plain.new_empty(0)
    return slot


def at_start(local: Tensor) -> Tensor:
    """The same memory as the whole of a storage: a DTensor whose local tensor begins inside one can be neither saved nor copied (2.13)."""
    if local.is_meta:
        return local
    begin = local.storage_offset() * local.itemsize
    part = local.untyped_storage()[begin : begin + local.numel() * local.itemsize]
    own: Tensor = torch.empty(0, dtype=local.dtype, device=local.device).set_(part, 0, local.shape, local.stride())
    return own


def local_of(value: Any) -> Tensor:
    """What this rank holds of a master, a gradient or a moment: of a DTensor its local tensor (`to_local` would return a view with a
    version counter of its own), else the tensor itself."""
    return local_tensor(value) if isinstance(value, DTensor) else value


def _keep_marks(plain: nn.Parameter, master: nn.Parameter) -> None:
    """Attributes that users and libraries hang on a parameter (`_no_weight_decay`, ...) stay on the master."""
    for key, value in vars(plain).items():
        if not hasattr(master, key):
            setattr(master, key, value)


def wrap_plain(slot: Slot, value: Tensor, coordinates: tuple[int, ...]) -> DTensor:
    """A plain tensor of the parameter's shape -> a DTensor like the master, from the rows that this rank owns."""
    return wrap_local(slot.own_rows(value, coordinates).to(slot.unit.master.device), slot.master)
