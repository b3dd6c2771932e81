"""The views of a dump, beside the text: ledger.txt and ledger.json, trace.json for Perfetto, report.html to look at.

They are written anew after each graph, whole or not at all: a reader never finds half a file. The page needs bokeh (the extra
`report`); where it is missing, a line says so and the rest is written.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from pathlib import Path

from zcompile.debug import chrome, tables
from zcompile.debug.step import Step


class Views:
    """Of all compilations of one process.

    Args:
        folder: where they are written.
        suffix: of the files' names, where the folder holds another job's: ".2".
    """

    def __init__(self, folder: Path, suffix: str = "") -> None:
        self.folder, self.suffix = folder, suffix
        self.steps: dict[int, Step] = {}

    def update(self, step: Step) -> None:
        """Write them with this step, as far as it has come."""
        self.steps[step.number] = step
        steps = [self.steps[number] for number in sorted(self.steps)]
        books = [each.as_dict() for each in steps]
        self._write("ledger.json", json.dumps(books, indent=1))
        self._write("ledger.txt", tables.as_text(books))
        self._write("trace.json", json.dumps(chrome.trace(steps)))
        if has_bokeh():
            from zcompile.debug import page

            self._write("report.html", page.page(steps))

    def path(self, name: str) -> Path:
        stem, dot, kind = name.partition(".")
        return self.folder / f"{stem}{self.suffix}{dot}{kind}"

    def _write(self, name: str, content: str) -> None:
        path = self.path(name)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(content, encoding="utf-8")
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


_told = False


def has_bokeh() -> bool:
    """Whether the page can be made; once says what it needs."""
    global _told
    found = importlib.util.find_spec("bokeh") is not None
    if not found and not _told:
        _told = True
        warnings.warn("zcompile: no report.html: it needs bokeh (pip install 'zcompile[report]')", stacklevel=6)
    return found
