"""Process groups that count, and the making of the groups under them.

A `CountingGroup` stands between a role name in a graph (`zc.2x2x2.pair.gather`) and a real communicator. It counts
calls and bytes, then hands the call on. Several roles share one communicator: a communicator is one ordered stream, a
role is one purpose.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.profiler import record_function

from zcompile import _torch_compat as compat
from zcompile import gloo
from zcompile.agreement import PATIENT
from zcompile.faults.flight import Flight
from zcompile.faults.watch import Watch
from zcompile.origins import Origins
from zcompile.pool import POOL
from zcompile.swap import METHODS, MOST_MEMBERS, Swap

_NUMBERS = itertools.count()
"""Of hops in a profiler's trace: see zcompile.overlap."""

AGREEMENT = "agreement"
"""The lane of the words that ranks exchange."""
LATER = 60.0
"""Seconds by which a backend's own time limit is later than ours, so that ours, which can say who is missing, comes first."""

CounterKey = tuple[str, str, str]
"""(level name, transfer, op)"""


class GroupError(RuntimeError):
    """A process group that could not be made, or did not answer in time. It names level, lane and member ranks."""


@dataclass(frozen=True)
class Counters:
    """Collectives this rank has issued: `rows[level, transfer, op] = (calls, bytes)`; bytes are those *received* by
    this rank.

    A value, not a live view: take one before and one after and subtract, `(after - before).by_transfer()`.
    """

    rows: Mapping[CounterKey, tuple[int, int]] = field(default_factory=dict)

    def __sub__(self, earlier: Counters) -> Counters:
        """What happened since `earlier`; rows without a new call are left out."""
        difference: dict[CounterKey, tuple[int, int]] = {}
        for key, (calls, received) in self.rows.items():
            calls_before, received_before = earlier.rows.get(key, (0, 0))
            if calls != calls_before:
                difference[key] = (calls - calls_before, received - received_before)
        return Counters(difference)

    def by_transfer(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(level name, transfer) -> (calls, bytes), summed over ops."""
        total: dict[tuple[str, str], tuple[int, int]] = {}
        for (level, transfer, _), (calls, received) in self.rows.items():
            calls_so_far, received_so_far = total.get((level, transfer), (0, 0))
            total[level, transfer] = (calls_so_far + calls, received_so_far + received)
        return total


class Tally:
    """The live counter behind `Counters`. Backward runs on autograd's threads, hence the lock."""

    def __init__(self) -> None:
        self._rows: dict[CounterKey, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def add(self, key: CounterKey, received: int) -> None:
        with self._lock:
            calls, total = self._rows.get(key, (0, 0))
            self._rows[key] = (calls + 1, total + received)

    def read(self) -> Counters:
        with self._lock:
            return Counters(dict(self._rows))


class Disturb(Protocol):
    """What happens before hops, in the search for who does not wait for them."""

    def launch(self, level: str, output: Any, sent: Any) -> None:
        """Before a hop over `level` is launched that sends `sent` and will write `output`, of which `sent` may be a part already."""

    def wait(self, level: str) -> None:
        """Before a hop is waited for."""


class CountingGroup(dist.ProcessGroup):
    """A process group that counts each collective in a `Tally` and delegates it to `inner`.

    torch reaches a Python process group from `_c10d_functional` ops through C++ virtual methods with these names, and
    from `torch.distributed` functions through Python methods; both are overridden (below the class) under every name
    that torch has had for them. A collective without an override finds no backend and raises, so nothing passes
    uncounted.
    """

    def __init__(
        self,
        inner: dist.ProcessGroup,
        name: str,
        level: str,
        transfer: str,
        tally: Tally,
        swap: Swap | None = None,
        stream: int = 0,
        watch: Watch | None = None,
        ranks: tuple[int, ...] = (),
    ) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]
        self.inner = inner
        self.swap = swap
        self.stream = stream
        """Of the swap: one for each transfer, as threads of their own launch some of them."""
        self.level = level
        self.transfer = transfer
        self.tally = tally
        self.watch = watch
        """None where nothing can be lost: one rank, or ranks on paper."""
        self.ranks = ranks
        """Global ranks of the members."""
        self.checksums = False
        """Whether what arrives is compared with what was sent: see zcompile.faults.checksums."""
        self.origins: Origins | None = None
        """Looks at what is sent, where that is gradients of this rank alone."""
        self.disturb: Disturb | None = None
        """What a replay does to hops: see zcompile.replay."""
        self._set_group_name(name)  # type: ignore[arg-type]

    def getBackendName(self) -> str:
        return "zcompile"


Received = Callable[[CountingGroup, tuple[Any, ...]], int]


def _bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _all_gather(group: CountingGroup, args: tuple[Any, ...]) -> int:
    return _bytes(args[0]) - _bytes(args[1])


def _all_to_all_single(group: CountingGroup, args: tuple[Any, ...]) -> int:
    output, splits = args[0], args[2] if len(args) > 2 else []
    if not splits:
        total = _bytes(output)
        return total - total // group.size()
    own: int = splits[group.rank()] * math.prod(output.shape[1:]) * output.element_size()
    return _bytes(output) - own


def _all_to_all(group: CountingGroup, args: tuple[Any, ...]) -> int:
    return _bytes(args[0]) - _bytes(args[0][group.rank()])


def _reduce_scatter(group: CountingGroup, args: tuple[Any, ...]) -> int:
    return _bytes(args[0]) * (group.size() - 1)


def _all_reduce(group: CountingGroup, args: tuple[Any, ...]) -> int:
    return 2 * _bytes(args[0]) * (group.size() - 1) // group.size()


def _from_root(group: CountingGroup, args: tuple[Any, ...]) -> int:
    root = getattr(args[1], "rootRank", args[1]) if len(args) > 1 else 0
    return 0 if bool(root == group.rank()) else _bytes(args[0])


def _first(group: CountingGroup, args: tuple[Any, ...]) -> int:
    return _bytes(args[0])


def _nothing(group: CountingGroup, args: tuple[Any, ...]) -> int:
    return 0


# op -> (bytes received, names of the method in torch 2.13, then older ones).
# Bytes of reductions are those of the algorithm with the least traffic.
_COLLECTIVES: dict[str, tuple[Received, tuple[str, ...]]] = {
    "all_gather": (
        _all_gather,
        (
            "all_gather_single_coalesced",
            "all_gather_single",
            "allgather",
            "allgather_coalesced",
            "allgather_into_tensor_coalesced",
            "_allgather_base",
        ),
    ),
    "all_to_all": (_all_to_all_single, ("all_to_all_single", "alltoall_base")),
    "all_to_all_list": (_all_to_all, ("alltoall",)),
    "reduce_scatter": (
        _reduce_scatter,
        (
            "reduce_scatter_single_coalesced",
            "reduce_scatter_single",
            "reduce_scatter",
            "reduce_scatter_tensor_coalesced",
            "_reduce_scatter_base",
        ),
    ),
    "all_reduce": (_all_reduce, ("allreduce", "allreduce_coalesced")),
    "broadcast": (_from_root, ("broadcast",)),
    "reduce": (_first, ("reduce",)),
    "gather": (_first, ("gather",)),
    "scatter": (_first, ("scatter",)),
    "send": (_nothing, ("send",)),
    "recv": (_first, ("recv", "recv_anysource")),
    "barrier": (_nothing, ("barrier", "monitored_barrier")),
}


def _counted(op: str, method: str, received: Received) -> Callable[..., Any]:
    swapped = METHODS.get(method)

    def collective(self: CountingGroup, *args: Any, **keywords: Any) -> Any:
        label = f"{self.level} {self.transfer} {next(_NUMBERS)}" if compat.profiling() else ""
        if self.disturb is not None:
            self.disturb.launch(self.level, args[0], args[1] if len(args) > 1 else None)

        def launch() -> Any:
            with record_function(f"zc launch {label}") if label else contextlib.nullcontext():
                work = swapped(self.swap, args, self.stream) if swapped is not None and self.swap is not None else None
                return getattr(self.inner, method)(*args, **keywords) if work is None else work

        work = launch() if self.watch is None else Flight.launch(launch, self, self.watch, op, args, label)
        self.tally.add((self.level, self.transfer, op), received(self, args))
        return work

    collective.__name__ = method
    collective.__doc__ = f"Count one `{op}` and delegate."
    return collective


for _op, (_received, _methods) in _COLLECTIVES.items():
    for _method in _methods:
        if hasattr(dist.ProcessGroup, _method):
            setattr(CountingGroup, _method, _counted(_op, _method, _received))


class Communicators:
    """The real groups under one default process group, made once for each (owner, ranks, lane) and kept for the next
    runtime of the same owner.

    The owner is a topology's key: torch 2.13 names a group after its ranks *and the number of groups that the process
    has*, so all ranks must make the same number of groups, and a group shared by two topologies on some ranks only
    would leave the others waiting for a name nobody has. `device` is where the warm-up tensor lives; `fake` marks
    torch's fake backend, where nothing moves and so nothing can be checked.
    """

    def __init__(self, device: torch.device, fake: bool) -> None:
        self.device = device
        self.fake = fake
        self.timeout = 300.0
        self.collective_timeout = 1800.0
        self.watch: Watch | None = None
        self._made: dict[tuple[str, tuple[int, ...], str], dist.ProcessGroup] = {}
        self._swaps: dict[dist.ProcessGroup, Swap] = {}
        self._setups = 0

    def check_setup(self, owner: str) -> None:
        """All ranks must be setting up `owner`, with equally many groups made so far; GroupError on ranks that differ
        from the first to arrive.
        """
        if self.fake or dist.get_world_size() == 1:
            return
        mine = f"topology {owner} with {compat.number_of_groups()} process groups made before"
        first = compat.default_store().compare_set(f"zc/setup/{self._setups}", "", mine).decode()
        self._setups += 1
        if first != mine:
            raise GroupError(
                f"rank {dist.get_rank()} sets up {mine}, another rank {first}: all ranks need "
                "one topology, and the same number of groups made before it"
            )

    def get(self, owner: str, ranks: list[int], level: str, lane: str, backend: str | None = None) -> dist.ProcessGroup:
        """The group of `ranks` in that order, ready to use. GroupError naming `level`, `lane` and `ranks` if a member
        does not turn up.
        """
        key = (owner, tuple(ranks), lane)
        if key not in self._made:
            default = "nccl" if self.device.type == "cuda" and not self.fake else None
            self._made[key] = self._make(ranks, level, lane, backend or default)
        return self._made[key]

    def swap(self, group: dist.ProcessGroup) -> Swap | None:
        """How a group made here swaps messages if gloo does it; None where torch's collectives are to be used."""
        if self.fake or self.device.type != "cpu" or not 1 < group.size() <= MOST_MEMBERS:
            return None
        return self._swaps.setdefault(group, Swap(group, self.collective_timeout))

    def limit(self, timeout: float, collective_timeout: float) -> None:
        """The time limits from here on, also of the groups that were made before."""
        self.timeout, self.collective_timeout = timeout, collective_timeout
        for swap in self._swaps.values():
            swap.timeout = collective_timeout
        for (_, _, lane), group in self._made.items():
            if not self.fake and lane != AGREEMENT:
                compat.set_group_timeout(group, collective_timeout + LATER)
        if self.watch is not None:
            self.watch.timeout = collective_timeout

    def start_watch(self) -> Watch | None:
        """The watch over this default process group; None where nothing can be lost."""
        if self.watch is None and not self.fake and dist.get_world_size() > 1:
            store, on_device = compat.default_store(), self.device.type == "cuda"
            self.watch = Watch(store, dist.get_rank(), dist.get_world_size(), self.collective_timeout, on_device)
        return self.watch

    def close(self) -> None:
        """The default process group is another one now."""
        POOL.clear()
        if self.watch is not None:
            self.watch.close()

    def _make(self, ranks: list[int], level: str, lane: str, backend: str | None) -> dist.ProcessGroup:
        subject = f"level `{level}`, lane `{lane}`, ranks {ranks}"
        try:
            group = compat.new_group(
                ranks, backend=gloo.shared(backend), timeout=self.timeout, description=f"zc.{level}.{lane}"
            )
            self._warm_up(group, ranks, torch.device("cpu") if backend == "gloo" else self.device)
            if not self.fake:
                later = PATIENT if lane == AGREEMENT else self.collective_timeout + LATER
                compat.set_group_timeout(group, later)
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, GroupError):
                raise GroupError(f"process group of {subject}: {error}") from None
            raise GroupError(
                f"process group of {subject} was not ready within {self.timeout:g} s: every one of these ranks must "
                f"make it, with the same topology; here is rank {dist.get_rank()}. torch said: {error}"
            ) from error
        return group

    def _warm_up(self, group: dist.ProcessGroup, ranks: list[int], device: torch.device) -> None:
        """One tiny all-gather of global ranks: the group answers, and its order is the order of `ranks`."""
        if len(ranks) == 1:
            return
        mine = torch.tensor([dist.get_rank()], dtype=torch.int64, device=device)
        gathered = torch.empty(len(ranks), dtype=torch.int64, device=device)
        work = compat.all_gather(gathered, mine, group)
        if self.fake:
            return
        deadline = time.monotonic() + self.timeout
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise TimeoutError("no answer to the first collective")
            time.sleep(0.0002)
        work.wait()
        if gathered.tolist() != ranks:
            raise GroupError(
                f"its order is {gathered.tolist()}: torch {torch.__version__} did not keep the order of ranks"
            )
