"""The command `zcompile`: each subcommand lives in the module that does its work, and is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "verify": (
        "zcompile.verify",
        "train a small model under every preset and compare it with DDP and with the eager reference",
    ),
}
"""name -> (module with `add_arguments(parser)` and `command(arguments) -> exit code`, one line of help)"""


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
    arguments = parser.parse_args(given)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
