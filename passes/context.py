"""What a pass is told, and where it says what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from zcompile.resolved import ResolvedPlan


@dataclass
class Context:
    """Of one graph on its way through the passes.

    Attributes:
        stage: "joint", "forward", "backward" or "inference".
        plan: the resolved plan.
        overlap: buckets whose hops may be under way while the graph computes; 0: none.
        memory: bytes that these may take, in each direction; 0: what so many buckets take.
        keep: bytes of gathered weights that a forward leaves for its backward.
        tokens: of a micro-batch on one rank, about; 0: unknown.
        kept: by the joint graph's `tag`: names of the parameters of those.
        decompositions: what traced code is decomposed with (empty without code generation).
        expected: by the schedule: "seconds" of the graph, and "exposed LEVEL", those of it in which it waits for hops of that level.
        notes: one line per thing a pass did, by pass; shown in the dump.
    """

    stage: str
    plan: ResolvedPlan
    decompositions: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    name: str = "graph"
    current: str = ""
    notes: dict[str, list[str]] = field(default_factory=dict)
    overlap: int = 0
    memory: int = 0
    keep: int = 0
    tokens: int = 0
    kept: set[str] = field(default_factory=set)
    expected: dict[str, float] = field(default_factory=dict)
    predicted: dict[tuple[str, str], int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def note(self, text: str) -> None:
        self.notes.setdefault(self.current, []).append(text)

    @staticmethod
    def parameter(node: Node) -> str:
        from zcompile.passes.nodes import spec_of

        return spec_of(node).name
