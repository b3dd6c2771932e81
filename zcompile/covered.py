"""How much of a model went through compiled graphs, and where it did not.

Equal numbers do not show that anything was compiled: a frame that Dynamo gives up (a tensor's `if` in a loop) makes no graph and reports no
break. So each forward notes which parameters compiled graphs gathered and which were read outside of any, and from which line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcompile.engine import Engine


@dataclass
class Reads:
    """Of one forward: names of parameters that graphs gathered, and those read outside any, with the line that did."""

    compiled: set[str] = field(default_factory=set)
    eager: dict[str, str] = field(default_factory=dict)


def break_of(gm: Any) -> dict[str, str] | None:
    """Why Dynamo ended this graph, if it was a break: {"reason", "where"}."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    stack = list(why.user_stack)
    where = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
    return {"reason": str(why.reason).strip().splitlines()[0], "where": where}


def report(engine: Engine) -> dict[str, Any]:
    """See `zcompile.coverage`."""
    reads = engine.reads
    names = [slot.name for slot in engine.slots]
    eager = {name: reads.eager[name] for name in names if name in reads.eager}
    compiled = [name for name in names if name in reads.compiled and name not in eager]
    return {
        "graphs": [program.name for program in engine.programs],
        "breaks": list(engine.breaks),
        "share": len(compiled) / (len(compiled) + len(eager)) if compiled or eager else 0.0,
        "compiled": compiled,
        "eager": eager,
        "unread": [name for name in names if name not in reads.compiled and name not in eager],
    }


def check(engine: Engine) -> None:
    """Option strict=True, after a forward: RuntimeError unless everything that was read went through compiled graphs."""
    found = report(engine)
    if found["eager"]:
        listed = "\n".join(f"  {name}, at {where}" for name, where in _few(found["eager"].items()))
        breaks = "".join(f"\n  {each['reason']}, at {each['where']}" for each in found["breaks"])
        raise RuntimeError(
            f"zcompile: strict=True, but compiled graphs gathered only {found['share']:.0%} of the parameters that this forward read. Read "
            f"outside of any graph:\n{listed}"
            + (f"\ngraph breaks:{breaks}" if breaks else "\nno graph break was reported")
        )


def _few(items: Iterable[tuple[str, str]], most: int = 10) -> list[tuple[str, str]]:
    listed = list(items)
    rest = len(listed) - most
    return listed if rest <= 0 else [*listed[:most], (f"and {rest} more", "other lines")]
