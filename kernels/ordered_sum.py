"""The sum of a reduce hop: fp32, in group order, so that its bits depend on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

UNROLL = 16
"""Up to this many terms the sum is plain adds, which the code generator fuses; beyond it one op, so that graphs stay small."""


def ordered_sum(x: Tensor) -> Tensor:
    """x[0] + x[1] + ... in fp32, strictly in this order.

    Args:
        x: [parts, n], any floating dtype.

    Returns:
        [n] fp32.
    """
    if x.shape[0] > UNROLL:
        return torch.ops.zcompile_kernels.ordered_sum(x)
    return _adds(x)


def _adds(x: Tensor) -> Tensor:
    total = x[0].to(torch.float32)
    for part in range(1, x.shape[0]):
        total = total + x[part].to(torch.float32)
    return total


def _inplace(x: Tensor) -> Tensor:
    total = x[0].to(torch.float32, copy=True)
    for part in range(1, x.shape[0]):
        total += x[part].to(torch.float32)
    return total


torch.library.define("zcompile_kernels::ordered_sum", "(Tensor x) -> Tensor")
torch.library.impl("zcompile_kernels::ordered_sum", "CompositeExplicitAutograd", _inplace)
torch.library.register_fake("zcompile_kernels::ordered_sum", lambda x: x.new_empty(x.shape[1:], dtype=torch.float32))
