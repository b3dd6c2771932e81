"""Memory that hops land in on CPUs, used again: torch keeps what it has allocated for GPUs alone. Fresh memory of some megabytes comes from
the kernel page by page, each cleared and charged when it is first written (docs/bench.md says what that costs), and goes back when it is
dropped, in every hop of every step.

A block is lent as the storage of a tensor, and is idle again when nobody but the pool holds that storage: no tensor, view or hop under way.
So nobody says that he is done with a block, and none is lent twice.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, UntypedStorage

from zcompile import _torch_compat as compat

SMALLEST = 128 << 10
"""Bytes: what the C library takes from its heap, not from the kernel, at first (mallopt(3), M_MMAP_THRESHOLD)."""


class Pool:
    """Blocks of the sizes that were asked for. What it holds, lent or not, is never more than what was lent at one time: beyond that, the
    block that has been idle longest is given up.

    Attributes:
        made: blocks that were allocated so far.
        most: bytes of the most that ever were lent at one time, as far as blocks had to be made for it.
    """

    def __init__(self) -> None:
        self.made = self.most = 0
        self._blocks: list[UntypedStorage] = []
        """What was lent last is the last one."""
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes() for block in self._blocks)

    @property
    def lent(self) -> int:
        """Bytes of the blocks that somebody else holds too."""
        return sum(block.nbytes() for block in self._blocks if not _idle(block))

    def land(self, tensor: Tensor) -> None:
        """From here on `tensor`, contiguous, whose values nobody wants, lies in a block. Not if it is small, or a part of a storage, or one
        of several tensors that share theirs."""
        if not tensor.is_cpu:
            return
        own = tensor.untyped_storage()
        size = own.nbytes()
        if size < SMALLEST or size != tensor.nbytes or compat.holders(own) != 2:  # of the tensor and of `own`
            return
        with self._lock:
            tensor.set_(self._block(size), 0, tensor.shape, tensor.stride())  # type: ignore[call-overload]

    def clear(self) -> None:
        """Give up what is idle, and forget how much was ever lent: another job begins."""
        with self._lock:
            self._blocks = [block for block in self._blocks if not _idle(block)]
            self.most = self.held

    def _block(self, size: int) -> UntypedStorage:
        for at in range(len(self._blocks) - 1, -1, -1):  # what was used last may still be in a cache
            block = self._blocks[at]
            if block.nbytes() == size and _idle(block):
                self._blocks.append(self._blocks.pop(at))
                return block
        self.most = max(self.most, self.lent + size)
        for block in [block for block in self._blocks if _idle(block)]:
            if self.held + size <= self.most:
                break
            self._blocks.remove(block)
        self.made += 1
        made = torch.empty(size, dtype=torch.uint8).untyped_storage()  # which is aligned as torch's kernels like it
        self._blocks.append(made)
        return made


def _idle(block: UntypedStorage) -> bool:
    return compat.holders(block) == 1  # the pool


POOL = Pool()
"""Of this process."""
