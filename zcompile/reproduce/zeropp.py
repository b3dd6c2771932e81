"""DeepSpeed's ZeRO-3 and ZeRO++ on 384 V100, beside the published bar labels and the tutorial's log.

One model for all cells, no constant of a cell: M = 2 psi bytes of fp16 weights, checkpointed activations (f = 4), rings over all ranks.

    ZeRO-3    forward: gather M; backward: gather M, reduce-scatter M
    ZeRO++    forward: gather M / 2 (int8); backward: gather M in the node (hpZ), all-to-all M / 4 in the node and (1/p) M / 4 between nodes

A phase takes computing and transfers one after the other (`serial`), or the longer of the two (`overlap`): the published systems prefetch
and cannot hide all of it, so both are shown, and the criterion is held against one of them for all cells.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from zcompile.machines import MACHINES
from zcompile.reproduce.flat import Flat
from zcompile.reproduce.report import Report
from zcompile.times import EFFICIENCY

RANKS, PER_NODE = 384, 16
CARD = 100e9 / 8
"""B/s of one 100 Gb/s card."""
BARS: dict[tuple[int, int], dict[str, tuple[list[float], list[float]]]] = {
    (4, 1024): {"18B 49B 91B 138B": ([25, 23, 23, 23], [35, 36, 36, 36])},
    (4, 2048): {"18B 49B 91B 138B": ([40, 36, 36, 36], [53, 51, 51, 50])},
    (1, 1024): {"18B 49B 91B 138B": ([14, 11, 11, 11], [31, 22, 22, 22])},
    (1, 2048): {"18B 49B 91B 138B": ([26, 20, 20, 20], [46, 38, 38, 38])},
    (2, 2048): {"18B 138B": ([37, 32], [50, 48])},
    (8, 2048): {"18B 138B": ([47, 48], [54, 55])},
}
"""(100 Gb/s cards per node, tokens per device) -> models -> TFLOP/s per V100 of ZeRO-3 and of ZeRO++: bar labels of DeepSpeed's blog."""
LOG = {"ZeRO-3": (3.356, 6.459, 9.956), "ZeRO++": (1.795, 1.742, 3.681)}
"""Seconds of forward, backward, step: log of the ZeRO++ tutorial, 18B, 512 tokens, 4 nodes of 16 V100, step 40."""
LAYER = {"18B": (40, 6144), "49B": (60, 8192), "91B": (111, 8192), "138B": (96, 11008)}
"""Layers and width: 18B as in the tutorial; of the others only the sizes are published, and only they matter here: (12 L h^2) to 2 %."""


@dataclass(frozen=True)
class Cell:
    """psi parameters, tokens per device, layers, ranks; peak: FLOP/s; efficiency: part of it that computing reaches."""

    psi: float
    tokens: int
    layers: int
    ranks: int
    flat: Flat
    peak: float
    memory: float
    efficiency: float = EFFICIENCY

    def compute(self) -> tuple[float, float]:
        """Seconds of forward, and of backward with the recomputed forward: 2 and 6 FLOPs a parameter and token."""
        rate = self.peak * self.efficiency
        return 2 * self.psi * self.tokens / rate, 6 * self.psi * self.tokens / rate

    def gathers(self, whole: float, ranks: int) -> float:
        """An all-gather for each layer."""
        return self.layers * self.flat.gather(whole / self.layers, ranks)

    def transfers(self, plus: bool) -> tuple[float, float]:
        """Seconds of the transfers of forward and of backward."""
        m, p = 2 * self.psi, self.flat.per_node
        if not plus:
            return self.gathers(m, self.ranks), 2 * self.gathers(m, self.ranks)
        kernels = (m + m / 2) / self.memory  # quantise and dequantise: read one, write the other
        forward = self.gathers(m / 2, self.ranks) + kernels
        inside = self.gathers(m, p) + self.gathers(m / 4, p)
        between = self.layers * self.flat.overhead + m / 4 * (1 - p / self.ranks) / self.flat.between
        return forward, inside + between + 2 * kernels

    def seconds(self, plus: bool, overlap: bool) -> tuple[float, float]:
        """Of forward and backward."""
        pairs = zip(self.compute(), self.transfers(plus), strict=True)
        forward, backward = (max(a, b) if overlap else a + b for a, b in pairs)
        return forward, backward

    def tflops(self, plus: bool, overlap: bool) -> float:
        return 8 * self.psi * self.tokens / sum(self.seconds(plus, overlap)) / 1e12


def cell(model: str, cards: int, tokens: int, ranks: int = RANKS) -> Cell:
    machine = MACHINES["dgx-2"]
    layers, width = LAYER[model]
    device = machine.device
    flat = Flat.of(machine, between=cards * CARD)
    return Cell(12 * layers * width**2, tokens, layers, ranks, flat, device.flops("float16"), device.memory_bandwidth)


def run(overlap: bool = False) -> Report:
    report = Report(
        "ZeRO-3 and ZeRO++ on 384 V100, TFLOP/s per device",
        [
            "cards, tokens, model",
            "ZeRO-3",
            "model",
            "overlapped",
            "ZeRO++",
            "model",
            "overlapped",
            "ratio",
            "model",
            "overlapped",
        ],
    )
    errors: dict[bool, list[float]] = {False: [], True: []}
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for (cards, tokens), groups in BARS.items():
        for names, (plain, plus) in groups.items():
            for name, a, b in zip(names.split(), plain, plus, strict=True):
                found = cell(name, cards, tokens)
                pairs = {way: (found.tflops(False, way), found.tflops(True, way)) for way in (False, True)}
                for way, (x, y) in pairs.items():
                    errors[way] += [abs(x / a - 1), abs(y / b - 1)]
                    ratios[way].append(abs((y / x) / (b / a) - 1))
                (x0, y0), (x1, y1) = pairs[False], pairs[True]
                report.rows.append(
                    [f"{cards} x 100 Gb/s, {tokens}, {name}", a, x0, x1, b, y0, y1, b / a, y0 / x0, y1 / x1]
                )
    log = cell("18B", 1, 512, 64)
    for system in LOG:
        serial, hidden = (log.seconds(system == "ZeRO++", way) for way in (False, True))
        for number, phase in enumerate(("forward", "backward")):
            taken = LOG[system][number]
            report.rows.append([f"log, 4 nodes, 512, {system}: {phase} s", taken, serial[number], hidden[number]])
            report.check(f"log, {system}: {phase}", abs((hidden if overlap else serial)[number] / taken - 1), 0.20)
        report.data[system] = {"log": LOG[system], "serial": serial, "overlapped": hidden}
    report.check(f"bars ({'overlapped' if overlap else 'serial'}): worst ratio", max(ratios[overlap]), 0.20)
    other = not overlap
    report.notes = [
        f"{'Overlapped' if other else 'Serial'} instead: median error {statistics.median(errors[other]):.1%}, worst ratio "
        f"{max(ratios[other]):.1%}.",
        f"Computing: {EFFICIENCY:.0%} of 125 TFLOP/s, the assumption for every device without a measurement; 8 psi FLOPs a token (f = 4).",
        *sensitivity(),
        "The log's network is not stated; one 100 Gb/s card per node is what its forward of ZeRO-3 (36 GB in 2.9 s) implies.",
        "Sources: bar labels and log of DeepSpeed's ZeRO++ blog and tutorial; machine: zcompile/machine_data/dgx-2.json.",
    ]  # fmt: skip
    return report


def sensitivity() -> list[str]:
    """How the median error moves with the one free constant."""
    found = []
    for efficiency in (0.4, 0.45, 0.55, 0.6):
        errors = []
        for (cards, tokens), groups in BARS.items():
            for names, (plain, plus) in groups.items():
                for name, a, b in zip(names.split(), plain, plus, strict=True):
                    each = replace(cell(name, cards, tokens), efficiency=efficiency)
                    errors += [abs(each.tflops(False, False) / a - 1), abs(each.tflops(True, False) / b - 1)]
        found.append(f"{efficiency:.0%}: {statistics.median(errors):.1%}")
    return [f"Sensitivity of the median error (serial) to the part of the peak: {', '.join(found)}."]
