"""Delta refresh: when it is a full one instead, how close the image stays to the master, and that faults in it are seen."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import quantized
from support.patches import replaced
from torch import Tensor, nn

from zcompile import Plan, hierarchical_zero, ledger, mark_written, transfers
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry

DELTA = Plan.preset("zero_topo", gather="int8/32", reduce="fp32", refresh="int4-delta/32")


def wrapped(plan: Plan = DELTA, topology: str = "2x2x2") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 32, bias=False))
    return hierarchical_zero(model, topology=topology, plan=plan, compute_dtype=torch.bfloat16, compile=False)


def loss(model: Any, rank: int, number: int) -> Tensor:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(100 * number + rank))
    out: Tensor = model(x).float().square().mean()
    return out


def refreshed(model: Any) -> int:
    """Bytes that the last step's refreshes received over the cluster level."""
    row = ledger(model)["levels"]["cluster"]["refresh"]
    assert row["predicted"] == row["compiled"] == row["counted"]
    return int(row["counted"])


def gap(model: Any) -> float:
    """Largest distance of a rank's own row of the image from its masters, over the block's scale of the last delta at most."""
    worst = 0.0
    for unit in model.zero.units:
        worst = max(worst, float((unit.image[unit.row].float() - unit.master).abs().max()))
    return worst


def images_agree(model: Any) -> None:
    """All holders of a row of an image have the same bits of it."""
    engine = model.zero
    for unit in engine.units:
        layout, rows = unit.first.layout, unit.image.shape[0]
        mine = {layout.index(engine.coordinates) // rows * rows + i: unit.image[i].clone() for i in range(rows)}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        first: dict[int, Tensor] = {}
        for held in everyone:
            for index, row in held.items():
                assert torch.equal(first.setdefault(index, row), row), f"{unit.name}: holders of row {index} differ"


def when_full(rank: int) -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    elements = sum(unit.master.numel() for unit in model.zero.units)
    code = Code("int4", 32)
    deltas = [sum(code.record_bytes(spec.layout.shard) for spec in unit.specs) for unit in model.zero.units]
    full, delta = 2 * elements, sum(deltas)

    def step(number: int) -> int:
        loss(model, rank, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        return refreshed(model)

    assert step(0) == full, "nobody holds anything yet"
    assert [step(n) for n in (1, 2, 3)] == [delta] * 3
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    with torch.no_grad():
        next(iter(model.parameters())).to_local().mul_(1.5)
    assert step(4) == 2 * model.zero.units[0].master.numel() + deltas[1], "an edit in place of one unit"
    assert step(5) == delta
    model.load_state_dict(state)
    assert step(6) == full, "a load"
    assert step(7) == delta
    mark_written(model)
    assert step(8) == full, "an announced write"
    loss(model, rank, 9).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.99)  # after the forward's refresh and before the step: the step does not hide it
    optimizer.step()
    optimizer.zero_grad()
    assert step(10) == full, "a write between two steps"
    with torch.no_grad():
        model(torch.zeros(1, 32))
        for unit in model.zero.units:
            assert unit.image.dtype == torch.bfloat16 and unit.copy.dtype == torch.uint8
    images_agree(model)


def test_a_full_refresh_after_every_write_that_is_no_optimizer_step(ranks: Any) -> None:
    ranks(8).run(when_full, timeout=120)


def every(rank: int) -> list[int]:
    model = wrapped(Plan.preset("zero_topo", refresh="int8-delta/32", full_refresh_every=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = []
    for number in range(6):
        loss(model, rank, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(refreshed(model))
    return out


def test_a_full_refresh_every_so_many_steps(ranks: Any) -> None:
    found = ranks(8).run(every, timeout=120)[0]
    full, delta = found[0], found[1]
    assert delta < full and found == [full, delta, delta, full, delta, delta]


def error(rank: int, plan: Plan) -> list[float]:
    model = wrapped(plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    out = []
    for number in range(40):
        loss(model, rank, number).backward()
        out.append(gap(model))
        optimizer.step()
        optimizer.zero_grad()
    images_agree(model)
    return out


def test_the_error_of_a_delta_refresh_does_not_add_up(ranks: Any) -> None:
    """Steps of 1e-3 by AdamW: a delta is off by half a step of its block's scale, and rounds to bf16; the next one brings the rest."""
    largest = 0.5  # weights are below it: half a bf16 step of them is largest * 2^-9
    for found in ranks(8).run(error, DELTA, timeout=200):
        bound = (1e-3 * 1.2 + largest * 2.0**-9) / 7 * 0.51 + largest * 2.0**-9
        assert max(found) <= 2 * bound and max(found[20:]) <= 1.5 * max(found[1:20]), (bound, found)


def fault(kind: str) -> contextlib.AbstractContextManager[None]:
    """What a broken kernel, or a forgotten update, would do."""
    kernels = transfers.kernels
    apply, reduce, dequantize = kernels.apply_delta, kernels.reduce, kernels.dequantize

    def stale(image: Tensor, message: Tensor, geometry: str, code: str) -> None:
        pass

    def dropped(message: Tensor, parts: int, mains: Any, geometry: str, code: str) -> Tensor:
        first, how = Geometry.parse(geometry).pieces[0], Code.parse(code)
        begin = how.code_bytes(first.n)
        message = message.clone()
        message[begin : begin + how.scale_bytes(first.n)] = 0
        return reduce(message, parts, mains, geometry, code)

    def shifted(message: Tensor, parts: int, mains: Any, geometry: str, code: str) -> Tensor:
        message = message.clone()
        message[:32] = message[:32] << 4 | message[:32] >> 4
        return reduce(message, parts, mains, geometry, code)

    def another(message: Tensor, geometry: str, code: str, dtype: torch.dtype) -> Tensor:
        message = message.clone()
        message[3] += 1
        return dequantize(message, geometry, code, dtype)

    broken = {
        "a stale image": ("apply_delta", stale), "a dropped scale": ("reduce", dropped), "a shifted nibble": ("reduce", shifted),
        "a code that is off by one": ("dequantize", another), "none": ("apply_delta", apply),
    }  # fmt: skip
    name, function = broken[kind]
    return replaced(kernels, name, function)


def faulty(rank: int, kind: str, *args: Any) -> list[Any]:
    with fault(kind if rank == 5 else "none"):
        return quantized.sharded(rank, *args)


FAULTS = ("a stale image", "a dropped scale", "a shifted nibble", "a code that is off by one")


@pytest.mark.parametrize("kind", ("none", *FAULTS))
def test_invariant_12_a_fault_in_a_quantiser_makes_the_comparison_go_red(ranks: Any, kind: str) -> None:
    topology, plan = quantized.PLANS["delta"]
    found = ranks(8).run(faulty, kind, topology, plan, "eager", 1, 3, torch.float32, timeout=120)
    with pytest.raises(AssertionError) if kind in FAULTS else contextlib.nullcontext():
        quantized.agree(found, quantized.reference(topology, plan, 1), 1, 3)
