"""Memory of one rank of `zcompile bench`: what it holds at rest between steps, and at the peak of one.

Above what it had before there was a model. At rest that is the state of the training, and on a CPU what the process itself keeps: of a
compiler, its graphs and its code.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class Memory:
    """Peak bytes of this rank above what it had at the start: allocated device memory, or resident pages on a CPU.

    A page that several ranks map (a copy that others read in memory) counts by this rank's share of it, as the kernel's PSS does: else each
    of two ranks would be charged for both copies. That share is taken at the end, as the kernel keeps no highest PSS.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.base = torch.cuda.memory_allocated(device) if device.type == "cuda" else _kernel("status", "VmRSS")

    def release(self) -> None:
        """What was freed goes back to the system. Of what compiling has freed: a step before the measured ones, which would else pay for
        getting memory again."""
        if self.device.type == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        Path("/proc/self/clear_refs").write_text("5")  # the mark of the peak starts again

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        return _kernel("status", "VmHWM") - _of_others() - self.base

    def rest(self) -> int:
        """Now, between two steps: without what the C library keeps of memory that was freed."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self.base
        self.release()
        return _kernel("status", "VmRSS") - _of_others() - self.base


def _of_others() -> int:
    """Bytes of this process's shared pages that are other processes' share."""
    return _kernel("status", "RssShmem") - _kernel("smaps_rollup", "Pss_Shmem")


def _kernel(file: str, key: str) -> int:
    """Bytes that /proc/self/`file` says for `key`; 0 where this kernel does not."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
