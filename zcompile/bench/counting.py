"""What one step asks of the network, by level, where torch hands it to a process group: of any system, under any launcher.

Bytes are what a rank receives by the algorithm with the least traffic, as in zcompile.groups, without headers. A collective over ranks of
several levels goes round a flat ring in rank order (zcompile.compare_fsdp says why): each rank receives over the outermost level in which
it differs from the one before it. An all-to-all goes straight. zcompile's own groups each lie in one level and count themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zcompile import _torch_compat as compat
from zcompile.compare_fsdp import ring_levels
from zcompile.groups import Counters
from zcompile.topology import Topology

Row = list[int]
"""[messages, bytes]"""


class Counted:
    """messages: level -> [number, bytes received] of this rank. peer_reads: level -> bytes that it read in other ranks' memory."""

    def __init__(self, topology: Topology):
        self.topology = topology
        self.messages: dict[str, Row] = {name: [0, 0] for name in topology.names}
        self.peer_reads: dict[str, int] = {}

    def add(self, level: str, received: int) -> None:
        if level and received:
            row = self.messages[level]
            row[0] += 1
            row[1] += received

    def take(self, counters: Counters) -> None:
        """What zcompile's groups have counted."""
        for (level, transfer, op), (calls, received) in counters.rows.items():
            if op == "peer_read":
                self.peer_reads[level] = self.peer_reads.get(level, 0) + received
            elif transfer != "barrier":  # a byte, for the time and not for the size
                self.messages[level][0] += calls
                self.messages[level][1] += received


@contextlib.contextmanager
def counting(topology: Topology, model: Any = None) -> Iterator[Counted]:
    """Counts what is asked inside. `model`: one that zcompile has wrapped, whose groups count; others are watched."""
    found = Counted(topology)
    if model is not None:
        runtime = model.zero.runtime
        before = runtime.counters
        yield found
        found.take(runtime.counters - before)
        return
    with _Watching(found):
        yield found


def total(everyone: Sequence[Counted]) -> dict[str, dict[str, Any]]:
    """Of all ranks: level -> {"messages": number, "bytes", "mean_bytes" of a message, "peer_read_bytes"}."""
    out = {}
    for name in everyone[0].topology.names:
        number, received = (sum(mine.messages[name][k] for mine in everyone) for k in (0, 1))
        out[name] = {
            "messages": number,
            "bytes": received,
            "mean_bytes": received / number if number else 0.0,
            "peer_read_bytes": sum(mine.peer_reads.get(name, 0) for mine in everyone),
        }
    return out


class _Watching(TorchDispatchMode):
    """Sees every collective of c10d, also those that C++ launches, in the thread that entered it and in the backwards it starts."""

    def __init__(self, found: Counted):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._see(func._schema.name.removeprefix("c10d::"), args)
        elif func.namespace == "_c10d_functional" and func._schema.name.split("::")[1] in _FUNCTIONAL:
            kind = _FUNCTIONAL[func._schema.name.split("::")[1]]
            name = next(arg for arg in reversed(args) if isinstance(arg, str))
            self._collective(kind, [result], args[:1], compat.group_by_name(name))
        return result

    def _see(self, name: str, args: Sequence[Any]) -> None:
        at = next((i for i, arg in enumerate(args) if _group(arg) is not None), -1)
        if at < 0:
            return
        group = _group(args[at])
        if name in ("recv_", "recv_any_source_"):
            other = args[at + 1] if name == "recv_" else group.rank()
            self._straight(group, other, _bytes(args[0]))
        elif name in ("alltoall_base_", "alltoall_"):
            self._all_to_all(args[0], args[3] if name == "alltoall_base_" else [], group)
        elif name == "broadcast_":
            if args[at + 1] != group.rank():
                self._straight(group, args[at + 1], _bytes(args[0]))
        elif name in _KINDS:
            self._collective(_KINDS[name], args[0], args[1], group)

    def _collective(self, kind: str, output: Any, given: Any, group: Any) -> None:
        ranks = dist.get_process_group_ranks(group)
        n = len(ranks)
        received = {
            "gather": _bytes(output) - _bytes(given) if n > 1 else 0,
            "scatter": _bytes(output) * (n - 1),
            "reduce": 2 * _bytes(output) * (n - 1) // n,
            "exchange": _bytes(output) - _bytes(output) // n,
        }[kind]
        self.found.add(ring_levels(self.found.topology, ranks)[group.rank()], received)

    def _all_to_all(self, output: Any, splits: Sequence[int], group: Any) -> None:
        n = group.size()
        for member in range(n):
            if isinstance(output, Tensor):
                row = output.numel() // output.shape[0] * output.element_size() if splits else 0
                received = splits[member] * row if splits else _bytes(output) // n
            else:
                received = _bytes(output[member])
            if member != group.rank():
                self._straight(group, member, received)

    def _straight(self, group: Any, member: int, received: int) -> None:
        """From one member of the group to this rank."""
        ranks = dist.get_process_group_ranks(group)
        pair = [ranks[member], ranks[group.rank()]]
        self.found.add(ring_levels(self.found.topology, pair)[1], received)


_KINDS = {
    "allgather_": "gather", "_allgather_base_": "gather", "allgather_coalesced_": "gather", "allgather_into_tensor_coalesced_": "gather",
    "reduce_scatter_": "scatter", "_reduce_scatter_base_": "scatter", "reduce_scatter_tensor_coalesced_": "scatter",
    "allreduce_": "reduce", "allreduce_coalesced_": "reduce",
}  # fmt: skip
"""Ops of c10d (2.13: torch/csrc/distributed/c10d/Ops.cpp), whose first argument is the output."""
_FUNCTIONAL = {
    "all_gather_into_tensor": "gather", "reduce_scatter_tensor": "scatter", "all_reduce": "reduce", "all_to_all_single": "exchange",
}  # fmt: skip


def _group(value: Any) -> Any:
    if isinstance(value, dist.ProcessGroup):
        return value
    if isinstance(value, torch.ScriptObject):
        with contextlib.suppress(RuntimeError):
            return dist.ProcessGroup.unbox(value)
    return None


def _bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
