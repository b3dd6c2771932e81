"""Memory of other ranks that kernels read where it lies: which buffer of this rank stands for which of theirs.

Whoever shares the memory registers it under its own rank's buffer (zcompile.peers does); a kernel is handed that buffer and looks the
others up, so that a graph holds no addresses and is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """The equal buffers of a level's ranks, in group order.

    Attributes:
        buffers: on CPUs: each rank's, mapped into this process; this rank's own is among them.
        pointers: on GPUs: [ranks] int64, where each lies in the memory of this device.
        rank: this rank's place among them.
        read: called with the bytes of other ranks that one gather reads.
    """

    rank: int
    read: Callable[[int], None]
    buffers: tuple[Tensor, ...] = ()
    pointers: Tensor | None = None


_PEERS: dict[int, Peers] = {}


def register(buffer: Tensor, peers: Peers) -> None:
    """From here on gathers of `buffer` read what `peers` says."""
    _PEERS[buffer.data_ptr()] = peers


def forget(buffer: Tensor) -> None:
    _PEERS.pop(buffer.data_ptr(), None)


def of(buffer: Tensor) -> Peers:
    """RuntimeError if nobody has shared this buffer."""
    found = _PEERS.get(buffer.data_ptr())
    if found is None:
        raise RuntimeError(
            f"peer_gather of a buffer of {buffer.numel()} bytes whose memory no other rank can read: it was not shared. "
            "Compute copies are, when a model is wrapped with a plan that says peer_gather=True."
        )
    return found


def gather(copy: Tensor, geometry: str, code: str, dtype: torch.dtype) -> Tensor:
    """The messages in the copies of all ranks of a level -> what `dequantize` makes of them, one behind another."""
    from zcompile.kernels.code import Code
    from zcompile.kernels.geometry import Geometry

    peers, how, where = of(copy), Code.parse(code), Geometry.parse(geometry)
    ranks = len(peers.buffers) if peers.pointers is None else len(peers.pointers)
    peers.read(copy.numel() * (ranks - 1))
    if peers.pointers is not None:
        from zcompile.kernels import gpu

        return gpu.peer_gather(peers.pointers, where, how, dtype, peers.rank)
    if how.integer:
        from zcompile.kernels import cpu

        return cpu.peer_gather(peers.buffers, where, how, dtype, peers.rank)
    from zcompile.kernels import reference

    return reference.dequantize(torch.cat(peers.buffers), where, how, dtype)
