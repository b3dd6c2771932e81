"""The command `zcompile`: each subcommand lives in the module that does its work, and is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "verify": (
        "zcompile.verify",
        "train a small model under every preset and compare it with DDP and with the eager reference",
    ),
    "trace": (
        "zcompile.trace",
        "compile a named model for a machine that exists on paper: no GPU, no allocation; seconds, memory, bytes per level",
    ),
    "dump": (
        "zcompile.debug.command",
        "what the compiler did to a model, for any machine, without one: programs, diffs, ledger, timeline, a page to look at",
    ),
    "diff": (
        "zcompile.debug.compare",
        "where two dumps part: two ranks, two plans, two commits",
    ),
    "measured": (
        "zcompile.debug.measured",
        "a torch.profiler trace of a dumped job's steps beside what was expected of them, in the dump's page",
    ),
    "plan": (
        "zcompile.planner.command",
        "which placements, formats and buckets, and what a step costs, on a machine that need not be here: table, formulas, pictures",
    ),
    "calibrate": (
        "zcompile.calibrate",
        "measure this machine's levels and computing, and write the file that a topology can be made of",
    ),
    "reproduce": (
        "zcompile.reproduce.command",
        "the cost model beside published measurements and runs on this machine: paper, zeropp, collectives, local, reach",
    ),
    "bytes": (
        "zcompile.compare_bytes",
        "bytes per level of a small GPT under native and quantised plans, beside FSDP2 and HSDP, counted on eight local processes",
    ),
    "bench": (
        "zcompile.bench.command",
        "train with zcompile's plans, FSDP2, HSDP, DDP and DeepSpeed side by side: step time, bytes, memory, loss; who is faster",
    ),
    "soak": (
        "zcompile.soak",
        "start a short job again and again, each time from its last checkpoint: all pass, and the bits are those of a run without a stop",
    ),
    "kernels": (
        "zcompile.kernels_command",
        "compile every kernel for every architecture, without a GPU: registers, spills, widths, and what arithmetic allows",
    ),
    "kernel-bench": (
        "zcompile.kernel_bench",
        "time the quantisers beside a copy of the memory, eager torch and torch.compile, in one run",
    ),
    "doctor": (
        "zcompile.doctor.command",
        "look at a job before it trains: launcher, core binding, topology, network variables, versions, communicators one by one",
    ),
    "overhead": (
        "zcompile.overhead",
        "one process, 1x1x1, against plain torch.compile: step time and memory, side by side",
    ),
}
"""name -> (module with `add_arguments(parser)` and `command(arguments) -> exit code`, one line of help)"""


def write_json(result: Any, target: str | None) -> bool:
    """Write `result` to the file `target` ("-": standard output); False if there is none. SystemExit where it cannot be written."""
    if target is None:
        return False
    text = json.dumps(result, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        try:
            Path(target).write_text(text)
        except OSError as error:
            print(f"zcompile: --json {target} cannot be written: {error.strerror or error}", file=sys.stderr)
            raise SystemExit(2) from error
    return True


def exit_on_sigterm() -> None:
    """A command that is ended from outside still takes down what it has started: its ranks, its network."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="zcompile", description="Hierarchical ZeRO as a torch.compile backend.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if given[:1] == [name]:
            found = importlib.import_module(module)
            found.add_arguments(command)
            command.set_defaults(run=found.command)
            if getattr(found, "TAKES_MORE", False) and "--" in given:  # what follows it is not for us
                at = given.index("--")
                command.set_defaults(more=given[at + 1 :])
                given = given[:at]
    arguments = parser.parse_args(given)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
