"""Starting the default process group from what the launcher said: torchrun, Slurm, or nobody (one process)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zcompile import _torch_compat as compat
from zcompile.discovery import gcd_pairs
from zcompile.topology import Topology


@dataclass(frozen=True)
class Launch:
    """What a launcher says about this process. `address` is host:port of rank 0's store, None for a world of one
    without a launcher.
    """

    rank: int
    world_size: int
    local_rank: int
    address: tuple[str, int] | None


def read_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (torchrun), else the variables of a Slurm *step*
    (`srun`), else one process.

    SLURM_NTASKS alone is no launch: a batch script has it too, and a program started there without `srun` is one
    process. ValueError names what is missing or out of range.
    """
    if "WORLD_SIZE" in env or "RANK" in env:
        missing = [name for name in ("RANK", "WORLD_SIZE") if name not in env]
        if missing:
            raise ValueError(
                f"launcher variable {missing[0]} is missing although the other of RANK, WORLD_SIZE is set; "
                "torchrun sets both"
            )
        rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        local_rank = _number(env, "LOCAL_RANK", 0)
        host, port = env.get("MASTER_ADDR"), _number(env, "MASTER_PORT", 0)
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        rank, world_size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
        local_rank = _number(env, "SLURM_LOCALID", 0)
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        host = env.get("MASTER_ADDR") or first_host(nodes)
        # The same on every rank and unlikely to meet another step's: below the range that Linux hands out by itself.
        port = (
            _number(env, "MASTER_PORT", 0)
            or 10000 + (7 * _number(env, "SLURM_JOB_ID", 0) + _number(env, "SLURM_STEP_ID", 0)) % 20000
        )
    else:
        return Launch(0, 1, 0, None)
    if not 0 <= rank < world_size:
        raise ValueError(f"launcher variables say rank {rank} of {world_size}; a rank is 0 to {world_size - 1}")
    if host and port:
        return Launch(rank, world_size, local_rank, (host, port))
    if world_size == 1:
        return Launch(rank, world_size, local_rank, None)
    raise ValueError(
        f"launcher variable {'MASTER_PORT' if host else 'MASTER_ADDR'} is missing for rank {rank} of {world_size}"
    )


def first_host(nodelist: str) -> str:
    """First name of a Slurm node list: `frontier[00012-00015,00020],login1` gives `frontier00012`."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,]*))?", nodelist)
    return "".join(part or "" for part in match.groups()) if match else ""


def init_from_launcher(device: str | torch.device | None = None, *, timeout: float = 300.0) -> None:
    """Start the default process group if there is none: gloo on the CPU, gloo for CPU tensors and nccl for GPU tensors
    with `device` cuda.

    `device` None means cuda where torch has it. A cuda device is made current from LOCAL_RANK (or SLURM_LOCALID),
    modulo the devices visible here. `timeout`, in seconds, is also that of the group's own collectives.
    RuntimeError names the address when the ranks do not meet within `timeout` seconds.
    """
    if dist.is_initialized():
        return
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    launch = read_launch()
    if kind == "cuda":
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if launch.address is None:
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, store=compat.HashStore())
        return
    host, port = launch.address
    # torchrun keeps the store in its agent: no rank opens the port then.
    serves = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout)
    try:
        store: compat.Store = compat.TCPStore(
            host, port, launch.world_size, is_master=serves, timeout=limit, wait_for_workers=False
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = compat.PrefixStore(f"/zcompile/attempt_{attempt}", store)
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, store=store, timeout=limit)
    except (RuntimeError, TimeoutError) as error:
        raise RuntimeError(
            f"rank {launch.rank} of {launch.world_size}: no process group at {host}:{port} within {timeout:g} s. "
            f"torch said: {error}"
        ) from error


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise ValueError(f"launcher variable {name} is missing")
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"launcher variable {name} is {text!r}, not a whole number") from None


def topology_of_job(given: Topology | str | None, device: torch.device, world_size: int) -> Topology:
    """The topology of this job on this device.

    On GPUs that come in pairs (MI250X) the pairs are found from PCI addresses, exchanged over the default group, never from the local
    rank: schedulers hand out devices in another order than they number ranks. A machine's name then gives the levels and their rates,
    the addresses give the order of the ranks. Elsewhere, and for a Topology that says where its ranks are, `given` stands as it is.

    Raises:
        ValueError: the devices do not form the levels of the machine that was named.
    """
    pci, pairs = pci_address(device), gcd_pairs()
    if isinstance(given, Topology) or (pci is None and given is not None):
        return Topology.parse(given, world_size=world_size)

    def gather(value: Any) -> list[Any]:
        out: list[Any] = [None] * world_size
        dist.all_gather_object(out, value)
        return out

    found = Topology.detect(world_size=world_size, gather=gather, pci=pci, pairs=pairs)
    if given is None:
        return found
    named = Topology.parse(given, world_size=world_size)
    if "pair" not in named.names:
        return named
    if named.sizes != found.sizes:
        raise ValueError(
            f"topology {given!r} has {named.key} ({', '.join(named.names)}), but the devices of this job form {found.key} "
            f"({', '.join(found.names)}); start one process per GCD on every node, or pass a Topology of your own"
        )
    return Topology(named.levels, named.device, found.order)


def pci_address(device: torch.device) -> str | None:
    """ "domain:bus:device" of this process's own GPU if it is one of a pair (gfx90a), else None."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    if not getattr(properties, "gcnArchName", "").startswith("gfx90a"):
        return None
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
