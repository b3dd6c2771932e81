"""Every communicator of a topology, made one by one, each with a time limit and a check of what arrives."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from zcompile import _torch_compat as compat
from zcompile.doctor.findings import Finding
from zcompile.groups import Communicators, GroupError
from zcompile.topology import Topology

ELEMENTS = 1 << 16
"""Of the check: 256 KiB of fp32 from each member, beyond what backends send in one packet."""
LANES = ("weights", "grads")


def check(topology: Topology, device: torch.device, timeout: float) -> Iterator[Finding]:
    """One finding for each communicator of this rank, in the order in which all ranks make them; ends with the first that fails."""
    communicators = Communicators(device, fake=False)
    communicators.limit(timeout, timeout)
    rank = dist.get_rank()
    for k, level in enumerate(topology.levels, start=1):
        ranks = topology.group(rank, k)
        for lane in LANES if level.size > 1 else ():
            name = f"communicator {level.name}.{lane}"
            finding = _one(communicators, topology.key, ranks, level.name, lane, name, timeout)
            yield finding
            if finding.status == "bad":
                return
    everybody = list(range(topology.world_size))
    yield _one(communicators, "", everybody, "world", "agreement", "communicator world.agreement", timeout, "gloo")


def _one(communicators: Communicators, owner: str, ranks: list[int], level: str, lane: str, name: str, timeout: float,
         backend: str | None = None) -> Finding:  # fmt: skip
    right = f"ready within {timeout:g} s, with the right data"
    begin = time.monotonic()
    try:
        group = communicators.get(f"doctor.{owner}", ranks, level, lane, backend)
        ready = time.monotonic()
        device = torch.device("cpu") if backend == "gloo" else communicators.device
        wrong = _wrong_member(group, ranks, device, timeout)
    except (GroupError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        advice = (
            f"look at ranks {ranks}: the first of them that is missing in the log, its node's network, its variables"
        )
        return Finding(name, "bad", f"level {level}, ranks {ranks}: {said}", right, advice)
    if wrong is not None:
        advice = f"rank {wrong}'s node, or the way from it, changes data: leave it out and report it"
        return Finding(
            name, "bad", f"level {level}, ranks {ranks}: other bytes arrived than rank {wrong} sent", right, advice
        )
    took = time.monotonic() - ready
    return Finding(
        name,
        "ok",
        f"{len(ranks)} ranks, ready in {ready - begin:.2f} s, {4 * ELEMENTS * len(ranks) / took / 1e6:.0f} MB/s gathered",
    )


def _wrong_member(group: dist.ProcessGroup, ranks: list[int], device: torch.device, timeout: float) -> int | None:
    """Gather a pattern of each member's own; the first rank whose part is not its pattern, None if all are right."""
    mine = _pattern(dist.get_rank(), device)
    out = torch.empty(len(ranks) * ELEMENTS, dtype=torch.float32, device=device)
    work = compat.all_gather(out, mine, group)
    deadline = time.monotonic() + timeout
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer to a gather of {4 * ELEMENTS} bytes from each within {timeout:g} s")
        time.sleep(0.0005)
    work.wait()
    parts = out.view(len(ranks), ELEMENTS)
    return next(
        (rank for rank, part in zip(ranks, parts, strict=True) if not torch.equal(part, _pattern(rank, device))), None
    )


def _pattern(rank: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(ELEMENTS, device=device) * 31 + rank * 1009).remainder(65521).to(torch.float32)
