"""F15 and what else goes wrong with checkpoints: the old one stays, every rank is told the file, nothing strange is run."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import training
from support.spawn import RanksFailed, run
from support.state import Awkward, one_step, same_bits, whole_state
from torch.distributed.checkpoint.filesystem import FileSystem

import zcompile
from zcompile import CheckpointError, hierarchical_zero

WORLD = 2


def refused(words: tuple[str, ...], call: Callable[[], Any], kind: type[Exception] = CheckpointError) -> None:
    training.refused(kind, words, call)


@contextlib.contextmanager
def full_disk(kind: str) -> Iterator[None]:
    """On this rank: files stop at 4 KB, or all writes go to a device that is full; or writing raises, or runs out of memory."""
    if kind == "limit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    original = FileSystem.create_stream

    @contextlib.contextmanager
    def stream(self: Any, path: Any, mode: str) -> Any:
        if kind == "raise":
            raise ValueError("sample 17 is no number")
        if kind == "memory":
            torch.empty(1 << 60)
        with original(self, "/dev/full", mode) as file:
            yield file

    FileSystem.create_stream = stream  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystem.create_stream = original  # type: ignore[method-assign]


def made(seed: int = 0) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: Any = hierarchical_zero(Awkward(), topology="2", plan="zero3", compile=False)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _full_disk(rank: int, root: str) -> None:
    model, optimizer = made()
    one_step(model, [optimizer], 0)
    zcompile.save(model, optimizer, f"{root}/good", {"step": 1})
    expected = whole_state(model, optimizer)
    one_step(model, [optimizer], 1)

    limited = full_disk("limit") if rank == 1 else contextlib.nullcontext()
    with limited:
        refused(("rank 1", f"{root}/new.partial/__1_0.distcp"), lambda: zcompile.save(model, optimizer, f"{root}/new"))
    full = full_disk("device") if rank == 1 else contextlib.nullcontext()
    with full:
        saving = zcompile.save(model, optimizer, f"{root}/new", asynchronous=True)
        assert saving is not None
        refused(("rank 1", "__1_0.distcp", "No space left"), saving.wait)

    def save(asynchronous: bool) -> None:
        saving = zcompile.save(model, optimizer, f"{root}/new", asynchronous=asynchronous)
        if saving is not None:
            saving.wait()

    for kind, words in {
        "raise": "ValueError: sample 17 is no number",
        "memory": "RuntimeError: [enforce fail at alloc_cpu",
    }.items():
        for odd, asynchronous in ((1, False), (0, True)):
            with full_disk(kind) if rank == odd else contextlib.nullcontext():
                refused((f"rank {odd}", f"__{odd}_0.distcp", words), lambda: save(asynchronous))  # noqa: B023 (called at once)
    full = full_disk("device") if rank == 0 else contextlib.nullcontext()
    with full:  # an error of a background write that nobody waited for is told by the next call
        zcompile.save(model, optimizer, f"{root}/new", asynchronous=True)
        refused(("rank 0", "No space left"), lambda: zcompile.load(model, optimizer, f"{root}/good"))
    dist.barrier()
    assert sorted(os.listdir(root)) == ["good"]
    zcompile.load(model, optimizer, f"{root}/good")
    same_bits(whole_state(model, optimizer), expected)
    refused(("exists", "never overwritten"), lambda: zcompile.save(model, optimizer, f"{root}/good"))
    zcompile.save(model, optimizer, f"{root}/new")  # the same name again, now that there is room


def test_f15_a_full_disk_leaves_the_old_checkpoint_and_names_the_file(ranks: Any, tmp_path: Path) -> None:
    ranks(WORLD).run(_full_disk, str(tmp_path), timeout=200)


def _killed(rank: int, root: str) -> str:
    model, optimizer = made()
    zcompile.save(model, optimizer, f"{root}/good", {"step": 1})
    if rank == 1:
        FileSystem.create_stream = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    try:
        zcompile.save(model, optimizer, f"{root}/new")
    except CheckpointError as error:
        return str(error)
    return "saved"


def _after_the_kill(rank: int, root: str) -> None:
    newest = zcompile.latest_checkpoint(root)
    assert newest == Path(root, "good"), newest
    model, optimizer = made(seed=3)
    assert zcompile.load(model, optimizer, newest).extra == {"step": 1}
    same_bits(whole_state(model), whole_state(made()[0]))
    zcompile.save(model, optimizer, f"{root}/new")


def test_f12_a_rank_that_is_killed_while_it_saves_leaves_the_checkpoint_before(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run(_killed, WORLD, str(tmp_path), timeout=120)
    assert set(failed.value.failures) == {1}, failed.value
    assert f"{tmp_path}/new: a rank is gone or late" in failed.value.results[0], failed.value.results
    assert sorted(os.listdir(tmp_path)) == ["good"]
    ranks(WORLD).run(_after_the_kill, str(tmp_path), timeout=120)
    assert sorted(os.listdir(tmp_path)) == ["good", "new"]


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.mark),)


def _damaged(rank: int, root: str) -> None:
    model, optimizer = made()
    one_step(model, [optimizer], 0)
    if rank == 0:
        Path(root, "cut.partial").mkdir()  # a run was ended while it wrote
    zcompile.save(model, optimizer, f"{root}/good", {"step": 1})
    before = whole_state(model, optimizer)

    def spoiled(name: str, spoil: Callable[[Path], Any]) -> str:
        folder = Path(root, name)
        if rank == 0:
            shutil.copytree(f"{root}/good", folder)
            spoil(folder)
        dist.barrier()
        return str(folder)

    def load(folder: str) -> Callable[[], Any]:
        return lambda: zcompile.load(model, optimizer, folder)

    short = spoiled("short", lambda folder: os.truncate(folder / "__1_0.distcp", 100))
    refused((f"{short}/__1_0.distcp is truncated: 100 bytes of",), load(short))
    flipped = spoiled("flipped", lambda folder: _flip(folder / "__0_0.distcp", model.embed.weight.to_local()))
    refused((f"rank 0: {flipped}/__0_0.distcp is damaged", "'model.embed.weight'", "checksum"), load(flipped))
    gone = spoiled("gone", lambda folder: (folder / "__0_0.distcp").unlink())
    refused((f"{gone}/__0_0.distcp", "No such file"), load(gone))
    index = spoiled("index", lambda folder: os.truncate(folder / ".metadata", 50))
    refused((f"{index}/.metadata is damaged",), load(index))
    headless = spoiled("headless", lambda folder: (folder / ".metadata").unlink())
    refused((headless, "no .metadata", "written last"), load(headless))
    refused((f"{root}/cut", "was not finished"), load(f"{root}/cut"))
    refused((f"{root}/nothing", "no such folder"), load(f"{root}/nothing"))
    refused(("None is not the path",), lambda: zcompile.load(model, optimizer, None), TypeError)  # type: ignore[arg-type]

    mark = f"{root}/ran"
    evil = spoiled("evil", lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark))))
    refused((f"{evil}/.metadata names", "was not read"), load(evil))
    dcp.save({"model": model.state_dict(), "extra": {"x": Evil(mark)}}, checkpoint_id=f"{root}/object")
    refused(("'extra.x'", "was not loaded"), lambda: zcompile.load(model, None, f"{root}/object"))
    elsewhere = spoiled("elsewhere", lambda folder: _point_outside(folder / ".metadata"))
    refused(("points at /etc/passwd", "outside"), load(elsewhere))
    assert not os.path.exists(mark)

    refused(("extra['x']", "Evil"), lambda: zcompile.save(model, None, f"{root}/x", {"x": Evil(mark)}), TypeError)
    refused(("must be text",), lambda: zcompile.save(model, None, f"{root}/x", {1: 2}), TypeError)  # type: ignore[dict-item]
    refused(("not a torch.optim.Optimizer",), lambda: zcompile.save(model, 3, f"{root}/x"), TypeError)  # type: ignore[arg-type]
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
    refused(("SGD", "shape (3,)", "not one"), lambda: zcompile.save(model, other, f"{root}/x"), ValueError)
    alone = {"x": Evil(mark)} if rank == 1 else None
    refused(
        ("own['x']",),
        lambda: zcompile.save(model, None, f"{root}/x", own=alone),
        TypeError if rank == 1 else CheckpointError,
    )
    refused(("folder of a checkpoint", "rank 1"), lambda: zcompile.save(model, None, f"{root}/{rank}"), RuntimeError)

    torch.manual_seed(1)
    wider = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    zcompile.save(hierarchical_zero(wider, topology="2", compile=False), None, f"{root}/wider")
    refused(("entries that this model has not: 0.bias",), lambda: zcompile.load(model, None, f"{root}/wider"))
    few = hierarchical_zero(torch.nn.Sequential(torch.nn.Linear(3, 5)), topology="2", compile=False, sync_init=True)
    zcompile.save(few, None, f"{root}/few")
    narrow = hierarchical_zero(torch.nn.Sequential(torch.nn.Linear(4, 5)), topology="2", compile=False, sync_init=True)
    refused(("'0.weight'", "(5, 3)", "(5, 4)"), lambda: zcompile.load(narrow, None, f"{root}/few"))
    both = hierarchical_zero(
        torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 5)), topology="2", compile=False, sync_init=True
    )
    refused(("lacks 2 entries", "1.weight"), lambda: zcompile.load(both, None, f"{root}/few"))
    refused(("no optimizer state",), lambda: zcompile.load(few, torch.optim.SGD(few.parameters()), f"{root}/few"))
    groups = torch.optim.AdamW([{"params": [p]} for p in model.parameters() if p.requires_grad])
    refused(("parameter group",), lambda: zcompile.load(model, groups, f"{root}/good"))

    zcompile.load(model, optimizer, f"{root}/good")  # none of it did any harm
    same_bits(whole_state(model, optimizer), before)
    zcompile.save(model, optimizer, f"{root}/cut")
    latest = zcompile.latest_checkpoint(root)
    assert latest == Path(root, "cut"), latest


def _refused_loads(rank: int, root: str) -> None:
    """What is refused has written nothing: weights, moments, gradients and the open window are as they were, to the bit."""
    model, optimizer = made()
    one_step(model, [optimizer], 0)
    zcompile.save(model, optimizer, f"{root}/good")
    torch.manual_seed(0)
    elsewhere: Any = hierarchical_zero(Awkward(), topology="2", plan="hsdp", compile=False)
    with elsewhere.no_sync():
        elsewhere(torch.arange(10).view(2, 5)).backward()
    zcompile.save(elsewhere, None, f"{root}/open")

    other, used = made(seed=5)
    one_step(other, [used], 3)
    other(torch.arange(10).view(2, 5)).backward()
    with other.no_sync():
        other(torch.arange(10).view(2, 5)).backward()
    groups = torch.optim.AdamW([{"params": [p]} for p in other.parameters() if p.requires_grad])

    def everything() -> dict[str, Any]:
        found = whole_state(other, used) | {f"{n}/grad": p.grad for n, p in other.named_parameters()}
        window = other.zero.window
        found |= {f"{slot.name}/main": main for slot, main in window.mains.items()}
        found |= {f"{slot.name}/touched": slot in window.touched for slot in other.zero.slots}
        found |= {f"{number}/stale": unit.stale for number, unit in enumerate(other.zero.units)}
        whole = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in found.items()}
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in whole.items()}

    before = everything()
    assert any(name.endswith("/main") for name in before) and any(
        before[f"{slot.name}/touched"] for slot in other.zero.slots
    )
    refused(("parameter group",), lambda: zcompile.load(other, groups, f"{root}/good"))
    same_bits(everything(), before)
    odd = groups if rank == 1 else used
    refused(("parameter group",), lambda: zcompile.load(other, odd, f"{root}/good"))
    same_bits(everything(), before)
    refused(("between micro-batches",), lambda: zcompile.load(other, None, f"{root}/open"))
    same_bits(everything(), before)
    refused(("no optimizer state",), lambda: zcompile.load(other, used, f"{root}/open", drop_window=True))
    same_bits(everything(), before)
    refused(
        ("arguments of zcompile.load", "rank 1"),
        lambda: zcompile.load(other, used if rank else None, f"{root}/good"),
        RuntimeError,
    )
    same_bits(everything(), before)
    zcompile.load(other, used, f"{root}/good")
    same_bits(whole_state(other, used), whole_state(model, optimizer))
    assert other.zero.memory()["main"] == 0 and all(p.grad is None for p in other.parameters())


def test_a_refused_load_has_written_nothing(ranks: Any, tmp_path: Path) -> None:
    ranks(WORLD).run(_refused_loads, str(tmp_path), timeout=100)


def _flip(file: Path, values: torch.Tensor) -> None:
    """One bit of one of these values."""
    data = bytearray(file.read_bytes())
    place = data.find(values.detach().numpy().tobytes())
    assert place > 0
    data[place + 2] ^= 1
    file.write_bytes(data)


def _point_outside(index: Path) -> None:
    found = pickle.loads(index.read_bytes())
    next(iter(found.storage_data.values())).relative_path = "/etc/passwd"
    index.write_bytes(pickle.dumps(found))


def test_what_is_damaged_missing_strange_or_of_another_model_is_refused_by_name(ranks: Any, tmp_path: Path) -> None:
    ranks(WORLD).run(_damaged, str(tmp_path), timeout=200)
