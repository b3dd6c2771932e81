"""The base paper's ratios: 20B on 384 GCDs of Frontier, ZeRO-3 : ZeRO++ : three levels = 1 : 1.405 : 2.398 (arXiv 2501.04266, abstract).

Closed forms, with constants from zcompile/machine_data/frontier.json and the choices of `Choice`; nothing is fitted to the three numbers.
Transfers follow computing: what published ZeRO-3 and ZeRO++ show on V100 too (`zcompile reproduce zeropp`).

    ZeRO-3         K times: gather M, gather M, reduce-scatter M, rings over all ranks
    ZeRO++         K times: gather M / 2 over all (int8), gather M in the node (hpZ), all-to-all M / 4 in the node, and M / 32 between nodes
    three levels   K times: gather M / 2 over the pair, twice (int8), reduce M / 4 over pair and node (int4);
                   once: sync M / 4 and refresh M / 2 between nodes, refresh M / 2 in the node: zcompile's hops, level by level
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from zcompile import cost
from zcompile.machines import MACHINES, Level
from zcompile.reproduce.flat import Flat
from zcompile.reproduce.report import Report
from zcompile.shapes import SHAPES
from zcompile.times import hop_seconds

PUBLISHED = {"ZeRO-3": 1.0, "ZeRO++": 1.405, "three levels": 2.398}
EFFICIENCY = 0.94
"""Published: throughput per GCD at 384 GCDs against the smallest run, whose size the abstract does not give; here: one node."""
SYSTEMS = tuple(PUBLISHED)


@dataclass(frozen=True)
class Choice:
    """What the abstract does not say.

    Attributes:
        micro_batch: samples of 2048 tokens. micro_batches: K.
        recompute: activations are computed again, f = 4 in the FLOP formula, else 3.
        rate: FLOP/s that computing reaches: the middle of 60 to 80 TF, what MI250X gives for such models without modern fusion.
        messages: collectives for each layer: DeepSpeed gathers module by module, four products a layer.
        flat: factor on the rate of rings over all ranks.
        exchange: B/s of an all-to-all among a node's eight GCDs: a single link, as most of its pairs have at best.
    """

    micro_batch: int = 1
    micro_batches: int = 1
    recompute: bool = True
    rate: float = 70e12
    messages: int = 4
    flat: float = 1.0
    exchange: float = 38e9


def flops(choice: Choice) -> float:
    """Of one micro-batch, as GPT-NeoX prints it: 24 f B s L h^2 (1 + s / 6h + V / 16Lh)."""
    shape = SHAPES["gpt-neox-20b"]
    h, layers, s, f = shape.hidden, shape.layers, shape.sequence, 4 if choice.recompute else 3
    inner = 1 + s / (6 * h) + shape.vocabulary / (16 * layers * h)
    return 24 * f * choice.micro_batch * s * layers * h**2 * inner


def parameters() -> float:
    shape = SHAPES["gpt-neox-20b"]
    return float(
        12 * shape.layers * shape.hidden**2 + 13 * shape.layers * shape.hidden + 2 * shape.vocabulary * shape.hidden
    )


def seconds(choice: Choice, nodes: int) -> dict[str, float]:
    """Of one step of each system."""
    machine = MACHINES["frontier"]
    ranks, per_node, k = 8 * nodes, machine.ranks_per_node, choice.micro_batches
    flat = Flat.of(machine)
    flat = replace(flat, between=flat.between * choice.flat)
    levels = machine.levels(nodes)
    psi, count = parameters(), SHAPES["gpt-neox-20b"].layers * choice.messages
    m, compute = 2 * psi, flops(choice) * k / choice.rate
    kernels = 1.5 * m / machine.device.memory_bandwidth

    def ring(whole: float, over: int) -> float:
        return count * flat.gather(whole / count, over)

    def hops(width: float, over: tuple[Level, ...], inner: int) -> float:
        """psi elements of `width` bytes, level by level; `inner` ranks share what is sent."""
        total, extent = 0.0, inner
        for level in over:
            if level.size > 1:
                values = {cost.B: width, cost.P: psi / count, cost.INNER: extent, cost.OUTER: extent * level.size}
                total += count * hop_seconds(level, int(cost.HOP.subs(values)))
            extent *= level.size
        return total

    pair, node, cluster = levels
    plus = ring(m / 2, ranks) + ring(m, per_node) + m / 4 * (per_node - 1) / per_node / choice.exchange + 3 * kernels
    plus += m / 4 / per_node * (1 - 1 / nodes) / cluster.bandwidth + count * flat.overhead
    inside = 2 * hops(1.0, (pair,), 1) + hops(0.5, (pair, node), 1) + 3 * kernels
    once = hops(0.5, (cluster,), 8) + hops(1.0, (cluster,), 8) + hops(1.0, (node,), 2) + kernels
    return {
        "ZeRO-3": compute + k * 3 * ring(m, ranks),
        "ZeRO++": compute + k * plus,
        "three levels": compute + k * inside + once,
    }


def ratios(choice: Choice, nodes: int = 48) -> dict[str, float]:
    """Throughput of each system against ZeRO-3."""
    found = seconds(choice, nodes)
    return {system: found["ZeRO-3"] / found[system] for system in SYSTEMS}


def efficiency(choice: Choice) -> float:
    """Of three levels, 384 GCDs against one node."""
    return seconds(choice, 1)["three levels"] / seconds(choice, 48)["three levels"]


def needed(choice: Choice, system: str) -> float:
    """The factor on the rate of rings over all ranks at which a ratio is the published one; 0 if there is none."""
    low, high = 1e-3, 10.0
    reached: Callable[[float], bool] = lambda f: ratios(replace(choice, flat=f))[system] >= PUBLISHED[system]  # noqa: E731
    if not reached(low) or reached(high):
        return 0.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if reached(middle) else (low, middle)
    return low


def run() -> Report:
    base = Choice()
    variants: dict[str, Choice] = {
        "as chosen": base,
        "micro-batch 2": replace(base, micro_batch=2),
        "micro-batch 4": replace(base, micro_batch=4),
        "no recomputation": replace(base, recompute=False),
        "4 micro-batches": replace(base, micro_batches=4),
        "60 TF": replace(base, rate=60e12),
        "80 TF": replace(base, rate=80e12),
        "1 collective a layer": replace(base, messages=1),
        "exchange at 76 GB/s": replace(base, exchange=76e9),
        "rings at 1/2": replace(base, flat=0.5),
        "rings at 1/4": replace(base, flat=0.25),
        "rings at 1/8": replace(base, flat=0.125),
    }
    columns = [
        "choice",
        *(f"{system} s" for system in SYSTEMS),
        "ZeRO++ / ZeRO-3",
        "three levels / ZeRO-3",
        "efficiency",
    ]
    report = Report("20B on 384 GCDs of Frontier", columns)
    report.rows.append(["published", None, None, None, PUBLISHED["ZeRO++"], PUBLISHED["three levels"], EFFICIENCY])
    for name, choice in variants.items():
        times, found = seconds(choice, 48), ratios(choice)
        report.rows.append(
            [
                name,
                *times.values(),
                f"{found['ZeRO++']:.3f}",
                f"{found['three levels']:.3f}",
                f"{efficiency(choice):.3f}",
            ]
        )
    found = ratios(base)
    for system in SYSTEMS[1:]:
        report.check(f"{system} / ZeRO-3", abs(found[system] / PUBLISHED[system] - 1), 0.10)
    report.check("efficiency", abs(efficiency(base) / EFFICIENCY - 1), 0.10)
    rate = Flat.of(MACHINES["frontier"]).between
    wanted = {system: needed(base, system) for system in SYSTEMS[1:]}
    said = [
        f"{system} at {rate * factor / 1e9:.1f} GB/s (1/{1 / factor:.1f})" if factor else f"{system} at none"
        for system, factor in wanted.items()
    ]
    compute, whole = flops(base) / base.rate, seconds(base, 48)["ZeRO-3"]
    report.notes = [
        f"Why it misses: with rings over 384 GCDs as fast as measured over 16, transfers of ZeRO-3 take {whole - compute:.2f} s beside "
        f"{compute:.2f} s of computing: no scheme can be more than {whole / compute:.2f} times as fast as that ZeRO-3; 2.398 is published.",
        f"The ratios would come out with rings over all ranks (for all systems) at: {', '.join(said)}; measured over 16 GCDs: "
        f"{rate / 1e9:.0f} GB/s.",
        "That rings over hundreds of GCDs are so much slower is what others report: RCCL up to 33 times slower than PCCL in all-gathers "
        "on 2048 GCDs, ZeRO-3 up to 4.9 times (https://arxiv.org/abs/2504.18658). No curve for 384 is published; none is made up here.",
        "Chosen: micro-batch 1 of 2048 tokens, recomputation (f = 4), K = 1, 70 TFLOP/s, four collectives a layer, transfers after "
        "computing.",
        "Sources: zcompile/machine_data/frontier.json.",
    ]  # fmt: skip
    report.data = {"ratios": found, "efficiency": efficiency(base), "rings": wanted}
    return report
