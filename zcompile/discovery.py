"""What a job's launcher, hosts and PCI addresses say about where its ranks sit. Standard library only.

Two sources. The launcher's variables give sizes and assume that ranks are contiguous on nodes; each rank checks that
for itself. An exchange between ranks (host, PCI address) knows the real placement: cyclic, shuffled, with holes.
"""

from __future__ import annotations

import itertools
import re
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_FULL_MI250X_NODE = 8  # GCDs; PCI order says which share a package only if all of them are in the list

# PCI device ids of AMD's (vendor 0x1002) MI250X and MI250: two GCDs in a package. MI210 (0x740f) has one.
_PAIRED_DEVICES = ("0x7408", "0x740c")


@dataclass(frozen=True)
class Found:
    """Sizes and placement: order[position] = rank, None if contiguous; paired: packages of two were found."""

    ranks_per_node: int
    nodes: int
    paired: bool = False
    order: tuple[int, ...] | None = None


class Seat(NamedTuple):
    """What one rank tells the others."""

    host: str
    pci: str | None
    package: str | None  # the lower address of the pair that holds pci, where a table of pairs was given


def discover(
    env: Mapping[str, str],
    world_size: int | None,
    gather: Callable[[Any], list[Any]] | None,
    pci: str | None,
    pairs: Sequence[tuple[str, str]] | None,
    host: str | None,
) -> Found:
    """See `Topology.detect`."""
    if gather is None:
        if pci is not None:
            raise ValueError(f"pci {pci!r} was given without `gather`: pairs need the addresses of the other ranks")
        return from_launcher(env, world_size)
    own = None if pci is None else normal_pci(pci)
    package = None if own is None or pairs is None else package_of(own, pairs)
    seats = [Seat(*seat) for seat in gather(tuple(Seat(host or socket.gethostname(), own, package)))]
    if world_size is not None and world_size != len(seats):
        raise ValueError(f"world_size is {world_size}, but {len(seats)} ranks answered")
    return from_seats(seats)


def from_seats(seats: Sequence[Seat]) -> Found:
    """Placement from what each rank said, in rank order. The same answer on every rank, as the list is the same."""
    hosts: dict[str, list[int]] = {}
    for rank, seat in enumerate(seats):
        hosts.setdefault(seat.host, []).append(rank)
    counts = {host: len(ranks) for host, ranks in hosts.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(_unequal(counts))
    without = [rank for rank, seat in enumerate(seats) if seat.pci is None]
    if without and len(without) < len(seats):
        raise ValueError(f"ranks {without[:8]} gave no PCI address while others did; give all of them or none")
    per_node = len(next(iter(hosts.values())))
    packages = {host: _packages(host, ranks, seats) for host, ranks in hosts.items()} if not without else {}
    widths = {len(package) for found in packages.values() for package in found}
    if widths == {1, 2}:
        lonely = [f"{seats[p[0]].pci} on {host}" for host, found in packages.items() for p in found if len(p) == 1]
        raise ValueError(
            f"some packages have both GCDs in use and some one ({', '.join(lonely[:8])}); "
            "use both of each package, or one of each, or give the topology by hand"
        )
    paired = widths == {2}
    order = tuple(
        rank for host, ranks in hosts.items() for part in (packages[host] if paired else [ranks]) for rank in part
    )
    return Found(per_node, len(hosts), paired, order)


def _packages(host: str, ranks: list[int], seats: Sequence[Seat]) -> list[list[int]]:
    """The ranks of one host by package, lowest rank first; inside a package in PCI order."""
    by_address = sorted(ranks, key=lambda rank: seats[rank].pci or "")
    for a, b in itertools.pairwise(by_address):
        if seats[a].pci == seats[b].pci:
            raise ValueError(f"ranks {a} and {b} on host {host} use the same device {seats[a].pci}")
    if all(seats[rank].package is not None for rank in ranks):
        table: dict[str, list[int]] = {}
        for rank in by_address:
            table.setdefault(seats[rank].package or "", []).append(rank)
        found = list(table.values())
    elif len(ranks) == 1:
        found = [ranks]
    elif len(ranks) == _FULL_MI250X_NODE:
        found = [by_address[i : i + 2] for i in range(0, len(by_address), 2)]
    else:
        raise ValueError(
            f"host {host} runs {len(ranks)} ranks with PCI addresses: PCI order tells pairs only on a node with all "
            f"{_FULL_MI250X_NODE} GCDs in use; give `pairs` (discovery.gcd_pairs()) or the topology by hand"
        )
    return sorted(found, key=min)


def normal_pci(address: str) -> str:
    """ "0000:c1:00" in lower case from "C1:00.0", "0000:C1:00.0" or "00000000:c1:00": domain:bus:device, hexadecimal,
    so that text order is PCI order. ValueError if it is no such address."""
    match = re.fullmatch(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})(?:\.[0-7])?", address.strip().lower())
    if match is None:
        raise ValueError(f"PCI address {address!r}; valid: domain:bus:device such as 0000:c1:00")
    domain, bus, device = (int(part or "0", 16) for part in match.groups())
    return f"{domain:04x}:{bus:02x}:{device:02x}"


def package_of(own: str, pairs: Sequence[tuple[str, str]]) -> str:
    table = [tuple(sorted(normal_pci(address) for address in pair)) for pair in pairs]
    for pair in table:
        if own in pair:
            return pair[0]
    raise ValueError(f"PCI address {own} is in none of the pairs {table}")


def gcd_pairs(root: str | Path = "/sys/bus/pci/devices") -> list[tuple[str, str]] | None:
    """The packages of this node: all MI250X/MI250 GCDs that the kernel lists, whether visible to this process or not,
    in PCI order, two by two. None if there are none or an odd number."""
    found = []
    for device in Path(root).glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "device").read_text().strip()
        except OSError:
            continue
        if vendor == "0x1002" and kind in _PAIRED_DEVICES:
            found.append(normal_pci(device.name))
    found.sort()
    if not found or len(found) % 2:
        return None
    return [(found[i], found[i + 1]) for i in range(0, len(found), 2)]


# Launchers.


def from_launcher(env: Mapping[str, str], world_size: int | None) -> Found:
    """Sizes from torchrun's or Slurm's variables, ranks contiguous on nodes; without variables, one node."""
    torchrun = "LOCAL_WORLD_SIZE" in env and "WORLD_SIZE" in env
    slurm_world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if torchrun:
        world, source = _number(env, "WORLD_SIZE"), "WORLD_SIZE"
        per_node = _number(env, "LOCAL_WORLD_SIZE")
    elif slurm_world in env:
        world, source = _number(env, slurm_world), slurm_world
        per_node = _slurm_tasks(env, world)
    else:
        world = _number(env, "WORLD_SIZE") if "WORLD_SIZE" in env else (world_size or 1)
        per_node, source = world, "WORLD_SIZE"
    if world_size is not None and world_size != world:
        raise ValueError(
            f"{source}={world} in the environment, but the job has {world_size} ranks; give the topology by hand"
        )
    if per_node < 1 or world < 1 or world % per_node:
        near = max(1, world // max(per_node, 1))
        sizes = ", ".join(str(max(per_node, 1) * n) for n in (near, near + 1))
        raise ValueError(f"{world} ranks ({source}) with {per_node} per node: valid world sizes are {sizes}, ...")
    names = ("RANK", "GROUP_RANK", "LOCAL_RANK") if torchrun else ("SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID")
    _check_contiguous(env, names, per_node)
    return Found(per_node, world // per_node)


def _slurm_tasks(env: Mapping[str, str], world: int) -> int:
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in env:
            counts = tasks_per_node(env[name], name)
            if len(set(counts)) > 1:
                raise ValueError(
                    _unequal({f"node {i}": count for i, count in enumerate(counts)}) + f" ({name}={env[name]})"
                )
            return counts[0]
    if "SLURM_NTASKS_PER_NODE" in env:
        return _number(env, "SLURM_NTASKS_PER_NODE")
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"):
        if name in env and world % _number(env, name) == 0:
            return world // _number(env, name)
    raise ValueError("Slurm says how many tasks there are but not how many per node: set SLURM_NTASKS_PER_NODE")


def tasks_per_node(text: str, name: str = "SLURM_TASKS_PER_NODE") -> list[int]:
    """Slurm's list, "8(x3),4" -> [8, 8, 8, 4]. ValueError if it is not of that form."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)(?:\(x([1-9]\d*)\))?\s*", part)
        if match is None:
            raise ValueError(f"{name}={text!r}: {part!r} is not of the form 8 or 8(x4)")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _check_contiguous(env: Mapping[str, str], names: tuple[str, str, str], per_node: int) -> None:
    if not all(name in env for name in names):
        return
    rank, node, local = (_number(env, name) for name in names)
    if rank != node * per_node + local:
        said = ", ".join(f"{name}={env[name]}" for name in names)
        raise ValueError(
            f"{said}: with {per_node} ranks per node this is not a contiguous placement; "
            "give `gather` so that hosts can be compared, or the topology with its `order`"
        )


def _number(env: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", env[name].strip()):
        raise ValueError(f"{name}={env[name]!r} in the environment is no number")
    return int(env[name])


def _unequal(counts: Mapping[str, int]) -> str:
    usual = Counter(counts.values()).most_common(1)[0][0]
    odd = [f"{host}: {count}" for host, count in counts.items() if count != usual]
    like = next(host for host, count in counts.items() if count == usual)
    more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
    return (
        f"unequal numbers of ranks per host: {', '.join(odd[:8])}{more}, but {usual} on {like} and others; "
        f"valid: the same number on each host, for example {min(counts.values())}"
    )
