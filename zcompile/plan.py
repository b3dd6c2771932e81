"""Plan: where weights, gradients and optimizer state live, and what travels between those places.

Three placements W <= G <= O (in level order), a wire format for each transfer (and per level of it, if wanted), and
rules that override placements per parameter. A Plan is machine-independent; `resolve` puts it on a topology.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, asdict, dataclass, fields
from difflib import get_close_matches

from zcompile.topology import LADDER, Topology
from zcompile.wire import COMPUTE_FORMATS, Formats, WireFormat, freeze_formats

__all__ = ["PRESETS", "TRANSFERS", "Plan", "ResolvedPlan", "Rule", "WireFormat"]

TRANSFERS = ("gather", "reduce", "sync", "refresh", "back")

PRESETS: dict[str, tuple[str, str, str]] = {
    "ddp": ("whole", "whole", "whole"),
    "zero1": ("whole", "whole", "world"),
    "zero2": ("whole", "world", "world"),
    "zero3": ("world", "world", "world"),
    "fsdp": ("world", "world", "world"),
    "hsdp": ("node", "node", "node"),
    "mics": ("node", "node", "node"),
    "zeropp": ("node", "world", "world"),
    "zero_topo": ("pair", "node", "world"),
}
"""Placements (W, G, O) by preset name. Presets name placements only; formats are arguments, native by default."""

_OWNERS = ("weights", "gradients", "optimizer")
# Names with a known order. `site` is no placement: each site holds the whole state, `world` is the widest.
_ORDER = {name: i for i, name in enumerate(("whole", *LADDER[:-1], "world"))}


@dataclass(frozen=True)
class Rule:
    """Placements for the parameters it matches: fnmatch `match` on the name and at most `max_elements` elements (if
    given). A placement left None keeps the plan's. The first rule that matches a parameter wins, also one that changes
    nothing. Raises ValueError naming the field and its value."""

    match: str = "*"
    max_elements: int | None = None
    weights: str | None = None
    gradients: str | None = None
    optimizer: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise ValueError(f"rule match={self.match!r}: must be a pattern on parameter names, such as *.bias")
        count = self.max_elements
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise ValueError(f"rule max_elements={count!r}: must be a number of elements from 0, or None")
        for owner in _OWNERS:
            if getattr(self, owner) is not None:
                _check_placement(f"rule {self.match!r}: {owner}", getattr(self, owner))

    def matches(self, name: str, numel: int) -> bool:
        """Whether it applies to a parameter of that name and number of elements."""
        return (self.max_elements is None or numel <= self.max_elements) and fnmatch.fnmatchcase(name, self.match)


@dataclass(frozen=True)
class Plan:
    """Placements, wire formats, rules and buffer budgets. Frozen, hashable, validated when made.

    weights, gradients, optimizer: placements (`whole`, a level name, `world`), W <= G <= O.
    gather, reduce, sync, refresh, back: the wire format of that transfer, one ("fp32", "bf16", "native" = the compute
    dtype) or a mapping from level name to format. A level missing from a mapping takes the transfer's default: gather
    native, reduce fp32, sync what reduce has there, refresh what gather has there, back fp32. `back` is the way from
    the world back to O when O is narrower. sync=None and refresh=None mean that default at all levels.
    bucket_bytes: the size that a message aims at.  name: a label.
    wire: "paper" asks for int8 gathers and int4 reductions, refused in this version.

    Order is checked here where names are on the canonical ladder, and for all names in `resolve`.
    Raises ValueError naming the field, its value and the valid ones.
    """

    weights: str = "pair"
    gradients: str = "node"
    optimizer: str = "world"
    _: KW_ONLY
    gather: Formats = "native"
    reduce: Formats = "fp32"
    sync: Formats | None = None
    refresh: Formats | None = None
    back: Formats = "fp32"
    rules: tuple[Rule, ...] = ()
    bucket_bytes: int = 25 * 2**20
    name: str = "custom"
    wire: InitVar[str | None] = None

    def __post_init__(self, wire: str | None) -> None:
        if wire is not None:
            known = 'wire="paper" is int8 gathers and int4 reductions: not in this version' if wire == "paper" else ""
            raise ValueError(f"wire={wire!r}: {known or 'unknown'}; leave it out and give formats per transfer")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r}: must be a text")
        for owner in _OWNERS:
            _check_placement(owner, getattr(self, owner))
        for transfer in TRANSFERS:
            value = getattr(self, transfer)
            if value is not None or transfer not in ("sync", "refresh"):
                object.__setattr__(self, transfer, freeze_formats(transfer, value))
        size = self.bucket_bytes
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"bucket_bytes={size!r}: must be a number of bytes from 1")
        if isinstance(self.rules, (str, Rule)) or not isinstance(self.rules, Iterable):
            raise ValueError(f"rules={self.rules!r}: must be a sequence of Rule")
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ValueError(f"rules: {rule!r} is no Rule")
        _check_order("plan", self.placements(), _ORDER)
        for rule in self.rules:
            _check_order(f"rule {rule.match!r}", self.placements(rule), _ORDER)

    def placements(self, rule: Rule | None = None) -> dict[str, str]:
        """Placement names by owner (weights, gradients, optimizer), overridden by a rule if given."""
        return {owner: (rule and getattr(rule, owner)) or getattr(self, owner) for owner in _OWNERS}

    @classmethod
    def preset(cls, preset: str, **overrides: object) -> Plan:
        """A preset, with any field of Plan overridden. Its label stays unless placements change (then "custom").
        ValueError for an unknown preset or field, listing the valid ones."""
        if preset == "auto":
            raise ValueError(f"plan 'auto': the planner is not in this version; valid: {', '.join(PRESETS)}")
        if preset not in PRESETS:
            raise ValueError(f"unknown plan {preset!r}{_hint(preset, PRESETS)}; valid: {', '.join(PRESETS)}")
        valid = [field.name for field in fields(cls)] + ["wire"]
        for option in overrides:
            if option not in valid:
                raise ValueError(f"unknown plan option {option!r}{_hint(option, valid)}; valid: {', '.join(valid)}")
        placements = dict(zip(_OWNERS, PRESETS[preset], strict=True))
        changed = any(overrides.get(owner, place) != place for owner, place in placements.items())
        return cls(**{**placements, "name": "custom" if changed else preset, **overrides})  # type: ignore[arg-type]

    @classmethod
    def parse(cls, plan: str | Plan) -> Plan:
        """A preset by name, or a Plan unchanged. ValueError for anything else."""
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, str):
            return cls.preset(plan)
        raise ValueError(f"plan {plan!r}: valid: a Plan or one of {', '.join(PRESETS)}")

    def resolve(self, topology: Topology, compute: str) -> ResolvedPlan:
        """This plan on a topology, computing in "float32" or "bfloat16". A level that the topology lacks becomes the
        next slower one that exists. ValueError if placements are then out of order, or name a level (or a format's
        level) that nobody knows."""
        return ResolvedPlan(self, topology, compute)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan on a topology: placements as level indices (0 = whole), formats per level."""

    plan: Plan
    topology: Topology
    compute: str

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE_FORMATS:
            raise ValueError(f"compute dtype {self.compute!r}: valid: {', '.join(COMPUTE_FORMATS)}")
        for rule in (None, *self.plan.rules):
            what = "plan" if rule is None else f"rule {rule.match!r}"
            places = self.plan.placements(rule)
            _check_order(
                f"{what} on topology {self.topology.key}", places, {p: self.topology.index(p) for p in places.values()}
            )
        for transfer in TRANSFERS:
            for level in self._named_levels(transfer):
                if level not in self.topology.names and level not in LADDER:
                    valid = ", ".join(dict.fromkeys((*self.topology.names, *LADDER)))
                    raise ValueError(f"{transfer} names the unknown level {level!r}; valid: {valid}")

    def _named_levels(self, transfer: str) -> list[str]:
        value = getattr(self.plan, transfer)
        return [level for level, _ in value] if isinstance(value, tuple) else []

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
        rule = next((rule for rule in self.plan.rules if rule.matches(name, numel)), None)
        cap = max(k for k, extent in enumerate(self.topology.extents) if extent <= rows)
        places = self.plan.placements(rule)
        w, g, o = (min(self.topology.index(places[owner]), cap) for owner in _OWNERS)
        return w, g, o

    def formats(self, transfer: str, compute: str = "") -> tuple[WireFormat, ...]:
        """The wire format of a transfer at each level 1..m; never "native". ValueError for an unknown transfer.

        `compute` is the dtype of a parameter that differs from the model's main one: what native means for it.
        """
        compute = compute or self.compute
        if transfer not in TRANSFERS:
            raise ValueError(f"unknown transfer {transfer!r}; valid: {', '.join(TRANSFERS)}")
        value: Formats | None = getattr(self.plan, transfer)
        if isinstance(value, WireFormat):
            return (value.resolved(compute),) * len(self.topology.levels)
        if transfer in ("sync", "refresh"):
            default = self.formats("reduce" if transfer == "sync" else "gather", compute)
        else:
            wire = WireFormat.parse("native" if transfer == "gather" else "fp32").resolved(compute)
            default = (wire,) * len(self.topology.levels)
        given = {level: wire.resolved(compute) for level, wire in value} if isinstance(value, tuple) else {}
        return tuple(given.get(level, wire) for level, wire in zip(self.topology.names, default, strict=True))

    @property
    def key(self) -> str:
        """16 hexadecimal digits over every field of the plan, the topology (levels with their rates, device, order)
        and the compute dtype: for cache keys and for agreement between ranks. The same in every process."""
        content = json.dumps([asdict(self.plan), asdict(self.topology), self.compute], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """Printable lines: preset, what each placement became on this topology, rules, formats."""
        topology = self.topology
        shape = " ".join(f"{level.name} {level.size}" for level in topology.levels)
        lines = [
            f"plan {self.plan.name} on {topology.key} ({shape}; {topology.world_size} ranks), compute {self.compute}"
        ]
        lines += [f"  {owner + ':':<11}{self._became(getattr(self.plan, owner))}" for owner in _OWNERS]
        for rule in self.plan.rules:
            at_most = "" if rule.max_elements is None else f" up to {rule.max_elements} elements"
            over = [f"{owner} {self._became(getattr(rule, owner))}" for owner in _OWNERS if getattr(rule, owner)]
            lines.append(f"  rule {rule.match}{at_most}: {', '.join(over) or 'as the plan'}")
        for transfer in TRANSFERS:
            formats = self.formats(transfer)
            one = len(set(formats)) == 1
            pairs = zip(topology.names, formats, strict=True)
            text = formats[0].name if one else ", ".join(f"{level} {wire.name}" for level, wire in pairs)
            absent = [level for level in self._named_levels(transfer) if level not in topology.names]
            note = f" (unused: no level {', '.join(f'`{level}`' for level in absent)})" if absent else ""
            lines.append(f"  {transfer + ':':<11}{text}{note}")
        lines.append(f"  {'bucket:':<11}{self.plan.bucket_bytes} bytes")
        return "\n".join(lines)

    def _became(self, place: str) -> str:
        index = self.topology.index(place)
        if place == "whole" or place in self.topology.names:
            return place
        level = self.topology.names[index - 1]
        if place == "world":
            return f"world ({self.topology.extents[index]} ranks, up to {level})"
        return f"{place} -> {level} (no level `{place}` in {self.topology.key})"


def _check_placement(what: str, place: object) -> None:
    if not isinstance(place, str) or not place:
        raise ValueError(
            f"{what}={place!r}: must be a placement, one of {', '.join(_ORDER)} or a level of the topology"
        )
    if place == "site":
        raise ValueError(f"{what}='site': state is not sharded over sites; the widest placement is `world`")


def _check_order(what: str, places: dict[str, str], order: Mapping[str, int]) -> None:
    known = [(owner, place) for owner, place in places.items() if place in order]
    for i, (narrow, a) in enumerate(known):
        for wide, b in known[i + 1 :]:
            if order[a] > order[b]:
                raise ValueError(
                    f"{what}: {narrow}={a!r} is wider than {wide}={b!r}; "
                    f"valid: weights <= gradients <= optimizer in {' < '.join(sorted(order, key=lambda p: order[p]))}"
                )


def _hint(value: str, valid: Iterable[str]) -> str:
    close = get_close_matches(str(value), list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
