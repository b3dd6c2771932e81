"""The rungs of a machine, its device, and the machines known by name.

All rates are per rank and in one direction, in B/s; latencies are in seconds and are those of the wire (what a
collective library adds per call is `overhead`). Known machines are files in zcompile/machine_data, where each value has its source: an
acceptance test, a paper, a data sheet ("peak") or a command; none was fitted. A file of your own is given by its path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

LADDER = ("pair", "node", "group", "cluster", "system", "site")
"""Level names with a known order, fastest first; other names are allowed and only match themselves."""

RESERVED = ("whole", "world")
"""Placements that are no level: placement 0, and the outermost extent that is not a `site`."""

FP8_CHIPS = {
    "gfx942": "e4m3fnuz",
    "gfx950": "e4m3fn",
    "sm_89": "e4m3fn",
    "sm_9": "e4m3fn",
    "sm_10": "e4m3fn",
    "sm_12": "e4m3fn",
}
"""Chips with fp8 in hardware, by the beginning of their name, and which of the two codes it is. gfx90a (MI250X) emulates it: not here."""


STEPS = ("direct", "ring", "tree")
"""How many messages of a collective among s ranks follow one another: 1 (each rank to each at once), s - 1, ceil(log2 s)."""


def _points(what: str, given: Any) -> tuple[tuple[float, float], ...]:
    """A curve, checked: ascending positive positions, fractions in (0, 1]."""
    points = tuple((float(x), float(y)) for x, y in given)
    if any(not (x > 0 and 0 < y <= 1) for x, y in points) or list(points) != sorted(points):
        raise ValueError(
            f"{what} {points}: must be pairs (size, part of the rate), sizes ascending, parts above 0 and up to 1"
        )
    return points


@dataclass(frozen=True)
class Level:
    """One rung of the machine.

    name: an identifier, not `whole` or `world`. size: how many groups of the rung below it joins (>= 1).
    bandwidth: B/s that one rank receives, one direction. latency: seconds for a small message.
    steps: how a collective scales with the size, one of STEPS: messages that follow one another, each with the latency.
    overhead: seconds that a call of the collective library takes before anything is sent.
    curve: the message-size curve, pairs (bytes of one message, part of the bandwidth that it reaches), ascending; between points it
    is linear in the logarithm of the bytes, beyond them it stays. (): the whole bandwidth, whatever the size.
    via: names of levels whose links its bytes cross too, and share with their own hops (a network card behind a device's link).
    burst: bytes that one rank receives at once from links that have rested, before the bandwidth counts (a token bucket); 0: links
    save nothing up.
    Raises ValueError naming the field and its value.
    """

    name: str
    size: int
    bandwidth: float
    latency: float
    steps: str = "direct"
    overhead: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    via: tuple[str, ...] = ()
    burst: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.name):
            raise ValueError(f"level name {self.name!r}: must be an identifier such as {', '.join(LADDER)}")
        if self.name in RESERVED:
            raise ValueError(
                f"level name {self.name!r} is reserved for a placement; valid: {', '.join(LADDER)} or another"
            )
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"level {self.name!r}: size {self.size!r}; valid sizes are integers from 1")
        if not (self.bandwidth > 0 and math.isfinite(self.bandwidth)):
            raise ValueError(f"level {self.name!r}: bandwidth {self.bandwidth!r} B/s; must be positive and finite")
        if not (self.latency >= 0 and math.isfinite(self.latency)):
            raise ValueError(f"level {self.name!r}: latency {self.latency!r} s; must be finite and not negative")
        if self.steps not in STEPS:
            raise ValueError(f"level {self.name!r}: steps {self.steps!r}; valid: {', '.join(STEPS)}")
        if not (self.overhead >= 0 and math.isfinite(self.overhead)):
            raise ValueError(f"level {self.name!r}: overhead {self.overhead!r} s; must be finite and not negative")
        object.__setattr__(self, "curve", _points(f"level {self.name!r}: curve", self.curve))
        if not (self.burst >= 0 and math.isfinite(self.burst)):
            raise ValueError(f"level {self.name!r}: burst {self.burst!r} bytes; must be finite and not negative")
        object.__setattr__(self, "via", tuple(self.via))


@dataclass(frozen=True)
class Device:
    """What one rank computes on.

    peak_flops: pairs (dtype name as torch spells it, FLOP/s), dense. memory: bytes. memory_bandwidth: B/s.
    chip: the architecture as compilers call it ("gfx90a", "sm_90"); "" where nobody knows.
    efficiency: pairs (FLOPs of one product, part of the peak that it reaches), a curve as `Level.curve` is; (): EFFICIENCY at all sizes.
    overhead: seconds that any operation takes at least.
    """

    name: str
    peak_flops: tuple[tuple[str, float], ...]
    memory: float
    memory_bandwidth: float
    chip: str = ""
    efficiency: tuple[tuple[float, float], ...] = ()
    overhead: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "efficiency", _points(f"device {self.name!r}: efficiency", self.efficiency))
        if not (self.overhead >= 0 and math.isfinite(self.overhead)):
            raise ValueError(f"device {self.name!r}: overhead {self.overhead!r} s; must be finite and not negative")
        rates = tuple((str(dtype), float(rate)) for dtype, rate in self.peak_flops)
        object.__setattr__(self, "peak_flops", rates)
        named = [(f"peak_flops of {dtype}", rate) for dtype, rate in rates]
        for what, value in [*named, ("memory", self.memory), ("memory_bandwidth", self.memory_bandwidth)]:
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"device {self.name!r}: {what} is {value!r}; must be positive and finite")
        if len({dtype for dtype, _ in rates}) != len(rates):
            raise ValueError(f"device {self.name!r}: peak_flops names a dtype twice: {[d for d, _ in rates]}")

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s for a dtype name; ValueError lists the known ones."""
        for known, rate in self.peak_flops:
            if known == dtype:
                return rate
        raise ValueError(
            f"device {self.name!r} has no peak for {dtype!r}; known: {', '.join(d for d, _ in self.peak_flops)}"
        )


GENERIC = Device("generic", (("bfloat16", 100e12), ("float32", 25e12)), memory=64e9, memory_bandwidth=1e12)
"""A round-number accelerator for topologies given by sizes alone: for drawing and testing, not for forecasts."""


class MachineError(ValueError):
    """A machine's file cannot be read: names the file, the field and what is right there."""


@dataclass(frozen=True)
class Split:
    """How the level between nodes is two on a large machine: at most `most` nodes in a group of `inner`, groups joined by `outer`."""

    most: int
    inner: Level
    outer: Level


@dataclass(frozen=True)
class Machine:
    """A machine: the levels inside one node, the level that joins nodes (its size is filled in), the device.

    Attributes:
        split: of the level between nodes into two; None where nobody knows.
        flat: what the vendor's collectives over all ranks reach, for comparisons: B/s in a node and between nodes (per node), seconds per
            step of a ring and per call. {} where it is not known.
        sources: field -> where its value is from, or the command that measured it.
        note: a line on the machine.
    """

    inside: tuple[Level, ...]
    between: Level
    device: Device
    split: Split | None = None
    flat: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def ranks_per_node(self) -> int:
        """Ranks in one node: the product of the sizes inside it."""
        return math.prod(level.size for level in self.inside)

    def levels(self, nodes: int, groups: int = 0) -> tuple[Level, ...]:
        """All levels, fastest first, for that many nodes; with `groups`, for so many groups of that many nodes (four levels on Frontier).

        One node keeps its `cluster` level, of size 1. A job that is larger than a group crosses the links between groups with all it sends
        between nodes: its one level has their rate. ValueError where the machine has no groups or they are larger than it has.
        """
        if not groups:
            level = replace(self.between, size=nodes)
            if self.split and nodes > self.split.most:
                level = replace(level, bandwidth=min(level.bandwidth, self.split.outer.bandwidth))
            return (*self.inside, level)
        if self.split is None:
            raise ValueError("this machine is not known to have groups of nodes; give one number of nodes")
        if nodes > self.split.most:
            raise ValueError(f"{nodes} nodes in a group: this machine's groups have at most {self.split.most}")
        return (*self.inside, replace(self.split.inner, size=nodes), replace(self.split.outer, size=groups))

    @classmethod
    def read(cls, path: str | Path) -> Machine:
        """From a file as in zcompile/machine_data, or as `zcompile calibrate` writes it. MachineError says what is wrong with it."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise MachineError(f"machine file {str(path)!r}: {error}") from None
        reader = _Reader(str(path))
        try:
            inside = tuple(reader.level(level, f"inside.{level.get('name')}") for level in data["inside"])
            split = data.get("split")
            return cls(
                inside,
                reader.level({"size": 1, **data["between"]}, "between"),
                reader.device(data["device"]),
                Split(
                    reader.value(split["most"], "split.most"),
                    reader.level({"size": 1, **split["inner"]}, "split.inner"),
                    reader.level({"size": 1, **split["outer"]}, "split.outer"),
                )
                if split
                else None,
                {key: reader.value(entry, f"flat.{key}") for key, entry in data.get("flat", {}).items()},
                reader.sources,
                str(data.get("note", "")),
            )
        except KeyError as error:
            raise MachineError(f"machine file {str(path)!r}: {error.args[0]!r} is missing") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise (
                error if isinstance(error, MachineError) else MachineError(f"machine file {str(path)!r}: {error}")
            ) from None


class _Reader:
    """Takes values out of a machine's file and keeps their sources: every one must have one."""

    def __init__(self, path: str):
        self.path = path
        self.sources: dict[str, str] = {}

    def value(self, entry: Any, where: str) -> Any:
        if not isinstance(entry, dict) or set(entry) != {"value", "source"} or not entry["source"]:
            raise MachineError(
                f'machine file {self.path!r}: {where} must be {{"value": ..., "source": "..."}}, not {entry!r}'
            )
        self.sources[where] = str(entry["source"])
        return entry["value"]

    def level(self, data: Mapping[str, Any], where: str) -> Level:
        plain = {key: data[key] for key in ("name", "size")}
        rest = {key: self.value(entry, f"{where}.{key}") for key, entry in data.items() if key not in plain}
        return Level(**plain, **rest)

    def device(self, data: Mapping[str, Any]) -> Device:
        peaks = {dtype: self.value(entry, f"device.peak_flops.{dtype}") for dtype, entry in data["peak_flops"].items()}
        named = ("name", "chip", "peak_flops")
        rest = {key: self.value(entry, f"device.{key}") for key, entry in data.items() if key not in named}
        return Device(data["name"], tuple(peaks.items()), chip=data.get("chip", ""), **rest)


DATA = Path(__file__).parent / "machine_data"
_ORDER = ("frontier", "lumi", "mi300x", "dgx-h100", "dgx-h200", "dgx-2")
MACHINES: dict[str, Machine] = {name: Machine.read(DATA / f"{name}.json") for name in _ORDER}
"""Known by name; each constant's source is in its file. frontier and lumi have the same node: 4 MI250X = 8 GCDs, 4 Slingshot-11 cards."""

MI250X_NODES = MACHINES["frontier"]

# Names given to sizes without a machine, by how many sizes there are.
NAMES_BY_COUNT: dict[int, tuple[str, ...]] = {
    1: ("cluster",),
    2: ("node", "cluster"),
    3: ("pair", "node", "cluster"),
    4: ("pair", "node", "group", "system"),
}

# Round numbers, each level slower than the one before it.
_GENERIC_RATES: dict[str, tuple[float, float]] = {
    "pair": (100e9, 2e-6),
    "node": (50e9, 3e-6),
    "group": (12.5e9, 5e-6),
    "cluster": (12.5e9, 5e-6),
    "system": (6.25e9, 10e-6),
}


def generic_levels(sizes: tuple[int, ...]) -> tuple[Level, ...]:
    """Levels of the "generic" machine for 1 to 4 sizes, fastest first, named by how many there are."""
    if len(sizes) not in NAMES_BY_COUNT:
        raise ValueError(
            f"{len(sizes)} sizes {'x'.join(map(str, sizes))}: 1 to 4 can be given as text "
            f"({'; '.join(' x '.join(names) for names in NAMES_BY_COUNT.values())}); build a Topology for others"
        )
    return tuple(
        Level(name, size, *_GENERIC_RATES[name]) for name, size in zip(NAMES_BY_COUNT[len(sizes)], sizes, strict=True)
    )
