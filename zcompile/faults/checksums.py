"""Option checks="checksums": what arrived is what was sent, bit for bit, or an error that names both ranks.

Each rank adds up the words of every part that it sends; the sums travel over the same communicator beside the message (8 bytes a member,
which the ledger does not count) and are compared with those of what arrived when the message is waited for. A flipped bit always
changes the sum of 64-bit words modulo 2^64. The compute copies, which lie in memory between steps, are summed when a refresh has
written them and again before each forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zcompile import _torch_compat as compat
from zcompile.faults.sites import Site


class ChecksumError(RuntimeError):
    """Bits changed on their way between two ranks, or in a rank's memory: names the ranks, the collective and the parameters."""


def checksum(x: Tensor) -> Tensor:
    """Scalar int64: the sum of a tensor's bits, eight bytes at a time and then the rest; without a copy of them if it is contiguous."""
    data = x.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    words = data.numel() // 8 * 8
    return data[:words].view(torch.int64).sum() + data[words:].sum()


def launch(group: Any, op: str, args: tuple[Any, ...], site: Site) -> Callable[[], None] | None:
    """Send the sums of what `group` is about to send; returns the comparison to make when it has arrived. None for other collectives
    than gathers and all-to-alls in equal parts.
    """
    if op not in ("all_gather", "all_to_all"):
        return None
    uneven = op == "all_to_all" and any(len(set(split)) > 1 for split in args[2:4] if split)
    output, mine = _tensor(args[0]), _tensor(args[1])
    if uneven or output is None or mine is None:
        return None
    size, own = group.size(), group.rank()
    parts = [mine] * size if op == "all_gather" else list(mine.reshape(size, -1))
    sums = torch.stack([checksum(parts[0])] * size if op == "all_gather" else [checksum(part) for part in parts])
    everyones = sums.new_empty(size * size)
    if group.swap is not None:
        work: Any = group.swap.all_gather(everyones, sums, group.stream)
    else:
        work = compat.all_gather(everyones, sums, group.inner)

    def compare() -> None:
        work.wait()
        sent = everyones.view(size, size)[:, own]
        arrived = torch.stack([checksum(part) for part in output.view(size, -1)])
        if not torch.equal(sent, arrived):
            member = int((sent != arrived).nonzero()[0])
            raise ChecksumError(
                f"zcompile: what rank {group.ranks[member]} sent is not what rank {group.ranks[own]} received in {site}: bits changed on "
                "the way or in the memory of one of them"
            )

    return compare


def _tensor(value: Any) -> Tensor | None:
    """The one tensor in nested lists; None if there are several."""
    while isinstance(value, (list, tuple)):
        if len(value) != 1:
            return None
        (value,) = value
    return value if isinstance(value, Tensor) else None
