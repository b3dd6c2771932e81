"""Pictures of plans: scaling curves, rooflines of levels, memory bars. PNG and SVG, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zcompile.planner.search import Candidate
from zcompile.timeline import OWNERS
from zcompile.times import hop_seconds
from zcompile.topology import Topology


def pyplot() -> Any:
    """matplotlib, drawing to files. ValueError says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'zcompile[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Both formats; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot().close(figure)
    return paths


def scaling(curves: Mapping[str, Sequence[tuple[int, float]]], ceiling: float, title: str, folder: Path) -> list[Path]:
    """curves: label -> (ranks, TFLOP/s per device) points; ceiling: computing alone. Beside it the efficiency against the first point."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for label, points in curves.items():
        ranks, rates = [n for n, _ in points], [rate for _, rate in points]
        left.plot(ranks, rates, marker="o", ms=3, label=label)
        right.plot(ranks, [rate / rates[0] for rate in rates], marker="o", ms=3, label=label)
    left.axhline(ceiling, color="gray", ls="--", lw=1, label="computing alone")
    left.set_ylabel("TFLOP/s per device")
    right.set_ylabel("efficiency, against the smallest")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("ranks")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return save(figure, folder, "scaling")


def roofline(topology: Topology, folder: Path) -> list[Path]:
    """Rate that a hop reaches over each level, by the bytes that a rank receives in it."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(6, 4))
    sizes = [2.0**k for k in range(10, 31)]
    for level in topology.levels:
        if level.size > 1:
            panel.plot(
                sizes, [n / hop_seconds(level, int(n)) / 1e9 for n in sizes], label=f"{level.name} ({level.size})"
            )
            panel.axhline(level.bandwidth / 1e9, color="gray", lw=0.5, ls=":")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("bytes that a rank receives in a hop")
    panel.set_ylabel("GB/s")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return save(figure, folder, "levels")


def memory(candidates: Mapping[str, Candidate], limit: float, folder: Path) -> list[Path]:
    """Peak memory by owner, a bar for each plan."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7, 0.45 * len(candidates) + 1.5))
    names = [name for name, candidate in candidates.items() if candidate.result]
    left = [0.0] * len(names)
    for owner in OWNERS:
        width = [(c.result.memory.get(owner, 0) if c.result else 0) / 1e9 for c in (candidates[name] for name in names)]
        panel.barh(names, width, left=left, label=owner)
        left = [a + b for a, b in zip(left, width, strict=True)]
    panel.axvline(limit / 1e9, color="black", ls="--", lw=1, label="limit")
    panel.set_xlabel("GB on one device at the peak")
    panel.invert_yaxis()
    panel.legend(fontsize=7)
    return save(figure, folder, "memory")
