"""`zcompile.explain(model)`: what the compiler did to a model, in a notebook or a terminal."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from zcompile.debug import tables
from zcompile.debug.step import LOWERED, Step
from zcompile.debug.views import has_bokeh


class Explanation:
    """Of a model's last compilations. Printed it is the ledger's tables; in a notebook it is the page.

    Attributes:
        steps: one for each compilation.
    """

    def __init__(self, steps: Sequence[Step], rows: int = 20, sort: str = "exposed") -> None:
        if sort not in tables.SORTS:
            raise ValueError(f"sort={sort!r}: valid: {', '.join(tables.SORTS)}")
        if not steps:
            raise ValueError(
                "zcompile.explain: nothing was compiled for this model so far; run a forward and a backward first"
            )
        self.steps = [step for step in steps if not step.broken]
        if not self.steps:
            raise ValueError(f"zcompile.explain: graph {steps[0].number} could not be recorded: {steps[0].broken}")
        self._rows, self._sort = rows, sort

    def ledger(self) -> list[dict[str, Any]]:
        """The ledger of each compilation, as in ledger.json."""
        return [step.as_dict() for step in self.steps]

    def program(self, stage: str = "forward", after: str = "", compilation: int = -1) -> str:
        """The text of a graph: "joint", "forward", "backward" or "inference"; after its last pass, or after the one that is named.

        Of a model that was compiled without a dump, only the last is kept. ValueError lists what there is.
        """
        records = self.steps[compilation].records
        if stage not in records:
            raise ValueError(f"stage {stage!r}: valid: {', '.join(records)}")
        programs = {program.name: program for program in records[stage].programs}
        if after and after not in programs:
            raise ValueError(f"pass {after!r} of {stage}: valid: {', '.join(programs)}")
        return "\n".join((programs[after] if after else records[stage].programs[-1]).lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page (report.html) there. ImportError without bokeh."""
        from zcompile.debug import page

        target = Path(path)
        target.write_text(page.page(self.steps), encoding="utf-8")
        return target

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for found in self.ledger():
            yield tables.ledger(found, self._rows, self._sort)

    def __str__(self) -> str:
        console = Console(width=180, color_system=None, highlight=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __repr__(self) -> str:
        graphs = [step.records[stage].title for step in self.steps for stage in LOWERED if stage in step.records]
        return f"<zcompile.explain: {', '.join(graphs)}; print it for tables, .save('report.html') for the page>"

    def _repr_html_(self) -> str:
        if not has_bokeh():
            return f"<pre>{html.escape(str(self))}</pre>"
        from zcompile.debug import page

        content = html.escape(page.page(self.steps), quote=True)
        return f'<iframe srcdoc="{content}" style="width:100%;height:820px;border:1px solid #8885;border-radius:8px"></iframe>'
