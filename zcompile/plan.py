"""Plan: where weights, gradients and optimizer state live, and what travels between those places.

Three placements W <= G <= O (in level order), a wire format for each transfer (and per level of it, if wanted), and
rules that override placements per parameter. A Plan is machine-independent; `resolve` puts it on a topology
(zcompile.resolved).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING

from zcompile.topology import LADDER, Topology
from zcompile.wire import Formats, WireFormat, freeze_formats

if TYPE_CHECKING:
    from zcompile.resolved import ResolvedPlan

__all__ = ["ALLOWED", "KINDS", "PRESETS", "TRANSFERS", "Auto", "Plan", "Rule", "WireFormat"]

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

WIRES = {"paper": {"gather": "int8", "reduce": "int4/128"}}
"""What `wire=` stands for: formats of transfers, by name. Gradients in blocks of 128: docs/convergence.md has what 64 and 256 do."""

DEFAULTS = {"gather": "native", "reduce": "fp32", "back": "fp32"}
"""Formats of transfers of which nothing is said. A sync is as the reduction then, a refresh as the gather."""
OWNERS = ("weights", "gradients", "optimizer")
# Names with a known order. `site` is no placement: each site holds the whole state, `world` is the widest.
_ORDER = {name: i for i, name in enumerate(("whole", *LADDER[:-1], "world"))}


KINDS = ("matrix", "embedding", "norm", "vector")
"""Kinds of parameters: of two dimensions or more; those of embeddings and of norms; of one dimension or none. The plan's quantised
formats are for matrices, lossless deltas for these and embeddings; the others keep native ones, unless a rule gives them formats of
their own."""


@dataclass(frozen=True)
class Rule:
    """Placements and wire formats for the parameters it matches: fnmatch `match` on the name and at most `max_elements` elements
    (if given). What is left None keeps the plan's. A format given here holds for what matches, embeddings and norms included. The
    first rule that matches a parameter wins, also one that changes nothing. Raises ValueError naming the field and its value."""

    match: str = "*"
    max_elements: int | None = None
    weights: str | None = None
    gradients: str | None = None
    optimizer: str | None = None
    _: KW_ONLY
    gather: Formats | None = None
    reduce: Formats | None = None
    sync: Formats | None = None
    refresh: Formats | None = None
    back: Formats | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise ValueError(f"rule match={self.match!r}: must be a pattern on parameter names, such as *.bias")
        count = self.max_elements
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise ValueError(f"rule max_elements={count!r}: must be a number of elements from 0, or None")
        for owner in OWNERS:
            if getattr(self, owner) is not None:
                _check_placement(f"rule {self.match!r}: {owner}", getattr(self, owner))
        for transfer in TRANSFERS:
            if getattr(self, transfer) is not None:
                wires = freeze_formats(f"rule {self.match!r}: {transfer}", getattr(self, transfer))
                object.__setattr__(self, transfer, wires)

    def matches(self, name: str, numel: int) -> bool:
        """Whether it applies to a parameter of that name and number of elements."""
        return (self.max_elements is None or numel <= self.max_elements) and fnmatch.fnmatchcase(name, self.match)


def paper_rule(match: str) -> Rule:
    """The formats of wire="paper" for what matches, embeddings included."""
    return Rule(match, gather=WIRES["paper"]["gather"], reduce=WIRES["paper"]["reduce"])


@dataclass(frozen=True)
class Plan:
    """Placements, wire formats, rules and buffer budgets. Frozen, hashable, validated when made.

    weights, gradients, optimizer: placements (`whole`, a level name, `world`), W <= G <= O.
    gather, reduce, sync, refresh, back: the wire format of that transfer, one ("fp32", "bf16", "native" = the compute
    dtype, "int8", "int4", "fp8", with options: see WireFormat) or a mapping from level name to format. A level missing from a
    mapping takes the transfer's default: gather native, reduce fp32, sync what reduce has there, refresh what gather has there,
    back fp32. None means that default at all levels. `back` is the way from the world back to O when O is narrower. A refresh can
    also be "int8-delta", "int4-delta", or "lossless-delta": the bits of native bf16 weights in fewer bytes. Quantised formats are for
    matrices: see KINDS and Rule.
    wire: "paper" is int8 gathers (so refreshes) and int4/128 reductions (so syncs), where these are not given.
    full_refresh_every: after so many delta refreshes in a row a full one (0: after other writes only).
    error_feedback: None, or beta in [0, 1): what quantising a gradient loses on this rank is added to its next one. The state is
    beta times the old one and 1 - beta times the new loss (LoCo's moving average; 0: the loss itself).
    peer_gather: gathers read the copies of the other ranks where they lie in memory, without messages: shared memory of a host on CPUs,
    where native copies are parts of one buffer, of which a gather is a view; symmetric memory on GPUs. For weights over one level, of
    ranks that can see one another's memory.
    bucket_bytes: bytes of weights, in the compute dtype, that travel together, of one block at most. None: so many that no level's
    latency matters much (zcompile.times.message_bytes; 25 to 400 MiB).  name: a label.

    Order is checked here where names are on the canonical ladder, and for all names in `resolve`.
    Raises ValueError naming the field, its value and the valid ones.
    """

    weights: str = "pair"
    gradients: str = "node"
    optimizer: str = "world"
    _: KW_ONLY
    gather: Formats | None = None
    reduce: Formats | None = None
    sync: Formats | None = None
    refresh: Formats | None = None
    back: Formats | None = None
    full_refresh_every: int = 0
    error_feedback: float | None = None
    peer_gather: bool = False
    rules: tuple[Rule, ...] = ()
    bucket_bytes: int | None = None
    name: str = "custom"
    wire: InitVar[str | None] = None

    def __post_init__(self, wire: str | None) -> None:
        if wire not in (None, *WIRES):
            raise ValueError(
                f"wire={wire!r}: unknown; valid: {', '.join(WIRES)}, or leave it out and give formats per transfer"
            )
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r}: must be a text")
        for owner in OWNERS:
            _check_placement(owner, getattr(self, owner))
        for transfer in TRANSFERS:
            value = getattr(self, transfer)
            if value is None:
                value = WIRES.get(wire or "", {}).get(transfer, DEFAULTS.get(transfer))
            if value is not None:
                object.__setattr__(self, transfer, freeze_formats(transfer, value))
        size, every, beta = self.bucket_bytes, self.full_refresh_every, self.error_feedback
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(
                f"bucket_bytes={size!r}: must be a number of bytes from 1, or None for what the machine's levels want"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"full_refresh_every={every!r}: must be a number of delta refreshes, or 0 for never")
        if beta is not None and (isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1):
            raise ValueError(f"error_feedback={beta!r}: must be None, or a number from 0 up to, not including, 1")
        if not isinstance(self.peer_gather, bool):
            raise ValueError(f"peer_gather={self.peer_gather!r}: must be True or False")
        if isinstance(self.rules, (str, Rule)) or not isinstance(self.rules, Iterable):
            raise ValueError(f"rules={self.rules!r}: must be a sequence of Rule")
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ValueError(f"rules: {rule!r} is no Rule")
        check_order("plan", self.placements(), _ORDER)
        for rule in self.rules:
            check_order(f"rule {rule.match!r}", self.placements(rule), _ORDER)

    def placements(self, rule: Rule | None = None) -> dict[str, str]:
        """Placement names by owner (weights, gradients, optimizer), overridden by a rule if given."""
        return {owner: (rule and getattr(rule, owner)) or getattr(self, owner) for owner in OWNERS}

    @classmethod
    def preset(cls, preset: str, **overrides: object) -> Plan:
        """A preset, with any field of Plan overridden. Its label stays unless placements change (then "custom").
        ValueError for an unknown preset or field, listing the valid ones."""
        if preset == "auto":
            raise ValueError(
                "plan 'auto' is chosen for a model: hierarchical_zero(model, plan='auto'), or `zcompile plan`; "
                f"valid here: {', '.join(PRESETS)}"
            )
        if preset not in PRESETS:
            raise ValueError(f"unknown plan {preset!r}{_hint(preset, PRESETS)}; valid: {', '.join(PRESETS)}")
        valid = [field.name for field in fields(cls)] + ["wire"]
        for option in overrides:
            if option not in valid:
                raise ValueError(f"unknown plan option {option!r}{_hint(option, valid)}; valid: {', '.join(valid)}")
        placements = dict(zip(OWNERS, PRESETS[preset], strict=True))
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

    def resolve(self, topology: Topology, compute: str, chip: str = "") -> ResolvedPlan:
        """This plan on a topology, computing in "float32" or "bfloat16" on a chip ("": the topology's). A level that the topology
        lacks becomes the next slower one that exists. ValueError if placements are then out of order, or name a level (or a
        format's level) that nobody knows, or if a format is not for this chip."""
        from zcompile.resolved import ResolvedPlan  # which needs plans

        return ResolvedPlan(self, topology, compute, chip or topology.device.chip)


ALLOWED = ("bf16", "int8", "int4", "lossless-delta", "int8-delta", "int4-delta")
"""What the planner may be allowed beyond native gathers and fp32 reductions: bf16 and int4 for reductions, int8 for gathers and
reductions, deltas for refreshes."""


@dataclass(frozen=True)
class Auto:
    """What `plan=` takes instead of a Plan: the planner chooses. "auto" is Auto().

    Attributes:
        allow: wire formats of ALLOWED that it may choose beyond native ones; none is chosen unasked.
        max_wire_bits: the same in one number, 16, 8 or 4: formats of at least so many bits, deltas not included; 32: native ones.
        memory: bytes of a device; 0: what the topology says.
        micro_batches: of a step.
    """

    allow: tuple[str, ...] = ()
    max_wire_bits: int = 32
    memory: int = 0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow", tuple(self.allow))
        for name in self.allow:
            if name not in ALLOWED:
                raise ValueError(f"Auto(allow={name!r}): valid: {', '.join(ALLOWED)}")
        if self.max_wire_bits not in (32, 16, 8, 4):
            raise ValueError(f"Auto(max_wire_bits={self.max_wire_bits!r}): valid: 32 (native formats), 16, 8, 4")
        for field, least in (("memory", 0), ("micro_batches", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Auto({field}={value!r}): must be a whole number from {least}")

    @property
    def formats(self) -> tuple[str, ...]:
        """All that are allowed."""
        bits = {"bf16": 16, "int8": 8, "int4": 4}
        return tuple(name for name in ALLOWED if name in self.allow or bits.get(name, 0) >= self.max_wire_bits)


def named_levels(value: Formats | None) -> list[str]:
    """The levels that a transfer's formats are given for one by one."""
    return [level for level, _ in value] if isinstance(value, tuple) else []


def _check_placement(what: str, place: object) -> None:
    if not isinstance(place, str) or not place:
        raise ValueError(
            f"{what}={place!r}: must be a placement, one of {', '.join(_ORDER)} or a level of the topology"
        )
    if place == "site":
        raise ValueError(f"{what}='site': state is not sharded over sites; the widest placement is `world`")


def check_order(what: str, places: dict[str, str], order: Mapping[str, int]) -> None:
    """ValueError, with `what` it is about, unless the owners' places come in `order`; places that it does not have are left alone."""
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
