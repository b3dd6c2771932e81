"""`zcompile reproduce WHAT`: the model held to account. Prints a table and each criterion, held or missed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from zcompile.bench.command import rates
from zcompile.bench.network import NetworkError
from zcompile.cli import exit_on_sigterm, write_json
from zcompile.reproduce import collectives, paper, zeropp
from zcompile.reproduce.report import Report
from zcompile.shapes import SHAPES

WHAT = {
    "paper": "the base paper's ratios: 20B on 384 GCDs of Frontier",
    "zeropp": "ZeRO-3 and ZeRO++ on 384 V100",
    "collectives": "LUMI's acceptance values",
    "local": "every preset on this machine, over a shaped network (root)",
    "reach": "zcompile from one node to the whole of Frontier",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=WHAT, metavar="WHAT", help="; ".join(f"{name}: {text}" for name, text in WHAT.items())
    )
    parser.add_argument("--model", help="of local (default: gpt-4m) and reach (default: gpt-neox-20b)")
    parser.add_argument("--micro-batch", type=int, default=0, help="of reach: samples per rank (default: by model)")
    parser.add_argument("--steps", type=int, default=3, help="of local: measured steps (default: %(default)s)")
    parser.add_argument("--overlap", type=int, default=0, help="of local: buckets under way (default: %(default)s)")
    parser.add_argument(
        "--mbit",
        metavar="NODE,CLUSTER",
        action="append",
        help="of local: a regime, in Mbit/s; may be given again (default: 400,100 and 100,25)",
    )
    parser.add_argument("--native", action="store_true", help="of reach: the best plan has native formats only")
    parser.add_argument(
        "--plot", metavar="FOLDER", default="", help="of reach: draw the curves there; needs matplotlib"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there; - for standard output")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there, for a document")


def command(arguments: argparse.Namespace) -> int:
    """0: every criterion is held; 1: one is missed, or a run failed; 2: bad arguments."""
    errors = Console(stderr=True, soft_wrap=True)
    exit_on_sigterm()
    try:
        if arguments.model and arguments.model not in SHAPES:
            raise ValueError(f"--model {arguments.model!r}: valid: {', '.join(SHAPES)}")
        for name in ("steps", "overlap", "micro_batch"):
            if getattr(arguments, name) < (name == "steps"):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must not be smaller")
        report = _run(arguments, lambda text: errors.print(text, style="dim", markup=False))
    except (ValueError, NetworkError) as error:
        errors.print(f"zcompile reproduce: {error}", style="red", markup=False)
        return 2
    except RuntimeError as error:
        errors.print(f"zcompile reproduce: {error}", style="red", markup=False)
        return 1
    if not write_json(report.as_dict(), arguments.json) or arguments.json != "-":
        report.show(Console(width=None if sys.stdout.isatty() else 190, highlight=False))
    if arguments.markdown:
        Path(arguments.markdown).write_text(report.markdown() + "\n")
    return 0 if report.held else 1


def _run(arguments: argparse.Namespace, say: Callable[[str], None]) -> Report:
    if arguments.what == "local":
        from zcompile.reproduce import local

        regimes = [found for text in arguments.mbit or () if (found := rates(text))] or local.REGIMES
        return local.run(arguments.model or "gpt-4m", arguments.steps, arguments.overlap, regimes, say)
    if arguments.what == "reach":
        from zcompile.planner.search import PAPER
        from zcompile.reproduce import reach

        allowed = () if arguments.native else PAPER
        return reach.run(arguments.model or "gpt-neox-20b", arguments.micro_batch, allowed, arguments.plot)
    return {"paper": paper.run, "zeropp": zeropp.run, "collectives": collectives.run}[arguments.what]()
