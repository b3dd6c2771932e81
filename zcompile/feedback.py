"""The state of the error feedback outside a step: what a checkpoint holds of it, and how it comes back.

What quantising a gradient lost on one rank belongs to that rank of that topology: the whole gradient's loss before a reduce, and that of
its own part at G before a sync. So a checkpoint has one row per rank, a DTensor sharded over all levels, under the topology's key. On
another world, or on another shape of it, nobody is left whom the rows belong to: the state begins at zero again, with a notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from zcompile.engine import Engine
from zcompile.resume import rows
from zcompile.storage import LoadPlanner, Reader, read_index


def feedback_state(engine: Engine) -> dict[str, dict[str, DTensor]]:
    """{topology key: {"parameter.reduce" or "parameter.sync": DTensor [ranks, elements] fp32}}: views of the state, to save or to load
    in place; {} without error feedback."""
    found = {
        f"{slot.name}.{transfer}": rows(engine, error)
        for slot in engine.slots
        for transfer, error in slot.errors.items()
    }
    return {engine.runtime.topology.key: found} if found else {}


def reset(engine: Engine) -> None:
    """Forget what quantising has lost so far."""
    for slot in engine.slots:
        for error in slot.errors.values():
            error.zero_()


def load(engine: Engine, checkpoint: Path, prefix: str) -> str:
    """Fill the state from a checkpoint in which it was saved under `prefix`; every rank calls it.

    Returns:
        "", or why it was reset to zero instead.
    """
    state = {prefix: feedback_state(engine)}
    if not state[prefix]:
        return ""
    saved = read_index(checkpoint).state_dict_metadata
    wanted = {f"{prefix}.{key}.{name}": row for key, rows in state[prefix].items() for name, row in rows.items()}
    odd = next((name for name, row in wanted.items() if not _holds(saved.get(name), row)), None)
    if odd is None:
        with engine.runtime.agreement.lend(f"reading {checkpoint}") as group:
            dcp.load(state, storage_reader=Reader(checkpoint), planner=LoadPlanner(), process_group=group)
        return ""
    reset(engine)
    others = {name.removeprefix(f"{prefix}.").split(".")[0] for name in saved if name.startswith(f"{prefix}.")}
    found = f"has it for {', '.join(sorted(others))}" if others else "has none"
    return (
        f"error feedback begins at zero: {checkpoint} {found}, not for topology {engine.runtime.topology.key} and this plan "
        f"(first missing: {odd})"
    )


def _holds(saved: Any, row: Tensor) -> bool:
    return saved is not None and tuple(getattr(saved, "size", ())) == tuple(row.shape)
