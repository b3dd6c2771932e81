"""The rungs of a machine, its device, and the machines known by name.

All rates are per rank and in one direction, in B/s; latencies are in seconds and are those of the wire (what a
collective library adds per call belongs to the cost model). Numbers marked *measured* come from acceptance tests or
papers, numbers marked *peak* from the vendor's data sheets; none was fitted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
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
        object.__setattr__(self, "via", tuple(self.via))


@dataclass(frozen=True)
class Device:
    """What one rank computes on.

    peak_flops: pairs (dtype name as torch spells it, FLOP/s), dense. memory: bytes. memory_bandwidth: B/s.
    chip: the architecture as compilers call it ("gfx90a", "sm_90"); "" where nobody knows.
    """

    name: str
    peak_flops: tuple[tuple[str, float], ...]
    memory: float
    memory_bandwidth: float
    chip: str = ""

    def __post_init__(self) -> None:
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

# Peak, bf16: half of the 383 TF of one MI250X (some public tables give the module's figure per GCD: twice too much).
# fp32 is the matrix rate, 47.9 TF. Memory and its rate: OLCF Frontier user guide.
MI250X_GCD = Device(
    "MI250X GCD", (("bfloat16", 191.5e12), ("float32", 47.9e12)), memory=64e9, memory_bandwidth=1.6e12, chip="gfx90a"
)
# Peak, data sheets, dense.
MI300X = Device(
    "MI300X", (("bfloat16", 1307.4e12), ("float32", 163.4e12)), memory=192e9, memory_bandwidth=5.3e12, chip="gfx942"
)
H100_SXM = Device(
    "H100 SXM", (("bfloat16", 989.4e12), ("float32", 66.9e12)), memory=80e9, memory_bandwidth=3.35e12, chip="sm_90"
)


@dataclass(frozen=True)
class Machine:
    """A known machine: the levels inside one node, the level that joins nodes (its size is filled in), the device."""

    inside: tuple[Level, ...]
    between: Level
    device: Device

    @property
    def ranks_per_node(self) -> int:
        """Ranks in one node: the product of the sizes inside it."""
        return math.prod(level.size for level in self.inside)

    def levels(self, nodes: int) -> tuple[Level, ...]:
        """All levels for that many nodes, fastest first. One node keeps its `cluster` level, of size 1."""
        return (*self.inside, replace(self.between, size=nodes))


# Frontier and LUMI-G have the same node (4 MI250X = 8 GCDs, 4 Slingshot-11 NICs). Measured, LUMI's acceptance tests
# (https://github.com/Lumi-supercomputer/lumi-reframe-tests; the GCD figures after Pearson, arXiv 2302.14827):
#   pair     148 GB/s  GCD to GCD in one package (peak 200)
#   node      38 GB/s  one single link between packages (peak 50). Some packages are joined by dual links (76), but
#                      every ring through the four even or the four odd GCDs has a single link, which sets its pace
#   cluster   95 GB/s  per node (8 pairs of processes at once), shared by 8 GCDs: 11.9 GB/s each
# Latency, measured: a small MPI GPU all-reduce in one node 1.25 us; GPU to GPU between nodes, 8 pairs, 3.0 us.
MI250X_NODES = Machine(
    inside=(Level("pair", 2, 148e9, 1.25e-6), Level("node", 4, 38e9, 1.25e-6)),
    between=Level("cluster", 1, 95e9 / 8, 3.0e-6),
    device=MI250X_GCD,
)

# Peak. MI300X: 7 Infinity Fabric links of 64 GB/s to the other 7 devices. DGX H100: NVLink 4, 18 links of 25 GB/s.
# Both: one 400 Gb/s NIC per device. The latencies are round numbers.
MI300X_NODES = Machine((Level("node", 8, 7 * 64e9, 2e-6),), Level("cluster", 1, 50e9, 5e-6), MI300X)
DGX_H100 = Machine((Level("node", 8, 18 * 25e9, 2e-6),), Level("cluster", 1, 50e9, 5e-6), H100_SXM)

MACHINES: dict[str, Machine] = {
    "frontier": MI250X_NODES,
    "lumi": MI250X_NODES,
    "mi300x": MI300X_NODES,
    "dgx-h100": DGX_H100,
}

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
