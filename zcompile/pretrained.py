"""Weights in safetensors files, as transformers writes and reads them: straight from the files into shards, and back.

No file is a pickle, and no rank reads more than it owns: a safetensors file says in its header where each tensor lies.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zcompile.converted import Misfit, Part, Shape, Source, sources
from zcompile.engine import Engine
from zcompile.params import Slot, named_owners
from zcompile.storage import CheckpointError, naming, partial, prepare, together

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


class Files:
    """The tensors of a folder of safetensors files, by the names that `model` has for them.

    Raises:
        CheckpointError: there are none, the index is damaged, or it names a file that is not there.
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.where = self._index()
        ours = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
        self.sources, unknown = sources(model, self.where, ours)
        """name in the model -> what makes it"""
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self.unknown = [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]

    def _index(self) -> dict[str, Path]:
        index, single = self.folder / INDEX, self.folder / WEIGHTS
        if index.is_file():
            where = {name: self.folder / file for name, file in _weight_map(index).items()}
        else:
            files = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
            where = {name: file for file in files for name in _names(file)}
        if not where:
            pickles = any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt"))
            hint = "; its .bin files are pickles, which are not loaded: save it with safetensors" if pickles else ""
            raise CheckpointError(f"{self.folder} holds no *.safetensors{hint}")
        for file in set(where.values()):
            if not file.is_file():
                raise CheckpointError(f"{file}, which {index} names, is not there")
        return where

    def given(self, model: nn.Module) -> set[str]:
        """First names of the parameters, and names of the buffers, that the files have."""
        tied = (names for names in named_owners(model).values() if any(name in self.sources for name, _, _ in names))
        return {names[0][0] for names in tied} | {name for name, _ in model.named_buffers() if name in self.sources}

    def source_of(self, slot: Slot) -> Source | None:
        """What makes a parameter: by any of its names, if it is tied."""
        return next((self.sources[name] for name in slot.names if name in self.sources), None)


def _weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file, of the index of a checkpoint in several files."""
    try:
        found = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{index} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f'{index} is damaged: its "weight_map" is no map of names to files')
    return found


def _names(file: Path) -> list[str]:
    with _opened(file) as found:
        return list(found.keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def load(model: nn.Module, engine: Engine, files: Files) -> None:
    """Fill the masters, and the buffers that the files have, with what this rank owns.

    Raises:
        CheckpointError: a parameter is in no file, is of another shape there, or the files have one that the model has not.
    """
    if files.unknown:
        raise CheckpointError(
            f"{files.folder} has {len(files.unknown)} tensors that this model has not: {', '.join(files.unknown[:3])}, ... "
            "(if they are of another version, load them there and save them again)"
        )
    wanted: list[tuple[str, Slot | Tensor, Source]] = []
    missing = []
    for slot in engine.slots:
        source = files.source_of(slot)
        if source is None:
            missing.append(slot.name)
        else:
            wanted.append((slot.name, slot, source))
    if missing:
        raise CheckpointError(
            f"{files.folder} lacks {len(missing)} parameters of this model: {', '.join(missing[:3])}, ..."
        )
    wanted += [(name, buffer, files.sources[name]) for name, buffer in model.named_buffers() if name in files.sources]
    names = [name for _, _, source in wanted for name in source.names]
    shapes: dict[str, Shape] = {}
    _each(files, names, lambda found, name: shapes.update({name: tuple(found.get_slice(name).get_shape())}))
    parts: dict[str, tuple[Part, Slot | Tensor]] = {}
    for name, target, source in wanted:  # nothing is written before all of it is known to fit
        parts |= {part.name: (part, target) for part in _checked(files, name, target, source, shapes)}
    _each(files, names, lambda found, name: _fill(found, *parts[name], engine))
    engine.mark_written()


def _each(files: Files, names: Iterable[str], step: Callable[[Any, str], None]) -> None:
    """`step(opened file, name)` for each tensor, file by file."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(files.where[name], []).append(name)
    for file, inside in by_file.items():
        with _opened(file) as found:
            for name in inside:
                try:
                    step(found, name)
                except Exception as error:
                    raise CheckpointError(f"{file}: {name!r} cannot be read: {error}") from error


def _checked(
    files: Files, name: str, target: Slot | Tensor, source: Source, shapes: Mapping[str, Shape]
) -> Sequence[Part]:
    """The parts of one parameter or buffer."""
    file, first = files.where[source.names[0]], source.names[0]
    if source.misfit:
        raise CheckpointError(
            f"{file}: {name!r} cannot be read straight into shards: {source.misfit} (load it in transformers, and "
            "save_pretrained(folder, save_original_format=False))"
        )
    try:
        shape, parts = source.placed(shapes)
    except Misfit as error:
        raise CheckpointError(f"{file}: {name!r}: {error}") from None
    expected = tuple(target.spec.shape if isinstance(target, Slot) else target.shape)
    if shape != expected:
        of = f"{first!r}" if len(parts) == 1 else f"{name!r}, of {len(parts)} tensors from {first!r} on,"
        raise CheckpointError(f"{file}: {of} has shape {shape}, this model's has {expected}")
    return parts


@torch.no_grad()
def _fill(found: Any, part: Part, target: Slot | Tensor, engine: Engine) -> None:
    if isinstance(target, Tensor):
        target.copy_(found.get_tensor(part.name))
        return
    layout = target.spec.layout
    start, rows = layout.local_rows(engine.coordinates)
    if rows and layout.numel:
        part.read(found, start, target.shard)


# -- back ----------------------------------------------------------------------------------------------------------------------------


def export(model: Any, engine: Engine, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """See zcompile.export. Rank 0 writes, the others take part in the gathers; no more than one file's tensors are whole at once."""
    slots = {name: slot for slot in engine.slots for name in slot.names}
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    # Of tied weights the first name: transformers ties them again when it loads.
    names = [name for name in state if name not in left_out and (name not in slots or slots[name].name == name)]
    plan = _files(
        names, {name: state[name].numel() * _saved_as(state[name], dtype).itemsize for name in names}, shard_bytes
    )
    new = partial(folder)
    together(
        engine.runtime, lambda: prepare(folder) if engine.runtime.rank == 0 else None, f"{folder} cannot be written"
    )
    where: dict[str, str] = {}
    for number, part in enumerate(plan, 1):
        file = WEIGHTS if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in part:
            whole = engine.whole_master(slots[name]) if name in slots else state[name].detach()
            if engine.runtime.rank == 0:
                tensors[name] = whole.to("cpu", _saved_as(whole, dtype), copy=True).contiguous()
        where |= dict.fromkeys(part, file)
        together(engine.runtime, lambda: _write(tensors, new / file), f"{folder} cannot be written")  # noqa: B023 (called at once)

    def finish() -> None:
        if engine.runtime.rank == 0:
            if len(plan) > 1:
                total = sum(state[name].numel() * _saved_as(state[name], dtype).itemsize for name in names)
                (new / INDEX).write_text(
                    json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
                )
            _write_config(model, new, dtype)
            os.rename(new, folder)

    together(engine.runtime, finish, f"{folder} cannot be written")


def _files(names: list[str], sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names by file, in order, at most `limit` bytes each unless one tensor alone is more."""
    plan: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if plan[-1] and filled + sizes[name] > limit:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += sizes[name]
    return plan


def _saved_as(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    if tensors:
        with naming(file):
            save_file(tensors, file, metadata={"format": "pt"})


def _write_config(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """What transformers wants beside the weights."""
    config: Any = copy.copy(getattr(model, "config", None))
    if callable(getattr(config, "save_pretrained", None)):
        config.architectures = [type(model).__name__]
        config.dtype = dtype or torch.float32
        config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if callable(getattr(generation, "save_pretrained", None)):
        generation.save_pretrained(folder)
