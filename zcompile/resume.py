"""What a run holds beside weights and moments, so that it goes on bit for bit: gradients under way, images, buffers, random states.

Note [Resume]: gradients that were synced but not stepped are sharded as the masters are, and go to any plan and world. The main grads of
an open window are sums that belong to one rank of one plan, as is what the holders of a delta refresh believe; they come back on that
plan alone. On another, an open window is an error (or dropped, if asked for), and a delta refresh begins with a full one. Copies are
made anew from the masters, and those of a delta refresh from the images: a fresh copy and a stale one are both as they were.
"""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor, Shard

from zcompile._torch_compat import wrap_local
from zcompile.engine import Engine
from zcompile.params import Slot, at_start
from zcompile.refresh import copy_from_image, spread_image
from zcompile.storage import CheckpointError, entries


def plan_key(engine: Engine) -> str:
    """Equal where every rank's buffers are laid out alike: plan, topology, compute dtype, parameters."""
    text = "\n".join([engine.plan.key, *(slot.text for slot in engine.slots)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rows(engine: Engine, own: Tensor) -> DTensor:
    """[ranks, elements]: every rank's `own` [elements], as a DTensor that a checkpoint can hold."""
    mesh = engine.runtime.mesh(engine.device.type)
    shape = torch.Size((engine.runtime.topology.world_size, own.numel()))
    return DTensor.from_local(
        own.view(1, -1), mesh, [Shard(0)] * mesh.ndim, run_check=False, shape=shape, stride=(own.numel(), 1)
    )


# -- gradients -----------------------------------------------------------------------------------------------------------------------


def gradients(engine: Engine) -> dict[str, Any]:
    """Gradients that wait for an optimizer step: {"synced": {name: DTensor}, "window": {plan key: {...}}}; {} if there are none."""
    out: dict[str, Any] = {}
    synced = {slot.name: slot.master.grad.detach() for slot in engine.slots if slot.master.grad is not None}
    if synced:
        out["synced"] = synced
    if engine.window.mains:
        mains = {slot.name: rows(engine, main) for slot, main in engine.window.mains.items()}
        touched = torch.tensor([slot in engine.window.touched for slot in engine.slots], dtype=torch.uint8)
        out["window"] = {plan_key(engine): {"mains": mains, "touched": rows(engine, touched.to(engine.device))}}
    return out


def empty_gradients(engine: Engine, index: Metadata, drop_window: bool) -> dict[str, Any]:
    """Buffers of the gradients that the checkpoint has, for dcp.load to fill. Nothing of the model is changed."""
    found = entries(index, "gradients")
    out: dict[str, Any] = {}
    if "synced" in found:
        out["synced"] = {
            slot.name: torch.zeros_like(slot.master, requires_grad=False)
            for slot in engine.slots
            if slot.name in found["synced"]
        }
    if "window" in found and not drop_window:
        key = plan_key(engine)
        if key not in found["window"]:
            raise CheckpointError(
                "the checkpoint was saved between micro-batches, on another topology or plan: what they had added up belongs to ranks "
                "that are not here. Resume it on the plan that saved it, save after optimizer.step(), or pass drop_window=True to lose "
                "those micro-batches."
            )
        mains = {
            slot.name: rows(engine, engine.new_main(slot))
            for slot in engine.slots
            if slot.name in found["window"][key]["mains"]
        }
        touched = torch.zeros(len(engine.slots), dtype=torch.uint8, device=engine.device)
        out["window"] = {key: {"mains": mains, "touched": rows(engine, touched)}}
    return out


def take_gradients(engine: Engine, filled: dict[str, Any]) -> None:
    """The gradients of a checkpoint in the place of those that this model had."""
    engine.drop_accumulated()
    for slot in engine.slots:
        slot.master.grad = filled.get("synced", {}).get(slot.name)
    for window in filled.get("window", {}).values():
        engine.window.mains = {
            slot: window["mains"][slot.name].to_local().view(-1)
            for slot in engine.slots
            if slot.name in window["mains"]
        }
        marks = window["touched"].to_local().flatten().tolist()
        engine.window.touched = {slot for slot, mark in zip(engine.slots, marks, strict=True) if mark}


# -- images --------------------------------------------------------------------------------------------------------------------------


def images(engine: Engine) -> dict[str, Any]:
    """What the holders of delta-refreshed copies have, and where each unit stands between two full refreshes. {} without deltas."""
    slots = [slot for slot in engine.slots if slot.unit.image is not None]
    if not slots:
        return {}
    standing = torch.tensor([
        [unit.deltas, unit.foreign or (unit.stale and unit.stepped != unit.version), unit.stale] for unit in _imaged(engine)
    ])  # fmt: skip
    return {plan_key(engine): {
        "own": {slot.name: _own_image(engine, slot) for slot in slots},
        "standing": rows(engine, standing.flatten().to(engine.device)),
    }}  # fmt: skip


def empty_images(engine: Engine, index: Metadata) -> dict[str, Any]:
    """The buffers of `images` themselves, if the checkpoint has them for this plan."""
    return images(engine) if plan_key(engine) in entries(index, "images") else {}


def take_images(engine: Engine, filled: dict[str, Any]) -> None:
    """After the masters were loaded and marked as written. Communicates; every rank calls it.

    Copies that other ranks read in memory are made here without the barriers of a refresh (zcompile.refresh, Note [Barriers]): so nobody
    begins before all have ended what reads them, and nobody goes on before all are made.
    """
    peers = bool(filled) and any(unit.first.peer_level for unit in _imaged(engine))
    if peers:
        _meet(engine, "copies of other ranks were read")
    for found in filled.values():
        standing = found["standing"].to_local().view(-1, 3).tolist()
        for unit, (deltas, foreign, stale) in zip(_imaged(engine), standing, strict=True):
            spread_image(unit)
            copy_from_image(unit)
            unit.deltas, unit.foreign = deltas, bool(foreign)
            unit.stepped = unit.version
            if not stale:
                unit.seen = unit.version
    if peers:
        _meet(engine, "copies were made from a checkpoint")


def _meet(engine: Engine, step: str) -> None:
    """What every rank has asked of its memory is done: on a GPU, work that is only enqueued too."""
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    engine.runtime.agreement.exchange([], step=step)


def _imaged(engine: Engine) -> list[Any]:
    return [unit for unit in engine.units if unit.image is not None]


def _own_image(engine: Engine, slot: Slot) -> DTensor:
    """This rank's rows of its image, as a DTensor like the master, in the compute dtype: a view."""
    assert slot.unit.image is not None
    padded = slot.unit.image[slot.unit.row].narrow(0, slot.spec.offset, slot.spec.layout.shard)
    return wrap_local(at_start(slot.trimmed(padded)), slot.master)


# -- buffers and random states -------------------------------------------------------------------------------------------------------


def odd_buffers(model: nn.Module, engine: Engine) -> dict[str, Tensor]:
    """Persistent buffers that differ from rank to rank (running statistics, say): a checkpoint has rank 0's, and these beside. Every rank
    calls it."""
    saved = {name: value for name, value in model.state_dict().items() if type(value) is Tensor}
    digests = [int(hashlib.sha256(_bytes(value)).hexdigest()[:15], 16) for value in saved.values()]
    columns = zip(*engine.runtime.agreement.exchange(digests, step="buffers of a checkpoint"), strict=True)
    return {name: value for (name, value), column in zip(saved.items(), columns, strict=True) if len(set(column)) > 1}


def _bytes(value: Tensor) -> bytes:
    plain = value.detach().cpu().contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators that a training loop draws from: torch's on the CPU and on the device, Python's, and NumPy's if it is in use."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    if "numpy.random" in sys.modules:
        kind, key, *rest = sys.modules["numpy.random"].get_state()
        state["numpy"] = (str(kind), key.tolist(), *rest)
    return state


def set_random_state(device: torch.device, state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "device" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))
