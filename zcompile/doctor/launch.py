"""Rules for how a job was started: launcher, core binding, devices, and the topology that they form beside the declared one."""

from __future__ import annotations

from collections.abc import Iterator

from zcompile import discovery
from zcompile.discovery import normal_pci
from zcompile.doctor.findings import OLCF_FRONTIER, OLCF_PYTORCH, Finding
from zcompile.doctor.recording import Recording, Seat, cores
from zcompile.topology import Topology

_NUMA_OF_PACKAGE = {0: 3, 1: 1, 2: 0, 3: 2}
"""Node of Frontier and LUMI: package (GCDs 2k, 2k+1 in PCI order) -> NUMA domain of 16 cores (OLCF user guide)."""
_CORES_A_NUMA, _GCDS = 16, 8


def launcher(recording: Recording) -> Iterator[Finding]:
    """Who started the ranks. Under Slurm, srun should start each rank itself."""
    env, ranks = recording.env, len(recording.seats)
    torchrun = "TORCHELASTIC_RUN_ID" in env or "LOCAL_WORLD_SIZE" in env
    slurm = "SLURM_STEP_ID" in env or "SLURM_STEP_NUM_TASKS" in env
    name = "torchrun" if torchrun else "srun" if slurm else "none" if ranks == 1 else "by its variables"
    hosts = len({seat.host for seat in recording.seats})
    seen = f"{name}, {ranks} rank{'s' * (ranks > 1)} on {hosts} host{'s' * (hosts > 1)}"
    if torchrun and "SLURM_JOB_ID" in env and recording.slingshot:
        advice = (
            "start the ranks by srun -N NODES -n RANKS -c7 --gpus-per-task=1 --gpu-bind=closest: a torchrun inside srun takes minutes to "
            "start and puts all ranks of a node on one core"
        )
        yield Finding("launcher", "warn", seen, "srun, one task a rank", advice, OLCF_PYTORCH)
        return
    if name == "none" and "SLURM_JOB_ID" in env:
        advice = (
            "inside a batch script the program needs srun in front of it: this is one process, whatever the job has"
        )
        yield Finding("launcher", "warn", seen, "srun, one task a rank", advice, OLCF_PYTORCH)
        return
    yield Finding("launcher", "ok", seen)


def binding(recording: Recording) -> Iterator[Finding]:
    """Every rank has cores of its own, near its GPU."""
    by_host: dict[str, list[Seat]] = {}
    for seat in recording.seats:
        by_host.setdefault(seat.host, []).append(seat)
    right = "cores of its own for each rank"
    for host, seats in by_host.items():
        sets = [cores(seat.cpus) for seat in seats]
        together = set().union(*sets)
        if len(seats) > 1 and len(together) < len(seats):
            advice = "bind each rank to cores of its own (srun -c7 --gpu-bind=closest, or --cpu-bind=mask_cpu:...): they take turns"
            seen = f"{host}: {len(seats)} ranks on core{'s' if len(together) > 1 else ''} {seats[0].cpus}"
            enough = recording.hosts[host].cores != len(together)  # else there are no others to bind them to
            yield Finding("core binding", "bad" if enough else "warn", seen, right, advice, OLCF_PYTORCH)
            return
        shared = [(a.rank, b.rank) for i, a in enumerate(seats) for j, b in enumerate(seats[:i]) if sets[i] & sets[j]]
        if shared:
            advice = "without a binding ranks move between cores and disturb one another: srun -c7 --gpu-bind=closest"
            seen = f"{host}: ranks {shared[0][1]} and {shared[0][0]} share cores {seats[0].cpus}"
            yield Finding("core binding", "warn", seen, right, advice, OLCF_FRONTIER)
            return
    far = list(_far_from_their_gpu(recording))
    if far:
        advice = "the first core of GCD 0..7 on Frontier and LUMI is 49, 57, 17, 25, 1, 9, 33, 41: bind by these, or use --gpu-bind=closest"
        yield Finding(
            "core binding",
            "warn",
            f"far from their GCD: {', '.join(far[:4])}",
            "cores of the GCD's NUMA domain",
            advice,
            OLCF_FRONTIER,
        )
        return
    usual = next(iter(by_host.values()))
    yield Finding("core binding", "ok", f"{len(cores(usual[0].cpus))} cores a rank")


def _far_from_their_gpu(recording: Recording) -> Iterator[str]:
    """Ranks of full MI250X nodes whose cores are in another NUMA domain than their GCD."""
    for seat in recording.seats:
        pairs = sorted(tuple(sorted(normal_pci(a) for a in pair)) for pair in recording.hosts[seat.host].pairs)
        if len(pairs) * 2 != _GCDS or not seat.pci:
            continue
        package = next((k for k, pair in enumerate(pairs) if normal_pci(seat.pci) in pair), None)
        if package is None:
            continue
        near = set(range(_NUMA_OF_PACKAGE[package] * _CORES_A_NUMA, (_NUMA_OF_PACKAGE[package] + 1) * _CORES_A_NUMA))
        if not {core % 64 for core in cores(seat.cpus)} & near:
            yield f"rank {seat.rank} on cores {seat.cpus}"


def devices(recording: Recording) -> Iterator[Finding]:
    """One device for each rank, and which: the local rank does not say."""
    seats = [seat for seat in recording.seats if seat.pci]
    if not seats:
        yield Finding("devices", "skip", "no GPU seen")
        return
    taken: dict[tuple[str, str], int] = {}
    for seat in seats:
        other = taken.setdefault((seat.host, normal_pci(seat.pci)), seat.rank)
        if other != seat.rank:
            advice = "give each rank a device of its own: srun --gpus-per-task=1 --gpu-bind=closest"
            yield Finding(
                "devices",
                "bad",
                f"ranks {other} and {seat.rank} use {seat.pci} on {seat.host}",
                "one each",
                advice,
                OLCF_PYTORCH,
            )
            return
    if len(seats) < len(recording.seats):
        without = [seat.rank for seat in recording.seats if not seat.pci]
        yield Finding(
            "devices", "bad", f"ranks {without[:8]} see no GPU", "one each", "ask for a GPU for each task", OLCF_PYTORCH
        )
        return
    gcds = _gcds(recording, seats[0].host)
    where = f", local ranks on GCD {','.join(map(str, gcds))}" if gcds else ""
    yield Finding("devices", "ok", f"one for each rank, {seats[0].visible} visible{where}")


def _gcds(recording: Recording, host: str) -> list[int]:
    table = sorted(normal_pci(address) for pair in recording.hosts[host].pairs for address in pair)
    seats = sorted((seat for seat in recording.seats if seat.host == host), key=lambda seat: seat.local_rank)
    return (
        [table.index(normal_pci(seat.pci)) for seat in seats] if all(normal_pci(s.pci) in table for s in seats) else []
    )


def topology(recording: Recording, declared: str | None = None) -> Iterator[Finding]:
    """The levels that hosts and PCI addresses form, beside the declared ones."""
    seats = []
    try:
        for seat in recording.seats:
            pairs = recording.hosts[seat.host].pairs
            paired = bool(pairs and seat.pci)
            package = discovery.package_of(normal_pci(seat.pci), pairs) if paired else None
            seats.append(discovery.Seat(seat.host, normal_pci(seat.pci) if paired else None, package))
        found = discovery.from_seats(seats)
    except ValueError as error:
        yield Finding(
            "topology",
            "bad",
            str(error),
            "equal hosts, whole packages",
            "start equally many ranks on every node",
            OLCF_FRONTIER,
        )
        return
    sizes = ((2, found.ranks_per_node // 2) if found.paired else (found.ranks_per_node,)) + (found.nodes,)
    shape = "x".join(map(str, sizes))
    order = (
        "" if found.order in (None, tuple(range(len(seats)))) else ", ranks not in the order of the hosts and packages"
    )
    seen = f"{shape} ({'pair, ' if found.paired else ''}node, cluster){order}"
    if declared is None:
        yield Finding("topology", "ok", seen)
        return
    try:
        named = Topology.parse(declared, world_size=len(seats))
    except ValueError as error:
        yield Finding("topology", "bad", seen, declared, str(error))
        return
    want = tuple(size for size in named.sizes if size > 1)
    have = tuple(size for size in sizes if size > 1)
    if want != have and (found.paired or recording.multi_node):
        advice = "declare what the hosts and PCI addresses form, or start the job so that they form what is declared"
        yield Finding("topology", "bad", seen, f"{declared}: {named.key} ({', '.join(named.names)})", advice)
    else:
        yield Finding("topology", "ok", seen, f"{declared}: {named.key}")
