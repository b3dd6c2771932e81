"""`python -m zcompile`: the command `zcompile`."""

import sys

from zcompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
