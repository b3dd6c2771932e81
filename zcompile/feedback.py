"""The state of the error feedback outside a step: what a checkpoint holds of it, and how it comes back.

What quantising a gradient lost on one rank belongs to that rank of that topology: the whole gradient's loss before a reduce, and that of
its own part at G before a sync. So a checkpoint has one row per rank, a DTensor sharded over all levels, under the topology's key. On
another world, or on another shape of it, nobody is left whom the rows belong to: the state begins at zero again, with a notice.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from zcompile.engine import Engine


def feedback_state(model: nn.Module, engine: Engine) -> dict[str, dict[str, DTensor]]:
    """{topology key: {"parameter.reduce" or "parameter.sync": DTensor [ranks, elements] fp32}}: views of the state, to save or to load
    in place; {} without error feedback."""
    runtime = engine.runtime
    mesh = runtime.mesh(engine.device.type)
    rows = {
        f"{slot.name}.{transfer}": DTensor.from_local(
            error.view(1, -1), mesh, [Shard(0)] * mesh.ndim, run_check=False,
            shape=torch.Size((runtime.topology.world_size, error.numel())), stride=(error.numel(), 1),
        )
        for slot in engine.slots
        for transfer, error in slot.errors.items()
    }  # fmt: skip
    return {runtime.topology.key: rows} if rows else {}


def reset(engine: Engine) -> None:
    """Forget what quantising has lost so far."""
    for slot in engine.slots:
        for error in slot.errors.values():
            error.zero_()


def load(model: nn.Module, engine: Engine, checkpoint: str | os.PathLike[str], prefix: str) -> bool:
    """Fill the state from a checkpoint in which it was saved under `prefix`; every rank calls it. False: it was reset, with a notice."""
    state = {prefix: feedback_state(model, engine)}
    if not state[prefix]:
        return False
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    wanted = {f"{prefix}.{key}.{name}": row for key, rows in state[prefix].items() for name, row in rows.items()}
    odd = next((name for name, row in wanted.items() if not _holds(saved.get(name), row)), None)
    if odd is None:
        dcp.load(state, checkpoint_id=checkpoint)
        return True
    reset(engine)
    if engine.runtime.rank == 0:
        others = {name.removeprefix(f"{prefix}.").split(".")[0] for name in saved if name.startswith(f"{prefix}.")}
        found = f"has it for {', '.join(sorted(others))}" if others else "has none"
        print(
            f"zcompile: error feedback begins at zero: {os.fspath(checkpoint)} {found}, not for topology "
            f"{engine.runtime.topology.key} and this plan (first missing: {odd})",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return False


def _holds(saved: Any, row: Tensor) -> bool:
    return saved is not None and tuple(getattr(saved, "size", ())) == tuple(row.shape)
