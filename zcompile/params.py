"""Masters, compute copies and main grads: the buffers behind a wrapped model's parameters, grouped into units.

A *unit* is a run of parameters of one block with equal placements; its masters lie side by side in one fp32 buffer, its compute
copies in another, so that a unit is one message without a copy in. A *slot* is one parameter: its spec, its master (an
`nn.Parameter` holding a DTensor whose local tensor is a view of the unit's buffer) and what a forward reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from zcompile import transfers
from zcompile._torch_compat import wrap_local
from zcompile.layout import ParamSpec
from zcompile.plan import ResolvedPlan

MASTER = torch.float32


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
    leaf: Tensor | None = None
    token: Tensor | None = None
    """What an accumulating forward reads through: see Note [Tokens] in zcompile.ops."""
    main: Tensor | None = None
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.spec.name

    def local(self, padded: Tensor, coordinates: tuple[int, ...]) -> Tensor:
        """The rows that this rank owns of a padded shard [shard]: a view."""
        layout = self.spec.layout
        _, rows = layout.local_rows(coordinates)
        shape = (rows, *layout.shape[1:]) if layout.shape else ()
        return padded.narrow(0, 0, rows * layout.row).view(shape)


@dataclass(eq=False)
class Unit:
    """Parameters that travel together: `master` [unit_shard] fp32, `copy` [E_o / E_w, unit_shard] (the master itself if they agree)."""

    name: str
    specs: list[ParamSpec]
    master: Tensor
    copy: Tensor
    refresh: tuple[str, ...]
    slots: list[Slot] = field(default_factory=list)
    writes: int = 0
    """Optimizer steps and other writes that were announced, not counted by torch: see zcompile.writes."""
    seen: int = -1
    """Version of the master that the copy holds; -1: none."""

    @property
    def first(self) -> ParamSpec:
        return self.specs[0]

    @property
    def cached(self) -> bool:
        """True if the copy is a cache: it differs from the master in placement or dtype and has to be refreshed."""
        return self.copy is not self.master

    @property
    def version(self) -> int:
        """Moves with every write that torch counts: to a master DTensor, to its local tensor (each counts its own), to our buffer."""
        return self.writes + self.master._version + sum(s.master._version + s.shard._version for s in self.slots)

    @property
    def stale(self) -> bool:
        return self.cached and self.seen != self.version

    def refresh_hops(self) -> list[int]:
        """Levels of the refresh that communicate, outermost first."""
        first = self.first
        return [level for level in range(first.o, first.w, -1) if first.sizes[level - 1] > 1]


def placements(spec: ParamSpec) -> tuple[Placement, ...]:
    """Shard(0) on every level up to O, Replicate outside: what a DTensor of the master says."""
    return tuple(Shard(0) if level <= spec.o else Replicate() for level in range(1, len(spec.sizes) + 1))


def storage_format(spec: ParamSpec) -> str:
    """dtype name in which the compute copy is stored: what its first communicating gather hop sends, else the compute dtype."""
    for level in range(spec.w, 0, -1):
        if spec.sizes[level - 1] > 1:
            return spec.gather[level - 1]
    return spec.compute


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


def _group(
    model: nn.Module, plan: ResolvedPlan, compute: dict[str, torch.dtype]
) -> Iterator[list[tuple[nn.Parameter, dict[str, Any]]]]:
    """Runs of parameters that share a unit, with the fields of their specs that do not depend on the unit."""
    blocks = _blocks(model)
    sizes = plan.topology.sizes
    open_runs: dict[object, list[tuple[nn.Parameter, dict[str, Any]]]] = {}
    order: list[list[tuple[nn.Parameter, dict[str, Any]]]] = []
    filled: dict[object, int] = {}
    for parameter, owners in named_owners(model).items():
        name, module, _ = owners[0]
        shape = tuple(parameter.shape)
        w, g, o = plan.placement(name, shape[0] if shape else 1, parameter.numel(), len(shape))
        dtype = compute[name]
        fields = {
            "name": name, "shape": shape, "sizes": sizes, "levels": plan.topology.names, "topology": plan.topology.key,
            "w": w, "g": g, "o": o, "compute": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        key = (blocks[module], w, g, o, dtype, parameter.requires_grad, len(shape) > 1, parameter.device)
        size = parameter.numel() * dtype.itemsize
        if key not in open_runs or (filled[key] + size > plan.plan.bucket_bytes and filled[key]):
            open_runs[key] = []
            filled[key] = 0
            order.append(open_runs[key])
        open_runs[key].append((parameter, fields))
        filled[key] += size
    yield from order


def build(model: nn.Module, plan: ResolvedPlan, mesh: DeviceMesh, coordinates: tuple[int, ...], engine: str,
          compute: dict[str, torch.dtype]) -> tuple[list[Unit], list[Slot]]:  # fmt: skip
    """Shard every parameter of `model` in place: its Parameter becomes a DTensor master under the same name.

    Args:
        compute: name -> dtype in which a forward sees the parameter.

    Returns:
        units and slots in registration order. The plain parameters are emptied, so that a forgotten reference fails loudly.
    """
    owners = named_owners(model)
    units: list[Unit] = []
    slots: list[Slot] = []
    for number, run in enumerate(list(_group(model, plan, compute))):
        unit_name = f"u{number}"
        total = 0
        offsets = []
        for _, fields in run:
            offsets.append(total)
            total += ParamSpec(
                **fields, gather=(), reduce=(), sync=(), back=(), unit="", offset=0, unit_shard=0
            ).layout.shard
        specs = []
        for (_, fields), offset in zip(run, offsets, strict=True):
            wires: dict[str, Any] = {
                t: tuple(f.torch_name for f in plan.formats(t, fields["compute"]))
                for t in ("gather", "reduce", "sync", "back")
            }
            specs.append(ParamSpec(**fields, **wires, unit=unit_name, offset=offset, unit_shard=total))
        first, device = specs[0], run[0][0].device
        master = torch.zeros(total, dtype=MASTER, device=device)
        stored = transfers.dtype(storage_format(first))
        rows = first.layout.shards // first.layout.extents[first.w]
        copy = master if rows == 1 and stored == MASTER else torch.zeros(rows * total, dtype=stored, device=device)
        refresh = tuple(f.torch_name for f in plan.formats("refresh", first.compute))
        unit = Unit(unit_name, specs, master, copy, refresh)
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
        start, rows = layout.local_rows(coordinates)
        source = plain.detach()
        local.copy_(source.narrow(0, start, rows) if layout.shape else source)
        local = at_start(local)
        stride = torch.empty(layout.shape, device="meta").stride()
        master = DTensor.from_local(
            local, mesh, placements(spec), run_check=False, shape=torch.Size(layout.shape), stride=stride
        )
        slot.master = nn.Parameter(master, requires_grad=plain.requires_grad)
        slot.shard = master_shard(slot.master)
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


def master_shard(master: Any) -> Tensor:
    """The local tensor of a DTensor itself: with gradients enabled `to_local` would return a view with a counter of its own."""
    with torch.no_grad():
        local: Tensor = master.to_local()
    return local


def _keep_marks(plain: nn.Parameter, master: nn.Parameter) -> None:
    """Attributes that users and libraries hang on a parameter (`_no_weight_decay`, ...) stay on the master."""
    for key, value in vars(plain).items():
        if not hasattr(master, key):
            setattr(master, key, value)


def wrap_plain(slot: Slot, value: Tensor, coordinates: tuple[int, ...]) -> DTensor:
    """A plain tensor of the parameter's shape -> a DTensor like the master, from the rows that this rank owns."""
    layout = slot.spec.layout
    start, rows = layout.local_rows(coordinates)
    local = (value.narrow(0, start, rows) if layout.shape else value).to(slot.unit.master.device)
    return wrap_local(local, slot.master)
