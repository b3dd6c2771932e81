"""Compute copies in memory that the other ranks of a level read directly: shared memory of one host on CPUs, torch's symmetric memory
on GPUs. For plans with peer_gather=True.

On CPUs each rank makes one file in /dev/shm for all its copies, the others of its level map it, and the name is taken away again before
anybody goes on: nothing is left behind by a rank that dies later. That all members see one another's files is the proof that they share
a host; where one does not, every rank raises. Copies of plain values (`ParamSpec.in_place`) lie in one file, which the level's first rank
makes: there each rank writes its own shards, and whole parameters are what all of them read. Nothing is copied to gather them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import weakref
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from zcompile import _torch_compat as compat
from zcompile.kernels import peers
from zcompile.params import Unit, at_start
from zcompile.runtime import Runtime
from zcompile.swap import MOST_MEMBERS

FOLDER = Path("/dev/shm")
ALIGNMENT = 64
"""Bytes: where a unit's copy begins. A cache line, and more than a kernel's widest load."""


def mapped(runtime: Runtime, device: torch.device) -> bool:
    """Whether ranks that read one another's copies have them mapped, as memory like any other: not on GPUs, nor on paper, where plans are
    for GPUs."""
    return device.type == "cpu" and runtime.real


class PeerMemoryError(RuntimeError):
    """The ranks of a level cannot read one another's memory: names the level, the ranks and the reason."""


def share(units: Sequence[Unit], runtime: Runtime, device: torch.device) -> None:
    """Move the copies that gathers will read directly into shared memory, and register them. All ranks call it with equal units.

    Raises:
        PeerMemoryError: on all ranks alike.
    """
    levels = sorted({unit.first.peer_level for unit in units} - {0})
    for level in levels:
        ranks, name = runtime.topology.sizes[level - 1], runtime.topology.names[level - 1]
        if mapped(runtime, device) and ranks > MOST_MEMBERS:
            raise PeerMemoryError(f"peer_gather over `{name}`: {ranks} ranks; on CPUs it is for up to {MOST_MEMBERS}")
        members = runtime.topology.group(runtime.rank, level)
        rank, read = members.index(runtime.rank), runtime.count_reads(level)
        _lay_in_place([unit for unit in units if unit.first.peer_level == level and unit.first.in_place], level, members, runtime)
        chosen = [unit for unit in units if unit.first.peer_level == level and not unit.first.in_place]
        if not chosen:
            continue
        starts, total = _one_behind_another([unit.copy.numel() * unit.copy.itemsize for unit in chosen])
        regions: list[Tensor] = []
        pointers: list[int] = []
        if device.type == "cuda":
            regions, pointers = compat.symmetric_memory(total, device, runtime.communicator(level, "barrier"))
        elif mapped(runtime, device):
            regions = _regions(total, level, members, members, runtime)
        for unit, start in zip(chosen, starts, strict=True):
            size = unit.copy.numel() * unit.copy.itemsize
            parts = tuple(region[start : start + size].view(unit.copy.dtype) for region in regions)
            parts = parts or (unit.copy,) * len(members)  # on paper (a fake group, the meta device) all are this one
            table = [pointer + start for pointer in pointers]
            where = torch.tensor(table, dtype=torch.int64, device=device) if table else None
            _register(unit, parts[rank], peers.Peers(rank, read, parts, where))


def _lay_in_place(units: Sequence[Unit], level: int, members: Sequence[int], runtime: Runtime) -> None:
    """Their copies become parts of one buffer of all members: [E_o, shard] for each parameter, one behind another."""
    if not units:
        return
    sizes = [unit.copy.numel() * unit.copy.itemsize * len(members) for unit in units]
    starts, total = _one_behind_another(sizes)
    (region,) = _regions(total, level, members, members[:1], runtime)
    for unit, start, size in zip(units, starts, sizes, strict=True):
        unit.copy = at_start(region[start : start + size].view(unit.copy.dtype))


def _one_behind_another(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of so many bytes begins, aligned, and how many they are all together."""
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    *starts, total = accumulate(padded, initial=0)
    return starts, total


def _register(unit: Unit, own: Tensor, entry: peers.Peers) -> None:
    own = at_start(own)  # a storage of its own: torch keeps what is to be waited for by storage
    if unit.image is not None and not unit.coded:  # the image is the copy
        unit.image = own.view(unit.image.shape)
    unit.copy = own
    peers.register(own, entry)
    weakref.finalize(unit, peers.forget, own)


def _regions(total: int, level: int, members: Sequence[int], owners: Sequence[int], runtime: Runtime) -> list[Tensor]:
    """The files of `owners`, which all members map: [total] uint8 each, zeros at first."""
    name = runtime.topology.names[level - 1]
    nonces = [row[0] for row in runtime.agreement.exchange([secrets.randbits(62)], step="sharing of memory")]
    paths = [FOLDER / f"zcompile-{nonce:016x}" for nonce in nonces]
    mine = paths[runtime.rank]
    try:
        failure = _make(mine, total) if runtime.rank in owners else 0
        failures = [row[0] for row in runtime.agreement.exchange([failure], step="sharing of memory")]
        bad = [rank for rank, code in enumerate(failures) if code]
        if bad:
            reason = os.strerror(failures[bad[0]])
            raise PeerMemoryError(
                f"peer_gather over `{name}`: rank {bad[0]} cannot make {total} bytes in {FOLDER}: {reason}. Make it larger (containers "
                "often have 64 MB), or leave peer_gather out"
            )
        unseen = next((rank for rank in owners if not paths[rank].exists()), -1)
        answers = [row[0] for row in runtime.agreement.exchange([unseen], step="sharing of memory")]
        blind = [rank for rank, answer in enumerate(answers) if answer >= 0]
        if blind:
            raise PeerMemoryError(
                f"peer_gather over `{name}`: rank {blind[0]} does not see the memory of rank {answers[blind[0]]}: the ranks of that level "
                "must be on one host. Take a plan whose weights are inside a host, or leave peer_gather out"
            )
        mapped = [torch.from_file(str(paths[rank]), shared=True, size=total, dtype=torch.uint8) for rank in owners]
        runtime.agreement.exchange([0], step="sharing of memory")  # all have mapped: the names may go
        return mapped
    finally:
        with contextlib.suppress(FileNotFoundError):
            mine.unlink()


def _make(path: Path, total: int) -> int:
    """A file of that many bytes that are really there; 0, or the number of the error."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        os.posix_fallocate(handle, 0, max(total, 1))
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(handle)
    return 0
