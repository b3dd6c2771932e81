"""Words for people that every view uses: dtypes, formats, bytes, lists of parameters. The same in text, on the page and in errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zcompile.passes.nodes import Collective

DTYPES = {
    "float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8",
}  # fmt: skip


def dtype(value: torch.dtype | str) -> str:
    """torch.float32 or "float32" -> "fp32"; names that the plan uses where it has one."""
    name = str(value).removeprefix("torch.")
    return DTYPES.get(name, name)


def wire(entry: Collective) -> str:
    """What a collective sends: the wire format of a quantised message, else the dtype."""
    return entry.wire or dtype(entry.dtype)


def size(count: int) -> str:
    """Bytes for people: "384 B", "1.58 MB" (decimal, three digits)."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.{max(0, 3 - len(str(int(amount))))}f} {unit}"


def fold(names: Sequence[str], most: int | None = None) -> str:
    """["blocks.0.qkv.weight", "blocks.0.proj.weight"] -> "blocks.0.{qkv,proj}.weight"; names that share nothing stand side by side.

    most: names that are said; of the others, how many there are.
    """
    if most is not None and len(names) > most:
        return f"{fold(names[:most])} and {len(names) - most} more"
    groups: list[
        tuple[list[str], int, list[str]]
    ] = []  # segments of the first name, the one that varies (-1: none yet), its values
    for name in names:
        parts = name.split(".")
        if groups:
            first, at, values = groups[-1]
            differing = [i for i, (a, b) in enumerate(zip(first, parts, strict=False)) if a != b]
            if len(first) == len(parts) > 1 and len(differing) == 1 and at in (-1, differing[0]):
                groups[-1] = (first, differing[0], [*(values or [first[differing[0]]]), parts[differing[0]]])
                continue
        groups.append((parts, -1, []))
    return " ".join(
        ".".join("{" + ",".join(values) + "}" if i == at else part for i, part in enumerate(first))
        for first, at, values in groups
    )
