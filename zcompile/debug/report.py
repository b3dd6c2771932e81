"""Compile times for people: which graphs there are, where their code came from, and how long each step took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def compile_report(programs: Iterable[Any]) -> str:
    """A table of `zcompile.program.Program`s: one line each, and a line of totals. Wall seconds on this rank.

    `code` says where the code came from: "generated" by this process, "loaded" from the cache that another rank or an earlier run filled,
    "interpreted" without code generation. `wait` is inside `code s`: a rank that loads waits for the one that generates.
    """
    rows = [("graph", "code", "collectives", "parameters", "passes s", "code s")]
    passes = code = 0.0
    made: dict[str, int] = {}
    for program in programs:
        in_passes = sum(s for name, s in program.seconds.items() if name != "codegen")
        in_code = program.seconds.get("codegen", 0.0)
        passes, code = passes + in_passes, code + in_code
        made[program.code] = made.get(program.code, 0) + 1
        names = {name for entry in program.collectives for name in entry.parameters}
        rows.append(
            (
                program.name,
                program.code,
                str(len(program.collectives)),
                str(len(names)),
                f"{in_passes:.2f}",
                f"{in_code:.2f}",
            )
        )
    total = ", ".join(f"{count} {how}" for how, count in made.items()) or "nothing compiled"
    rows.append(("total", total, "", "", f"{passes:.2f}", f"{code:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
