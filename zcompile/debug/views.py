"""The views of a dump, beside the text: ledger.txt and ledger.json, trace.json for Perfetto, report.html to look at.

They are written anew after each graph, whole or not at all: a reader never finds half a file. The page needs bokeh (the extra
`report`); where it is missing, a line says so and the rest is written.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zcompile.debug import chrome, page, tables
from zcompile.debug.step import Step

_MOST = 16
"""Compilations in the views; the text of every one is in its folder."""
DATA = "dump.json.gz"
"""What the page is made of, for `zcompile measured`."""


class Views:
    """Of all compilations of one process.

    Args:
        folder: where they are written.
        job: how many-th in the folder: the second one's files are called report.2.html and so on.
    """

    def __init__(self, folder: Path, job: int = 1) -> None:
        self.folder, self.job = folder, job
        self.steps: dict[int, Step] = {}
        self._data: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}

    def update(self, changed: Sequence[Step]) -> None:
        """Write them with these steps, as far as they have come. Of very many compilations the first are shown: a page has to open."""
        changed = [step for step in changed if step.number in self.steps or len(self.steps) < _MOST]
        if not changed:
            return
        self.steps.update((step.number, step) for step in changed)
        steps = [self.steps[number] for number in sorted(self.steps)]
        books = [each.as_dict() for each in steps]
        self._write("ledger.json", json.dumps(books, indent=1))
        self._write("ledger.txt", tables.as_text(books))
        self._write("trace.json", json.dumps(chrome.trace(steps)))
        for step in changed:
            data = page.step_data(step)
            self._data[step.number] = (data, [page.graph_data(record) for record in page.records(step)])
        parts = [self._data[number] for number in sorted(self._data)]
        whole = ([step for step, _ in parts], [graph for _, graphs in parts for graph in graphs])
        self._write(DATA, gzip.compress(json.dumps(whole).encode("utf-8", "replace"), 6, mtime=0))
        if has_bokeh():
            self._write("report.html", page.render(*whole))

    def path(self, name: str) -> Path:
        return of_job(self.folder, name, self.job)

    def _write(self, name: str, content: str | bytes) -> None:
        write(self.path(name), content)


def of_job(folder: Path, name: str, job: int) -> Path:
    """A file of the views of the folder's n-th job: "report.html", "report.2.html"."""
    stem, dot, kind = name.partition(".")
    return folder / f"{stem}{'' if job == 1 else f'.{job}'}{dot}{kind}"


def jobs(folder: Path) -> list[int]:
    """Those that have left views in a folder, the newest last."""
    pattern = re.compile(r"ledger(?:\.(\d+))?\.json$")
    return sorted(int(found[1] or 1) for path in folder.glob("ledger*.json") if (found := pattern.match(path.name)))


def newest(folder: Path) -> int:
    """The number of the last job in a folder; 0: none."""
    return max(jobs(folder), default=0)


def check_writable(folder: Path) -> None:
    """Make the folder, and a file in it that goes at once.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror or error}") from error


def write(path: Path, content: str | bytes) -> None:
    """A file, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def load(folder: Path, job: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(steps, graphs) of a job's dump. ValueError where the folder holds none."""
    path = of_job(folder, DATA, job)
    try:
        steps, graphs = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder} holds no dump that can be read: {path.name}: {error}") from error
    return steps, graphs


def save_measured(
    folder: Path, job: int, steps: list[dict[str, Any]], graphs: list[dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    """measured.json, and the page with the measured spans. OSError where they cannot be written."""
    write(of_job(folder, "measured.json", job), json.dumps(found))
    if has_bokeh():
        write(of_job(folder, "report.html", job), page.render(steps, graphs))


_told = False


def has_bokeh() -> bool:
    """Whether the page can be made; once says what it needs."""
    global _told
    found = importlib.util.find_spec("bokeh") is not None
    if not found and not _told:
        _told = True
        warnings.warn("zcompile: no report.html: it needs bokeh (pip install 'zcompile[report]')", stacklevel=6)
    return found
