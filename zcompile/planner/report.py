"""What the planner found, as tables, as JSON and in formulas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
from rich.console import Console
from rich.table import Table

from zcompile import cost
from zcompile.planner.search import Answer, Candidate, Estimator, Request, formats_of
from zcompile.planner.workload import Workload
from zcompile.timeline import OWNERS
from zcompile.times import at, hop_seconds, steps
from zcompile.topology import Topology


def result(workload: Workload, topology: Topology, text: str, request: Request, answer: Answer) -> dict[str, Any]:
    """Everything, for JSON."""
    seconds = workload.clock(topology.device)
    return {
        "model": workload.name, "parameters": workload.parameters, "topology": text, "key": topology.key,
        "ranks": topology.world_size, "device": topology.device.name, "micro_batches": request.micro_batches,
        "tokens_per_rank": workload.tokens * request.micro_batches, "memory_limit": request.limit(topology),
        "allowed": list(request.allowed), "flops_per_micro_batch": workload.flops, "compute_seconds_per_micro_batch": seconds[-1],
        "activation_bytes": workload.activations, "considered": answer.considered, "pruned": answer.pruned,
        "best": answer.best.as_dict(), "ranked": [c.as_dict() for c in answer.ranked],
        "presets": {name: c.as_dict() for name, c in answer.presets.items()},
    }  # fmt: skip


def show(
    console: Console, workload: Workload, topology: Topology, text: str, request: Request, answer: Answer, most: int = 8
) -> None:
    """Tables of the best plans and of the presets."""
    limit = request.limit(topology)
    console.print(
        f"{workload.name}, {workload.parameters:,} parameters; {text} = {topology.key}, {topology.world_size:,} x {topology.device.name}; "
        f"{request.micro_batches} micro-batch{'es' if request.micro_batches > 1 else ''} of {workload.tokens:,} tokens a rank; "
        f"{limit / 1e9:.1f} GB a device; allowed: {', '.join(request.allowed) or 'native formats'}"
    )
    console.print(
        f"computing alone: {workload.clock(topology.device)[-1] * request.micro_batches:.3f} s, "
        f"{workload.flops / workload.clock(topology.device)[-1] / 1e12:.1f} TFLOP/s a device; {answer.considered} plans considered"
    )
    levels = [level.name for level in topology.levels if level.size > 1]
    _table(console, "best plans", levels, ((c.plan.name, c) for c in answer.ranked[:most]))
    if answer.presets:
        _table(console, "presets, native formats, overlap 2", levels, answer.presets.items())
    best = answer.best
    console.print(f"take: {code(best)}")


def code(candidate: Candidate) -> str:
    """The plan as an argument of hierarchical_zero."""
    plan = candidate.plan
    extra = "".join(f", {transfer}={wire!r}" for transfer, wire in formats_of(plan).items())
    bucket = f", bucket_bytes={plan.bucket_bytes}" if plan.bucket_bytes != type(plan)().bucket_bytes else ""
    places = f"{plan.weights!r}, {plan.gradients!r}, {plan.optimizer!r}"
    return f"plan=Plan({places}{extra}{bucket}), overlap={candidate.overlap}"


def _table(console: Console, title: str, levels: list[str], rows: Iterable[tuple[str, Candidate]]) -> None:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("plan")
    table.add_column("W / G / O, formats, bucket, overlap", overflow="fold", ratio=3)
    heads = ("step s", "TFLOP/s", "exposed", "GB a step " + " / ".join(levels), "GB peak: " + ", ".join(OWNERS))
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("why not", overflow="fold", ratio=3)
    for name, candidate in rows:
        found = candidate.result
        if found is None:
            continue
        received = [sum(v for (level, _), v in found.received.items() if level == each) / 1e9 for each in levels]
        owners = ", ".join(f"{found.memory.get(owner, 0) / 1e9:.1f}" for owner in OWNERS)
        table.add_row(
            name, candidate.label, f"{found.seconds:.4g}", f"{found.tflops:.1f}", f"{found.share:.1%}",
            " / ".join(f"{amount:.3g}" for amount in received), f"{found.bytes / 1e9:.1f}: {owners}",
            candidate.verdict or "the best",
        )  # fmt: skip
    console.print(table)


def explain(
    console: Console, workload: Workload, topology: Topology, request: Request, answer: Answer, compute: str
) -> None:
    """The formulas, then their numbers for the best plan."""
    best, estimator = answer.best, Estimator(workload, topology, request, compute)
    plan = estimator.resolve(best.plan)
    extents = topology.extents
    e_w, e_g, e_o = (extents[i] for i in (plan.weights, plan.gradients, plan.optimizer))
    psi = workload.parameters
    say = console.print
    say(
        "\n[bold]model state[/bold], bytes on one rank; P parameters, b bytes each in a copy, E ranks that a placement shards over"
    )
    for kind, form in cost.STATE.items():
        if kind == "main" and request.micro_batches == 1:
            continue
        bits = plan.formats("gather")[plan.weights - 1].bits if plan.weights else 16 if compute == "bfloat16" else 32
        values = {cost.P: psi, cost.B: sympy.Rational(bits, 8), cost.E_W: e_w, cost.E_G: e_g, cost.E_O: e_o}
        say(
            f"  {kind:9s}{form!s:12s} = {int(form.subs(values)) / 1e9:9.3f} GB; with padding and scales {best.state[kind] / 1e9:.3f} GB"
        )
    say(f"  activations and temporaries, from the model on fake tensors: {workload.peak / 1e9:.3f} GB")
    say(f"\n[bold]bytes[/bold] that one rank receives over level j in a hop of a transfer: {cost.HOP}")
    assert best.result is not None
    for (level, transfer), amount in sorted(best.result.received.items()):
        j = topology.names.index(level) + 1
        say(
            f"  {transfer:8s} over {level:8s}(1/{extents[j - 1]} - 1/{extents[j]}), in all {amount / 1e9:9.3f} GB a step"
        )
    say(f"\n[bold]seconds of a hop[/bold] that brings R bytes: {cost.HOP_SECONDS}")
    one = 64 * 2**20
    for rung in topology.levels:
        if rung.size > 1:
            say(
                f"  {rung.name:8s}o = {rung.overhead * 1e6:g} us, n = {steps(rung)} ({rung.steps}), "
                f"alpha = {rung.latency * 1e6:g} us, beta = {rung.bandwidth / 1e9:g} GB/s, "
                f"c = {at(rung.curve, one / steps(rung)):.2f} at 64 MiB: {hop_seconds(rung, one) * 1e3:.3f} ms"
            )
    device = topology.device
    say(f"\n[bold]seconds of an operation[/bold] of F FLOPs that moves M bytes: {cost.OPERATION_SECONDS}")
    rate = device.efficiency[-1][1] if device.efficiency else 0.5
    peaks = ", ".join(f"{dtype} {peak / 1e12:g} TFLOP/s" for dtype, peak in device.peak_flops)
    say(f"  {device.name}: peak {peaks}; products reach {rate:.3g} of it; mu = {device.memory_bandwidth / 1e12:g} TB/s")
    say(f"\n[bold]no step is shorter than[/bold] {cost.STEP_BOUND} over the levels j")
    say("  " + ", ".join(f"{lane} {seconds:.3f} s" for lane, seconds in best.lanes.items()))
    say(f"  simulated: {best.result.seconds:.3f} s, {best.result.share:.1%} of it exposed")
    reasons: dict[str, float] = {}
    for hop in best.result.timeline.hops:
        if hop.exposed > 0:
            key = f"{hop.transfer} over {hop.level}: {hop.reason}"
            reasons[key] = reasons.get(key, 0.0) + hop.exposed
    for key, seconds in sorted(reasons.items(), key=lambda item: -item[1])[:8]:
        say(f"    {seconds * 1e3:8.2f} ms exposed, {key}")
