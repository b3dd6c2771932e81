"""`zcompile diff A B`: where two dumps part, two ranks', two plans' or two commits'.

Both are read as text, in the order in which the compiler works: the plan, then each graph (joint, forward, backward) pass by pass. What
differs first is shown first, because what differs later follows from it. Names in a dump do not depend on the run, so that equal
programs have equal lines.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zcompile.cli import write_json

STAGES = ("joint", "forward", "backward", "inference")
_GRAPH = re.compile(r"graph(\d+)\.(\w+?)(?:\.(\d+))?$")
_RANK = re.compile(r"rank(\d+)(?:\.(\d+))?$")
_NUMBERED = re.compile(r"^ *\d+  ")
_LAST = 999
"""Behind the texts of all passes."""
_SHOWN = 40
"""Lines of the first difference that are printed without --full."""


@dataclass(frozen=True)
class Part:
    """One text of the two dumps: `a` and `b` are its lines, None where it is missing."""

    name: str
    a: tuple[str, ...] | None
    b: tuple[str, ...] | None

    @property
    def equal(self) -> bool:
        return self.a == self.b

    @cached_property
    def changes(self) -> list[str]:
        """A unified diff, without its heading."""
        found = difflib.unified_diff(self.a or (), self.b or (), n=2, lineterm="")
        return list(found)[2:]

    @property
    def added(self) -> int:
        return sum(line.startswith("+") for line in self.changes)

    @property
    def removed(self) -> int:
        return sum(line.startswith("-") for line in self.changes)

    @property
    def first(self) -> tuple[int, str, str]:
        """(number of the first line that differs, that line in a, in b); "" where one is at its end."""
        a, b = self.a or (), self.b or ()
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return at, a[at] if at < len(a) else "", b[at] if at < len(b) else ""

    def as_dict(self) -> dict[str, Any]:
        line, a, b = self.first
        missing = "a" if self.a is None else "b" if self.b is None else ""
        counts = {"removed": self.removed, "added": self.added}
        return {"part": self.name, "missing": missing, **counts, "first": {"line": line, "a": a, "b": b}}


@dataclass(frozen=True)
class Difference:
    """Of two dumps of one rank each: their parts, in the compiler's order; `note` says what else is to be known of the pair."""

    a: Path
    b: Path
    parts: tuple[Part, ...]
    note: str = ""

    @property
    def differing(self) -> list[Part]:
        return [part for part in self.parts if not part.equal]

    def as_dict(self) -> dict[str, Any]:
        return {
            "a": str(self.a),
            "b": str(self.b),
            "note": self.note,
            "equal": not self.differing,
            "parts": len(self.parts),
            "differing": [part.as_dict() for part in self.differing],
        }


def ranks(folder: Path) -> list[Path]:
    """The ranks' folders of a dump, or the folder itself if it is one rank's.

    Raises:
        ValueError: it holds no dump.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    children = [child for child in folder.iterdir() if child.is_dir()]
    if any(_GRAPH.match(child.name) for child in children):
        return [folder]
    found = {child: match for child in children if (match := _RANK.match(child.name))}
    if not found:
        raise ValueError(f"{folder} holds no dump: neither rank0, rank1, ... nor graph0.forward, ... is in it")
    return sorted(found, key=lambda child: (int(found[child][1]), int(found[child][2] or 1)))


def compare(a: Path, b: Path, note: str = "") -> Difference:
    """Two dumps of one rank each (folders that hold graph0.forward, ...)."""
    ours, theirs = _texts(a), _texts(b)
    names = sorted({*ours, *theirs})
    parts = []
    for key in names:
        x, y = ours.get(key), theirs.get(key)
        parts.append(Part(_title(key), x, y))
    return Difference(a, b, tuple(parts), note)


Key = tuple[int, int, int, int, str]
"""Sorts as the compiler works: (compilation, stage, how often it came to that stage, number of the text, name)."""


def _title(key: Key) -> str:
    number, stage, again, file, name = key
    graph = f"graph {number} {STAGES[stage]}{f' ({again})' if again > 1 else ''}"
    return f"{graph}, {name}" if file >= 0 else f"{graph}, plan"


def _texts(folder: Path) -> dict[Key, tuple[str, ...]]:
    found: dict[Key, tuple[str, ...]] = {}
    for place in folder.iterdir():
        match = _GRAPH.match(place.name)
        if match is None or not place.is_dir() or match[2] not in STAGES:
            continue
        where = (int(match[1]), STAGES.index(match[2]), int(match[3] or 1))
        for file in place.glob("*.txt"):
            number, _, name = file.stem.partition("-")
            if number.isdigit():
                key: Key = (*where, int(number), name)
                found[key] = _program(file)
            elif file.name == "summary.txt":
                lines = file.read_text(encoding="utf-8").split("\n")
                collectives = _section(lines, "collectives, in order")[1:]
                plan, last = (*where, -1, ""), (*where, _LAST, "collectives, in order")
                found[plan] = tuple(_section(lines, "plan "))
                found[last] = tuple(_NUMBERED.sub("", line) for line in collectives)
    return found


def _program(file: Path) -> tuple[str, ...]:
    """The nodes' lines, which follow the first empty one, without their numbers: one node more is one line more."""
    lines = file.read_text(encoding="utf-8").split("\n")
    begin = lines.index("") + 1 if "" in lines else 0
    return tuple(_NUMBERED.sub("", line) for line in lines[begin:] if line)


def _section(lines: Sequence[str], start: str) -> list[str]:
    """The lines from the one that begins with `start` to the next empty one."""
    begin = next((i for i, line in enumerate(lines) if line.startswith(start)), len(lines))
    end = next((i for i in range(begin, len(lines)) if not lines[i]), len(lines))
    return list(lines[begin:end])


def pairs(paths: Sequence[Path]) -> list[tuple[Path, Path, str]]:
    """What to compare, and what is to be said of it: two dumps rank by rank, or the ranks of one with its first.

    Raises:
        ValueError: there is nothing to compare.
    """
    if len(paths) == 1:
        found = ranks(paths[0])
        if len(found) < 2:
            raise ValueError(
                f"{paths[0]} holds one rank's dump; give another dump to compare it with, or dump every rank (dump_ranks='all')"
            )
        return [(found[0], other, "") for other in found[1:]]
    a, b = (ranks(path) for path in paths)
    if paths[0] in a and paths[1] in b:
        return [(a[0], b[0], "")]  # one rank's folder each, by name
    by_name = {path.name: path for path in b}
    both = [(path, by_name[path.name], "") for path in a if path.name in by_name]
    if not both and (len(a) == 1 or len(b) == 1):
        return [(a[0], b[0], f"they have no rank in common: {a[0].name} is compared with {b[0].name}")]
    if not both:
        raise ValueError(
            f"{paths[0]} and {paths[1]} have no rank in common: {', '.join(p.name for p in a)} and {', '.join(p.name for p in b)}"
        )
    return both


def show(found: Iterable[Difference], console: Console, full: bool) -> None:
    for difference in found:
        differing = difference.differing
        if difference.note:
            console.print(difference.note, style="yellow", markup=False, soft_wrap=True)
        if not differing:
            console.print(
                f"[green]equal[/green]  {escape(f'{difference.a}  {difference.b}')}: {len(difference.parts)} texts",
                soft_wrap=True,
            )
            continue
        first = differing[0]
        console.print(
            f"[red]differ[/red]  {escape(f'{difference.a}  {difference.b}')}: {len(differing)} of {len(difference.parts)} texts; "
            f"they part at [bold]{escape(first.name)}[/bold]",
            soft_wrap=True,
        )
        _show_part(first, console, full)
        others = differing[1:]
        collectives = next((part for part in others if part.name.endswith("collectives, in order")), None)
        if collectives is not None:
            console.print(f"\n[bold]{escape(collectives.name)}[/bold] part at number {collectives.first[0]}")
            _show_part(collectives, console, full, most=8)
        if others:
            table = Table(
                "text",
                "removed",
                "added",
                title="what differs after that",
                title_justify="left",
                box=None,
                pad_edge=False,
            )
            for part in others:
                missing = "only in b" if part.a is None else "only in a" if part.b is None else ""
                table.add_row(escape(part.name), missing or str(part.removed), "" if missing else str(part.added))
            console.print()
            console.print(table)


def _show_part(part: Part, console: Console, full: bool, most: int = _SHOWN) -> None:
    if part.a is None or part.b is None:
        console.print(f"  only in {'b' if part.a is None else 'a'}")
        return
    lines = part.changes if full else part.changes[:most]
    colours = {"-": "red", "+": "green", "@": "cyan"}
    for line in lines:
        console.print(
            f"  {line.rstrip()}", style=colours.get(line[:1], "dim"), markup=False, highlight=False, soft_wrap=True
        )
    if len(lines) < len(part.changes):
        console.print(f"  ... {len(part.changes) - len(lines)} more lines; --full shows all", style="dim")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="a dump, or one rank's folder in it")
    parser.add_argument(
        "b", type=Path, metavar="B", nargs="?", help="another one; without it A's ranks are compared with its first"
    )
    parser.add_argument("--full", action="store_true", help="all lines of the first difference")
    parser.add_argument(
        "--json", metavar="FILE", help="write the result there ('-': standard output) instead of printing it"
    )


def command(arguments: argparse.Namespace) -> int:
    """0: equal; 1: they differ; 2: bad arguments."""
    try:
        paths = [path for path in (arguments.a, arguments.b) if path is not None]
        found = [compare(*pair) for pair in pairs(paths)]
    except (ValueError, OSError) as error:
        print(f"zcompile diff: {error}", file=sys.stderr)
        return 2
    equal = not any(each.differing for each in found)
    if not write_json({"equal": equal, "pairs": [each.as_dict() for each in found]}, arguments.json):
        show(found, Console(highlight=False, width=None if sys.stdout.isatty() else 160), arguments.full)
    return 0 if equal else 1
