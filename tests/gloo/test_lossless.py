"""The lossless delta refresh: native bits in every mode, exact bytes, and a full refresh where a message cannot hold what changed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.patches import replaced
from support.training import MODES
from torch import Tensor, nn

import zcompile
from zcompile import Plan, engine, hierarchical_zero, ledger
from zcompile.kernels.code import lossless_bytes

NATIVE = Plan.preset("zero_topo", reduce="bf16")
LOSSLESS = Plan.preset("zero_topo", reduce="bf16", refresh="lossless-delta")
PLANS = {
    "zero_topo": (NATIVE, LOSSLESS),
    "peers": tuple(
        Plan.preset("zero_topo", peer_gather=True, **given) for given in ({}, {"refresh": "lossless-delta"})
    ),
    "zero2": tuple(Plan.preset("zero2", **given) for given in ({}, {"refresh": "lossless-delta"})),
}


class Net(nn.Module):
    """[B, 6] tokens -> [B, 6, 99]. The matrices are lossless, of `down` eight does not divide the rows; the vector is native."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(160, 64)
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 99, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(self.embed(tokens))))
        return out


def wrapped(plan: Plan, mode: str = "eager") -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return hierarchical_zero(Net(), topology="2x2x2", plan=plan, compute_dtype=torch.bfloat16, **MODES[mode])


def loss(model: Any, rank: int, number: int) -> Tensor:
    tokens = torch.randint(0, 160, (2, 6), generator=torch.Generator().manual_seed(100 * number + rank))
    out: Tensor = model(tokens).float().square().mean()
    return out


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model: Any, optimizer: torch.optim.Optimizer, rank: int, number: int) -> float:
    found = loss(model, rank, number)
    found.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(found.detach())


def refreshed(model: Any, level: str = "cluster") -> int:
    """Bytes that the last step's refreshes received over a level."""
    row = ledger(model)["levels"][level]["refresh"]
    assert row["predicted"] == row["compiled"] == row["counted"], row
    return int(row["counted"])


def masters(model: Any) -> list[Tensor]:
    return [unit.master.clone() for unit in model.zero.units]


def sizes(model: Any) -> tuple[int, int]:
    """Bytes of a rank's own row: native, and as the plan's formats have it."""
    units = model.zero.units
    native = sum(2 * spec.layout.shard for unit in units for spec in unit.specs)
    lossless = sum(
        lossless_bytes(spec.layout.shard) if spec.lossless else 2 * spec.layout.shard
        for unit in units
        for spec in unit.specs
    )
    return native, lossless


def train(rank: int, name: str, mode: str) -> list[Any]:
    out = []
    for plan in PLANS[name]:
        model = wrapped(plan, mode)
        optimizer = adamw(model)
        steps = []
        for number in range(5):
            found = step(model, optimizer, rank, number)
            steps.append((found, refreshed(model), refreshed(model, "node"), refreshed(model, "pair")))
        masters_then = [master.full_tensor() for master in model.state_dict().values()]
        out.append(
            (
                steps,
                masters_then,
                sizes(model),
                [spec.name for unit in model.zero.units for spec in unit.specs if spec.lossless],
            )
        )
    return out


@pytest.mark.parametrize(("name", "mode"), [("zero_topo", "eager"), ("peers", "graph"), ("zero2", "eager")])
def test_native_bits_in_fewer_bytes(ranks: Any, name: str, mode: str) -> None:
    for (native, one, (full, _), _), (lossless, two, (_, delta), names) in ranks(8).run(train, name, mode, timeout=240):
        assert [row[0] for row in native] == [row[0] for row in lossless], "losses"
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "weights"
        assert names == ["embed.weight", "up.weight", "down.weight"]
        node, pair = (2, 4) if name == "zero2" else (2, 0)
        assert [row[1:] for row in native] == [(full, node * full, pair * full)] * 5
        assert lossless[0][1:] == (full, node * full, pair * full), "nobody holds anything yet"
        assert [row[1:] for row in lossless[1:]] == [(delta, node * delta, pair * delta)] * 4
        assert delta < 0.6 * full


def overfull(rank: int, plan: Plan, agreed: bool) -> tuple[list[float], list[int], list[Tensor]]:
    """In step 2 one rank's masters of `up` move far, by an optimizer step, and no other's."""
    model = wrapped(plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses, found = [], []
    look = engine.lossless.prepared
    with (
        contextlib.nullcontext()
        if agreed
        else replaced(engine.lossless, "prepared", lambda units: look(units) and set())
    ):
        for number in range(4):
            out = loss(model, rank, number)
            out.backward()
            losses.append(float(out.detach()))
            if number == 1 and rank == 5:
                model.up.weight.grad.to_local().fill_(300.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(refreshed(model))
    return losses, found, masters(model)


def test_what_one_ranks_message_cannot_hold_is_sent_in_full_by_all(ranks: Any) -> None:
    native, lossless = (ranks(8).run(overfull, plan, True, timeout=120) for plan in (NATIVE, LOSSLESS))
    for rank, ((losses, _, weights), (mine, found, own)) in enumerate(zip(native, lossless, strict=True)):
        assert losses == mine and all(torch.equal(a, b) for a, b in zip(weights, own, strict=True)), rank
        first, second, third, fourth = found
        assert second == fourth < third == first, f"a full one, once: {found}"
        assert found == lossless[0][1], "on all ranks"


@pytest.mark.slow
def test_without_the_agreement_it_would_be_wrong(ranks: Any) -> None:
    with pytest.raises(Exception, match=r"compute copy of 'up.weight' is not what its last refresh left"):
        ranks(8).run(overfull, LOSSLESS, False, timeout=120)


def alone(rank: int, plan: Plan) -> tuple[float, list[Tensor], int]:
    """Only on one rank is anything stale; the others' masters are what they were."""
    model = wrapped(plan)
    optimizer = adamw(model)
    step(model, optimizer, rank, 0)
    loss(model, rank, 1).backward()
    refreshed(model)
    if rank == 3:
        for unit in model.zero.units:
            unit.master *= 1.001
            unit.stepped = unit.version  # as after an optimizer's step
    out = loss(model, rank, 2)
    out.backward()
    return float(out.detach()), masters(model), refreshed(model)


def test_a_rank_that_wrote_nothing_says_so(ranks: Any) -> None:
    native, lossless = (ranks(8).run(alone, plan, timeout=120) for plan in (NATIVE, LOSSLESS))
    assert [found[0] for found in native] == [found[0] for found in lossless]
    assert 0 < lossless[0][2] < 0.6 * native[0][2]


def writes(rank: int) -> list[int]:
    model = wrapped(LOSSLESS)
    optimizer = adamw(model)
    native, delta = sizes(model)
    step(model, optimizer, rank, 0)
    found = []

    def after(write: Any) -> None:
        with torch.no_grad():
            write()
        step(model, optimizer, rank, 1)
        assert refreshed(model) == native, "a write that is no optimizer step"
        step(model, optimizer, rank, 2)
        found.append(refreshed(model))

    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    after(lambda: [parameter.to_local().mul_(1.5) for parameter in model.parameters()])
    after(lambda: model.load_state_dict(state))
    after(lambda: zcompile.mark_written(model))
    assert found == [delta] * 3
    return found


def test_a_full_refresh_after_every_write_that_is_no_optimizer_step(ranks: Any) -> None:
    ranks(8).run(writes, timeout=120)


def written_to(rank: int, at: int) -> None:
    model = wrapped(LOSSLESS)
    optimizer = adamw(model)
    step(model, optimizer, rank, 0)
    if rank == 2:
        unit = next(unit for unit in model.zero.units if unit.specs[0].name == "embed.weight")
        unit.rows[0][(unit.row + at) % 4, 7] += 1
    step(model, optimizer, rank, 1)
    step(model, optimizer, rank, 2)


@pytest.mark.parametrize("at", [pytest.param(0, id="what it owns"), pytest.param(1, id="what it was sent", marks=pytest.mark.slow)])
def test_a_copy_that_something_else_has_written_to_is_an_error(ranks: Any, at: int) -> None:
    """Of the owner's row all but the owner see it, of another row the one that holds it."""
    words = r"'embed.weight' is not what its last refresh left.*Rule\('embed.weight', refresh='native'\)"
    with pytest.raises(Exception, match=words):
        ranks(8).run(written_to, at, timeout=120)


def resumed(rank: int, folder: str) -> tuple[list[float], list[float], list[int]]:
    model = wrapped(LOSSLESS)
    optimizer = adamw(model)
    for number in range(3):
        step(model, optimizer, rank, number)
    zcompile.save(model, optimizer, folder)
    through = [step(model, optimizer, rank, number) for number in range(3, 6)]
    again = wrapped(LOSSLESS)
    other = adamw(again)
    assert zcompile.load(again, other, folder).exact
    dist.barrier()
    rest, found = [], []
    for number in range(3, 6):
        rest.append(step(again, other, rank, number))
        found.append(refreshed(again))
    assert all(torch.equal(a, b) for a, b in zip(masters(model), masters(again), strict=True))
    return through, rest, found


def test_a_resumed_run_goes_on_bit_for_bit(ranks: Any, tmp_path: Path) -> None:
    for through, rest, found in ranks(8).run(resumed, str(tmp_path / "saved"), timeout=120):
        assert through == rest
        assert found[1] == found[2] < found[0], "the first refresh after a load is a full one"
