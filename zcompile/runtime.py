"""The runtime of one topology in one process: role groups with counters, the device mesh, agreement between ranks, and
one-of-a-host work.

Groups of a level hold the ranks that differ in that level's coordinate alone. Each level of size > 1 has two
communicators ("lanes"), so that a gather and a reduction of one level can overlap; a role (level, transfer) is a
`CountingGroup` over a lane, registered under the same name on every rank, so graphs that name it are equal on all
ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from zcompile import _torch_compat as compat
from zcompile.agreement import Agreement, AgreementError
from zcompile.faults.sites import Site
from zcompile.faults.watch import Watch
from zcompile.groups import AGREEMENT, Communicators, Counters, CountingGroup, Disturb, GroupError, Tally
from zcompile.launcher import init_from_launcher
from zcompile.layout import role_name
from zcompile.origins import Origins
from zcompile.swap import do_not_preempt
from zcompile.topology import Topology

__all__ = [
    "LANES",
    "TRANSFERS",
    "Agreement",
    "AgreementError",
    "Counters",
    "GroupError",
    "Once",
    "Runtime",
    "init_from_launcher",
]

T = TypeVar("T")

TRANSFERS = ("gather", "reduce", "sync", "refresh", "back", "barrier")
LANES = {
    "gather": "weights",
    "reduce": "grads",
    "sync": "grads",
    "refresh": "grads",
    "back": "grads",
    "barrier": "grads",
}
"""transfer -> lane"""


@dataclass
class Once:
    """What `generate_once` did in this process: calls of `make` and of `load`, and the wall seconds of both with the
    waiting.
    """

    generations: int = 0
    loads: int = 0
    seconds: float = 0.0


class Runtime:
    """Groups, mesh, agreement and counters of one topology. Made by `Runtime.get`, kept until `close` or until the
    default group changes.
    """

    _live: ClassVar[dict[str, Runtime]] = {}
    _communicators: ClassVar[tuple[dist.ProcessGroup, Communicators] | None] = None

    def __init__(self, topology: Topology, communicators: Communicators, timeout: float) -> None:
        self.topology = topology
        self.rank = dist.get_rank()
        self.coordinates = topology.coordinates(self.rank)
        self.timeout = timeout
        self.once = Once()
        self.host = socket.gethostname()
        self._alone = communicators.fake or topology.world_size == 1
        self.real = not communicators.fake
        self.watch = communicators.start_watch()
        self._made_by = communicators
        self._tally = Tally()
        self._roles: dict[str, CountingGroup] = {}
        self._first_hops: list[CountingGroup] = []  # of gradients: what they send is this rank's own
        self._meshes: dict[str, DeviceMesh] = {}
        self._dimensions: list[dist.ProcessGroup] = []  # one a level: the groups of the mesh
        for k, level in enumerate(topology.levels, start=1):
            ranks = topology.group(self.rank, k)
            if level.size == 1:
                # One group serves all levels of size 1.
                self._dimensions.append(communicators.get(topology.key, ranks, level.name, "self"))
                continue
            lanes = {lane: communicators.get(topology.key, ranks, level.name, lane) for lane in ("weights", "grads")}
            self._dimensions.append(lanes["grads"])
            for transfer, lane in LANES.items():
                name = role_name(topology.key, topology.names[k - 1], transfer)
                group, swap = lanes[lane], communicators.swap(lanes[lane])
                stream = TRANSFERS.index(transfer)
                role = CountingGroup(
                    group, name, level.name, transfer, self._tally, swap, stream, self.watch, tuple(ranks)
                )
                self._roles[name] = role
                innermost = all(inner.size == 1 for inner in topology.levels[: k - 1])
                if innermost and transfer in ("reduce", "sync"):
                    self._first_hops.append(role)
        everybody = list(range(topology.world_size))
        words = None if self._alone else communicators.get("", everybody, "world", AGREEMENT, backend="gloo")
        self.agreement = Agreement(words, self.rank, topology.world_size, timeout, self.watch)
        self._groups = communicators
        if any(role.swap for role in self._roles.values()):
            do_not_preempt()
        for name, role in self._roles.items():
            compat.register_group(name, role)

    @classmethod
    def get(cls, topology: Topology, *, timeout: float = 300.0, collective_timeout: float = 1800.0) -> Runtime:
        """The runtime of `topology` in this process, made on the first call, by all ranks alike.

        `timeout` (seconds) limits each step of setting up and each agreement, `collective_timeout` each collective
        afterwards. Starts the default process group from launcher variables when there is none. ValueError when the
        topology does not fit the world, GroupError when a rank does not turn up.
        """
        if timeout <= 0 or collective_timeout <= 0:
            raise ValueError(f"timeout {timeout} and collective_timeout {collective_timeout} must be positive seconds")
        init_from_launcher(timeout=timeout)
        topology.check_world(dist.get_world_size())
        default = compat.default_group()
        if cls._communicators is None or cls._communicators[0] is not default:
            for stale in list(cls._live.values()):
                stale.close()
            if cls._communicators is not None:
                cls._communicators[1].close()
            cls._communicators = default, _new_communicators()
        communicators = cls._communicators[1]
        communicators.limit(timeout, collective_timeout)
        live = cls._live.get(topology.key)
        if live is not None:
            live.agreement.timeout = timeout
            if live.topology.names != topology.names:
                raise ValueError(
                    f"topology {topology.key} with levels {', '.join(topology.names)}: this process already runs it "
                    f"with levels {', '.join(live.topology.names)}; close() that runtime first"
                )
            return live
        communicators.check_setup(topology.key)
        cls._live[topology.key] = made = cls(topology, communicators, timeout)
        return made

    def limit(self, timeout: float) -> None:
        """Seconds that this rank waits for another from here on, in an agreement and in a collective."""
        self.timeout = self.agreement.timeout = timeout
        self._made_by.limit(timeout, timeout)

    def verify_messages(self, on: bool) -> None:
        """Whether what arrives is compared with what was sent (zcompile.faults.checksums). All ranks alike."""
        for role in self._roles.values():
            role.checksums = on and self.watch is not None

    def look_at_gradients(self, origins: Origins | None) -> None:
        """Who looks at the gradients that this rank sends from here on, before they are summed with those of others."""
        for role in self._first_hops:
            role.origins = origins

    @contextlib.contextmanager
    def disturbed(self, disturb: Disturb) -> Iterator[None]:
        """Hops that are launched or waited for inside go through `disturb` first, in this process."""
        for role in self._roles.values():
            role.disturb = disturb
        try:
            yield
        finally:
            for role in self._roles.values():
                role.disturb = None

    def role(self, level: int, transfer: str) -> str:
        """Name of the group for `transfer` over level index `level` (1..m). ValueError if either does not exist or the
        level has size 1.
        """
        if transfer not in LANES:
            raise ValueError(f"transfer {transfer!r}: valid are {', '.join(TRANSFERS)}")
        if not 1 <= level <= len(self.topology.levels):
            raise ValueError(f"level {level}: topology {self.topology.key} has levels 1 to {len(self.topology.levels)}")
        if self.topology.levels[level - 1].size == 1:
            raise ValueError(
                f"level {level} (`{self.topology.names[level - 1]}`) of topology {self.topology.key} "
                "has size 1: nothing travels over it"
            )
        return role_name(self.topology.key, self.topology.names[level - 1], transfer)

    def communicator(self, level: int, transfer: str) -> dist.ProcessGroup:
        """The real group under `role(level, transfer)`, for what torch does with groups that it made itself. What it carries is not
        counted."""
        return self._roles[self.role(level, transfer)].inner

    def count_reads(self, level: int) -> Callable[[int], None]:
        """What a gather that reads other ranks' memory over `level` (1..m) tells: bytes, for the counters."""
        name = self.topology.names[level - 1]
        return lambda received: self._tally.add((name, "gather", "peer_read"), received)

    def background(self) -> dist.ProcessGroup | None:
        """A group of all ranks for a thread that works beside training (gloo), made on the first call, by all ranks alike; None where
        there is nobody else."""
        if self._alone:
            return None
        everybody = list(range(self.topology.world_size))
        made = self._groups.get("", everybody, "world", "background", backend="gloo")
        do_not_preempt()
        return made

    def broke_off(self, error: BaseException) -> None:
        """A forward or a backward ended in `error`: for the report, should the program go on from it while others wait."""
        if self.watch is not None:
            self.watch.broke_off(error)

    @property
    def counters(self) -> Counters:
        """Collectives issued under this runtime's roles so far, a value: subtract two of them."""
        return self._tally.read()

    def snapshot(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(level name, transfer) -> (calls, bytes received by this rank) so far."""
        return self.counters.by_transfer()

    def mesh(self, device_type: str) -> DeviceMesh:
        """A mesh with one dimension per level, fastest first, over the groups of the lane "grads"; its collectives are
        not counted.

        `[Shard(0)] * levels` on it gives the pair coordinate the most significant digit of the shard index, in the
        order of `topology`.
        """
        if device_type not in self._meshes:
            names = tuple(self.topology.names)
            self._meshes[device_type] = DeviceMesh.from_group(
                self._dimensions,
                device_type,
                mesh=torch.tensor(self.topology.mesh(), dtype=torch.int),
                mesh_dim_names=names,
            )
        return self._meshes[device_type]

    def generate_once(self, key: str, make: Callable[[], T], load: Callable[[], T], *, timeout: float = 3600.0) -> T:
        """Run `make` on one rank of each host and `load` on the others once it is done; no collective, so ranks may
        come with different keys.

        The first rank of a host to arrive with `key` makes. If its `make` raises (its error goes on to its caller), or
        takes longer than `timeout` seconds, the others run `make` themselves. A further call with the same key loads.
        `once` counts what happened here. FaultError if the rank that makes is gone or stopped.
        """
        start = time.monotonic()
        try:
            if self._alone:
                self.once.generations += 1
                return make()
            store = compat.default_store()
            base = f"zc/once/{self.host}/{key}"
            if store.add(f"{base}/arrivals", 1) == 1:
                return self._make(store, base, make)
            if self._outcome(store, base, timeout) == b"ok":
                self.once.loads += 1
                return load()
            self.once.generations += 1
            return make()
        finally:
            self.once.seconds += time.monotonic() - start

    def _make(self, store: compat.Store, base: str, make: Callable[[], T]) -> T:
        self.once.generations += 1
        store.set(f"{base}/maker", str(self.rank))
        outcome = "failed"
        try:
            made = make()
            outcome = "ok"
            return made
        finally:
            store.set(f"{base}/done", outcome)

    def _outcome(self, store: compat.Store, base: str, timeout: float) -> bytes:
        """What the rank that makes `base` says when it has done so, b"late" after `timeout` seconds. Polls: a blocking wait would hold the
        store against other threads, and would wait for a rank that is gone.
        """
        key, start, pause, look = f"{base}/done", time.monotonic(), 0.01, time.monotonic() + self.timeout
        while not store.check([key]):
            now = time.monotonic()
            if now - start > timeout:
                return b"late"
            if self.watch is not None:
                self.watch.check()
                if now > look:
                    look = now + self.timeout
                    self._check_maker(store, base, self.watch, start)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        return bytes(store.get(key))

    @staticmethod
    def _check_maker(store: compat.Store, base: str, watch: Watch, start: float) -> None:
        maker = int(store.get(f"{base}/maker")) if store.check([f"{base}/maker"]) else None
        if maker is not None and not watch.alive(maker):
            site = Site("", "", f"the wait for the code that rank {maker} generates", 0, (maker,))
            raise watch.lost(site, "its heart does not beat", missing=[maker], since=start)

    def close(self) -> None:
        """Unregister the roles and forget this runtime; graphs that name them cannot run any more. The communicators
        stay, for the next one.
        """
        for name in self._roles:
            compat.unregister_group(name)
        self._roles.clear()
        self._meshes.clear()
        if Runtime._live.get(self.topology.key) is self:
            del Runtime._live[self.topology.key]


def _new_communicators() -> Communicators:
    on_gpu = torch.cuda.is_available() and "nccl" in str(compat.backend_config())
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return Communicators(device, fake=str(dist.get_backend()) == "fake")


def _close_all() -> None:
    for runtime in list(Runtime._live.values()):
        runtime.close()


atexit.register(_close_all)
