"""A plan's real graphs on paper beside its skeleton: the same bytes, the same FLOPs, nearly the same time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.spawn import Pool

from zcompile._torch_compat import run_and_save_rng_state, run_with_rng_state
from zcompile.paper import world
from zcompile.passes.nodes import aten, find
from zcompile.plan import Plan
from zcompile.planner.search import Request
from zcompile.planner.skeleton import Skeleton
from zcompile.planner.step import of_skeleton, play
from zcompile.planner.traced import simulate
from zcompile.planner.workload import of_text
from zcompile.shapes import SHAPES, Decoder
from zcompile.topology import Topology
from zcompile.wrap import hierarchical_zero

FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default


def both(_: int, plan: Any, k: int) -> tuple[Any, Any]:
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()
    topology = Topology.parse("2x2x2")
    with mock.patch.dict(SHAPES, {"half of gpt-4m": replace(SHAPES["gpt-4m"], layers=2)}):
        workload = of_text("half of gpt-4m")
    skeleton = play(of_skeleton(Skeleton(workload, plan.resolve(topology, "bfloat16"), 2), k), k)
    real, _ = simulate(workload, plan, 2, topology, Request(micro_batches=k), torch.bfloat16)
    return tuple((found.received, found.flops, found.seconds, found.bytes, found.memory) for found in (skeleton, real))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("plan", "k"),
    [
        (Plan.preset("zero_topo"), 1),
        pytest.param(Plan.preset("zero_topo", wire="paper"), 3, marks=pytest.mark.slow),
        pytest.param(Plan.preset("zero3"), 1, marks=pytest.mark.slow),
    ],
    ids=["zero_topo", "zero_topo quantised, three micro-batches", "zero3"],
)
def test_a_skeleton_is_what_the_compiler_makes(paper: Pool, plan: Plan, k: int) -> None:
    (skeleton, real), *_ = paper.run(both, plan, k, timeout=400.0)
    assert skeleton[0] == real[0], "bytes by level and transfer, refreshes included"
    assert skeleton[1] == real[1]
    assert skeleton[2] == pytest.approx(real[2], rel=0.15)
    assert skeleton[4]["weights"] == real[4]["weights"]
    assert skeleton[3] == pytest.approx(real[3], rel=0.35)


def recomputed(_: int) -> list[tuple[int, int]]:
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()
    topology = Topology.parse("2x2x2")
    with torch.device("meta"):
        module = Decoder(SHAPES["tiny"], recompute=True)
    with world(topology):
        model: Any = hierarchical_zero(
            module, topology=topology, plan="zero_topo", codegen=False, fullgraph=True, device="meta", overlap=2
        )
        model.zero.graphs = []
        model(torch.zeros(1, 33, dtype=torch.int64, device="meta")).backward()
        return [
            (len(find(gm.graph, FLASH)), len(find(gm.graph, run_and_save_rng_state, run_with_rng_state)))
            for _, gm in model.zero.graphs
        ]


def test_fused_attention_is_computed_again_on_paper(paper: Pool) -> None:
    """torch's partitioner wraps it in what keeps a random state, of a size that is a symbol, and cannot run on the meta device."""
    found, *_ = paper.run(recomputed, timeout=400.0)
    assert found == [(2, 0), (2, 0)], "two layers, forward and backward; none is wrapped"
