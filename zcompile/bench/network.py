"""A network with a machine's shape on one Linux host: network namespaces, bridges and token buckets (root; iproute2).

    pair      ranks of one pair share a namespace        loopback, not limited
    node      pairs of one node share a bridge           `node_mbit` for each pair's link
    cluster   nodes share a spine                        `cluster_mbit` for each node's uplink

    lo [pair] veth --+                             +-- veth [pair] lo
                     [node] uplink -- [spine] -- uplink [node]
    lo [pair] veth --+                             +-- veth [pair] lo

Every link is full duplex and limited in both directions by a token bucket. A pair's traffic to other nodes crosses its own link too, as
behind a network card. Bandwidth only: no delay is added. Bytes are the kernel's interface counters: frames with their headers, each
direction of a hop counted once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

LEVELS = ("pair", "node", "cluster")
MTU = 9000
BURST = 256 * 1024  # bytes: lets an offloaded segment of 64 KiB pass whole
QUEUE = "64m"  # holds what TCP has in flight: nothing is dropped, the queue is the delay


class NetworkError(RuntimeError):
    """The network cannot be had here: says what is missing."""


def missing() -> str:
    """What this machine lacks for a shaped network; "" if nothing."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a shaped network needs root (network namespaces)"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"a shaped network needs the command `{tool}` (package iproute2)"
    return ""


def _sh(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(f"`{command}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


COUNTERS = "ZCOMPILE_BENCH_COUNTERS"
"""Environment variable: the socket that answers with a network's counters."""


def read_counters() -> dict[str, int]:
    """In a rank: level name -> bytes that the network has carried so far; {} where nobody counts."""
    path = os.environ.get(COUNTERS)
    if not path:
        return {}
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        found: dict[str, int] = json.loads(line.makefile().readline())
    return found


class Local:
    """Processes of one host that talk over loopback: the network that needs no building."""

    description = "loopback, not limited"

    def __init__(self, sizes: Sequence[int]):
        self.sizes = tuple(sizes)
        self.port = random.randint(20000, 29000)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def counters(self) -> dict[str, int]:
        """level name -> bytes carried so far; {} where nobody counts."""
        return {}

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float) -> bool:
        """`command` once per rank with the launcher's variables; False if a rank failed or `timeout` seconds went by."""
        world = 1
        for size in self.sizes:
            world *= size
        per_node = world // self.sizes[-1]
        self.port += 1
        deadline = time.monotonic() + timeout
        with log.open("wb") as out:
            for rank in range(world):
                own = {
                    "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % per_node),
                    "LOCAL_WORLD_SIZE": str(per_node), "MASTER_PORT": str(self.port), "OMP_NUM_THREADS": "1",
                }  # fmt: skip
                self._processes.append(self._start(rank, command, {**os.environ, **own, **environment}, out))
            while any(process.poll() is None for process in self._processes):
                failed = any(process.poll() not in (None, 0) for process in self._processes)
                if failed or time.monotonic() > deadline:
                    time.sleep(2)  # a failing rank's trace, and its peers', reach the log
                    break
                time.sleep(0.05)
        worked = all(process.poll() == 0 for process in self._processes)
        self.stop()
        return worked

    def _start(
        self, rank: int, command: Sequence[str], environment: Mapping[str, str], out: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        here = {**environment, "MASTER_ADDR": "127.0.0.1"}
        return subprocess.Popen(command, env=here, stdout=out, stderr=out, start_new_session=True)

    def stop(self) -> None:
        """End every rank that is still alive, with its children."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes = []


class Shaped(Local):
    """Three levels of speed. `with Shaped((2, 2, 2), 400, 100) as network: network.run(...)`.

    Args:
        sizes: ranks of a pair, pairs of a node, nodes.
        node_mbit, cluster_mbit: Mbit/s of a pair's link and of a node's uplink, one direction; 0: not limited.

    Raises:
        NetworkError: not root, no iproute2, or the kernel refuses.
    """

    def __init__(self, sizes: Sequence[int], node_mbit: float, cluster_mbit: float):
        super().__init__(sizes)
        if len(self.sizes) != 3:
            raise NetworkError(f"a shaped network has three levels (pair x node x cluster), not {len(self.sizes)}")
        self.node_mbit, self.cluster_mbit = node_mbit, cluster_mbit
        self.description = f"shaped: loopback / {node_mbit:g} / {cluster_mbit:g} Mbit/s"
        self._tag = f"zc{os.getpid() % 100000}"
        self._spaces: list[str] = []
        self._pairs: list[str] = []
        self._nodes: list[str] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._server: socket.socket | None = None

    def __enter__(self) -> Shaped:
        lack = missing()
        if lack:
            raise NetworkError(lack)
        _, pairs, nodes = self.sizes
        try:
            spine = self._space("s")
            self._bridge(spine)
            for n in range(nodes):
                node = self._space(f"n{n}")
                self._bridge(node)
                self._link(node, "up0", spine, f"d{n}", self.cluster_mbit)
                _sh(f"ip -n {node} link set up0 master br0")
                self._nodes.append(node)
                for p in range(pairs):
                    pair = self._space(f"p{n}_{p}")
                    self._link(pair, "eth0", node, f"d{p}", self.node_mbit)
                    _sh(f"ip -n {pair} addr add 10.77.{n}.{p + 1}/16 dev eth0")
                    # reno loses nothing in a deep queue, and every kernel has it
                    _sh(f"ip netns exec {pair} sysctl -qw net.ipv4.tcp_congestion_control=reno")
                    self._pairs.append(pair)
            self._serve()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._remove()

    @property
    def bursts(self) -> dict[str, float]:
        """level name -> bytes that one rank receives at once over links that have rested: a bucket, divided among those behind it."""
        ranks = self.sizes[0], self.sizes[0] * self.sizes[1]
        limited = self.node_mbit, self.cluster_mbit
        return {level: BURST / n for level, n, mbit in zip(LEVELS[1:], ranks, limited, strict=True) if mbit}

    def counters(self) -> dict[str, int]:
        pair = sum(self._sent(space, "lo") for space in self._pairs)
        beyond = sum(self._sent(space, "eth0") for space in self._pairs)
        cluster = sum(self._sent(space, "up0") for space in self._nodes)
        return {"pair": pair, "node": beyond - cluster, "cluster": cluster}

    def _start(
        self, rank: int, command: Sequence[str], environment: Mapping[str, str], out: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        assert self._folder is not None
        counters = {COUNTERS: f"{self._folder.name}/s"}
        here = {**environment, **counters, "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
        inside = ["ip", "netns", "exec", self._pairs[rank // self.sizes[0]], *command]
        return subprocess.Popen(inside, env=here, stdout=out, stderr=out, start_new_session=True)

    def _space(self, name: str) -> str:
        space = f"{self._tag}{name}"
        _sh(f"ip netns add {space}")
        self._spaces.append(space)
        _sh(f"ip -n {space} link set lo up")
        return space

    def _bridge(self, space: str) -> None:
        _sh(f"ip -n {space} link add br0 mtu {MTU} type bridge")
        _sh(f"ip -n {space} link set br0 up")

    def _link(self, lower: str, lower_device: str, upper: str, upper_device: str, mbit: float) -> None:
        """A cable from `lower` up to a port of `upper`'s bridge."""
        peer = f"peer name {upper_device} mtu {MTU} netns {upper}"
        _sh(f"ip -n {lower} link add {lower_device} mtu {MTU} type veth {peer}")
        _sh(f"ip -n {upper} link set {upper_device} master br0")
        for space, device in ((lower, lower_device), (upper, upper_device)):
            _sh(f"ip -n {space} link set {device} up")
            if mbit:
                _sh(f"tc -n {space} qdisc add dev {device} root tbf rate {mbit:g}mbit burst {BURST} limit {QUEUE}")

    def _sent(self, space: str, device: str) -> int:
        found = json.loads(_sh(f"ip -n {space} -j -s link show {device}"))
        return int(found[0]["stats64"]["tx"]["bytes"])

    def _serve(self) -> None:
        """Answer every connection with the counters, on a thread."""
        self._folder = tempfile.TemporaryDirectory(prefix="zcompile-bench")
        server = self._server = socket.socket(socket.AF_UNIX)
        server.bind(f"{self._folder.name}/s")
        server.listen(64)

        def loop() -> None:
            while True:
                try:
                    line, _ = server.accept()
                except OSError:
                    return  # closed
                with line:
                    line.sendall((json.dumps(self.counters()) + "\n").encode())

        threading.Thread(target=loop, name="zcompile-bench-counters", daemon=True).start()

    def _remove(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        for space in reversed(self._spaces):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        self._spaces, self._pairs, self._nodes = [], [], []
