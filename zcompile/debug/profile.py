"""A trace that torch.profiler exported, as events in order."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """One complete event of the trace; seconds."""

    name: str
    kind: str
    thread: tuple[Any, Any]
    begin: float
    end: float
    link: Any = None
    """What a device's kernel and the call that launched it have in common."""


def read(path: Path) -> list[Event]:
    """A trace that `torch.profiler` exported (export_chrome_trace), .json or .json.gz.

    Raises:
        ValueError: it is no such file.
    """
    try:
        raw = path.read_bytes()
        data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        events = data["traceEvents"] if isinstance(data, dict) else data
        return sorted(
            (_event(each) for each in events if each.get("ph") == "X"), key=lambda event: (event.begin, -event.end)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no trace of torch.profiler: {type(error).__name__}: {error}") from error


def _event(raw: Mapping[str, Any]) -> Event:
    begin = float(raw["ts"]) / 1e6
    link = raw.get("args", {}).get("External id")
    return Event(
        str(raw["name"]),
        str(raw.get("cat", "")),
        (raw.get("pid"), raw.get("tid")),
        begin,
        begin + float(raw.get("dur", 0)) / 1e6,
        link,
    )


def outermost(events: Iterable[Event]) -> list[Event]:
    """Events of one thread, in order, that are inside no other."""
    found: list[Event] = []
    for event in events:
        if not found or event.begin >= found[-1].end:
            found.append(event)
    return found
