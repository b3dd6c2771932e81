"""`zcompile kernels`: compile every Triton kernel ahead of time, on a machine without a GPU, and print what came out."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from zcompile.cli import write_json
from zcompile.kernels.aot import TARGETS, compile_kernel
from zcompile.kernels.catalogue import Case, Variant, catalogue

ISSUE = 110 * 1.7e9
"""Vector instructions that one GCD of an MI250X issues per second: 110 CU x 1.7 GHz, each a wave of 64 lanes per cycle."""
MEMORY = 1.6
"""TB/s of its memory: a kernel whose arithmetic allows less is limited by arithmetic."""


def inspect(variant: Variant, arch: str, large: bool = False) -> dict[str, Any]:
    """Compile one kernel for one architecture.

    Args:
        large: as for tensors of more than 2 GB.

    Returns:
        What the text says; "error" and nothing else of it, if it does not compile.
    """
    row: dict[str, Any] = {"kernel": variant.name, "arch": arch, "error": ""}
    case = variant.make(arch)
    call = case.call
    begin = time.perf_counter()
    try:
        compiled = compile_kernel(
            call.kernel, call.signature, call.all_constants, arch, warps=call.warps, small_pointers=not large, stages=1
        )
    except Exception as error:  # whatever a compiler raises is what this command is there to report
        return row | {"error": f"{type(error).__name__}: {error}"}
    facts = compiled.facts()
    row |= {
        "seconds": time.perf_counter() - begin,
        "vgpr": facts.vgpr,
        "agpr": facts.agpr,
        "spills": facts.spills,
        "scratch": facts.scratch,
        "lds": facts.lds,
        "widest_load": facts.widest_load,
        "widest_store": facts.widest_store,
        "narrow_stores": facts.narrow_stores,
    }
    return row | _arithmetic(case, arch, facts.valu)


def _arithmetic(case: Case, arch: str, valu: int | None) -> dict[str, Any]:
    """Vector instructions per 64 values, and on gfx90a the memory traffic in TB/s that they allow if nothing else takes time.

    A static count: of two ways that a tile may take both are counted, and of a loop nothing can be said.
    """
    constants = case.call.constants
    if valu is None or constants.get("PARTS") == 0:
        return {"valu_per_64": None, "roof_tb_s": None}
    per_64 = valu * case.call.warps * 64 / (constants["ROWS"] * constants["BLOCK"])
    roof = ISSUE / per_64 * case.traffic * 64 * 1e-12 if arch == "gfx90a" else None
    return {"valu_per_64": per_64, "roof_tb_s": roof}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--large", action="store_true", help="as for tensors of more than 2 GB")
    parser.add_argument(
        "--json", metavar="FILE", help="write the result there ('-': standard output) instead of printing a table"
    )


def command(arguments: argparse.Namespace) -> int:
    unknown = [arch for arch in arguments.arch if arch not in TARGETS]
    if unknown:
        print(f"zcompile kernels: unknown arch {', '.join(unknown)}; valid: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    variants = [variant for variant in catalogue() if arguments.kernel in variant.name]
    if not variants:
        names = ", ".join(variant.name for variant in catalogue())
        print(f"zcompile kernels: no kernel has {arguments.kernel!r} in its name; there are: {names}", file=sys.stderr)
        return 2
    rows = [
        inspect(variant, arch, arguments.large)
        for variant in variants
        for arch in arguments.arch
        if arch in variant.archs()
    ]
    failed = [row for row in rows if row["error"] or row["spills"] or row["scratch"]]
    if not write_json(rows, arguments.json):
        _print(rows)
    for row in failed:
        why = row["error"] or f"{row['spills']} registers spilled, {row['scratch']} bytes of scratch"
        print(f"zcompile kernels: {row['kernel']} on {row['arch']}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(caption=f"roof: what arithmetic allows on one GCD of an MI250X, whose memory moves {MEMORY} TB/s")
    for column in ("kernel", "arch"):
        table.add_column(column, no_wrap=True)
    for column in (
        "vgpr",
        "spills",
        "LDS",
        "load",
        "store",
        "narrow",
        "VALU/64",
        "roof TB/s",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        if row["error"]:
            table.add_row(row["kernel"], row["arch"], "[red]does not compile[/red]")
            continue
        roof = row["roof_tb_s"]
        shown = _number(roof, ".2f")
        table.add_row(
            row["kernel"],
            row["arch"],
            _number(row["vgpr"]),
            _number(row["spills"]),
            _number(row["lds"]),
            _number(row["widest_load"]),
            _number(row["widest_store"]),
            _number(row["narrow_stores"]),
            _number(row["valu_per_64"], ".1f"),
            f"[yellow]{shown}[/yellow]" if roof is not None and roof < MEMORY else shown,
        )
    Console().print(table)


def _number(value: float | None, form: str = "d") -> str:
    return "-" if value is None else format(value, form)
