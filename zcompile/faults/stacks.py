"""Where the main thread of this process is, read from another one without a frame object of its.

A frame object that is made of a function that runs on is a danger where torch.compile evaluates functions: a rank whose watch walked the
main thread's frames once a second died in it by a segmentation fault. The interpreter's own dumps for crashes make none, and no Python code
runs while they write.

Note [Threads that begin]
    Python 3.11 puts a thread into the list of all threads before it has filled in what a dump reads of it. The threads of torch that come
    to hold the interpreter's lock (one that drops the last use of a tensor does) enter the list before they hold it, so beside a dump of
    all threads, which then ends the process by a segmentation fault. There, the main thread alone is dumped, by the function that
    faulthandler uses for that. Versions before and after it fill in first (read in 3.10.13, 3.12.1 and 3.13.0).
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import sys
import threading
from typing import IO, Any

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)|Stack \(")
_CALL = re.compile(r'  File "(.*)", line (\d+) in ')


def main_thread() -> list[tuple[str, int]]:
    """(file, line) of each call on the main thread's stack, innermost first, at most a hundred (the dumps' limit)."""
    with open(os.memfd_create("stacks"), "w+b") as file:
        _dump(file)
        file.seek(0)
        return of_text(file.read().decode("ascii", "replace"), threading.main_thread().ident or 0)


def of_text(text: str, thread: int) -> list[tuple[str, int]]:
    """The same of a thread, by its `ident`, from a dump of all threads or of that one alone; [] if it is not there."""
    found, inside = [], False
    for line in text.splitlines():
        head = _THREAD.match(line)
        if head is not None:
            inside = head[1] is None or int(head[1], 16) == thread
        elif inside and (call := _CALL.match(line)) is not None:
            found.append((call[1], int(call[2])))
    return found


_ALONE = sys.version_info[:2] == (3, 11)
"""Whether no other thread may be dumped. See Note [Threads that begin]."""
_API = ctypes.PyDLL(None)
"""The interpreter's functions, called while its lock is held; an object of our own, as one sets here what they take and return."""
_main: list[int] = []
"""The address of the interpreter's state of the main thread, which lives as long as the process; nothing if it is not known."""


def _learn_main() -> None:
    """Called by the main thread: at import, and by the thread that a fork makes the main one."""
    _main.clear()
    if threading.current_thread() is threading.main_thread():
        _main.append(_API.PyThreadState_Get())


def _dump(file: IO[Any]) -> None:
    """Write a dump that has the main thread's calls in it."""
    if not _ALONE:
        faulthandler.dump_traceback(file, all_threads=True)
    elif _main:
        _API._Py_DumpTraceback(file.fileno(), _main[0])


if _ALONE and hasattr(_API, "_Py_DumpTraceback"):  # else reports name no line
    _API.PyThreadState_Get.restype = ctypes.c_void_p
    _API._Py_DumpTraceback.argtypes, _API._Py_DumpTraceback.restype = [ctypes.c_int, ctypes.c_void_p], None
    _learn_main()
    os.register_at_fork(after_in_child=_learn_main)
