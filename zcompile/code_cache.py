"""Inductor's cache of generated code, where this rank cannot use it: a folder that cannot be written, an entry that cannot be read.

Neither is a reason for a rank to stop while others wait for it. It goes on with a folder of its own, generates what it needs, and says so;
the graphs and their lists of collectives do not depend on the cache.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import TypeVar

from zcompile._torch_compat import code_cache_misses

T = TypeVar("T")
FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def keep_writable() -> None:
    """Leave the folder that the environment names if nothing can be written there; torch's own default is left alone."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _leave(f"cannot be written: {error.strerror}")


def loaded_or_made(make: Callable[[], T]) -> T:
    """`make()`, which looks into the cache first; once more with an empty one if what it found there could not be loaded."""
    before = code_cache_misses()
    try:
        return make()
    except Exception as error:
        if code_cache_misses() != before and not _cannot_be_loaded(error):  # the error is one of generating
            raise
        _leave(
            f"has an entry that cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        return make()


def _cannot_be_loaded(error: BaseException | None) -> bool:
    """Whether it comes of a library in the cache, which has entries of its own: cut short where whoever wrote it was killed."""
    while error is not None:
        # a missing file or compiler has an errno; what the dynamic loader says has none
        if isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno is None):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False


def _leave(reason: str) -> None:
    own = tempfile.mkdtemp(prefix="zcompile-inductor-")
    atexit.register(_remove, own, os.getpid())
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "?"
    print(f"zcompile: rank {rank}: {FOLDER}={os.environ.get(FOLDER, '')} {reason}; this rank generates its code in {own}",
          file=sys.stderr, flush=True)  # fmt: skip
    os.environ[FOLDER] = own


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
