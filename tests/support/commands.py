"""zcompile's commands, as a shell would call them."""

from __future__ import annotations

import contextlib
import io
import itertools

import torch
from support.spawn import Pool

from zcompile.backend import Compilation
from zcompile.cli import main
from zcompile.debug import dump

TIMEOUT = 300.0  # the machine may be busy with other things


def command(_: int, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a zcompile command, in a process with no group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()
    Compilation._numbers = itertools.count()
    dump._places.clear()
    dump._meant.clear()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


def run(paper: Pool, *arguments: str) -> tuple[int, str, str]:
    return paper.run(command, *arguments, timeout=TIMEOUT)[0]
