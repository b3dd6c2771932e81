"""Flat 64-bit memory made of named buffers. Every access is checked: bounds, alignment, write permission."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from amdgcn.errors import Fault

_GRAIN = 64
"""Buffers keep their address modulo this inside the arena, so that an aligned address is an aligned index."""


@dataclass(frozen=True)
class Buffer:
    """`data` (bytes) appears at `address`."""

    name: str
    data: np.ndarray
    address: int
    writable: bool = True

    @property
    def end(self) -> int:
        return self.address + self.data.nbytes


class Memory:
    """The buffers are copied into one arena, so that an access is one numpy gather; `flush` copies them back."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = sorted(buffers, key=lambda buffer: buffer.address)
        for before, after in zip(self.buffers, self.buffers[1:], strict=False):
            if before.end > after.address:
                raise ValueError(f"buffers {before.name} and {after.name} overlap")
        self._starts, at = [], 0
        for buffer in self.buffers:
            at = -(-at // _GRAIN) * _GRAIN + buffer.address % _GRAIN
            self._starts.append(at)
            at += buffer.data.nbytes
        self._bytes = np.zeros(-(-(at + 1) // _GRAIN) * _GRAIN, np.uint8)
        for buffer, start in zip(self.buffers, self._starts, strict=True):
            self._bytes[start : start + buffer.data.nbytes] = buffer.data
        self._views = {1: self._bytes, 2: self._bytes.view("<u2"), 4: self._bytes.view("<u4")}
        self._bases = np.array([buffer.address for buffer in self.buffers], np.uint64)
        self._ends = np.array([buffer.end for buffer in self.buffers], np.uint64)
        # Modulo 2^64: adding this to an address gives its place in the arena.
        self._shifts = np.array(
            [(s - b.address) % 2**64 for b, s in zip(self.buffers, self._starts, strict=True)], np.uint64
        )

    def flush(self) -> None:
        """Makes the stores visible in the arrays that the buffers were made of."""
        for buffer, start in zip(self.buffers, self._starts, strict=True):
            if buffer.writable:
                buffer.data[:] = self._bytes[start : start + buffer.data.nbytes]

    def load(self, addresses: np.ndarray, width: int) -> list[np.ndarray]:
        """`width` bytes at each address, as 32-bit words: one array per word, narrow values zero-extended."""
        unit = min(width, 4)
        places = self._places(addresses, width, unit, store=False)
        return [self._views[unit][places + i].astype(np.uint32, copy=False) for i in range(max(width // 4, 1))]

    def store(self, addresses: np.ndarray, words: Sequence[np.ndarray], width: int) -> None:
        """Writes `width` bytes at each address; where two lanes write to one place the later lane wins."""
        unit = min(width, 4)
        places = self._places(addresses, width, unit, store=True)
        for i, word in enumerate(words):
            self._views[unit][places + i] = word.astype(self._views[unit].dtype, copy=False)

    def _places(self, addresses: np.ndarray, width: int, unit: int, *, store: bool) -> np.ndarray:
        """Checks the addresses and turns them into indices of the arena in units of `unit` bytes."""
        if not addresses.size:
            return np.zeros(0, np.int64)
        if unit > 1 and (crooked := addresses & np.uint64(unit - 1)).any():
            self._raise(addresses, int(np.flatnonzero(crooked)[0]), width, f"is not a multiple of {unit}")
        lowest, highest = int(addresses.min()), int(addresses.max())
        owner = int(np.searchsorted(self._bases, np.uint64(lowest), "right")) - 1
        if owner >= 0 and highest + width <= self.buffers[owner].end:  # the common case: all in one buffer
            owners: np.ndarray | int = owner
            written = [owner]
        else:
            owners = np.searchsorted(self._bases, addresses, "right").astype(np.int64) - 1
            # Written as a difference, so that an address near 2^64 does not wrap around into a buffer.
            room = self._ends[np.maximum(owners, 0)] - addresses
            bad = (owners < 0) | (room < np.uint64(width)) | (addresses >= self._ends[np.maximum(owners, 0)])
            if bad.any():
                self._raise(addresses, int(np.flatnonzero(bad)[0]), width, None)
            written = [int(each) for each in np.unique(owners)]
        for each in written if store else []:
            if not self.buffers[each].writable:
                position = int(np.flatnonzero(np.broadcast_to(owners == np.int64(each), addresses.shape))[0])
                self._raise(addresses, position, width, f"is in {self.buffers[each].name}, which is read-only")
        return ((addresses + self._shifts[owners]) >> np.uint64(unit.bit_length() - 1)).astype(np.int64)

    def _raise(self, addresses: np.ndarray, position: int, width: int, reason: str | None) -> None:
        address = int(addresses[position])
        if reason is None:
            nearest = min(self.buffers, key=lambda b: max(b.address - address, address - b.end, 0), default=None)
            reason = "is in no buffer"
            if nearest is not None:
                reason += f"; nearest: {nearest.name}, {nearest.data.nbytes} bytes at {nearest.address:#x}"
                reason += f", the access begins at byte {address - nearest.address}"
        raise Fault(f"{width} bytes at address {address:#x}: {reason}", address, position)
