"""What a lossless delta is made from."""

from __future__ import annotations

import torch
from torch import Tensor


def masters_and_old(sizes: list[int], seed: int, far: float) -> tuple[Tensor, Tensor]:
    """(masters, what the others have of them), of parameters of `sizes` side by side: near one another, but for a share of `far`."""
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(sum(sizes), generator=generator) * 0.02
    old = (master + 1e-4 * torch.randn(master.shape, generator=generator)).bfloat16()
    moved = torch.rand(master.shape, generator=generator) < far
    old[moved] = torch.randn(int(moved.sum()), generator=generator).bfloat16()
    return master, old
