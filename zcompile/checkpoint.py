"""Saving and loading a run: weights, optimizers, and all else that it needs to go on as if it had never stopped.

    zcompile.save(model, optimizer, "checkpoints/step-000100", {"step": 100, "position": position})
    found = zcompile.load(model, optimizer, zcompile.latest_checkpoint("checkpoints"))
    step = found.extra["step"]

The folder is torch.distributed.checkpoint's, nested so that plain calls read it and write what is read here:
{"model": names of the plain model, "optimizer": as get_optimizer_state_dict}, and beside them what only zcompile writes ("extra" among it:
zcompile.extras).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from zcompile import extras, feedback, resume
from zcompile import optimizer_state as optimizers
from zcompile.engine import Engine
from zcompile.faults.verdict import FaultError
from zcompile.runtime import Runtime
from zcompile.storage import (
    RANKS,
    CheckpointError,
    LoadPlanner,
    Planner,
    Reader,
    Writer,
    discard,
    entries,
    folder_of,
    paths,
    prepare,
    read_index,
    template,
    together,
)

VERSION = 1
Optimizer = torch.optim.Optimizer


class Saving:
    """A checkpoint that is being written in the background. `wait()` before the process group is destroyed."""

    def __init__(self, folder: Path, future: Future[Any], engine: Engine) -> None:
        self.folder = folder
        self._future = future
        self._engine = engine

    def done(self) -> bool:
        """True once it is written, or has failed."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> Path:
        """The folder, once it is complete. CheckpointError, on every rank, if it could not be written; TimeoutError after `timeout` s."""
        try:
            _raise_alike(lambda: self._future.result(timeout), self.folder)
        except FutureTimeout:
            raise TimeoutError(f"{self.folder} is not written after {timeout:g} s") from None
        except CheckpointError:
            if self._engine.runtime.rank == 0:
                discard(self.folder)
            raise
        finally:
            if self.done() and self._engine.saving is self:
                self._engine.saving = None
        return self.folder


@dataclass
class Loaded:
    """What `load` brought back beside weights and optimizers.

    Attributes:
        extra: what `save` was given as extra, the same on every rank, tensors on the CPU and whole; {} if nothing.
        own: what this rank gave as own, if the checkpoint has as many ranks; else {}.
        exact: whether the run goes on as the saved one would have, bit for bit: on the same topology and plan (on others gradients are
            added up in another order), with nothing in `notices`.
        notices: what could not be brought back on this world or plan. Rank 0 has printed them.
    """

    extra: dict[str, Any]
    own: dict[str, Any]
    exact: bool
    notices: list[str]


def save(model: nn.Module, engine: Engine, optimizer: Optimizer | Sequence[Optimizer] | None, folder: str | os.PathLike[str],
         extra: Mapping[str, Any] | None, own: Mapping[str, Any] | None, asynchronous: bool) -> Saving | None:  # fmt: skip
    """See zcompile.save."""
    target = folder_of(folder)
    if not isinstance(asynchronous, bool):
        raise TypeError(f"asynchronous={asynchronous!r}: must be True or False")
    finish(engine)
    runtime = engine.runtime
    runtime.agreement.compare("folder of a checkpoint", str(target))

    def begin() -> dict[str, Any]:
        found = _state(model, engine, optimizers.listed(optimizer), extra, own)
        if runtime.rank == 0:
            prepare(target)
        return found

    state = together(engine.runtime, begin, f"{target} cannot be written")
    _say_what_differs(runtime, extra)
    aliases = {
        f"model.{slot.name}": [("model", name) for name in slot.names[1:] if name in state["model"]]
        for slot in engine.slots
    }
    for slot in engine.slots:
        for _, name in aliases[f"model.{slot.name}"]:
            del state["model"][name]
    state[RANKS] = {str(runtime.rank): state[RANKS] | _odd(model, engine)}
    writer = Writer(target, {name: paths for name, paths in aliases.items() if paths})
    arguments: dict[str, Any] = {"storage_writer": writer, "planner": Planner()}
    if asynchronous:
        written: Any = dcp.async_save(state, process_group=runtime.background(), **arguments)
        engine.saving = Saving(target, written, engine)
        return engine.saving
    try:
        _raise_alike(lambda: _save(runtime, state, target, arguments), target)
    except CheckpointError:
        if runtime.rank == 0:
            discard(target)
        raise
    return None


def _say_what_differs(runtime: Runtime, extra: Mapping[str, Any] | None) -> None:
    """The checkpoint has rank 0's `extra`: no error where another rank's differs (a loss, a time), but not without a word."""
    rows = runtime.agreement.exchange(extras.digests(extra), step="extra of a checkpoint")
    odd = extras.differing(extra, rows)
    if odd and runtime.rank == 0:
        said = f"extra[{odd[0]!r}]" + (f" and {len(odd) - 1} more differ" if odd[1:] else " differs")
        print(f"zcompile: {said} from rank to rank: the checkpoint has rank 0's (own= keeps every rank's)",
              file=sys.stderr, flush=True)  # fmt: skip


def _save(runtime: Runtime, state: dict[str, Any], target: Path, arguments: dict[str, Any]) -> None:
    with runtime.agreement.lend(f"writing {target}") as group:
        dcp.save(state, process_group=group, **arguments)


def _read(runtime: Runtime, wanted: dict[str, Any], source: Path) -> None:
    with runtime.agreement.lend(f"reading {source}") as group:
        dcp.load(wanted, storage_reader=Reader(source), planner=LoadPlanner(), process_group=group)


def finish(engine: Engine) -> None:
    """Wait for a checkpoint that is still being written: there is one at a time. Raises what went wrong with it, if nobody was told."""
    if engine.saving is not None:
        engine.saving.wait()


def _odd(model: nn.Module, engine: Engine) -> dict[str, Any]:
    buffers = resume.odd_buffers(model, engine)
    return {"buffers": buffers} if buffers else {}


def _state(model: nn.Module, engine: Engine, used: optimizers.Optimizers, extra: Mapping[str, Any] | None,
           own: Mapping[str, Any] | None) -> dict[str, Any]:  # fmt: skip
    mine = {"random": resume.random_state(engine.device), "own": extras.pack("own", own)}
    topology = engine.runtime.topology
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizers.named_state(engine, used),
        "gradients": resume.gradients(engine),
        "images": resume.images(engine),
        "feedback": feedback.feedback_state(engine),
        "extra": extras.pack("extra", extra),
        "zcompile": {
            "version": VERSION,
            "ranks": topology.world_size,
            "topology": topology.key,
            "plan": resume.plan_key(engine),
            "skipped": engine.skipped,
        },
        RANKS: {key: value for key, value in mine.items() if value},
    }
    return {key: value for key, value in state.items() if value or key == RANKS}


def load(model: nn.Module, engine: Engine, optimizer: Optimizer | Sequence[Optimizer] | None, folder: str | os.PathLike[str],
         drop_window: bool) -> Loaded:  # fmt: skip
    """See zcompile.load."""
    source = folder_of(folder)
    finish(engine)
    used = optimizers.listed(optimizer)
    asked = {"folder": str(source), "optimizers": [type(each).__name__ for each in used], "drop_window": drop_window}
    engine.runtime.agreement.compare("arguments of zcompile.load", asked)
    index = together(engine.runtime, lambda: read_index(source), f"{source} cannot be loaded")
    wanted = together(
        engine.runtime, lambda: _wanted(model, engine, used, index, drop_window), f"{source} cannot be loaded"
    )
    if used:
        _check_groups(engine, used, index, source)
    _raise_alike(lambda: _read(engine.runtime, wanted, source), source)
    rank = wanted.get(RANKS, {}).get(str(engine.runtime.rank), {})
    together(engine.runtime, lambda: _take(model, engine, used, wanted, rank), f"{source} cannot be loaded")
    notices = _notices(engine, index, source, bool(rank))
    if lost := feedback.load(engine, source, "feedback"):
        notices.append(lost)
    engine.mark_written()
    resume.take_images(engine, wanted.get("images", {}))
    if "random" in rank:
        resume.set_random_state(engine.device, rank["random"])
    for notice in notices if engine.runtime.rank == 0 else []:
        print(f"zcompile: {notice}", file=sys.stderr, flush=True)
    exact = not notices and wanted["zcompile"]["plan"] == resume.plan_key(engine)
    # Nobody goes on to read a copy that another rank has not made yet.
    engine.runtime.agreement.exchange([], step="the end of a load")
    return Loaded(extras.unpack(wanted.get("extra", {})), extras.unpack(rank.get("own", {})), exact, notices)


def _check_groups(engine: Engine, used: optimizers.Optimizers, index: Metadata, source: Path) -> None:
    """Which parameters a group has is no part of the index: it is read first, as nothing may be written before it is known to fit."""
    state = {"optimizer": {"param_groups": template(index, "optimizer", "param_groups")}}
    _raise_alike(lambda: _read(engine.runtime, state, source), source)

    def check() -> None:
        optimizers.check_groups(engine, used, state["optimizer"]["param_groups"])

    together(engine.runtime, check, f"{source} cannot be loaded")


def _wanted(
    model: nn.Module, engine: Engine, used: optimizers.Optimizers, index: Metadata, drop_window: bool
) -> dict[str, Any]:
    """The state to fill: what the checkpoint has and this job can take."""
    saved = {".".join(map(str, path[1:])) for path in paths(index).values() if path[0] == "model"}
    held = dict(model.state_dict())
    if not saved:
        names = sorted({str(path[0]) for path in paths(index).values()})[:5]
        raise CheckpointError(
            f'it has no "model" but {", ".join(names)}, ...: load it by torch.distributed.checkpoint.load(model.state_dict(), ...)'
        )
    unknown = sorted(saved - set(held))
    if unknown:
        raise CheckpointError(f"it has {len(unknown)} entries that this model has not: {', '.join(unknown[:3])}, ...")
    for slot in engine.slots:  # one name of a tied weight is enough
        there = [name for name in slot.names if name in saved]
        for name in slot.names if there else ():
            if name != there[0]:
                held.pop(name, None)
    missing = [name for name in held if name not in saved]
    if missing:
        raise CheckpointError(f"it lacks {len(missing)} entries of this model: {', '.join(missing[:3])}, ...")
    for name, value in held.items():
        size = getattr(index.state_dict_metadata[f"model.{name}"], "size", None)
        if isinstance(value, Tensor) and (size is None or tuple(size) != tuple(value.shape)):
            raise CheckpointError(
                f"{name!r} has shape {tuple(size or ())} in it and {tuple(value.shape)} in this model"
            )
    rank, ranks = str(engine.runtime.rank), {path[1] for path in paths(index).values() if path[0] == RANKS}
    wanted = {
        "model": held,
        "optimizer": optimizers.empty_state(engine, used, index),
        "gradients": resume.empty_gradients(engine, index, drop_window),
        "images": resume.empty_images(engine, index),
        "extra": template(index, "extra"),
        "zcompile": template(index, "zcompile"),
        RANKS: {rank: template(index, RANKS, rank)} if len(ranks) == engine.runtime.topology.world_size else {},
    }
    return {key: value for key, value in wanted.items() if value}


def _take(
    model: nn.Module, engine: Engine, used: optimizers.Optimizers, filled: dict[str, Any], rank: dict[str, Any]
) -> None:
    """Tensors of the model were filled in place; the rest goes where it belongs."""
    objects = {name: value for name, value in filled["model"].items() if not isinstance(value, Tensor)}
    if objects:
        model.load_state_dict(objects, strict=False)
    held = model.state_dict()
    for name, value in rank.get("buffers", {}).items():
        held[name].copy_(value)
    if used:
        optimizers.restore(engine, used, filled["optimizer"])
    resume.take_gradients(engine, filled.get("gradients", {}))
    engine.skipped = filled.get("zcompile", {}).get("skipped", 0)


def _notices(engine: Engine, index: Metadata, source: Path, has_rank: bool) -> list[str]:
    """What of the checkpoint this job cannot take, in words."""
    found = {path[0] for path in paths(index).values()}
    here = engine.runtime.topology.world_size
    notices = []
    if "zcompile" not in found:
        return [f"{source} holds weights and optimizer only: it was not saved by zcompile.save"]
    if not has_rank:
        notices.append(
            f"random states of {source} are not those of {here} ranks: the generators go on as they were seeded"
        )
        odd = {
            ".".join(map(str, path[3:])) for path in paths(index).values() if path[0] == RANKS and path[2] == "buffers"
        }
        if odd:
            notices.append(f"buffers that differed from rank to rank are rank 0's now: {', '.join(sorted(odd))}")
    plans = entries(index, "images")
    if plans and resume.plan_key(engine) not in plans and any(unit.image is not None for unit in engine.units):
        notices.append(
            f"delta refresh: {source} was saved on another topology or plan, so the next refresh is a full one"
        )
    return notices


# -- all ranks alike -----------------------------------------------------------------------------------------------------------------


def _raise_alike(call: Callable[[], Any], folder: Path) -> Any:
    """torch gathers the errors of all ranks and raises them everywhere: one of ours, with the first rank's words."""
    try:
        return call()
    except dcp.CheckpointException as error:
        rank, (first, _) = min(error.failures.items())
        text = str(first) if isinstance(first, CheckpointError) else f"{folder}: {type(first).__name__}: {first}"
        more = f" (and {len(error.failures) - 1} ranks more)" if len(error.failures) > 1 else ""
        raise CheckpointError(f"rank {rank}: {text}{more}") from first
    except CheckpointError:
        raise
    except FaultError as fault:
        raise CheckpointError(f"{folder}: a rank is gone or late. {fault}") from fault
    except RuntimeError as error:  # of a collective: torch does not say of which file
        raise CheckpointError(f"{folder}: a rank is gone or late. torch said: {error}") from error
