"""Memory that hops land in on CPUs, used again: torch keeps what it has allocated for GPUs alone. Fresh memory of some megabytes comes from
the kernel page by page, each cleared and charged when it is first written (docs/bench.md says what that costs), and goes back when it is
dropped, in every hop of every step.

A block is lent as the storage of a tensor. It comes back when that storage is gone: with the last tensor, view or hop under way that
holds it. So nobody says that he is done with a block, and none is lent twice.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from zcompile import _torch_compat as compat

SMALLEST = 128 << 10
"""Bytes: what the C library takes from its heap, not from the kernel, at first (mallopt(3), M_MMAP_THRESHOLD)."""

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Pool:
    """Blocks of the sizes that were asked for. What it holds, lent or not, is never more than what was lent at one time: beyond that, the
    block that has been idle longest is given up.

    Attributes:
        made: blocks that were allocated so far.
        held, lent, most: bytes of all blocks; of those that are lent; of the most that ever were at one time.
    """

    def __init__(self) -> None:
        self.made = self.held = self.lent = self.most = 0
        self._idle: list[Bytes] = []
        """The one that has been idle longest first."""
        self._back: deque[Bytes] = deque()
        """Filled by whichever thread drops a storage, without a lock: it may be holding this one."""
        self._lock = threading.Lock()

    def land(self, tensor: Tensor) -> None:
        """From here on `tensor`, contiguous, whose values nobody wants, lies in a block. Not if it is small, or a part of a storage, or one
        of several tensors that share theirs."""
        size = tensor.numel() * tensor.itemsize
        if size < SMALLEST or tensor.device.type != "cpu" or not compat.alone(tensor):
            return
        if tensor.untyped_storage().nbytes() != size:
            return
        block = self._take(size)
        loan = block[:]  # an object of its own, which only the storage holds
        weakref.finalize(loan, self._back.append, block).atexit = False
        tensor.set_(torch.from_numpy(loan).view(tensor.dtype).untyped_storage(), 0, tensor.shape, tensor.stride())

    def clear(self) -> None:
        """Give up what is idle, and forget how much was ever lent: another job begins."""
        with self._lock:
            self._collect()
            self.held -= sum(block.nbytes for block in self._idle)
            self._idle.clear()
            self.most = self.lent

    def _take(self, size: int) -> Bytes:
        with self._lock:
            self._collect()
            self.lent += size
            self.most = max(self.most, self.lent)
            for at in range(len(self._idle) - 1, -1, -1):  # what was used last may still be in a cache
                if self._idle[at].nbytes == size:
                    return self._idle.pop(at)
            self.held += size
            while self.held > self.most:
                self.held -= self._idle.pop(0).nbytes
            self.made += 1
        made: Bytes = torch.empty(size, dtype=torch.uint8).numpy()  # which is aligned as torch's kernels like it
        return made

    def _collect(self) -> None:
        while self._back:
            block = self._back.popleft()
            self.lent -= block.nbytes
            self._idle.append(block)


POOL = Pool()
"""Of this process."""
