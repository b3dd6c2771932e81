"""A whole optimizer step: refresh, K micro-batches forward and backward, the optimizer; graphs from a skeleton or from the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph

from zcompile.planner.skeleton import Skeleton
from zcompile.simulator import Noise, Refresh, begin
from zcompile.timeline import Memory, Timeline
from zcompile.topology import Topology

ADAMW_BYTES = 28
"""What a fused AdamW moves for one element: reads weight, gradient and two moments, writes weight and moments, all fp32."""

MOST_PLAYED = 3
"""Micro-batches that are played one by one: the first, one in the middle, the last; the others take what the middle one takes."""


@dataclass(frozen=True)
class Played:
    """A step as it is played.

    Attributes:
        forward, accumulate, sync: lowered graphs; `accumulate` is the backward of all micro-batches but the last.
        refreshes: of the copies, in the order of their launch.
        state: model-state bytes by what they are (zcompile.cost.step_state).
        shard: elements of masters on one rank: what the optimizer updates.
        workspace: bytes that operations need for a while beside what is kept.
    """

    topology: Topology
    forward: Graph
    accumulate: Graph | None
    sync: Graph
    refreshes: Sequence[Refresh]
    state: Mapping[str, int]
    shard: int
    workspace: int = 0


@dataclass
class Result:
    """A simulated step.

    Attributes:
        seconds, flops: of the step, on one device.
        compute: seconds of it that a device computes, the optimizer included.
        exposed: seconds of it that it stands still; `levels` by level.
        received: (level, transfer) -> bytes that one rank receives.
        memory: owner -> bytes at the peak.
        timeline: of the micro-batches that were played.
    """

    seconds: float
    flops: float
    compute: float
    exposed: float
    levels: dict[str, float]
    received: dict[tuple[str, str], int]
    memory: dict[str, int]
    timeline: Timeline = field(repr=False)

    @property
    def tflops(self) -> float:
        """TFLOP/s per device."""
        return self.flops / self.seconds / 1e12 if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Part of the step that is exposed."""
        return self.exposed / self.seconds if self.seconds else 0.0

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        received: dict[str, dict[str, int]] = {}
        for (level, transfer), amount in self.received.items():
            received.setdefault(level, {})[transfer] = amount
        return {
            "seconds": self.seconds, "tflops": self.tflops, "compute_seconds": self.compute, "exposed_seconds": self.exposed,
            "exposed_share": self.share, "exposed_levels": self.levels, "received_bytes": received,
            "exposed_parameters": dict(sorted(self.timeline.exposed_by("parameters").items(), key=lambda item: -item[1])[:20]),
            "memory_bytes": self.memory, "peak_bytes": self.bytes,
        }  # fmt: skip


def of_skeleton(skeleton: Skeleton, micro_batches: int = 1) -> Played:
    """A plan's step, without tracing it."""
    return Played(
        skeleton.plan.topology,
        skeleton.forward(),
        skeleton.backward(accumulate=True) if micro_batches > 1 else None,
        skeleton.backward(accumulate=False),
        skeleton.refreshes(),
        skeleton.state(micro_batches > 1),
        sum(spec.layout.shard for piece in skeleton.pieces if piece.trainable for spec in piece.specs),
        max(0, skeleton.workload.peak - skeleton.workload.activations),
    )


def play(step: Played, micro_batches: int = 1, noise: Noise | None = None) -> Result:
    """The step's time and memory.

    Args:
        micro_batches: K; their gradients are reduced up to G and added up, the last one goes on to O.
        noise: jitter and stragglers; None for none.
    """
    player = begin(step.topology, step.refreshes, step.state, noise)
    played = min(micro_batches, MOST_PLAYED)
    marks = []
    for number in range(1, played + 1):
        suffix = f" {number}" if micro_batches > 1 else ""
        started = max(player.now)
        player.graph(step.forward, "forward", f"forward{suffix}")
        last = number == played
        backward = step.sync if last else step.accumulate
        assert backward is not None
        player.graph(backward, "backward", f"backward{suffix}")
        marks.append(max(player.now) - started)
    player.charge("gradients", step.state["gradient"])
    player.operation(
        "AdamW", step.shard * ADAMW_BYTES / step.topology.device.memory_bandwidth, "optimizer", "optimizer"
    )
    timeline = player.finish()
    timeline.memory = [
        Memory(each.at, {**each.bytes, "activations": each.bytes.get("activations", 0) + step.workspace})
        for each in timeline.memory
    ]
    return _result(timeline, micro_batches - played, marks)


def _result(timeline: Timeline, more: int, marks: Sequence[float]) -> Result:
    """more: micro-batches like the second one that were not played."""
    middle = Timeline(
        [span for span in timeline.spans if more and span.phase.endswith(" 2")],
        [hop for hop in timeline.hops if more and hop.phase.endswith(" 2")],
    )
    levels, received = timeline.exposed_by("level"), timeline.received()
    for level, seconds in middle.exposed_by("level").items():
        levels[level] = levels.get(level, 0.0) + more * seconds
    for key, amount in middle.received().items():
        received[key] = received.get(key, 0) + more * amount
    rounds = len(marks) + more
    return Result(
        timeline.seconds + more * (marks[1] if more else 0.0),
        timeline.flops * rounds / len(marks),
        timeline.busy("compute") + more * middle.busy("compute"),
        timeline.exposed + more * middle.exposed,
        levels,
        received,
        dict(timeline.peak().bytes),
        timeline,
    )
