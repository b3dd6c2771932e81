"""`zcompile overhead`: one process, `1x1x1`, against plain torch.compile: what zcompile costs where there is nothing to shard.

Both models are compiled once, then stepped in turn (A B A B ...), forward, backward and AdamW; the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zcompile.api import hierarchical_zero
from zcompile.cli import write_json
from zcompile.shapes import Decoder, Shape


def measure(hidden: int = 512, layers: int = 4, batch: int = 4, sequence: int = 128, steps: int = 20) -> dict[str, Any]:
    """Step seconds of both, their ratio pair by pair, and the bytes each allocates.

    Returns:
        ratio: median, and the middle half as [low, high]; seconds: medians; peak_bytes: the highest sum of live allocations during a
        step, above what lived before it; state_bytes: parameters, gradients and optimizer state.
    """
    shape = Shape(layers, hidden, hidden // 64, 2048, sequence)
    tokens = torch.randint(shape.vocabulary, (batch, sequence + 1), generator=torch.Generator().manual_seed(1))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Decoder(shape)

    def stepper(model: nn.Module, call: Callable[..., Any]) -> Callable[[], float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

        def step() -> float:
            begin = time.perf_counter()
            loss = call(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step.loss = loss.item()  # type: ignore[attr-defined]
            return time.perf_counter() - begin

        step.state = lambda: _state_bytes(model, optimizer)  # type: ignore[attr-defined]
        return step

    plain_model, our_model = build(), hierarchical_zero(build(), topology="1x1x1", plan="zero_topo")
    plain, ours = stepper(plain_model, torch.compile(plain_model)), stepper(our_model, our_model)
    for _ in range(3):
        plain(), ours()
    pairs = [(plain(), ours()) for _ in range(steps)]
    ratios = sorted(b / a for a, b in pairs)
    quarter = len(ratios) // 4
    return {
        "ratio": statistics.median(ratios),
        "middle_half": [ratios[quarter], ratios[-1 - quarter]],
        "seconds": {
            "plain": statistics.median(a for a, _ in pairs),
            "zcompile": statistics.median(b for _, b in pairs),
        },
        "loss": {"plain": plain.loss, "zcompile": ours.loss},  # type: ignore[attr-defined]
        "peak_bytes": {"plain": _peak(plain), "zcompile": _peak(ours)},
        "state_bytes": {"plain": plain.state(), "zcompile": ours.state()},  # type: ignore[attr-defined]
        "steps": steps,
    }


def _peak(step: Callable[[], Any]) -> int:
    """Highest sum of live allocations during `step`, relative to its start, from the profiler's allocation events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [p.detach() for p in model.parameters()]
    tensors += [
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim()
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=512, help="width of the decoder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="its blocks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples per step (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per sample (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="measured pairs of steps (default: %(default)s)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the result there ('-': standard output) instead of printing lines"
    )


def command(arguments: argparse.Namespace) -> int:
    if (
        arguments.hidden % 64
        or min(arguments.hidden, arguments.layers, arguments.batch, arguments.sequence, arguments.steps) < 1
    ):
        print("zcompile overhead: --hidden must be a multiple of 64, the others at least 1", file=sys.stderr)
        return 2
    result = measure(arguments.hidden, arguments.layers, arguments.batch, arguments.sequence, arguments.steps)
    if not write_json(result, arguments.json):
        low, high = result["middle_half"]
        print(
            f"step time zcompile : plain = {result['ratio']:.4f} (middle half {low:.4f} to {high:.4f}, {result['steps']} pairs)"
        )
        for name in ("seconds", "peak_bytes", "state_bytes", "loss"):
            print(f"{name}: plain {result[name]['plain']}, zcompile {result[name]['zcompile']}")
    return 0
