"""`zcompile overhead`: one process, `1x1x1`, against plain torch.compile: what zcompile costs where there is nothing to shard.

Both models are compiled once, then stepped in turn (A B A B ...), forward, backward and fused AdamW; the ratio is taken pair by pair.
What compiling takes is measured beside that, in processes of their own with empty caches, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zcompile.cli import write_json
from zcompile.plan import Auto
from zcompile.shapes import SHAPES, Decoder, Shape
from zcompile.topology import Topology
from zcompile.wrap import hierarchical_zero

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
"""Environment variables: where compiled code is kept."""
KINDS = ("plain", "zcompile")


def measure(hidden: int = 512, layers: int = 4, batch: int = 4, sequence: int = 128, steps: int = 20, device: str = "cpu",
            dtype: str = "float32", compiles: int = 1) -> dict[str, Any]:  # fmt: skip
    """Step seconds of both, their ratio pair by pair, and the bytes each allocates.

    In bfloat16 the plain model keeps fp32 masters by hand, as zcompile does: the same arithmetic and the same state on both sides.

    Returns:
        ratio: median, and the middle half as [low, high]; seconds: medians; compile_seconds: what the first step of a process with empty
        caches takes beyond a later one, the least of `compiles` of them, and compile_ratio: of these; auto_seconds: what plan="auto" adds
        to the wrapping of a tiny model on 2x2x2, the first time in a process; peak_bytes: the highest sum of live allocations during a
        step, above what lived before it; state_bytes: masters and optimizer state.
    """
    given: dict[str, Any] = {
        "hidden": hidden,
        "layers": layers,
        "batch": batch,
        "sequence": sequence,
        "device": device,
        "dtype": dtype,
    }
    automatic = auto()
    compiled = {kind: float("inf") for kind in KINDS}
    for _ in range(compiles):
        for kind in KINDS:
            compiled[kind] = min(compiled[kind], _cold(kind, given))
    plain, ours = (stepper(kind, **given) for kind in KINDS)
    for _ in range(3):
        plain.timed(), ours.timed()
    pairs = [(plain.timed(), ours.timed()) for _ in range(steps)]
    ratios = sorted(b / a for a, b in pairs)
    quarter = len(ratios) // 4
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": dtype,
        "parameters": plain.parameters,
        "ratio": statistics.median(ratios),
        "middle_half": [ratios[quarter], ratios[-1 - quarter]],
        "seconds": {
            "plain": statistics.median(a for a, _ in pairs),
            "zcompile": statistics.median(b for _, b in pairs),
        },
        "compile_seconds": compiled,
        "compile_ratio": compiled["zcompile"] / compiled["plain"],
        "auto_seconds": automatic,
        "loss": {"plain": plain.loss, "zcompile": ours.loss},
        "peak_bytes": {"plain": plain.peak(), "zcompile": ours.peak()},
        "state_bytes": {"plain": plain.state_bytes(), "zcompile": ours.state_bytes()},
        "steps": steps,
    }


def auto(model: str = "tiny", topology: str = "2x2x2") -> float:
    """Seconds that plan="auto" adds to the wrapping of a named shape, with an example of one sample: the planner's import among them."""
    shape = SHAPES[model]
    module = Decoder(shape)
    example = torch.zeros(1, shape.sequence + 1, dtype=torch.int64)
    begin = time.perf_counter()
    from zcompile.planner.auto import choose

    compute = {name: torch.float32 for name, _ in module.named_parameters()}
    choose(module, Auto(), Topology.parse(topology), compute, (example,))
    return time.perf_counter() - begin


def stepper(kind: str, hidden: int, layers: int, batch: int, sequence: int, device: str, dtype: str) -> _Stepper:
    """A decoder that is not compiled yet, with its optimizer and a batch. kind: one of KINDS."""
    shape = Shape(layers, hidden, hidden // 64, 2048, sequence)
    tokens = torch.randint(shape.vocabulary, (batch, sequence + 1), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(device)
    compute = getattr(torch, dtype)

    torch.manual_seed(0)
    model = Decoder(shape).to(device)
    if kind == "plain":
        return _Stepper(model, torch.compile(model), tokens, None if compute == torch.float32 else compute)
    ours = hierarchical_zero(model, topology="1x1x1", plan="zero_topo", compute_dtype=compute)
    return _Stepper(ours, ours, tokens, None)


def _cold(kind: str, given: dict[str, Any]) -> float:
    """Seconds of compiling in a process of its own, with caches of its own that are empty."""
    code = "import json, sys; from zcompile.overhead import first; print(first(sys.argv[1], **json.loads(sys.argv[2])))"
    with tempfile.TemporaryDirectory(prefix="zcompile-overhead") as folder:
        caches = {name: f"{folder}/{name}" for name in CACHES}
        done = subprocess.run(
            [sys.executable, "-c", code, kind, json.dumps(given)], env={**os.environ, **caches}, capture_output=True, text=True
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the compile of {kind} in a process of its own failed: {done.stderr.strip()[-1000:]}")
    return float(done.stdout.split()[-1])


def first(kind: str, **given: Any) -> float:
    """What the first step here takes beyond the third."""
    made = stepper(kind, **given)
    begin, _, later = made.timed(), made.timed(), made.timed()
    return begin - later


class _Stepper:
    """One model and its optimizer.

    Args:
        low: a dtype: the model computes in it, and the optimizer steps fp32 masters that are kept beside it.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any], tokens: torch.Tensor, low: torch.dtype | None):
        self.call, self.tokens = call, tokens
        self.parameters = sum(p.numel() for p in model.parameters())
        found: list[torch.Tensor] = [*model.parameters()]
        self.masters, self.low = found, found[:0]
        if low:
            self.masters, self.low = [p.detach().clone().requires_grad_() for p in found], found
            model.to(low)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)
        self.loss = 0.0

    def step(self) -> None:
        loss = self.call(self.tokens)
        loss.backward()
        for master, parameter in zip(self.masters, self.low, strict=False):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.low:
            with torch.no_grad():
                torch._foreach_copy_(self.low, self.masters)
        self.loss = loss.item()  # waits for a GPU

    def timed(self) -> float:
        begin = time.perf_counter()
        self.step()
        return time.perf_counter() - begin

    def peak(self) -> int:
        """Highest sum of live allocations during a step, relative to its start."""
        if self.tokens.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return int(torch.cuda.max_memory_allocated()) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        live = peak = 0
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return peak

    def state_bytes(self) -> int:
        tensors = [p.detach() for p in self.masters]
        states = self.optimizer.state.values()
        tensors += [t for state in states for t in state.values() if isinstance(t, torch.Tensor) and t.dim()]
        return sum(t.numel() * t.element_size() for t in tensors)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=512, help="width of the decoder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="its blocks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples per step (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per sample (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="measured pairs of steps (default: %(default)s)")
    parser.add_argument("--compiles", type=int, default=1,
                        help="compiles of each with empty caches, of which the fastest counts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="what is computed in; masters are fp32 (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE", help="write the result there ('-': standard output) instead of printing lines"
    )


def command(arguments: argparse.Namespace) -> int:
    if (
        arguments.hidden % 64
        or min(
            arguments.hidden, arguments.layers, arguments.batch, arguments.sequence, arguments.steps, arguments.compiles
        )
        < 1
    ):
        print("zcompile overhead: --hidden must be a multiple of 64, the others at least 1", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("zcompile overhead: --device cuda: torch sees no CUDA or HIP device here; valid: cpu", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and arguments.dtype == "bfloat16":
        print(
            "zcompile overhead: --dtype bfloat16 needs --device cuda: torch's code for CPUs does not compile two equal bfloat16 sums, "
            "which the biases of this model have (seen with torch 2.13)",
            file=sys.stderr,
        )
        return 2
    result = measure(
        arguments.hidden, arguments.layers, arguments.batch, arguments.sequence, arguments.steps, arguments.device, arguments.dtype,
        arguments.compiles,
    )  # fmt: skip
    if not write_json(result, arguments.json):
        low, high = result["middle_half"]
        print(
            f"step time zcompile : plain = {result['ratio']:.4f} (middle half {low:.4f} to {high:.4f}, {result['steps']} pairs)"
        )
        print(f"compile time, empty caches, zcompile : plain = {result['compile_ratio']:.2f}")
        print(f'plan="auto" of a tiny model on 2x2x2: {result["auto_seconds"]:.2f} s')
        for name in ("seconds", "compile_seconds", "peak_bytes", "state_bytes", "loss"):
            print(f"{name}: plain {result[name]['plain']}, zcompile {result[name]['zcompile']}")
    return 0
