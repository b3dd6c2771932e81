"""How a checkpoint lies on disk: torch.distributed.checkpoint's own format, written so that it is there whole or not at all, and read
without trusting it.

    step-000100.partial/        while it is written; renamed to step-000100 when every file of every rank is complete and synced
    step-000100/.metadata       the index: what lies where
    step-000100/__3_0.distcp    what rank 3 wrote

Note [Pickles]: torch's reader unpickles the index, and whatever is no tensor, as they come (2.13: FileSystemReader.read_metadata,
DefaultLoadPlanner.load_bytes), so a checkpoint from a stranger runs the stranger's code. `Reader` knows the few classes that an index is
made of and refuses all others by name, and `LoadPlanner` loads with weights_only=True: numbers, text, containers and tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType

from zcompile._torch_compat import set_element
from zcompile.runtime import Runtime

T = TypeVar("T")

INDEX = ".metadata"
PARTIAL = ".partial"
RANKS = "ranks"
"""Below this key lies what belongs to one rank: ranks.3.own."""
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip
"""module -> what the index of a checkpoint may name of it, beside torch's dtypes."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read: the text names the rank and the file, and is the same on every rank."""


def folder_of(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise TypeError(f"a checkpoint is a folder; {folder!r} is not the path of one")
    return Path(folder)


def partial(folder: Path) -> Path:
    """Where a checkpoint lies until it is complete."""
    return folder.with_name(folder.name + PARTIAL)


# -- reading -------------------------------------------------------------------------------------------------------------------------


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, name: Path) -> None:
        super().__init__(file)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        known = name in _CLASSES.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self._name} names {module}.{name}, which no index of torch.distributed.checkpoint holds. It may be damaged, or made to run "
            "code when it is read; it was not read."
        )


def read_index(folder: Path) -> Metadata:
    """The index of a complete checkpoint, unpickled with nothing but the classes that an index is made of."""
    path = folder / INDEX
    if not path.is_file():
        if partial(folder).exists():
            why = f"only {partial(folder)}: its writing was not finished"
        elif folder.is_dir():
            why = f"the folder has no {INDEX}, which is written last"
        else:
            why = "there is no such folder"
        raise CheckpointError(f"no checkpoint at {folder}: {why}")
    with path.open("rb") as file:
        try:
            found = _IndexUnpickler(file, path).load()
        except CheckpointError:
            raise
        except Exception as error:  # pickle raises almost anything on damaged input
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not the index of a checkpoint")
    return found


class Reader(dcp.FileSystemReader):
    """torch's FileSystemReader that trusts nothing: see Note [Pickles]. Missing and short files are found before anything is loaded.

    For plain calls too: `dcp.load(state, storage_reader=Reader(folder), planner=LoadPlanner())`.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises CheckpointError if there is no complete checkpoint, or its index is damaged or names strange classes."""
        found = read_index(Path(self.path))
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises CheckpointError if a file of the checkpoint is missing or shorter than the index says."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        if not is_coordinator:
            return
        ends: dict[str, int] = {}
        for info in self.storage_data.values():
            name = Path(info.relative_path)
            if name.is_absolute() or ".." in name.parts:
                raise CheckpointError(f"{self.path}/{INDEX} points at {name}, outside of the checkpoint")
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for relative, end in sorted(ends.items()):
            path = Path(self.path) / relative
            try:
                size = path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            if size < end:
                raise CheckpointError(f"{path} is truncated: {size} bytes of {end}")

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future[None]:
        """As torch's, file by file, so that an error can name the file."""
        files: dict[str, list[Any]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        done: torch.futures.Future[None] = torch.futures.Future()
        for relative, items in files.items():
            path = Path(self.path) / relative
            try:
                self._check_sums(path, items)
                super().read_data(dataclasses.replace(plan, items=items), planner).wait()
            except CheckpointError:
                raise
            except Exception as error:
                raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        done.set_result(None)
        return done

    def _check_sums(self, path: Path, items: Sequence[Any]) -> None:
        """Each entry is a zip file with a checksum of its data, which torch writes and does not look at."""
        if not torch.serialization.get_crc32_options():  # then torch writes none that mean anything
            return
        with path.open("rb") as file:
            for index in {item.storage_index for item in items}:
                info = self.storage_data[index]
                if info.transform_descriptors:
                    continue  # not a zip file as it lies there
                file.seek(info.offset)
                with zipfile.ZipFile(io.BytesIO(file.read(info.length))) as entry:
                    if entry.testzip() is not None:
                        raise CheckpointError(
                            f"{path} is damaged: {index.fqn!r} in it has not the checksum that it was written with"
                        )


class LoadPlanner(dcp.DefaultLoadPlanner):
    """torch's planner, with weights_only=True for what is no tensor."""

    def load_bytes(self, read_item: dcp.ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{name!r} in the checkpoint is a pickle of more than numbers, text, containers and tensors; it was not loaded: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


def paths(index: Metadata) -> dict[str, tuple[str | int, ...]]:
    """flat name -> its path in the nested state that was saved."""
    return {name: tuple((index.planner_data or {}).get(name, (name,))) for name in index.state_dict_metadata}


def entries(index: Metadata, *prefix: str) -> Any:
    """What the index says of what was saved below `prefix`, nested as it was; {} if there is nothing."""
    return _nested(index, prefix, lambda entry: entry)


def template(index: Metadata, *prefix: str) -> Any:
    """What was saved below `prefix`, nested as it was, tensors empty and on the CPU: for dcp.load to fill. {} if there is nothing."""

    def empty(entry: Any) -> Tensor | None:
        return torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else None

    return _nested(index, prefix, empty)


def _nested(index: Metadata, prefix: tuple[str, ...], make: Callable[[Any], Any]) -> Any:
    out: Any = {}
    for name, path in paths(index).items():
        if len(path) > len(prefix) and path[: len(prefix)] == prefix:
            set_element(out, path, make(index.state_dict_metadata[name]))
    for key in prefix:
        out = out.get(key, {})
    return out


# -- writing -------------------------------------------------------------------------------------------------------------------------


class Planner(dcp.DefaultSavePlanner):
    """torch's planner; what every rank holds alike and is no DTensor comes from rank 0 alone.

    Of DTensors torch keeps one writer per shard and spreads the writers over the replicas.
    """

    def create_local_plan(self) -> dcp.SavePlan:
        plan = super().create_local_plan()
        if self.is_coordinator:
            return plan
        kept = [
            item
            for item in plan.items
            if item.type == WriteItemType.SHARD or item.index.fqn.startswith(f"{RANKS}.")
        ]  # fmt: skip
        self.plan = dataclasses.replace(plan, items=kept)
        return self.plan


class Writer(dcp.FileSystemWriter):
    """torch's FileSystemWriter, into a folder that gets its name when all of it is there.

    Args:
        aliases: name of an entry -> further paths under which the index lists it (tied weights are written once).
    """

    def __init__(self, folder: Path, aliases: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        super().__init__(partial(folder), single_file_per_rank=True, sync_files=True)
        self.folder = folder
        self.aliases = aliases

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        with naming(Path(self.path)):
            return super().prepare_local_plan(plan)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list[Any]]:
        with naming(Path(self.path) / f"{plan.storage_data.prefix}0.distcp"):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Rank 0, when all ranks have written: the index, then the name."""
        for file in {r.storage_data.relative_path for rank in results for r in rank}:
            path = Path(self.path) / file
            if not path.is_file():
                raise CheckpointError(
                    f"{path} was written by another rank and is not to be seen from rank 0: a checkpoint needs a file system that all "
                    "ranks share"
                )
        extra = []
        for result in (r for rank in results for r in rank):
            for path in self.aliases.get(result.index.fqn, ()):
                name = ".".join(path)
                metadata.state_dict_metadata[name] = metadata.state_dict_metadata[result.index.fqn]
                metadata.planner_data[name] = path
                index = MetadataIndex(name, result.index.offset, result.index.index)
                extra.append(dataclasses.replace(result, index=index))
        with naming(Path(self.path) / INDEX):
            super().finish(metadata, [*results, extra])
            _sync_folder(Path(self.path))
            os.rename(self.path, self.folder)
            _sync_folder(self.folder.parent)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self.folder), save_id=self.save_id)


def prepare(folder: Path) -> None:
    """On one rank, before the others write: the folder is new, and nothing is left of a run that was ended while it wrote it."""
    if folder.exists():
        raise CheckpointError(f"{folder} exists: a checkpoint is never overwritten; save to a new folder")
    with naming(partial(folder)):
        if partial(folder).exists():
            shutil.rmtree(partial(folder))
        partial(folder).mkdir(parents=True)


def discard(folder: Path) -> None:
    """Free the disk from what a failed save has written. The checkpoints beside it are not touched."""
    shutil.rmtree(partial(folder), ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Names of new files reach the disk with their folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the file system say which file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch's zip writer turns a full disk into a RuntimeError
        raise CheckpointError(f"{path} cannot be written: {type(error).__name__}: {error}") from error


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint in `folder` that was written last; None if there is none. Unfinished ones do not count.

    Of checkpoints that bear the same time the one that sorts last by name.
    """
    found = [path.parent for path in folder_of(folder).glob(f"*/{INDEX}") if not path.parent.name.endswith(PARTIAL)]
    return max(found, key=lambda path: ((path / INDEX).stat().st_mtime_ns, path.name), default=None)


# -- all ranks alike -----------------------------------------------------------------------------------------------------------------


def together(runtime: Runtime, step: Callable[[], T], what: str) -> T:
    """What `step` returns; if it raises on any rank, every rank raises: its own error, or a CheckpointError with another's."""
    error: Exception | None = None
    out: Any = None
    try:
        out = step()
    except Exception as raised:
        error = raised
    said: list[Any] = [None] * runtime.topology.world_size
    mine = None if error is None else f"{type(error).__name__}: {error}"
    with runtime.agreement.lend(what) as group:
        if group is None:
            said = [mine]
        else:
            dist.all_gather_object(said, mine, group=group)
    if error is not None:
        raise error
    other = next(((rank, text) for rank, text in enumerate(said) if text is not None), None)
    if other is not None:
        raise CheckpointError(f"{what}: rank {other[0]} says {other[1]}")
    found: T = out
    return found
