"""Memory of other ranks that kernels read where it lies: which buffer of this rank stands for which of theirs.

Whoever shares the memory registers it under its own rank's buffer (zcompile.peers does); a kernel is handed that buffer and looks the
others up, so that a graph holds no addresses and is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import memmove
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zcompile.kernels import reference
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry


@dataclass(frozen=True)
class Peers:
    """The equal buffers of a level's ranks, in group order.

    Attributes:
        buffers: each rank's, mapped into this process; this rank's own is among them.
        pointers: on GPUs: [ranks] int64, where each lies in the memory of this device.
        rank: this rank's place among them.
        read: called with the bytes of other ranks that one gather reads.
    """

    rank: int
    read: Callable[[int], None]
    buffers: tuple[Tensor, ...]
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
    """What lies in the copies of all ranks of a level, one behind another -> whole parameters in one buffer, at `geometry.starts`.

    Args:
        code: that of the records in the copies, which are dequantised; "" for plain rows of values, which are copied.
    """
    peers, where = of(copy), Geometry.parse(geometry)
    peers.read(copy.numel() * copy.itemsize * (len(peers.buffers) - 1))
    if not code:
        return _copy(peers, where, dtype)
    how = Code.parse(code)
    if peers.pointers is not None:
        from zcompile.kernels import gpu

        return gpu.peer_gather(peers.pointers, where, how, dtype, peers.rank)
    if how.integer:
        from zcompile.kernels import cpu

        return cpu.peer_gather(peers.buffers, where, how, dtype, peers.rank)
    return reference.dequantize(torch.cat(peers.buffers), where, how, dtype)


def _copy(peers: Peers, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    out = torch.empty(geometry.size, dtype=dtype, device=peers.buffers[0].device)
    ranks, size, width = len(peers.buffers), dtype.itemsize, geometry.width
    # torch copies two-byte values at two thirds of the speed of bytes on CPUs (2.13).
    direct = out.device.type == "cpu" and peers.buffers[0].dtype == dtype
    for part in (*range(peers.rank, ranks), *range(peers.rank)):  # not all begin with the same one
        source = peers.buffers[part]
        for at, start, length, rows in _stretches(geometry.text, ranks, part):
            if not direct:
                stretch = source.as_strided((rows, length), (width, 1), source.storage_offset() + at)
                out.narrow(0, start, rows * length).view(rows, length).copy_(stretch)
                continue
            for row in range(rows):
                to, begin = start + row * length, at + row * width
                memmove(out.data_ptr() + to * size, source.data_ptr() + begin * size, length * size)
    return out


@lru_cache(maxsize=1024)
def _stretches(text: str, ranks: int, part: int) -> tuple[tuple[int, int, int, int], ...]:
    """Of what one rank holds: (element of its buffer, element of the whole parameters' buffer, elements, rows of its buffer in which
    there are so many, which follow one another there)."""
    geometry = Geometry.parse(text)
    found: list[tuple[int, int, int, int]] = []
    each, column = geometry.rows // ranks, 0
    for piece, start in zip(geometry.pieces, geometry.starts, strict=False):
        first = part * each
        if not piece.spans:
            found.append((column, start + first * piece.n, piece.n, each))
        else:
            spans = ((row * geometry.width + column, piece.span(first + row)) for row in range(each))
            found += [(at, start + begin, valid, 1) for at, (begin, valid) in spans]
        column += piece.n
    return tuple(found)
