"""Checkpoints on any world, topology and plan: the same bits, plain names, one writer per shard, nothing trusted, nothing lost."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.spawn import Pool
from support.state import Awkward, one_step, same_bits, whole_state
from support.training import refused
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import zcompile
from zcompile import hierarchical_zero
from zcompile.storage import LoadPlanner, Reader, read_index


def made(
    topology: str, plan: Any, kind: str, seed: int = 0, **settings: Any
) -> tuple[Any, list[torch.optim.Optimizer]]:
    """An eager Awkward model with its optimizers."""
    torch.manual_seed(seed)
    model: Any = hierarchical_zero(Awkward(), topology=topology, plan=plan, **{"compile": False, **settings})
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return model, [torch.optim.SGD(trained, lr=0.1, momentum=0.9)]
    if kind == "two":
        matrices = [p for p in trained if p.dim() == 2]
        return model, [
            torch.optim.SGD(matrices, lr=0.1, momentum=0.9),
            torch.optim.AdamW([p for p in trained if p.dim() != 2], lr=1e-2, foreach=True),
        ]
    options = {"adamw": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}[kind]
    return model, [torch.optim.AdamW(trained, lr=1e-2, **options)]


KINDS = ("adamw", "foreach", "fused", "sgd", "two")
PRESETS = ("ddp", "zero1", "zero2", "zero3", "hsdp", "zeropp", "zero_topo")
WORLDS = {4: ("2x2", "zeropp"), 8: ("2x2x2", "zero_topo"), 6: ("3x2", "hsdp"), 1: ("1", "ddp")}


def _begin(rank: int, folder: str) -> dict[str, Any]:
    """Train with each optimizer, save; what was saved, as whole tensors."""
    expected = {}
    for kind in KINDS:
        model, optimizers = made(*WORLDS[dist.get_world_size()], kind)
        for number in range(2):
            one_step(model, optimizers, number)
        zcompile.save(
            model, optimizers, f"{folder}/{kind}", {"step": 2, "nested": {"position": [7, 0.5], "t": torch.arange(3)}}
        )
        expected[kind] = whole_state(model, *optimizers)
    return expected


def _go_on(rank: int, before: str, after: str) -> dict[str, Any]:
    """Load what another world saved into other weights; save again; what was loaded, as whole tensors."""
    found = {}
    for kind in KINDS:
        model, optimizers = made(*WORLDS[dist.get_world_size()], kind, seed=3)
        loaded = zcompile.load(model, optimizers, f"{before}/{kind}")
        assert loaded.extra["step"] == 2 and loaded.extra["nested"]["position"] == [7, 0.5]
        assert torch.equal(loaded.extra["nested"]["t"], torch.arange(3))
        found[kind] = whole_state(model, *optimizers)
        zcompile.save(model, optimizers, f"{after}/{kind}", loaded.extra)
        one_step(model, optimizers, 2)
    return found


@pytest.mark.slow
def test_f16_any_world_and_plan_to_any_other_bit_for_bit(ranks: Any, tmp_path: Path) -> None:
    """4 -> 8 -> 6 -> 1 -> 4, each with a preset of its own."""
    (expected, *_) = ranks(4).run(_begin, f"{tmp_path}/0", timeout=300)
    six = Pool(6)
    try:
        for number, world in enumerate((8, 6, 1, 4)):
            pool = six if world == 6 else ranks(world)
            found = pool.run(_go_on, f"{tmp_path}/{number}", f"{tmp_path}/{number + 1}", timeout=300)
            for kind in KINDS:
                for state in found:
                    same_bits(state[kind], expected[kind])
    finally:
        six.close()


def _presets(rank: int, folder: str, presets: tuple[str, ...]) -> None:
    """What is saved under each preset comes back under itself and two others, to the bit."""
    expected, models = {}, {}
    for number, preset in enumerate(presets):
        model, optimizers = models[preset] = made("2x2", preset, "adamw", seed=number)
        one_step(model, optimizers, number)
        zcompile.save(model, optimizers, f"{folder}/{preset}")
        expected[preset] = whole_state(model, *optimizers)
    for number, saved in enumerate(presets):
        for other in dict.fromkeys(presets[(number + step) % len(presets)] for step in (0, 1, 3)):
            model, optimizers = models[other]
            zcompile.load(model, optimizers, f"{folder}/{saved}")
            same_bits(whole_state(model, *optimizers), expected[saved])


def written_once(folder: Path, ranks: int) -> None:
    """No replica writes what another has written: shards do not overlap and fill their tensors, and the files hold nothing else."""
    index = read_index(folder)
    for name, entry in index.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            continue
        boxes = [[range(o, o + s) for o, s in zip(c.offsets, c.sizes, strict=True)] for c in entry.chunks]
        assert len({str(box) for box in boxes}) == len(boxes), f"{name}: a shard is written twice"
        assert sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel(), name
    places = {(info.relative_path, info.offset): info.length for info in index.storage_data.values()}
    files = {file.name: file.stat().st_size for file in folder.glob("*.distcp")}
    for file, size in files.items():
        assert sum(length for (name, _), length in places.items() if name == file) == size, (
            f"{file}: more than the index names"
        )
    assert len(files) == ranks and min(files.values()) > 0  # writers are spread over all ranks
    kinds = {name.split(".")[0] for name, entry in index.state_dict_metadata.items() if hasattr(entry, "chunks")}
    assert {"model", "optimizer"} <= kinds


@pytest.mark.parametrize(
    "presets",
    [
        pytest.param(("ddp", "hsdp"), id="those with replicas"),
        pytest.param(PRESETS, marks=pytest.mark.slow, id="all"),
    ],
)
def test_f16_any_preset_to_any_preset_and_no_replica_writes_twice(
    ranks: Any, tmp_path: Path, presets: tuple[str, ...]
) -> None:
    ranks(4).run(_presets, str(tmp_path), presets, timeout=300)
    for preset in presets:
        written_once(tmp_path / preset, 4)


# -- other systems -------------------------------------------------------------------------------------------------------------------


def plain(seed: int, lr: float = 1e-2) -> tuple[nn.Module, torch.optim.AdamW]:
    """The model as a user has it without zcompile, with an optimizer that has stepped."""
    torch.manual_seed(seed)
    model = Awkward()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def plain_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    out: dict[str, Any] = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            out[f"{names[id(parameter)]}/{key}"] = (
                value.full_tensor() if isinstance(value, DTensor) else value
            ).clone()
    return out


def forward(model: Any) -> float:
    with torch.no_grad():
        return float(model(torch.arange(10).view(2, 5)))


def trained_everywhere(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """State for every parameter, unused ones included: what torch's get_optimizer_state_dict wants to find."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.25)
    optimizer.step()
    optimizer.zero_grad()


def _other_systems(rank: int, folder: str) -> dict[str, Any]:
    """zcompile -> FSDP2 -> zcompile, and zcompile -> plain DCP calls -> zcompile, synchronous and not."""
    model, (optimizer,) = made("2x2", "zero_topo", "adamw")
    trained_everywhere(model, optimizer)
    zcompile.save(model, optimizer, f"{folder}/ours")
    expected = whole_state(model, optimizer)

    torch.manual_seed(5)
    other = Awkward()
    for module in (other.body, other):
        fully_shard(module, ignored_params={other.scale})  # FSDP2 cannot shard a scalar
    theirs = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    weights, moments = get_state_dict(other, theirs)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=f"{folder}/ours")
    set_state_dict(other, theirs, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    same_bits(plain_state(other, theirs), expected)
    weights, moments = get_state_dict(other, theirs)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/fsdp2")

    back, (again,) = made("2x2", "zero3", "adamw", seed=6)
    found = zcompile.load(back, again, f"{folder}/fsdp2")
    assert not found.exact and "not saved by zcompile.save" in found.notices[0] and found.extra == {}
    same_bits(whole_state(back, again), expected)

    dcp.save({"model": back.state_dict(), "optimizer": again.state_dict()}, checkpoint_id=f"{folder}/calls")
    group = dist.new_group(backend="gloo")
    dcp.async_save({"model": back.state_dict()}, checkpoint_id=f"{folder}/async", process_group=group).result()
    for name in ("calls", "async"):
        last, _ = made("2x2", "hsdp", "adamw", seed=7)
        zcompile.load(last, None, f"{folder}/{name}")
        weights_only = {key: value for key, value in expected.items() if "/" not in key}
        same_bits(whole_state(last), weights_only)
    changed, _ = made("2x2", "zeropp", "adamw", seed=8)
    forward(changed)
    dcp.load(
        {"model": changed.state_dict()}, checkpoint_id=f"{folder}/ours"
    )  # in place, by plain calls: the next forward sees it
    assert forward(changed) == forward(last)
    return expected


def test_other_systems_read_ours_and_we_read_theirs(ranks: Any, tmp_path: Path) -> None:
    (expected, *_) = ranks(4).run(_other_systems, str(tmp_path), timeout=300)
    model, optimizer = plain(9)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, storage_reader=Reader(tmp_path / "ours"), planner=LoadPlanner())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    same_bits(plain_state(model, optimizer), expected)

    index = read_index(tmp_path / "ours")
    names = [name.removeprefix("model.") for name in index.state_dict_metadata if name.startswith("model.")]
    assert sorted(names) == sorted(model.state_dict())
    places: dict[tuple[str, int], str] = {}
    for key, info in index.storage_data.items():
        first = places.setdefault((info.relative_path, info.offset), key.fqn)
        tied = {first, key.fqn} == {"model.embed.weight", "model.head.weight"}
        assert tied or first == key.fqn, (first, key)
    written_once(tmp_path / "ours", 4)


def _asynchronous(rank: int, folder: str) -> None:
    """What is saved is what was there when save was called, whatever training does while it is written; buffers are each rank's own."""
    model, optimizers = made("2x2", "zero_topo", "adamw")
    one_step(model, optimizers, 0)
    model.seen += 10 * rank
    model.zero.skipped = 3
    expected = whole_state(model, *optimizers)
    saving = zcompile.save(model, optimizers, f"{folder}/first", {"step": 1}, own={"rank": rank}, asynchronous=True)
    for number in range(1, 4):
        one_step(model, optimizers, number)
    later = whole_state(model, *optimizers)
    zcompile.save(model, optimizers, f"{folder}/second", asynchronous=True)  # waits for the first
    assert saving is not None and saving.done() and saving.wait() == Path(folder, "first")
    found = zcompile.load(model, optimizers, f"{folder}/first")  # waits for the second
    assert found.exact and found.own == {"rank": rank} and found.extra == {"step": 1}
    same_bits(whole_state(model, *optimizers), expected)
    assert model.seen == 1 + 10 * rank
    assert sorted(path.name for path in Path(folder).iterdir()) == ["first", "second"]
    zcompile.load(model, optimizers, f"{folder}/second")
    same_bits(whole_state(model, *optimizers), later)
    other, again = made("4", "zero3", "adamw", seed=4)
    found = zcompile.load(other, again, f"{folder}/first")
    assert other.zero.skipped == 3
    assert found.notices == [] and found.own == {
        "rank": rank
    }  # as many ranks: native formats hold nothing else of a topology
    assert not found.exact  # but gradients are added up in another order
    same_bits(whole_state(other, *again), expected)


def _other_buffers(rank: int, folder: str) -> list[str]:
    model, optimizers = made("2", "zero3", "adamw", seed=4, compute_dtype=torch.bfloat16)
    found = zcompile.load(model, optimizers, f"{folder}/first")
    assert found.own == {} and not found.exact and model.seen == 1
    return found.notices


def test_asynchronous_saves_hold_the_moment_of_the_call_and_another_world_is_told_what_is_lost(
    ranks: Any, tmp_path: Path
) -> None:
    ranks(4).run(_asynchronous, str(tmp_path), timeout=200)
    for notices in ranks(2).run(_other_buffers, str(tmp_path)):
        assert len(notices) == 2
        assert "not those of 2 ranks" in notices[0] and "buffers that differed" in notices[1] and "seen" in notices[1]


def _extras(rank: int, folder: str) -> str:
    """What is handed over comes back equal, keys, types and empty containers too; a scheduler decays as if it had never stopped."""
    model, (optimizer,) = made("2", "zero3", "adamw")
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 3, 5], gamma=0.1)
    for number in range(2):
        one_step(model, [optimizer], number)
        scheduler.step()
    shared: dict[str, Any] = {
        "scheduler": scheduler.state_dict(), "nothing": {}, "none": None, "list": [], "deep": {"a": {}, "b": [{}, [], {2: {}}]},
        "keys": {1: "int", "1": "text", 2.5: 0, (1, "x"): 1, None: 2, False: 3}, "a.b": 1, "a": {"b": 2}, "pair": (1, [2, (3,)]),
        "set": {"x", "y"}, "ordered": OrderedDict(z=1, a=torch.arange(3)), "one": (5,), "in a tuple": ({"t": torch.ones(2, 2)},),
        "ema": {name: p.detach() * 2 for name, p in model.named_parameters()},
    }  # fmt: skip
    own = {"rank": {rank: {}}, "state": torch.full((2,), rank)}
    zcompile.save(model, optimizer, f"{folder}/extras", shared, own=own)
    refused(
        TypeError,
        ("own['x']", "give it as extra"),
        lambda: zcompile.save(model, None, f"{folder}/x", own={"x": model.scale}),
    )

    other, (again,) = made("2", "hsdp", "adamw", seed=3)
    restarted = torch.optim.lr_scheduler.MultiStepLR(again, milestones=[3, 3, 5], gamma=0.1)
    found = zcompile.load(other, again, f"{folder}/extras")
    assert _shown(found.extra) == _shown(shared)
    assert _shown(found.own) == _shown(own)
    restarted.load_state_dict(found.extra["scheduler"])
    rates = []
    for stepper, opt in ((scheduler, optimizer), (restarted, again)):
        rates.append([])
        for _ in range(4):
            opt.step()
            stepper.step()
            rates[-1].append(stepper.get_last_lr()[0])
    assert rates[0] == rates[1] and rates[0][0] != rates[0][-1] and rates[0][0] == pytest.approx(1e-4), rates

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        zcompile.save(model, None, f"{folder}/differs", {"step": 1, "loss": 0.1 * rank, "tensor": torch.tensor(rank)})
    assert zcompile.load(other, None, f"{folder}/differs").extra["loss"] == 0
    return said.getvalue()


def _shown(value: Any) -> str:
    """Types, keys in their order, and the values of tensors, sharded ones as whole."""
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return f"{whole.dtype} {whole.shape} {whole.tolist()}"
    if isinstance(value, dict):
        return f"{type(value).__name__} {[(repr(key), _shown(each)) for key, each in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} {[_shown(each) for each in value]}"
    return f"{type(value).__name__} {sorted(value) if isinstance(value, set) else value!r}"


def test_extra_and_own_come_back_equal(ranks: Any, tmp_path: Path) -> None:
    said, other = ranks(2).run(_extras, str(tmp_path), timeout=100)
    assert "zcompile: extra['loss'] and 1 more differ from rank to rank" in said and other == ""


def t5(seed: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def _tied(rank: int, folder: str) -> dict[str, Any]:
    model: Any = hierarchical_zero(t5(0), topology="2x2", plan="zero_topo", compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(12).view(2, 6)
    model.eval()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    zcompile.save(model, optimizer, f"{folder}/t5")
    expected = whole_state(model, optimizer)
    other: Any = hierarchical_zero(t5(1), topology="4", plan="hsdp", compile=False)
    again = torch.optim.AdamW(other.parameters(), lr=1e-2)
    zcompile.load(other, again, f"{folder}/t5")
    same_bits(whole_state(other, again), expected)
    return expected


@pytest.mark.slow
def test_a_tied_t5_is_written_once_under_all_its_names(ranks: Any, tmp_path: Path) -> None:
    (expected, *_) = ranks(4).run(_tied, str(tmp_path), timeout=200)
    plain = t5(2)
    dcp.load({"model": plain.state_dict()}, checkpoint_id=tmp_path / "t5")
    same_bits(dict(plain.state_dict()), {name: value for name, value in expected.items() if "/" not in name})
    tied = [f"model.{n}.weight" for n in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")]
    index = read_index(tmp_path / "t5")
    places = {
        name: {(i.relative_path, i.offset) for k, i in index.storage_data.items() if k.fqn == name} for name in tied
    }
    assert set(tied) <= set(index.state_dict_metadata) and len(places[tied[0]]) == 4
    assert all(place == places[tied[0]] for place in places.values())
    assert len({name for name in expected if name.endswith("/exp_avg")}) == len(list(plain.parameters()))


def whole_gradients(model: Any) -> dict[str, Any]:
    return {n: p.grad.full_tensor().clone() for n, p in model.named_parameters() if p.grad is not None}


def _between(rank: int, folder: str) -> None:
    """Saved between micro-batches: what was synced goes to any plan; an open window goes nowhere else, and is lost only if asked for."""
    model, optimizers = made("2x2", "zero_topo", "adamw")
    one_step(model, [], 0)  # a backward without a step
    expected = whole_gradients(model)
    assert len(expected) > 5
    zcompile.save(model, optimizers, f"{folder}/synced")
    model.set_requires_gradient_sync(False)
    model(torch.arange(10).view(2, 5)).backward()
    zcompile.save(model, optimizers, f"{folder}/open")

    other, again = made("4", "zero3", "adamw", seed=3)
    one_step(other, [], 7)
    zcompile.load(other, again, f"{folder}/synced")
    same_bits(whole_gradients(other), expected)
    with pytest.raises(zcompile.CheckpointError, match=r"between micro-batches.*drop_window=True"):
        zcompile.load(other, again, f"{folder}/open")
    zcompile.load(other, again, f"{folder}/open", drop_window=True)
    same_bits(whole_gradients(other), expected)
    assert other.zero.memory()["main"] == 0
    same, again = made("2x2", "zero_topo", "adamw", seed=3)
    zcompile.load(same, again, f"{folder}/open")
    for one, two in zip(model.zero.slots, same.zero.slots, strict=True):
        assert (one in model.zero.window.mains) == (two in same.zero.window.mains)
        if one in model.zero.window.mains:
            assert torch.equal(model.zero.window.mains[one], same.zero.window.mains[two])
    zcompile.load(same, again, f"{folder}/synced")  # and what was open before a load is forgotten
    assert same.zero.memory()["main"] == 0


def test_gradients_go_to_any_plan_and_an_open_window_to_its_own(ranks: Any, tmp_path: Path) -> None:
    ranks(4).run(_between, str(tmp_path), timeout=200)
