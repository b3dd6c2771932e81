"""Weights in safetensors files, as transformers writes and reads them: straight from the files into shards, and back.

No file is a pickle, and no rank reads more than it owns: a safetensors file says in its header where each tensor lies.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zcompile.engine import Engine
from zcompile.params import Slot
from zcompile.storage import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


class Files:
    """The tensors of a folder of safetensors files, by the names that `model` has for them.

    Raises:
        CheckpointError: there are none, or the index names a file that is not there.
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.where = self._index()
        prefix = getattr(model, "base_model_prefix", "")
        ours = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
        self.names: dict[str, str] = {}
        """name in the model -> name in the files: some were saved from the bare model, without its head, or the other way round"""
        unknown = []
        for name in self.where:
            own = next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in ours), None)
            if own is not None:
                self.names.setdefault(own, name)
            else:
                unknown.append(name)
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self.unknown = [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]

    def _index(self) -> dict[str, Path]:
        index, single = self.folder / INDEX, self.folder / WEIGHTS
        if index.is_file():
            where = {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
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

    def name_of(self, slot: Slot) -> str | None:
        """The name in the files of a parameter: of any of its names, if it is tied."""
        return next((self.names[name] for name in slot.names if name in self.names), None)


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
            "(if transformers renames them on loading, load them there and save them again)"
        )
    wanted: dict[Path, list[tuple[str, Slot | Tensor]]] = {}
    missing = []
    for slot in engine.slots:
        name = files.name_of(slot)
        if name is None:
            missing.append(slot.name)
        else:
            wanted.setdefault(files.where[name], []).append((name, slot))
    if missing:
        raise CheckpointError(
            f"{files.folder} lacks {len(missing)} parameters of this model: {', '.join(missing[:3])}, ..."
        )
    for name, buffer in model.named_buffers():
        if name in files.names:
            wanted.setdefault(files.where[files.names[name]], []).append((files.names[name], buffer))
    for file, entries in wanted.items():
        with _opened(file) as found:
            for name, target in entries:
                try:
                    _fill(found, name, target, engine)
                except CheckpointError as error:
                    raise CheckpointError(f"{file}: {error}") from None
                except Exception as error:
                    raise CheckpointError(f"{file}: {name!r} cannot be read: {error}") from error
    engine.mark_written()


@torch.no_grad()
def _fill(found: Any, name: str, target: Slot | Tensor, engine: Engine) -> None:
    part = found.get_slice(name)
    shape = tuple(part.get_shape())
    expected = tuple(target.spec.shape if isinstance(target, Slot) else target.shape)
    if shape != expected:
        raise CheckpointError(f"{name!r} has shape {shape}, this model's has {expected}")
    if not isinstance(target, Slot):
        target.copy_(found.get_tensor(name))
        return
    start, rows = target.spec.layout.local_rows(engine.coordinates)
    if rows and target.spec.layout.numel:
        target.shard.copy_(part[start : start + rows] if shape else found.get_tensor(name))


# -- back ----------------------------------------------------------------------------------------------------------------------------


def export(model: Any, engine: Engine, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """See zcompile.export."""
    names = [name for name, value in model.state_dict().items() if isinstance(value, Tensor)]
    slots = {name: slot for slot in engine.slots for name in slot.names}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    plan: list[list[str]] = [[]]
    sizes = [0]
    for name in names:
        if name in left_out or (name in slots and slots[name].name != name):
            continue  # transformers ties weights again when it loads
        shape = slots[name].spec.shape if name in slots else tuple(model.state_dict()[name].shape)
        size = torch.Size(shape).numel() * (dtype or torch.float32).itemsize
        if sizes[-1] and sizes[-1] + size > shard_bytes:
            plan.append([])
            sizes.append(0)
        plan[-1].append(name)
        sizes[-1] += size
    where: dict[str, str] = {}
    partial = folder.with_name(folder.name + ".partial")
    for number, part in enumerate(plan, 1):
        file = WEIGHTS if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        tensors = dict(_wholes(model, engine, part, slots, dtype))
        if tensors:
            partial.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
    if engine.runtime.rank == 0:
        if len(plan) > 1:
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _write_config(model, partial)
        os.rename(partial, folder)


def _wholes(
    model: Any, engine: Engine, names: list[str], slots: Mapping[str, Slot], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) on rank 0; the others take part and yield nothing."""
    state = model.state_dict()
    for name in names:
        whole = engine.whole_master(slots[name]) if name in slots else state[name].detach()
        if engine.runtime.rank == 0:
            yield (
                name,
                (whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole)
                .cpu()
                .contiguous()
                .clone(),
            )


def _write_config(model: Any, folder: Path) -> None:
    """What transformers wants beside the weights."""
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "save_pretrained", None)):
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if callable(getattr(generation, "save_pretrained", None)):
        generation.save_pretrained(folder)
