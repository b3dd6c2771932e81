"""What every reproduction returns: a table, a verdict, and notes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

Cell = str | float | int | None


@dataclass
class Report:
    """One reproduction.

    Attributes:
        title: what is held against what.
        columns, rows: of the table; numbers are formatted when they are shown.
        checks: (what, found, bound, held) of each criterion.
        notes: choices, sources, and why what is missed is missed.
        data: whatever else the JSON should have.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    checks: list[tuple[str, str, str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        return all(held for *_, held in self.checks)

    def check(self, what: str, found: float, bound: float, unit: str = "%") -> None:
        """A criterion: `found` may be at most `bound`; both parts, shown in percent."""
        scale = 100 if unit == "%" else 1
        self.checks.append((what, f"{found * scale:.1f} {unit}", f"{bound * scale:g} {unit}", found <= bound))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "held": self.held}

    def show(self, console: Console) -> None:
        table = Table(title=self.title, title_justify="left", show_edge=False, pad_edge=False)
        for number, head in enumerate(self.columns):
            table.add_column(head, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(text(cell) for cell in row))
        console.print(table)
        for what, found, bound, held in self.checks:
            console.print(
                f"{'held  ' if held else 'MISSED'} {what}: {found} (bound {bound})", style="" if held else "red"
            )
        for note in self.notes:
            console.print(f"- {note}", style="dim")

    def markdown(self) -> str:
        """The same for the docs."""
        lines = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        lines += [f"| {' | '.join(text(cell) for cell in row)} |" for row in self.rows]
        lines += [
            "",
            *(
                f"* {'held' if held else '**missed**'}: {what}: {found} (bound {bound})"
                for what, found, bound, held in self.checks
            ),
        ]
        return "\n".join([*lines, *(f"* {note}" for note in self.notes)])


def text(cell: Cell) -> str:
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"
