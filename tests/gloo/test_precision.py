"""The table of formats is what tensors and messages really have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zcompile
from zcompile import Plan, hierarchical_zero


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 8))


MATRICES, REST = 64 * 128 + 128 * 8, 40 * 64 + 128 + 2 * 128 + 8


def table(rank: int, plan: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    model: Any = hierarchical_zero(
        small(), topology="2x2x1", plan=Plan.preset("zero_topo", **plan), compute_dtype=dtype, codegen=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.arange(6).view(2, 3)).float().square().mean().backward()
    optimizer.step()
    found: dict[str, Any] = {"table": zcompile.precision(model, optimizer)}
    sent: dict[str, dict[str, str]] = {}
    for program in model.zero.programs:
        for entry in program.collectives:
            names = sent.setdefault(f"{entry.transfer} over {entry.level}", {})
            names.update(dict.fromkeys(entry.parameters, entry.wire or entry.dtype))
    sizes = {slot.name: slot.spec.layout.numel for slot in model.zero.slots}
    found["sent"] = {}
    for what, names in sent.items():
        for name, wire in names.items():
            row = found["sent"].setdefault(what, {})
            row[wire] = row.get(wire, 0) + sizes[name]
    return found


SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "plan", [{}, {"wire": "paper"}, {"reduce": "bf16"}], ids=["native", "paper", "bf16 reductions"]
)
def test_requirement_20_the_table_is_what_there_is(ranks: Any, plan: dict[str, Any], dtype: torch.dtype | None) -> None:
    compute = "bf16" if dtype else "fp32"
    for found in ranks(4).run(table, plan, dtype):
        rows = found["table"]
        everything = MATRICES + REST
        for what in (
            "masters",
            "main gradients",
            "gradients for the optimizer",
            "optimizer's exp_avg",
            "optimizer's exp_avg_sq",
        ):
            assert rows[what] == {"fp32": everything}, what
        assert rows["whole weights"] == {compute: everything}
        quantized = [name for name in rows["compute copies"] if name.startswith("int8")]
        assert bool(quantized) == ("wire" in plan)
        assert sum(rows["compute copies"].values()) == everything
        if quantized:
            assert rows["compute copies"][quantized[0]] == MATRICES and rows["compute copies"][compute] == REST
        for what, sent in found["sent"].items():
            assert {SHORT.get(wire, wire): n for wire, n in sent.items()} == rows[what], what
        assert any(what.startswith("reduce over") for what in found["sent"])
        if plan.get("reduce") == "bf16":
            assert all(set(row) == {"bf16"} for what, row in rows.items() if what.startswith("reduce over"))
        elif not plan:
            assert all(
                set(row) == {"fp32"} for what, row in rows.items() if what.startswith(("reduce over", "sync over"))
            )


def autocast(rank: int, dtype: torch.dtype | None) -> str:
    model: Any = hierarchical_zero(small(), topology="2", plan="zero3", compute_dtype=dtype, compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            model(torch.arange(6).view(2, 3)).float().sum().backward()
        except RuntimeError as error:
            return str(error)
    return ""


def test_autocast_is_the_compute_dtype_or_refused(ranks: Any) -> None:
    assert ranks(2).run(autocast, torch.bfloat16) == ["", ""]
    for message in ranks(2).run(autocast, None):
        assert "compute_dtype=torch.bfloat16" in message
