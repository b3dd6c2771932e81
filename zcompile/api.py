"""What is asked of a wrapped model: its weights, its state, its books."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zcompile import checkpoint, covered, feedback, formats, gradients, optimizer_state, pretrained, traffic
from zcompile.front import engine_of, unwrapped
from zcompile.storage import folder_of, together

if TYPE_CHECKING:
    from zcompile.debug.explain import Explanation


def full_state_dict(model: nn.Module, *, rank0_only: bool = False, cpu_offload: bool = False) -> dict[str, Any]:
    """Plain tensors, names and shapes as the plain model's, fp32 as the masters; copies. Every rank calls it.

    Args:
        rank0_only: {} on the other ranks, which hold one whole parameter at a time.
        cpu_offload: each parameter goes to the CPU when it is whole, so that the device holds one at a time.
    """
    engine = engine_of(model, "full_state_dict")
    slots = {name: slot for slot in engine.slots for name in slot.names}
    wholes: dict[str, Tensor] = {}
    out: dict[str, Any] = {}

    def kept(tensor: Tensor) -> Tensor:
        return tensor.to("cpu") if cpu_offload else tensor

    dropped = rank0_only and engine.runtime.rank != 0
    for name, value in unwrapped(model).state_dict().items():
        slot = slots.get(name) if isinstance(value, DTensor) else None
        if slot is None:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            out[name] = kept(whole.detach()).clone() if isinstance(whole, Tensor) else whole
        elif slot.name == name or slot.name not in wholes:
            whole = engine.whole_master(slot)
            wholes[slot.name] = out[name] = whole.new_empty(0) if dropped else kept(whole)
        else:
            out[name] = wholes[slot.name]
    return {} if dropped else out


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = 5_000_000_000,
) -> None:
    """Write the weights into a new `folder` of safetensors files that transformers' `from_pretrained` loads, with the model's config beside
    them if it has one. Every rank calls it; rank 0 writes, and holds one file's tensors at a time.

    Args:
        dtype: of the floating point tensors in the files; None: fp32, as the masters.
        file_bytes: how large a file may grow, unless one tensor is larger.

    Raises:
        CheckpointError: on every rank alike: the folder exists, or cannot be written.
    """
    if isinstance(file_bytes, bool) or not isinstance(file_bytes, int) or file_bytes < 1:
        raise ValueError(f"file_bytes={file_bytes!r}: must be a number of bytes")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: must be a floating point torch.dtype, or None for fp32")
    pretrained.export(unwrapped(model), engine_of(model, "export"), folder_of(folder), dtype, file_bytes)


def load_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Fill the weights from a folder of safetensors files, as transformers saves them; every rank calls it and reads the rows it owns.

    Raises:
        CheckpointError: on every rank alike: no safetensors there, a name or a shape that does not fit, a file that cannot be read.
    """
    engine = engine_of(model, "load_pretrained")
    files = together(engine.runtime, lambda: pretrained.Files(unwrapped(model), folder), f"{folder} cannot be loaded")
    together(engine.runtime, lambda: pretrained.load(unwrapped(model), engine, files), f"{folder} cannot be loaded")


def ledger(model: nn.Module) -> dict[str, Any]:
    """Bytes one rank received in the last step: {"levels": {level: {transfer: {"predicted", "compiled", "counted"}}}, ...}.

    "schedule" says what the schedule expects of each graph, by the machine's data: its seconds, and those of it that are exposed waiting,
    by level, each time that it runs, and how often it has run; zcompile.overlap measures the same in a profiler's trace.

    Transfers are gather, reduce, sync and refresh (and barrier, with peer gathers); a step ends with a synchronising backward. The three
    columns come from the closed forms, from the collective nodes of the graphs that ran, and from the process groups; they are equal, or
    something is wrong.
    """
    return traffic.report(engine_of(model, "ledger"))


def explain(model: nn.Module, rows: int = 20, sort: str = "exposed") -> Explanation:
    """What the compiler did to a wrapped model that has run: programs, ledger, timeline, and why hops are waited for.

    Printed it is tables; in a notebook it is the page that a dump has as report.html (with bokeh: the extra `report`).

    Args:
        rows: parameters and hops that are printed; sort: order of the parameters, one of "exposed", "bytes", "name".

    Raises:
        TypeError: the model was not wrapped by hierarchical_zero.
        ValueError: another order; nothing was compiled so far.
    """
    from zcompile.debug.explain import Explanation

    steps = engine_of(model, "explain").steps
    return Explanation([steps[number] for number in sorted(steps)], rows, sort)


def precision(
    model: nn.Module, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None
) -> dict[str, dict[str, int]]:
    """What is kept, computed and sent in which format: {what: {format: elements of the plain parameters}}.

    Rows: masters, compute copies, whole weights, each transfer over each level, main gradients, the gradients that are there, and, with an
    optimizer or several, its state. Kept tensors are looked at; what only travels is told by the plan.
    """
    return formats.report(engine_of(model, "precision"), optimizer_state.listed(optimizer))


def coverage(model: nn.Module) -> dict[str, Any]:
    """How much of the last forward went through compiled graphs.

    Returns:
        graphs: names of all that were compiled; breaks: {"reason", "where"} of Dynamo's graph breaks; share: of the parameters that the
        forward read, those that compiled graphs alone gathered; compiled: their names; eager: name -> file:line that read it outside of
        any graph; unread: names of the others.
    """
    return covered.report(engine_of(model, "coverage"))


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> float:
    """Scale the gradients of a wrapped model so that their norm is at most `max_norm`; every rank calls it.

    `torch.nn.utils.clip_grad_norm_(model.parameters(), ...)` does the same and returns a DTensor; this adds up in float64 and returns the
    number.

    Args:
        norm_type: order of the norm of all gradients as one vector: 2, 1, any positive number, or inf.
        error_if_nonfinite: raise RuntimeError, on all ranks, if the norm is not finite.

    Returns:
        the norm before clipping, equal on all ranks. If it is not finite the gradients are left as they are, and the optimizer's step
        is skipped by the option `nonfinite`.
    """
    return gradients.clip_grad_norm_(engine_of(model, "clip_grad_norm_"), max_norm, norm_type, error_if_nonfinite)


def feedback_state(model: nn.Module) -> dict[str, dict[str, DTensor]]:
    """The state of the error feedback, for torch.distributed.checkpoint: put it beside the model's under a name of its own. {} without.

    {topology key: {"parameter.reduce" or "parameter.sync": DTensor [ranks, elements] fp32}}; the tensors are the state itself.
    """
    return feedback.feedback_state(engine_of(model, "feedback_state"))


def load_feedback_state(model: nn.Module, folder: str | os.PathLike[str], prefix: str = "feedback") -> bool:
    """Bring back what `feedback_state` saved under `prefix` in a checkpoint folder; every rank calls it.

    Returns:
        False if the checkpoint holds none for this topology and plan (it was saved on another world, say): the state then begins at
        zero, and rank 0 says so.
    """
    engine = engine_of(model, "load_feedback_state")
    lost = feedback.load(engine, folder_of(folder), prefix)
    if lost and engine.runtime.rank == 0:
        print(f"zcompile: {lost}", file=sys.stderr, flush=True)
    return bool(feedback.feedback_state(engine)) and not lost


def save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    folder: str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
    *,
    own: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
) -> checkpoint.Saving | None:
    """Save a run into a new `folder`, in the format of torch.distributed.checkpoint; every rank calls it, at any point between two calls
    of the model.

    The folder appears when all of it has been written, and never replaces another. Beside weights and optimizers it holds what an exact
    resume needs: gradients and micro-batches that wait for a step, error feedback, the images of a delta refresh, and every rank's random
    states (torch, Python, NumPy).

    Args:
        optimizer: one, several, or None.
        extra: yours, the same on every rank (step, position in the data, a scheduler's state): numbers, text, containers, tensors. It
            comes back equal; what differs between ranks is rank 0's, with a line on stderr.
        own: yours, of this rank alone (a data loader's state); it comes back on as many ranks.
        asynchronous: copy now, write in the background; `wait()` of what is returned raises what went wrong. One at a time: the next save
            or load waits for it. Wait before the process group is destroyed.

    Raises:
        CheckpointError: on every rank alike, with the rank and the file: the disk is full, the folder exists. What was written is removed.
    """
    return checkpoint.save(unwrapped(model), engine_of(model, "save"), optimizer, folder, extra, own, asynchronous)


def load(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    folder: str | os.PathLike[str],
    *,
    drop_window: bool = False,
) -> checkpoint.Loaded:
    """Bring back what `save` saved, on any world, topology and plan; every rank calls it.

    Weights and moments are those that were saved, to the bit, on any number of ranks. What belongs to ranks (random states, error
    feedback, the images of a delta refresh) comes back where they are the same; where not, `notices` of the result say what begins anew.
    A folder that torch.distributed.checkpoint or FSDP2 wrote as {"model": ..., "optimizer": ...} loads too. No pickle of more than numbers,
    text, containers and tensors is loaded.

    Args:
        optimizer: made as the saved one was; None takes the weights alone.
        drop_window: lose the micro-batches of a checkpoint that was saved between two of them, rather than refuse it on another plan.

    Raises:
        CheckpointError: on every rank alike, naming what is missing, short, damaged, strange or of another shape. If it is raised while
            shards are read, the model holds a mixture: load again, or end.
    """
    return checkpoint.load(unwrapped(model), engine_of(model, "load"), optimizer, folder, drop_window)


def mark_written(model: nn.Module) -> None:
    """Announce a write to the masters that torch does not count (through `p.data`): the next forward refreshes every copy."""
    engine_of(model, "mark_written").mark_written()
