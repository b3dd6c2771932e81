"""`zcompile measured DIR TRACE`: what a real step took, beside what the dump in DIR expected of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zcompile.cli import write_json
from zcompile.debug.matching import Measured, match
from zcompile.debug.profile import read
from zcompile.debug.tables import seconds


def table(step: Mapping[str, Any], found: Measured) -> Table:
    """Expected beside measured: the step, computing, and what each level is waited for."""
    made = Table(
        "", "expected", "measured", title=f"{step['title']}: the last step in the trace", title_justify="left", box=None
    )
    for column in made.columns[1:]:
        column.justify = "right"
    made.add_row("step", seconds(max(step["spans"]["end"], default=0.0)), seconds(found.seconds))
    names = [level["level"] for level in step["levels"]]
    expected, measured = (_waits(step, spans) for spans in (step["spans"], found.spans))
    made.add_row("waiting for transfers", *(seconds(sum(each.values())) for each in (expected, measured)))
    for name in names:
        made.add_row(f"  for {name}", *(seconds(each.get(name, 0.0)) for each in (expected, measured)))
    return made


def _waits(step: Mapping[str, Any], spans: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """level -> seconds in which the graphs of one run wait for its hops; "": for hops that are not known."""
    found: dict[str, float] = {}
    for kind, hop, begin, end in zip(*(spans[name] for name in ("kind", "hop", "begin", "end")), strict=True):
        if kind == "wait":
            level = step["hops"][hop]["level"] if hop >= 0 else ""
            found[level] = found.get(level, 0.0) + end - begin
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a dump of the job")
    parser.add_argument(
        "trace", type=Path, metavar="TRACE", help="what torch.profiler exported in it (export_chrome_trace)"
    )
    parser.add_argument(
        "--job",
        type=int,
        metavar="N",
        help="which of the jobs that have dumped into DIR, from 1 on (default: the newest)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result there ('-': standard output) instead of printing it"
    )


def command(arguments: argparse.Namespace) -> int:
    """0: matched; 1: little or nothing was; 2: bad arguments. Writes DIR/measured.json, and the measured spans into DIR/report.html."""
    from zcompile.debug import views

    try:
        job = _job(arguments)
        steps, graphs = views.load(arguments.folder, job)
        events = read(arguments.trace)
    except ValueError as error:
        print(f"zcompile measured: {error}", file=sys.stderr)
        return 2
    found = []
    for step in steps:
        own = {graph["stage"]: graph for graph in graphs if graph["step"] == step["number"]}
        result = match(events, step, own)
        if result.time:
            step["measured"] = result.as_dict()
        found.append(result)
    try:
        views.save_measured(arguments.folder, job, steps, graphs, [each.as_dict() for each in found])
    except OSError as error:
        print(f"zcompile measured: {arguments.folder} cannot be written to: {error.strerror or error}", file=sys.stderr)
        return 2
    if not write_json([each.as_dict() for each in found], arguments.json):
        _show(steps, found, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    ran = [(step["title"], each) for step, each in zip(steps, found, strict=True) if each.time]
    wrong = ", ".join(title for title, each in ran if each.little) or (
        "" if ran else "no graph of the dump is in the trace"
    )
    if wrong:
        print(
            f"zcompile measured: LITTLE OR NOTHING WAS MATCHED ({wrong}): do not read the measured lanes as this program's",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def _show(steps: Sequence[Mapping[str, Any]], found: Sequence[Measured], console: Console) -> None:
    for step, each in zip(steps, found, strict=True):
        if each.time:
            console.print(table(step, each))
            console.print(
                f"matched: {each.matched_hops} of {each.hops} launches and waits, {each.matched_operations} of {each.operations} "
                f"operations; {100 * each.share:.0f} % of the graphs' time",
                style="red bold" if each.little else "green",
            )
        for note in each.notes:
            console.print(f"  {note}", style="yellow", markup=False, soft_wrap=True)


def _job(arguments: argparse.Namespace) -> int:
    """The job that is asked for; says which it is where the folder holds several."""
    from zcompile.debug import views

    there = views.jobs(arguments.folder)
    if arguments.job is not None and arguments.job not in there:
        raise ValueError(f"--job {arguments.job}: {arguments.folder} holds {', '.join(map(str, there)) or 'none'}")
    job: int = arguments.job or max(there, default=1)
    if len(there) > 1:
        place = views.of_job(arguments.folder, views.DATA, job)
        print(
            f"zcompile measured: of {len(there)} jobs in {arguments.folder} the {place.name} of job {job}",
            file=sys.stderr,
        )
    return job
