"""What torch's own FSDP2 and HSDP receive, counted at their process groups: the peers in the tables of `zcompile bytes`.

A mesh names its process groups, and `fully_shard` looks them up by name. While it does, `counting` registers a `CountingGroup` under
each of these names, so every collective that FSDP2 issues later goes through one; then the plain groups get their names back.

What is counted is what a rank receives by the algorithm with the least traffic: (n - 1) / n of what a gather or a reduce-scatter is
about, twice that for an all-reduce. Our own groups each lie in one level; theirs may span several, and a collective does not say
which of its bytes cross which link. The rule here: **a flat ring in rank order**, as NCCL's and gloo's. Each rank receives everything
from the rank before it, so all its bytes belong to the outermost level in which those two differ.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from zcompile import _torch_compat as compat
from zcompile.groups import Communicators, CountingGroup, Tally
from zcompile.shapes import Decoder, Shape
from zcompile.topology import Topology

TOKENS = 16
"""Tokens per sample where only bytes matter: those of weights and gradients do not depend on it."""


def decoder(shape: Shape) -> Decoder:
    """The model of that shape, equal on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder(shape)


def batch(shape: Shape, step: int, rank: int, micro: int) -> Tensor:
    """[1, T + 1] tokens: what `rank` sees as micro-batch `micro` of `step`."""
    generator = torch.Generator().manual_seed(step * 10_000 + rank * 100 + micro)
    return torch.randint(shape.vocabulary, (1, min(TOKENS, shape.sequence) + 1), generator=generator)


def ring_levels(topology: Topology, ranks: Sequence[int]) -> list[str]:
    """For each member of a ring in the order of `ranks`: the level over which it receives, "" in a ring of one."""
    found = []
    for i, rank in enumerate(ranks):
        pairs = zip(topology.coordinates(ranks[i - 1]), topology.coordinates(rank), strict=True)
        differing = [name for name, (a, b) in zip(topology.names, pairs, strict=True) if a != b]
        found.append(differing[-1] if differing else "")
    return found


def members(topology: Topology, rank: int, hybrid: bool) -> dict[str, list[int]]:
    """Groups of `rank`, by mesh dimension: "shard" is the world, or with `hybrid` the node, and "replicate" one rank per node."""
    everyone = sorted(range(topology.world_size))
    if not hybrid:
        return {"shard": everyone}
    inside, mine = topology.index("node"), topology.coordinates(rank)
    return {
        "replicate": [r for r in everyone if topology.coordinates(r)[:inside] == mine[:inside]],
        "shard": [r for r in everyone if topology.coordinates(r)[inside:] == mine[inside:]],
    }


@cache
def _communicators() -> Communicators:
    """One set per process: torch names a group after the number of groups made before, so none of them is ever given back."""
    return Communicators(torch.device("cpu"), fake=False)


@contextlib.contextmanager
def counting(topology: Topology, hybrid: bool, tally: Tally) -> Iterator[DeviceMesh]:
    """A mesh for `fully_shard`, whose groups count into `tally` (dimension as level) for whoever looks them up inside."""
    rank = dist.get_rank()
    named = members(topology, rank, hybrid)
    owner = f"{topology.key}.{'hsdp' if hybrid else 'fsdp'}"
    groups = {name: _communicators().get(owner, ranks, name, "peer") for name, ranks in named.items()}
    if hybrid:
        rows = {tuple(members(topology, r, True)["shard"]) for r in range(topology.world_size)}
        mesh = DeviceMesh.from_group(
            list(groups.values()), "cpu", mesh=torch.tensor(sorted(rows)), mesh_dim_names=tuple(groups)
        )
    else:
        mesh = DeviceMesh.from_group(groups["shard"], "cpu", mesh_dim_names=("shard",))
    plain = {str(group.group_name): group for group in groups.values()}
    # torch keeps no reference to what is registered, so `counted` does.
    counted = {
        str(g.group_name): CountingGroup(g, str(g.group_name), name, "peer", tally) for name, g in groups.items()
    }
    try:
        _register(counted)
        yield mesh
    finally:
        _register(plain)


def _register(groups: Mapping[str, dist.ProcessGroup]) -> None:
    """Each under its name, in the place of what was there."""
    for name, group in groups.items():
        compat.unregister_group(name)
        compat.register_group(name, group)


def shard(model: Decoder, mesh: DeviceMesh, dtype: torch.dtype) -> Any:
    """FSDP2 as its documentation has it: each block, then the root; weights and reductions in `dtype`."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    root: Any = None
    for module in (*model.blocks, model):
        root = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        root.set_force_sum_reduction_for_comms(True)  # gloo has no average; the division is local either way
    return root


def peer(
    rank: int, shape: Shape, topology: str, hybrid: bool, micro_batches: int = 1, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Two steps on this rank; the second one's collectives.

    FSDP2 reduces in every micro-batch (its gradients stay sharded); HSDP leaves the all-reduce over the replicas to the last one.

    Returns:
        "collectives": (mesh dimension, op) -> (calls, bytes received); "levels": mesh dimension -> the level over which this rank
        receives in a ring.
    """
    begin = time.perf_counter()
    levels, tally = Topology.parse(topology), Tally()
    with counting(levels, hybrid, tally) as mesh:
        model = shard(decoder(shape), mesh, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    before = tally.read()
    for step in range(2):
        before = tally.read()
        for k in range(micro_batches):
            model.set_requires_all_reduce(k == micro_batches - 1)
            (model(batch(shape, step, rank, k)) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = {(name, op): row for (name, _, op), row in (tally.read() - before).rows.items()}
    del model, optimizer
    gc.collect()
    edges = {
        name: ring_levels(levels, ranks)[ranks.index(rank)] for name, ranks in members(levels, rank, hybrid).items()
    }
    return {"collectives": rows, "levels": edges, "seconds": time.perf_counter() - begin}


def attribute(topology: Topology, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `peer` returned on every rank -> one row of the report: raw bytes of a rank per collective, and bytes by level."""
    raw: dict[str, dict[str, Any]] = {}
    levels = {name: {"sum": 0, "most_on_one_rank": 0} for name in topology.names}
    for found in ranks:
        mine = dict.fromkeys(topology.names, 0)
        for (name, op), (calls, received) in found["collectives"].items():
            row = raw.setdefault(f"{op} over {name}", {"calls": calls, "received_by_rank": []})
            row["received_by_rank"].append(received)
            if received:
                mine[found["levels"][name]] += received
        for name, amount in mine.items():
            levels[name]["sum"] += amount
            levels[name]["most_on_one_rank"] = max(levels[name]["most_on_one_rank"], amount)
    return {"collectives": raw, "levels": levels, "seconds": max(found["seconds"] for found in ranks)}
