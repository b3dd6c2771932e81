"""Where another thread of this process is, read without a frame object of its.

A frame object that is made of a function that runs on is a danger where torch.compile evaluates functions: a rank whose watch walked the
main thread's frames once a second died in it by a segmentation fault. The interpreter's own dump for crashes makes none, and nothing else
runs while it writes.
"""

from __future__ import annotations

import faulthandler
import os
import re
import threading

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_CALL = re.compile(r'  File "(.*)", line (\d+) in ')


def calls(thread: int) -> list[tuple[str, int]]:
    """(file, line) of each call on a thread's stack, innermost first, at most a hundred (the dump's limit); [] if the thread is over.

    Args:
        thread: its `ident`.
    """
    with open(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return of_text(file.read().decode("ascii", "replace"), thread)


def of_text(text: str, thread: int) -> list[tuple[str, int]]:
    """The same from the dump of all threads."""
    found, inside = [], False
    for line in text.splitlines():
        head = _THREAD.match(line)
        if head is not None:
            inside = int(head[1], 16) == thread
        elif inside and (call := _CALL.match(line)) is not None:
            found.append((call[1], int(call[2])))
    return found


def main_thread() -> list[tuple[str, int]]:
    """`calls` of the main thread."""
    return calls(threading.main_thread().ident or 0)
