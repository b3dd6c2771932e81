"""`zcompile dump`: what the compiler does to a model, for any machine and number of ranks, in one process without a GPU.

zcompile dump my_model:make --topology frontier:48 --plan zero_topo --out DIR     make() -> (model, inputs)
zcompile dump gpt-neox-20b --out DIR                                              a named shape, on the meta device
zcompile dump train.py --topology 2x2x2 --out DIR -- --steps 3                    a script, stopped after its first step
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from zcompile import paper
from zcompile.cli import write_json
from zcompile.debug import tables, text
from zcompile.debug.dump import Place, collecting
from zcompile.debug.views import check_writable
from zcompile.plan import Plan
from zcompile.shapes import SHAPES, Decoder
from zcompile.times import tokens_in
from zcompile.topology import Topology

TAKES_MORE = True
"""What follows "--" is for the script."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    parser.epilog, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    option(
        "model",
        metavar="MODEL",
        help=f"module:function or file.py:function that returns (model, inputs); a script; {', '.join(SHAPES)}",
    )
    option("--topology", default="frontier:48", help="a machine or sizes, fastest first (default: %(default)s)")
    option("--plan", help="a preset (default: zero_topo, or what a script says)")
    option(
        "--out",
        type=lambda text: Path(os.path.abspath(text)),  # a script may change the working directory
        metavar="DIR",
        help="folder for the dump; without it the tables are printed and nothing is kept",
    )
    option(
        "--compute-dtype",
        choices=list(DTYPES),
        help="dtype in which weights are gathered (default: the model's; bf16 for named shapes)",
    )
    option("--overlap", type=int, help="buckets in flight (default: 2, or what a script says)")
    option(
        "--keep",
        type=int,
        metavar="BYTES",
        help="gathered weights that a forward leaves for its backward (default: none)",
    )
    option("--memory", type=int, metavar="BYTES", help="bound for what is in flight (default: none)")
    option(
        "--tokens",
        type=int,
        metavar="N",
        help="of a micro-batch, as the schedule is told (default: as the inputs have, or what a script says)",
    )
    option("--micro-batches", type=int, default=1, metavar="N", help="of a step (default: %(default)s)")
    option("--sequence", type=int, metavar="N", help="tokens per sample of a named shape (default: its own)")
    option("--eval", action="store_true", help="a forward without gradient instead of a step")
    option("--rank", type=int, default=0, metavar="N", help="whose programs (default: %(default)s)")
    option("--sort", choices=tables.SORTS, default="exposed", help="order of the parameters (default: %(default)s)")
    option(
        "--rows", type=int, default=20, metavar="N", help="parameters and hops that are printed (default: %(default)s)"
    )
    option("--json", metavar="FILE", help="write the ledger there ('-': standard output) instead of printing it")
    parser.set_defaults(more=[])


def command(arguments: argparse.Namespace) -> int:
    """0: dumped; 1: the script, the model or the dump failed, or no step was made; 2: bad arguments."""
    begin = time.perf_counter()
    try:
        _check(arguments)
        run = _prepare(arguments)
        _prepare_folder(arguments.out)  # the last thing: a mistake in the others leaves no folder
        with collecting() as steps:
            stepped = run()
    except (ValueError, TypeError) as error:
        if in_users_code(error):
            raise  # with its traceback, which ends with exit code 1
        print(f"zcompile dump: {error}", file=sys.stderr)
        return 2
    if not steps:
        print(
            f"zcompile dump: {arguments.model} compiled nothing: is its model wrapped by hierarchical_zero, and run?",
            file=sys.stderr,
        )
        return 1
    counted = [step for step in steps if step.count()]
    place = None if arguments.out is None else Place.made(str(arguments.out), arguments.rank)
    if counted and place and place.views:
        place.views.update(counted)
    found = [step.as_dict() for step in steps]
    if not stepped:
        print(
            f"zcompile dump: {arguments.model} ended before an optimizer's step: this is what it had compiled",
            file=sys.stderr,
        )
    code = 0 if stepped else 1
    if write_json(found, arguments.json):
        return code
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for each in found:
        console.print(tables.ledger(each, arguments.rows, arguments.sort))
    if len(found) > 1 and len({each["topology"] for each in found}) == 1:
        console.print(tables.together(found))
    if arguments.out is None:
        return code
    if broken := next((step.broken for step in steps if step.broken), ""):
        print(f"zcompile dump: what is in {arguments.out} is not all: {broken}", file=sys.stderr)
        return 1
    if place is not None:
        report = place.views and place.views.path("report.html")
        where = f"open {report} in a browser" if report and report.exists() else f"text in {place.root}"
        console.print(f"{escape(where)}  ({time.perf_counter() - begin:.1f} s)", soft_wrap=True)
    return code


def in_users_code(error: BaseException) -> bool:
    """Whether an error came up through code that is neither ours nor torch's nor Python's own: a user wants to see where."""
    library = sysconfig.get_path("stdlib") + os.sep
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        text.is_users(file) and not file.startswith("<") and (not file.startswith(library) or "-packages" in file)
        for file in files
    )


def _check(arguments: argparse.Namespace) -> None:
    for name in ("micro_batches", "rows"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be 1 or more")
    is_script = arguments.model.endswith(".py")
    if arguments.more and not is_script:
        raise ValueError(f"arguments {' '.join(arguments.more)!r}: only a script takes any")
    own = [name for name in ("micro_batches", "eval", "sequence") if getattr(arguments, name) not in (None, 1, False)]
    if is_script and own:
        raise ValueError(f"--{own[0].replace('_', '-')}: a script says that itself")
    if arguments.sequence is not None and arguments.model not in SHAPES:
        raise ValueError(f"--sequence {arguments.sequence}: is for named shapes ({', '.join(SHAPES)})")


def _prepare(arguments: argparse.Namespace) -> Callable[[], bool]:
    """Everything that can be wrong with the arguments is found here; returns what runs the model, and says whether it made a step."""
    topology = Topology.parse(arguments.topology)
    settings: dict[str, Any] = {"dump": str(arguments.out or ""), "dump_ranks": str(arguments.rank), "codegen": False}
    for name in ("overlap", "memory", "keep", "tokens"):
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)
    if arguments.compute_dtype is not None:
        settings["compute_dtype"] = DTYPES[arguments.compute_dtype]
    if arguments.plan is not None:
        settings["plan"] = arguments.plan if arguments.plan == "auto" else Plan.parse(arguments.plan)
    if arguments.model.endswith(".py"):
        path = Path(arguments.model)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such script")
        return lambda: paper.script(path, arguments.more, topology, arguments.rank, settings)
    settings = {"plan": "zero_topo", **settings}

    def run() -> bool:
        model, inputs = _model(arguments, settings)
        paper.dump(
            model,
            inputs,
            topology,
            rank=arguments.rank,
            micro_batches=arguments.micro_batches,
            backward=not arguments.eval,
            **{"tokens": tokens_in(inputs), **settings},
        )
        return True

    if arguments.model not in SHAPES:
        paper.target(arguments.model)  # that it is there is known before anything is built
    return run


def _prepare_folder(folder: Path | None) -> None:
    if folder is not None:
        try:
            check_writable(folder)
        except ValueError as error:
            raise ValueError(f"--out {error}") from error


def _model(arguments: argparse.Namespace, settings: dict[str, Any]) -> tuple[nn.Module, Any]:
    if arguments.model in SHAPES:
        shape = SHAPES[arguments.model]
        length = arguments.sequence or shape.sequence
        if not 1 <= length <= shape.sequence:
            raise ValueError(f"--sequence {length}: {arguments.model} takes 1 to {shape.sequence}")
        settings.setdefault("compute_dtype", torch.bfloat16)
        with torch.device("meta"):
            return Decoder(shape), torch.zeros(1, length + 1, dtype=torch.int64)
    found = paper.target(arguments.model)()
    if not (isinstance(found, (tuple, list)) and len(found) == 2 and isinstance(found[0], nn.Module)):
        kind = f"a {type(found).__name__}" if not isinstance(found, (tuple, list)) else f"{len(found)} things"
        raise TypeError(
            f"model {arguments.model!r}: must return (model, inputs), a torch.nn.Module first; it returned {kind}"
        )
    return found[0], found[1]
