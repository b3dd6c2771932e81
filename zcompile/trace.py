"""`zcompile trace`: compile a model for a world that exists on paper, in one process without a GPU, and say what it took.

The model is built on the meta device and the process group is torch's fake one, so nothing is allocated and nothing is sent; the
backend, the passes and the checks are those of a real job, code generation aside.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

import torch

from zcompile.api import ledger
from zcompile.cli import write_json
from zcompile.paper import world
from zcompile.plan import Plan
from zcompile.shapes import SHAPES, Decoder
from zcompile.topology import Topology
from zcompile.wrap import hierarchical_zero


def trace(
    model: str = "gpt-neox-20b",
    topology: str = "frontier:48",
    plan: str = "zero_topo",
    sequence: int | None = None,
    micro_batch: int = 1,
    compute_dtype: torch.dtype = torch.bfloat16,
    micro_batches: int = 1,
) -> dict[str, Any]:
    """Forward and backward of one step of a named shape, traced and put through every pass.

    Returns:
        seconds by stage, peak memory of the process in bytes, and the ledger of the step.

    Raises:
        ValueError: an unknown shape, topology or plan. RuntimeError: this process has a process group already.
    """
    if model not in SHAPES:
        raise ValueError(f"model {model!r}: known shapes are {', '.join(SHAPES)}")
    shape = SHAPES[model]
    length = sequence or shape.sequence
    if length > shape.sequence:
        raise ValueError(f"sequence {length}: {model} has at most {shape.sequence}")
    levels = Topology.parse(topology)
    Plan.parse(plan)
    with world(levels):
        begin = time.perf_counter()
        with torch.device("meta"):
            module = Decoder(shape)
        wrapped: Any = hierarchical_zero(
            module,
            topology=levels,
            plan=plan,
            compute_dtype=compute_dtype,
            codegen=False,
            fullgraph=True,
            tokens=micro_batch * length,
            device="meta",
        )
        wrapped_at = time.perf_counter()
        tokens = torch.zeros(micro_batch, length + 1, dtype=torch.int64, device="meta")
        forward = backward = 0.0
        for index in range(micro_batches):
            wrapped.set_requires_gradient_sync(index == micro_batches - 1)
            start = time.perf_counter()
            loss = wrapped(tokens)
            middle = time.perf_counter()
            loss.backward()
            forward, backward = forward + middle - start, backward + time.perf_counter() - middle
        programs = wrapped.zero.programs
        return {
            "model": model,
            "parameters": sum(slot.spec.layout.numel for slot in wrapped.zero.slots),
            "topology": levels.key,
            "ranks": levels.world_size,
            "plan": plan,
            "seconds": {
                "wrap": wrapped_at - begin,
                "forward": forward,
                "backward": backward,
                "passes": sum(s for p in programs for name, s in p.seconds.items() if name != "codegen"),
                "total": time.perf_counter() - begin,
            },
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "graphs": [{"name": p.name, "stage": p.stage, "collectives": len(p.collectives)} for p in programs],
            "ledger": ledger(wrapped),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt-neox-20b", help=f"one of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument(
        "--topology", default="frontier:48", help="a machine or sizes, fastest first (default: %(default)s)"
    )
    parser.add_argument("--plan", default="zero_topo", help="a preset (default: %(default)s)")
    parser.add_argument("--sequence", type=int, help="tokens per sample (default: the model's)")
    parser.add_argument("--micro-batch", type=int, default=1, help="samples per rank (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step (default: %(default)s)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the result there ('-': standard output) instead of printing lines"
    )


def command(arguments: argparse.Namespace) -> int:
    try:
        result = trace(
            arguments.model,
            arguments.topology,
            arguments.plan,
            arguments.sequence,
            arguments.micro_batch,
            micro_batches=arguments.micro_batches,
        )
    except ValueError as error:
        print(f"zcompile trace: {error}", file=sys.stderr)
        return 2
    if write_json(result, arguments.json):
        return 0
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    print(
        f"{result['model']}: {result['parameters']:,} parameters, {result['plan']} on {result['topology']} ({result['ranks']} ranks)"
    )
    print(f"{seconds}; {result['peak_bytes'] / 1e9:.2f} GB")
    for level, transfers in result["ledger"]["levels"].items():
        row = ", ".join(f"{name} {columns['compiled'] / 1e9:.3f} GB" for name, columns in transfers.items())
        print(f"  {level}: {row}")
    return 0
