"""The mesh of a topology: DTensors on it give back their rows in order, whatever rank sits where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.spawn import Pool
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from zcompile.runtime import Runtime
from zcompile.topology import Topology

Ranks = Callable[[int], Pool]

ORDERS = [("2x2", None), ("2x2", (2, 0, 3, 1)), ("2x1x2", (1, 0, 3, 2)), ("4x1", (3, 1, 0, 2))]


def _sharded(rank: int, shape: str, order: tuple[int, ...] | None, rows: int) -> Any:
    here = Runtime.get(replace(Topology.parse(shape), order=order), timeout=30)
    mesh = here.mesh("cpu")
    whole = torch.arange(rows * 2.0).view(rows, 2)
    levels = len(here.topology.levels)
    shard = distribute_tensor(whole, mesh, [Shard(0)] * levels, src_data_rank=None)
    inner = distribute_tensor(whole, mesh, [Shard(0)] + [Replicate()] * (levels - 1), src_data_rank=None)
    made = DTensor.from_local(
        shard.to_local() * 2, mesh, [Shard(0)] * levels, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    norm = torch.linalg.vector_norm(shard)
    assert isinstance(norm, DTensor)
    return (
        (here.coordinates, shard.to_local()[:, 0].tolist()),
        shard.full_tensor().equal(whole),
        inner.full_tensor().equal(whole),
        made.full_tensor().equal(2 * whole),
        abs(norm.full_tensor() - torch.linalg.vector_norm(whole)).item(),
    )


@pytest.mark.parametrize(("shape", "order"), ORDERS)
@pytest.mark.parametrize("rows", [8, 5, 7, 3])
def test_full_tensor_has_the_rows_in_order(ranks: Ranks, shape: str, order: tuple[int, ...] | None, rows: int) -> None:
    answers = ranks(4).run(_sharded, shape, order, rows)
    for _, *whole, error in answers:
        assert whole == [True, True, True]
        assert error < 1e-4
    # The first level's coordinate is the most significant digit of the shard index, whatever rank sits there.
    by_coordinates = [row for _, rows_here in sorted(answer[0] for answer in answers) for row in rows_here]
    assert by_coordinates == [2.0 * row for row in range(rows)]
