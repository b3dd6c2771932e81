"""On which rank did a gradient that is no number arise?

After a reduction it is in the shard of an owner, who had no part in it. But what the first reduce hop sends is still this rank's own: the
hop over the innermost level of more than one member, of a reduce, or of a sync where gradients are whole until then. So each such message
is summed when it leaves (one pass over it, nothing is waited for), and where a step has to be skipped, which is rare, the ranks compare
whose sums are no numbers, and which was the first: a backward sends in the same order everywhere.

A message of codes (int8, int4, fp8) is not looked at. Vectors and norms, which have native formats, then tell of what spread from
activations; what arose in a quantised matrix alone, only the option checks=True finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Origins:
    """Of one model, since its last step: the sums of what this rank has sent, by the parameters that a message carries."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def sent(self, parameters: tuple[str, ...], message: Any) -> None:
        """This rank is about to send `message`, its own gradients of `parameters`."""
        while isinstance(message, (list, tuple)) and len(message) == 1:
            (message,) = message
        if not isinstance(message, Tensor) or not message.is_floating_point():
            return
        # bf16 reaches as far as fp32, and a sum in another dtype than its own is one of a copy: ten times as long.
        own = message.dtype if message.dtype == torch.bfloat16 else torch.float32
        total = message.detach().sum(dtype=own).to(torch.float32)
        have = self._sums.get(parameters)
        self._sums[parameters] = total if have is None else have.add_(total)  # what is no number stays none

    def first(self) -> int:
        """Number, from 1, of the first message that was not finite, in the order of a backward; 0 for none."""
        if not self._sums:
            return 0
        fine = torch.isfinite(torch.stack(list(self._sums.values()))).tolist()
        return next((number for number, is_fine in enumerate(fine, start=1) if not is_fine), 0)

    def parameters(self, number: int) -> Sequence[str]:
        """What message `number` carried; nothing if there was none such."""
        return next(iter(list(self._sums)[number - 1 : number]), ())

    def clear(self) -> None:
        self._sums.clear()
