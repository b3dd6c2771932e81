"""Quantised plans over real ranks: the bits are those of the unsharded reference, the bytes those of the closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.marks import slow
from support.quantized import PLANS, agree, once, reference, sharded, small

from zcompile.topology import Topology


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("micro", "steps"), [(1, 3), slow(3, 2)])
def test_sharded_training_has_the_bits_of_the_reference(ranks: Any, name: str, micro: int, steps: int) -> None:
    """A third step for deltas, of which every second refresh may be none. Of three micro-batches one adds to what it finds, and does not
    sync."""
    topology, plan = PLANS[name]
    found = ranks(8).run(sharded, topology, plan, "eager", micro, steps, torch.float32, timeout=120)
    agree(found, reference(topology, plan, micro), micro, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "topology"),
    [
        ("paper", torch.bfloat16, "2x2"), ("paper", torch.float32, "2x2"), ("zero3", torch.bfloat16, "2x2"),
        ("a format per level", torch.bfloat16, "2x2x2"), ("replicas sync and come back", torch.float32, "2x2"),
        ("delta", torch.bfloat16, "2x2"), ("feedback", torch.bfloat16, "2x2"),
    ],
)  # fmt: skip
def test_compiled_equals_eager_bit_for_bit(ranks: Any, name: str, dtype: torch.dtype, topology: str) -> None:
    """Two micro-batches, so that the last hop's sum goes into the main grads, and comes out of them. Each rank compiles for itself: eight
    do where every level has a format; what the others change is there with two levels too."""
    plan = PLANS[name][1]
    pool = ranks(Topology.parse(topology).world_size)
    model = once if plan.error_feedback is not None else small  # with feedback each read of a weight is sent apart
    eager = pool.run(sharded, topology, plan, "eager", 2, 2, dtype, model, timeout=200)
    graph = pool.run(sharded, topology, plan, "graph", 2, 2, dtype, model, timeout=200)
    for rank, (one, other) in enumerate(zip(eager, graph, strict=True)):
        for step, ((a, held), (b, again)) in enumerate(zip(one, other, strict=True)):
            assert a == b, f"losses of rank {rank}, step {step}"
            for (parameter, _, x), (_, _, y) in zip(held, again, strict=True):
                assert torch.equal(x, y), f"{parameter} on rank {rank}, step {step}"
