"""ResolvedPlan: a plan on a topology. Which levels placements are, what each parameter's are, and the format of every hop."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from zcompile.plan import DEFAULTS, OWNERS, TRANSFERS, Plan, Rule, check_order, named_levels
from zcompile.topology import LADDER, Topology
from zcompile.wire import COMPUTE_FORMATS, Formats, WireFormat

LOSSLESS_SMALLEST = 1024
"""Values of a shard below which header and padding are some percent of a lossless delta."""


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan on a topology: placements as level indices (0 = whole), formats per level."""

    plan: Plan
    topology: Topology
    compute: str
    chip: str = ""

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE_FORMATS:
            raise ValueError(f"compute dtype {self.compute!r}: valid: {', '.join(COMPUTE_FORMATS)}")
        for rule in (None, *self.plan.rules):
            what = "plan" if rule is None else f"rule {rule.match!r}"
            places = self.plan.placements(rule)
            check_order(
                f"{what} on topology {self.topology.key}", places, {p: self.topology.index(p) for p in places.values()}
            )
        for rule in (None, *self.plan.rules):
            what = "" if rule is None else f"rule {rule.match!r}: "
            for transfer in TRANSFERS:
                for level in named_levels(getattr(rule or self.plan, transfer)):
                    if level not in self.topology.names and level not in LADDER:
                        valid = ", ".join(dict.fromkeys((*self.topology.names, *LADDER)))
                        raise ValueError(f"{what}{transfer} names the unknown level {level!r}; valid: {valid}")
                self.formats(transfer, rule=rule)
            self._check_lossless(what, rule)
        if self.plan.peer_gather:
            self._check_peers()

    def _check_lossless(self, what: str, rule: Rule | None) -> None:
        """A lossless delta goes on from bf16 values: copies that are stored otherwise are none."""
        w = self.topology.index(self.plan.placements(rule)["weights"])
        levels = list(zip(self.topology.names, self.topology.sizes, self.formats("gather", rule=rule), strict=True))
        sent = next((wire for _, size, wire in reversed(levels[:w]) if size > 1), None)
        if self.formats("refresh", rule=rule)[0].lossless and sent is not None and sent.name != "bf16":
            raise ValueError(
                f"{what}refresh='lossless-delta' with gather={sent.short!r}: it goes on from copies of bf16 values, which then are stored "
                "as they are gathered; valid with it: gather='native'; valid with that: a refresh as the gather, int8-delta, int4-delta"
            )

    def _check_peers(self) -> None:
        """peer_gather=True has something to read, and one level to read it over."""
        names, sizes = self.topology.names, self.topology.sizes
        over = [name for name, size in list(zip(names, sizes, strict=True))[: self.weights] if size > 1]
        if len(over) > 1:
            raise ValueError(
                f"peer_gather=True with weights over {' and '.join(over)}: ranks of one level read one another's memory; "
                f"valid: weights={over[0]!r}, or peer_gather=False"
            )

    @property
    def bucket(self) -> int:
        """Bytes of weights that travel together."""
        from zcompile.times import message_bytes  # which needs torch; plans are made and read without it

        return self.plan.bucket_bytes or message_bytes(self.topology.levels)

    @property
    def weights(self) -> int:
        """W as a level index, before rules and caps."""
        return self.topology.index(self.plan.weights)

    @property
    def gradients(self) -> int:
        """G as a level index, before rules and caps."""
        return self.topology.index(self.plan.gradients)

    @property
    def optimizer(self) -> int:
        """O as a level index, before rules and caps."""
        return self.topology.index(self.plan.optimizer)

    def placement(self, name: str, rows: int, numel: int, dim: int) -> tuple[int, int, int]:
        """(W, G, O) as level indices for one parameter: its name, rows (size of dimension 0), elements and number of
        dimensions. Rules apply first; then each is capped at the widest level k with E_k <= rows. Scalars, empty
        parameters and those of one row stay whole (0)."""
        if dim == 0 or rows <= 1 or numel == 0:
            return 0, 0, 0
        rule = self.rule(name, numel)
        cap = max(k for k, extent in enumerate(self.topology.extents) if extent <= rows)
        places = self.plan.placements(rule)
        w, g, o = (min(self.topology.index(places[owner]), cap) for owner in OWNERS)
        return w, g, o

    def formats(self, transfer: str, compute: str = "", rule: Rule | None = None) -> tuple[WireFormat, ...]:
        """The wire format of a transfer at each level 1..m; never "native". ValueError for an unknown transfer, for fp8 on a chip
        without it, for a refresh that is a delta at some levels only.

        `compute` is the dtype of a parameter that differs from the model's main one: what native means for it. `rule` is what
        matches the parameter. This is what the plan says for matrices: see `wires`.
        """
        compute = compute or self.compute
        if transfer not in TRANSFERS:
            raise ValueError(f"unknown transfer {transfer!r}; valid: {', '.join(TRANSFERS)}")
        value: Formats | None = None if rule is None else getattr(rule, transfer)
        if value is None:
            value = getattr(self.plan, transfer)
        if isinstance(value, WireFormat) and value.lossless and compute != self.compute:
            value = WireFormat.parse("native")  # a parameter of its own dtype in a model of bf16
        if isinstance(value, WireFormat):
            found = (value.resolved(compute, self.chip),) * len(self.topology.levels)
        else:
            if transfer in ("sync", "refresh"):
                default = self.formats("reduce" if transfer == "sync" else "gather", compute, rule)
            else:
                wire = WireFormat.parse(DEFAULTS[transfer]).resolved(compute)
                default = (wire,) * len(self.topology.levels)
            given = {a: wire.resolved(compute, self.chip) for a, wire in value} if isinstance(value, tuple) else {}
            found = tuple(given.get(level, wire) for level, wire in zip(self.topology.names, default, strict=True))
        if any(wire.delta for wire in found) and len(set(found)) > 1:
            text = ", ".join(f"{level} {wire.short}" for level, wire in zip(self.topology.names, found, strict=True))
            raise ValueError(
                f"{transfer} ({text}): a delta goes on over all levels of a refresh as it is; give one format for all"
            )
        return found

    def wires(self, name: str, shape: Sequence[int], compute: str = "", kind: str = "matrix") -> Wires:
        """The formats that the transfers of one parameter have, and the block that its shards are padded to.

        A quantised format that the plan gives (not a rule that names the parameter) is replaced by the transfer's native default
        for embeddings, norms and vectors, and for a parameter whose shard does not fill one block; a lossless one for norms and vectors,
        some of which begin at zero, and for small shards.
        """
        numel = math.prod(shape)
        rule = self.rule(name, numel)
        rows = shape[0] if shape else 1
        _, _, o = self.placement(name, rows, numel, len(shape))
        found: dict[str, tuple[WireFormat, ...]] = {}
        if rule is not None and isinstance(rule.refresh, WireFormat) and rule.refresh.lossless:
            try:
                rule.refresh.resolved(compute or self.compute)
            except ValueError as error:
                raise ValueError(f"rule {rule.match!r}, which is the first to match {name!r}: refresh: {error}") from None
        for transfer in TRANSFERS:
            own = rule is not None and _given_by(rule, transfer)
            wires = self.formats(transfer, compute, rule)
            if not own:
                default = "fp32" if transfer in ("reduce", "sync", "back") else "native"
                native = WireFormat.parse(default).resolved(compute or self.compute)
                shard = -(-rows // self.topology.extents[o]) * (numel // rows if rows else 0)
                piece = -(-shard // (self.topology.extents[-1] // self.topology.extents[o]))

                def suits(wire: WireFormat, shard: int = shard, piece: int = piece) -> bool:
                    if wire.lossless:
                        return kind in ("matrix", "embedding") and shard >= LOSSLESS_SMALLEST
                    return not wire.quantized or (kind == "matrix" and piece >= wire.block)

                wires = tuple(wire if suits(wire) else native for wire in wires)
            found[transfer] = wires
        return Wires(**found)

    def rule(self, name: str, numel: int) -> Rule | None:
        """The rule that holds for a parameter, if any."""
        return next((rule for rule in self.plan.rules if rule.matches(name, numel)), None)

    @property
    def key(self) -> str:
        """16 hexadecimal digits over every field of the plan, the topology (levels with their rates, device, order)
        and the compute dtype: for cache keys and for agreement between ranks. The same in every process."""
        content = json.dumps([asdict(self.plan), asdict(self.topology), self.compute, self.chip], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """Printable lines: preset, what each placement became on this topology, rules, formats."""
        topology = self.topology
        shape = " ".join(f"{level.name} {level.size}" for level in topology.levels)
        lines = [
            f"plan {self.plan.name} on {topology.key} ({shape}; {topology.world_size} ranks), compute {self.compute}"
        ]
        lines += [f"  {owner + ':':<11}{self._became(getattr(self.plan, owner))}" for owner in OWNERS]
        for rule in self.plan.rules:
            at_most = "" if rule.max_elements is None else f" up to {rule.max_elements} elements"
            over = [f"{owner} {self._became(getattr(rule, owner))}" for owner in OWNERS if getattr(rule, owner)]
            over += [
                f"{transfer} {_said(getattr(rule, transfer))}" for transfer in TRANSFERS if getattr(rule, transfer)
            ]
            lines.append(f"  rule {rule.match}{at_most}: {', '.join(over) or 'as the plan'}")
        for transfer in TRANSFERS:
            formats = self.formats(transfer)
            one = len(set(formats)) == 1
            pairs = zip(topology.names, formats, strict=True)
            text = formats[0].short if one else ", ".join(f"{level} {wire.short}" for level, wire in pairs)
            absent = [level for level in named_levels(getattr(self.plan, transfer)) if level not in topology.names]
            note = f" (unused: no level {', '.join(f'`{level}`' for level in absent)})" if absent else ""
            lines.append(f"  {transfer + ':':<11}{text}{note}")
        if any(wire.quantized for transfer in TRANSFERS for wire in self.formats(transfer)):
            lines.append(
                f"  {'native:':<11}embeddings, norms, vectors, shards smaller than a block, unless a rule says otherwise"
            )
        if any(wire.delta for wire in self.formats("refresh")):
            every = f" and after {self.plan.full_refresh_every} deltas" if self.plan.full_refresh_every else ""
            lines.append(f"  {'full:':<11}a refresh after every write that is no optimizer step{every}")
        if self.plan.error_feedback is not None:
            lines.append(f"  {'feedback:':<11}beta {self.plan.error_feedback:g}, where gradients are quantised")
        if self.plan.peer_gather:
            lines.append(f"  {'peer:':<11}gathers read the other ranks' memory")
        lines.append(f"  {'bucket:':<11}{self.bucket} bytes")
        return "\n".join(lines)

    def _became(self, place: str) -> str:
        index = self.topology.index(place)
        if place == "whole" or place in self.topology.names:
            return place
        level = self.topology.names[index - 1]
        if place == "world":
            return f"world ({self.topology.extents[index]} ranks, up to {level})"
        return f"{place} -> {level} (no level `{place}` in {self.topology.key})"


@dataclass(frozen=True)
class Wires:
    """The wire formats of one parameter: per transfer one for each level 1..m."""

    gather: tuple[WireFormat, ...]
    reduce: tuple[WireFormat, ...]
    sync: tuple[WireFormat, ...]
    refresh: tuple[WireFormat, ...]
    back: tuple[WireFormat, ...]

    @property
    def block(self) -> int:
        """What shards are padded to a multiple of: the largest block of its quantised formats (all are powers of two), or 1."""
        return max((wire.block for t in TRANSFERS for wire in getattr(self, t) if wire.quantized), default=1)


def _given_by(rule: Rule, transfer: str) -> bool:
    """Whether a rule itself gives a transfer's format, or that of the one which it follows."""
    follows = {"sync": "reduce", "refresh": "gather"}.get(transfer, transfer)
    return getattr(rule, transfer) is not None or getattr(rule, follows) is not None


def _said(value: Formats) -> str:
    if isinstance(value, WireFormat):
        return value.short
    assert isinstance(value, tuple)
    return " ".join(f"{level}={wire.short}" for level, wire in value)
