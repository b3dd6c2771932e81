"""The real thing on paper: a plan's graphs, traced, put through every pass and verified in one process, and then simulated."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from zcompile import cost, times
from zcompile.api import ledger
from zcompile.paper import world
from zcompile.plan import Plan
from zcompile.planner.search import Request
from zcompile.planner.step import Played, Result, play
from zcompile.planner.workload import Workload
from zcompile.simulator import refreshes
from zcompile.topology import Topology
from zcompile.wrap import hierarchical_zero


class GraphError(RuntimeError):
    """The bytes of the traced graphs are not those of the closed forms."""


def simulate(
    workload: Workload, plan: Plan, overlap: int, topology: Topology, request: Request, compute: torch.dtype
) -> tuple[Result, dict[str, Any]]:
    """One step of a plan from the compiler's own graphs. The module of the workload is wrapped, and is no plain module afterwards.

    Returns:
        the simulated step, and what it took: seconds, peak bytes of this process, nodes and collectives.

    Raises:
        GraphError: bytes of graphs and closed forms differ. PassError: a pass failed or an invariant does not hold.
    """
    begin = time.perf_counter()
    topology = Topology(topology.levels, topology.device)
    with world(topology):
        wrapped: Any = hierarchical_zero(
            workload.module,
            topology=topology,
            plan=plan,
            compute_dtype=compute,
            codegen=False,
            fullgraph=True,
            overlap=overlap,
            tokens=workload.tokens,
            device="meta" if next(workload.module.parameters()).is_meta else None,
        )
        engine = wrapped.zero
        engine.graphs = []
        for index in range(min(request.micro_batches, 2)):
            wrapped.set_requires_gradient_sync(index == min(request.micro_batches, 2) - 1)
            args, keywords = workload.example()
            output = wrapped(*args, **keywords)
            getattr(output, "loss", output).backward()
        graphs = engine.graphs
        forwards = [gm for stage, gm in graphs if stage == "forward"]
        backwards = [gm for stage, gm in graphs if stage == "backward"]
        if len(forwards) < 1 or len(backwards) < 1:
            raise GraphError("the model left no forward and backward graph")
        _check(ledger(wrapped))
        if not any(times.node_flops(node) for node in backwards[-1].graph.nodes):
            raise GraphError(
                "the traced backward computes nothing: an operation of the model (a loss of torch.nn.functional?) has no derivative on the "
                "meta device; without --trace the model runs on fake CPU tensors, which have"
            )
        several, trained = request.micro_batches > 1, engine.trained
        step = Played(
            topology,
            forwards[0].graph,
            backwards[0].graph if several else None,
            backwards[-1].graph,
            refreshes(spec for unit in engine.units for spec in unit.specs if spec.name in trained),
            cost.step_state((slot.spec for slot in engine.slots), trained, several),
            sum(slot.spec.layout.shard for slot in engine.slots if slot.name in trained),
        )
        result = play(step, request.micro_batches, request.noise)
        nodes = sum(len(gm.graph.nodes) for _, gm in graphs)
        return result, {
            "seconds": time.perf_counter() - begin,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "graphs": len(graphs),
            "nodes": nodes,
            "collectives": sum(len(program.collectives) for program in engine.programs),
            "step": result.as_dict(),
        }


def _check(found: dict[str, Any]) -> None:
    """In graphs, bytes are those of the closed forms (on paper, nothing is counted on a wire)."""
    for level, transfers in found["levels"].items():
        for transfer, columns in transfers.items():
            if columns["predicted"] != columns["compiled"]:
                raise GraphError(
                    f"{transfer} over {level}: {columns['compiled']} bytes in the graphs, {columns['predicted']} by closed form"
                )
