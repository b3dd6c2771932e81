"""Topology: the ordered levels of a machine, and where each rank sits in them.

Levels are indexed 1..m, fastest first; index 0 is `whole`. E_k, the extent of level k, is the product of the first k
sizes (E_0 = 1). Position i of N = E_m has the coordinates c_1 = i % s_1, c_2 = i // s_1 % s_2, and so on; `order[i]`
is the global rank that sits at position i, so any placement of ranks on nodes fits the same arithmetic.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from zcompile import discovery
from zcompile.machines import (
    GENERIC,
    LADDER,
    MACHINES,
    MI250X_NODES,
    NAMES_BY_COUNT,
    Device,
    Level,
    Machine,
    generic_levels,
)

__all__ = ["LADDER", "Device", "Level", "Topology"]


@dataclass(frozen=True)
class Topology:
    """Levels (fastest first), device and the rank at each position (None: rank i sits at position i).

    Validated when made: at least one level besides `site`, unique names, names of the canonical ladder
    (pair < node < group < cluster < system < site) in that order, `site` last, `order` a permutation of the ranks.
    Raises ValueError naming the offending value. An order that is the identity is stored as None.
    """

    levels: tuple[Level, ...]
    device: Device = GENERIC
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        for level in self.levels:
            if not isinstance(level, Level):
                raise ValueError(f"topology levels must be Level objects, got {level!r}")
        names = self.names
        if not names or names == ("site",):
            raise ValueError(f"topology levels {list(names)}: at least one level besides `site` is needed")
        if len(set(names)) != len(names):
            raise ValueError(f"topology levels {list(names)}: names must be unique")
        known = [name for name in names if name in LADDER]
        if known != sorted(known, key=LADDER.index):
            raise ValueError(f"topology levels {list(names)}: list them fastest first, {' < '.join(LADDER)}")
        if "site" in names[:-1]:
            raise ValueError(f"topology levels {list(names)}: `site` must be the last (outermost) level")
        if self.order is not None:
            order = tuple(self.order)
            if sorted(order) != list(range(self.world_size)):
                raise ValueError(
                    f"topology order has {len(order)} entries {_short(order)}: it must hold each rank "
                    f"0..{self.world_size - 1} of {self._shape} once"
                )
            object.__setattr__(self, "order", None if order == tuple(range(len(order))) else order)

    # Shape.

    @property
    def names(self) -> tuple[str, ...]:
        """Level names, fastest first."""
        return tuple(level.name for level in self.levels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Level sizes s_1..s_m, fastest first."""
        return tuple(level.size for level in self.levels)

    @cached_property
    def extents(self) -> tuple[int, ...]:
        """E_0..E_m: ranks inside one group of each level; E_0 = 1."""
        return tuple(itertools.accumulate(self.sizes, initial=1, func=lambda a, b: a * b))

    @property
    def world_size(self) -> int:
        """All ranks, E_m, sites included."""
        return math.prod(self.sizes)

    @property
    def world(self) -> int:
        """Index of the outermost level that is not a `site`."""
        return len(self.levels) - (self.names[-1] == "site")

    @property
    def _shape(self) -> str:
        return "x".join(map(str, self.sizes))

    @cached_property
    def key(self) -> str:
        """Short stable text: the sizes ("2x2x2"), the names where they are not the usual ones for that many sizes
        ("2x4-pair_node"), and a digest of the order where it is not the identity ("2x2x2~1f09ab34")."""
        text = self._shape
        if self.names != NAMES_BY_COUNT.get(len(self.names)):
            text += "-" + "_".join(self.names)
        if self.order is not None:
            text += "~" + hashlib.sha256(repr(self.order).encode()).hexdigest()[:8]
        return text

    # Ranks and coordinates.

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.order or ())}

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """(c_1..c_m) of a global rank, fastest level first. ValueError for a rank outside the topology."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in topology {self.key}; valid ranks: 0..{self.world_size - 1}")
        position = rank if self.order is None else self._positions[rank]
        return tuple(position // extent % size for extent, size in zip(self.extents, self.sizes, strict=False))

    def rank_at(self, coordinates: Sequence[int]) -> int:
        """The global rank at (c_1..c_m). ValueError naming the level whose coordinate is out of range."""
        if len(coordinates) != len(self.levels):
            raise ValueError(
                f"coordinates {tuple(coordinates)}: topology {self.key} has levels {', '.join(self.names)}"
            )
        for level, c in zip(self.levels, coordinates, strict=True):
            if not 0 <= c < level.size:
                raise ValueError(f"coordinate {c} of level {level.name!r} in {self.key}; valid: 0..{level.size - 1}")
        position = sum(c * extent for c, extent in zip(coordinates, self.extents, strict=False))
        return position if self.order is None else self.order[position]

    def group(self, rank: int, level: int) -> list[int]:
        """Global ranks that differ from `rank` in the coordinate of that level alone (level 1..m), `rank` included,
        in the order of that coordinate: member i has c_level = i. Not sorted by rank if `order` is not."""
        if not 1 <= level <= len(self.levels):
            raise ValueError(
                f"level index {level} of topology {self.key}; valid: 1..{len(self.levels)} ({', '.join(self.names)})"
            )
        mine = self.coordinates(rank)
        return [self.rank_at((*mine[: level - 1], c, *mine[level:])) for c in range(self.sizes[level - 1])]

    def mesh(self) -> list[Any]:
        """Nested lists with one dimension per level, fastest first: mesh[c_1][c_2]..[c_m] = global rank."""

        def build(prefix: tuple[int, ...]) -> list[Any]:
            depth = len(prefix)
            if depth == len(self.sizes) - 1:
                return [self.rank_at((*prefix, c)) for c in range(self.sizes[depth])]
            return [build((*prefix, c)) for c in range(self.sizes[depth])]

        return build(())

    # Names.

    def index(self, name: str) -> int:
        """Level index of a placement name.

        `whole` is 0, `world` is `.world`, a level of this topology is itself. A canonical name that this topology
        lacks is the next slower level that exists (memory-safe: it shards more, not less), never `site`; the world if
        none is slower. ValueError for any other name, listing the valid ones.
        """
        if name == "whole":
            return 0
        if name == "world":
            return self.world
        if name in self.names:
            return self.names.index(name) + 1
        if name in LADDER:
            for slower in LADDER[LADDER.index(name) + 1 : -1]:
                if slower in self.names:
                    return self.names.index(slower) + 1
            return self.world
        valid = list(dict.fromkeys(("whole", *self.names, *LADDER, "world")))
        raise ValueError(f"unknown level {name!r} in topology {self.key}; valid: {', '.join(valid)}")

    # Checks and ways to make one.

    def check_world(self, n: int) -> None:
        """ValueError, listing sizes that fit, unless a job of n ranks fills this topology exactly."""
        if n == self.world_size:
            return
        inner = self.world_size // self.sizes[-1]
        message = f"topology {self.key} has {self.world_size} ranks, the job has {n}"
        if n > 0 and n % inner == 0:
            fitting = "x".join(map(str, (*self.sizes[:-1], n // inner)))
            raise ValueError(f"{message}; a topology that fits {n} ranks: {fitting}")
        raise ValueError(
            f"{message}, which levels {', '.join(self.names[:-1])} of {inner} ranks do not divide; "
            f"valid world sizes: {_multiples(inner, n)}"
        )

    @classmethod
    def parse(cls, text: str | Topology | None, world_size: int | None = None) -> Topology:
        """A topology from text.

        Sizes, fastest first: "8" (cluster), "4x2" (node, cluster), "2x2x2" (pair, node, cluster), four sizes (pair, node,
        group, system), at the rates of a "generic" machine. Or a machine: "frontier", "lumi", "mi300x", "dgx-h100", ..., or the path
        of a machine's file (.json), with the number of nodes after a colon ("frontier:48"; "frontier:64x147": 147 groups of 64
        nodes, in four levels) or taken from `world_size`. None: what the launcher's
        variables say (`detect`). A Topology is passed through. ValueError if the text is not understood, or if the
        result does not have `world_size` ranks (where given); it lists what is valid.
        """
        if text is None:
            return cls.detect(world_size=world_size)
        if isinstance(text, Topology):
            topology = text
        elif not isinstance(text, str):
            raise ValueError(f"topology {text!r}: valid: {_valid_texts()}, or a Topology")
        elif re.fullmatch(r"\d+(x\d+)*", text.strip()):
            topology = cls(generic_levels(tuple(int(size) for size in text.strip().split("x"))))
        else:
            topology = cls._machine(text.strip(), world_size)
        if world_size is not None:
            topology.check_world(world_size)
        return topology

    @classmethod
    def _machine(cls, text: str, world_size: int | None) -> Topology:
        name, colon, count = text.rpartition(":") if ":" in text else (text, "", "")
        machine = Machine.read(name) if name.endswith(".json") else MACHINES.get(name.lower())
        if machine is None:
            raise ValueError(f"unknown topology {text!r}; valid: {_valid_texts()}")
        per_node = machine.ranks_per_node
        if colon:
            grouped = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", count)
            if grouped:
                try:
                    return cls(machine.levels(int(grouped[1]), int(grouped[2])), machine.device)
                except ValueError as error:
                    raise ValueError(f"topology {text!r}: {error}") from None
            if not re.fullmatch(r"[1-9]\d*", count):
                raise ValueError(f"topology {text!r}: {count!r} is no number of nodes; valid: {name}:1, {name}:2, ...")
            nodes = int(count)
        elif world_size is None:
            raise ValueError(f"topology {text!r}: the number of nodes is not known; write it, as in {name}:2")
        elif world_size < 1 or world_size % per_node:
            raise ValueError(
                f"topology {text!r}: {world_size} ranks do not fill nodes of {per_node}; "
                f"valid world sizes: {_multiples(per_node, world_size)}"
            )
        else:
            nodes = world_size // per_node
        return cls(machine.levels(nodes), machine.device)

    @classmethod
    def detect(
        cls,
        env: Mapping[str, str] = os.environ,
        world_size: int | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
        pci: str | None = None,
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        host: str | None = None,
    ) -> Topology:
        """The topology of this job: levels `node`, `cluster`, and `pair` where PCI addresses are given.

        gather: exchanges one object per rank and returns all of them in rank order, on every rank (an
        all_gather_object over a CPU group). With it node groups follow the real hosts, however ranks are placed.
        Without it ranks are taken to be contiguous on nodes, as torchrun's or Slurm's variables in `env` say
        (ValueError where those contradict it), and without variables all ranks share one node.

        pci: the PCI address ("domain:bus:device") of this rank's device, only on nodes where devices come in pairs
        (MI250X); needs `gather`. pairs: the node's table of address pairs, one entry per package
        (`discovery.gcd_pairs()`); without it, and with all eight GCDs of a node in use, pairs are neighbours in PCI
        order. Never the local rank or the device index: with one visible device per process both lie.
        host: this rank's host name (default: the machine's).

        Inside a node, the coordinate of `pair` follows PCI order (all even GCDs share it: they are linked in a ring),
        everything else the lowest rank. ValueError for unequal ranks per host, half-used pairs, a device used twice.
        """
        found = discovery.discover(env, world_size, gather, pci, pairs, host)
        if not found.paired:
            return cls(generic_levels((found.ranks_per_node, found.nodes)), order=found.order)
        levels = (
            MI250X_NODES.inside[0],
            replace(MI250X_NODES.inside[1], size=found.ranks_per_node // 2),
            MI250X_NODES.levels(found.nodes)[-1],
        )
        return cls(levels, MI250X_NODES.device, found.order)


def _valid_texts() -> str:
    return (
        f"sizes such as 8, 4x2, 2x2x2, or a machine ({', '.join(MACHINES)}, or its .json file), its nodes after a colon"
    )


def _multiples(step: int, near: int) -> str:
    first = max(1, near // step)
    return ", ".join(str(step * i) for i in (first, first + 1, first + 2)) + ", ..."


def _short(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return f"({shown}, ...)" if len(values) > 8 else f"({shown})"
