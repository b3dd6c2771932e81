"""Runs passes: times each, checks its contract, shows before and after to an observer (the dump)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType

from torch.fx import GraphModule

from zcompile.passes.context import Context

Observer = Callable[[GraphModule, Context, str], None]
"""Called with the graph before the first pass (name "input"), after each, and after one that failed ("lower.failed"). Must not raise."""


class PassError(RuntimeError):
    """A pass failed or broke its contract: names the pass, the graph and the reason."""


def run(gm: GraphModule, passes: Sequence[ModuleType], context: Context, observer: Observer | None = None) -> None:
    if observer:
        observer(gm, context, "input")
    for module in passes:
        context.current = module.NAME
        begin = time.perf_counter()
        try:
            module.run(gm, context)
            module.check(gm, context)
            gm.graph.lint()
        except Exception as error:
            if observer:
                observer(gm, context, f"{module.NAME}.failed")
            raise PassError(f"zcompile: pass `{module.NAME}` on {context.name} ({context.stage}): {error}") from error
        context.seconds[module.NAME] = time.perf_counter() - begin
        if observer:
            observer(gm, context, module.NAME)
    gm.recompile()
