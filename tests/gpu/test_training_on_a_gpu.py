"""Training on one GPU: alone against plain torch.compile, and several ranks that share it, over gloo, against the same on the CPU."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from support.spawn import run
from support.training import losses_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device, and there is none"),
]

PLANS: dict[str, dict[str, Any]] = {
    "native": {},
    "paper": {"wire": "paper"},
    "delta": {"wire": "paper", "refresh": "int4-delta"},
}


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(96, 259), torch.nn.GELU(), torch.nn.Linear(259, 130), torch.nn.LayerNorm(130), torch.nn.Linear(130, 96)
    )  # fmt: skip


def wrapped(device: str, plan: str, topology: str, **options: Any) -> Any:
    from zcompile import Plan, hierarchical_zero

    chosen = Plan.preset("zero_topo", **PLANS[plan])
    return hierarchical_zero(
        module().to(device), topology=topology, plan=chosen, compute_dtype=torch.bfloat16, **options
    )


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def transfers_of(rank: int, device: str, plan: str) -> dict[str, str]:
    """What every transfer of every parameter gives, for inputs that are the same on every device."""
    from zcompile import transfers

    model = wrapped(device, plan, "2x2x1", compile=False, codegen=False)
    engine, found = model.zero, {}
    with torch.no_grad():
        for step in range(2):  # the second refresh is a delta where the plan has them
            for number, slot in enumerate(engine.slots):
                noise = torch.randn(
                    slot.shard.shape, generator=torch.Generator().manual_seed(97 * number + rank + step)
                )
                slot.shard.add_(1e-3 * noise.to(device))
            for unit in engine.units:
                unit.stepped = unit.version  # as an optimizer's step
            engine.refresher.launch(engine.units, {unit for unit in engine.units if unit.wants_full and step == 0})
            engine.refresher.drain()
            for slot in engine.slots:
                found[f"{step} gather {slot.name}"] = digest(transfers.gather(slot.unit.copy, [slot.spec])[0])
        for number, slot in enumerate(engine.slots):
            noise = torch.randn(slot.spec.shape, generator=torch.Generator().manual_seed(31 * number + rank))
            reduced = transfers.reduce([noise.bfloat16().to(device)], [slot.spec])
            found[f"reduce {slot.name}"] = digest(reduced)
            found[f"sync {slot.name}"] = digest(transfers.sync(reduced, [slot.spec]))
    return found


@pytest.mark.parametrize("plan", PLANS)
def test_ranks_that_share_a_gpu_send_the_bits_that_they_send_on_the_cpu(plan: str) -> None:
    on_cpu, on_gpu = (run(transfers_of, 4, device, plan, timeout=300.0) for device in ("cpu", "cuda"))
    assert on_cpu == on_gpu
    assert len({str(rank) for rank in on_gpu}) > 1, "ranks hold different shards"


def losses(rank: int, device: str, plan: str, options: dict[str, Any]) -> list[float]:
    return losses_of(wrapped(device, plan, "2x2x1", **options), 96, 6, rank, device)


@pytest.mark.parametrize("plan", PLANS)
def test_training_is_that_on_the_cpu(plan: str) -> None:
    """bf16 has 8 bits: a value is off by 2^-9 of itself after each of a dozen roundings in a forward, in other places on the two devices.
    A loss is a mean of 768 squares, whose errors average out: 1 % is far above that and far below what a wrong scale would do."""
    reference = run(losses, 4, "cpu", plan, {"codegen": False}, timeout=300.0)
    for options in ({"codegen": False}, {}, {"overlap": 2}):
        found = run(losses, 4, "cuda", plan, options, timeout=400.0)
        for ours, expected in zip(found, reference, strict=True):
            assert ours == pytest.approx(expected, rel=1e-2), options


def alone(rank: int) -> tuple[list[float], list[float]]:
    """1x1x1 and plain torch.compile of a bf16 model whose fp32 masters are kept by hand."""
    ours = wrapped("cuda", "native", "1x1x1")
    plain = module().cuda()
    masters = [p.detach().clone().requires_grad_() for p in plain.parameters()]
    plain.bfloat16()
    forward = torch.compile(plain)
    optimizers = [torch.optim.AdamW(ps, lr=1e-3, fused=True) for ps in (list(ours.parameters()), masters)]
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(6):
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(number)).cuda()
        for model, optimizer, out in zip((ours, forward), optimizers, found, strict=True):
            loss = model(x.bfloat16()).float().square().mean()
            loss.backward()
            if model is forward:
                for master, low in zip(masters, plain.parameters(), strict=True):
                    assert low.grad is not None
                    master.grad, low.grad = low.grad.float(), None
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        with torch.no_grad():
            torch._foreach_copy_(list(plain.parameters()), masters)
    return found


def test_alone_it_is_torch_compile() -> None:
    ((ours, plain),) = run(alone, 1, timeout=300.0)
    assert ours == plain
