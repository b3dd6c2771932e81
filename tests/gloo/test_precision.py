"""The table of formats is what tensors and messages really have."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor

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


def counted(pairs: Iterable[tuple[torch.dtype, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for dtype, number in pairs:
        name = SHORT[str(dtype).removeprefix("torch.")]
        out[name] = out.get(name, 0) + number
    return out


def tensors(rank: int, plan: dict[str, Any], dtype: torch.dtype | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the table, the same of tensors): main grads of an open window, whole weights as a forward reads them, moments of two optimizers."""
    model: Any = hierarchical_zero(
        small(), topology="2x1", plan=Plan.preset("zero_topo", **plan), compute_dtype=dtype, compile=False
    )
    seen: dict[str, tuple[torch.dtype, int]] = {}
    sizes = {slot.name: slot.spec.layout.numel for slot in model.zero.slots}

    def look(prefix: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            for name in sizes:
                if name.rpartition(".")[0] == prefix:
                    whole = getattr(module, name.rpartition(".")[2])
                    assert not isinstance(whole, DTensor)
                    seen[name] = (whole.dtype, whole.numel())

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(look(name)) if name else None
    matrices = [p for p in model.parameters() if p.dim() == 2]
    two = [torch.optim.AdamW(matrices), torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2])]
    ids = torch.arange(6).view(2, 3)
    model(ids).float().square().mean().backward()
    for optimizer in two:
        optimizer.step()
    with model.no_sync():
        model(ids).float().square().mean().backward()
    mains = model.zero.window.mains
    assert set(seen) == set(sizes) == {slot.name for slot in mains}
    moments = {key: counted((state[key].dtype, state[key].numel()) for each in two for state in each.state.values())
               for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    return zcompile.precision(model, two), {
        "main gradients": counted((main.dtype, sizes[slot.name]) for slot, main in mains.items()),
        "whole weights": counted(seen.values()),
        **{f"optimizer's {key}": row for key, row in moments.items()},
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", [{}, {"wire": "paper"}], ids=["native", "paper"])
def test_requirement_20_what_is_not_kept_is_what_a_forward_and_a_window_have(
    ranks: Any, plan: dict[str, Any], dtype: torch.dtype | None
) -> None:
    for table, seen in ranks(2).run(tensors, plan, dtype):
        for what, row in seen.items():
            assert table[what] == row and sum(row.values()) == MATRICES + REST, what


def example(rank: int, folder: str) -> tuple[str, dict[str, Any]]:
    """What examples/train_gpt.py prints at the end of a run of one step, and the table."""
    sys.path.insert(0, folder)
    try:
        import gpt
        import train_gpt
    finally:
        sys.path.remove(folder)
    arguments = train_gpt.parse(["--eager", "--layers", "1", "--hidden", "16", "--heads", "2", "--context", "8", "--dtype", "bfloat16",
                                 "--topology", "1", "--steps", "1", "--accumulate", "1"])  # fmt: skip
    text = torch.arange(4096).to(torch.uint8)
    run = train_gpt.prepare(arguments, train_gpt.plan_of(arguments), gpt.Corpus(text, text, 1), torch.device("cpu"))
    run.train_step()
    console = Console(file=io.StringIO(), width=200)
    train_gpt.report(run, console, None, 1.0, 0.5, 2.0)
    return console.file.getvalue(), zcompile.precision(run.model, run.optimizer)  # type: ignore[attr-defined]


def test_the_example_prints_the_table(ranks: Any) -> None:
    ((printed, found),) = ranks(1).run(example, str(Path(__file__).parents[2] / "examples"))
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.count("│") > 2}
    for what, row in found.items():
        assert all(f"{number:,}" in lines[what] for number in row.values()), (what, printed)
    assert "optimizer's exp_avg" in lines and "bf16" in printed and "formats, and how many parameters" in printed


SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "dtype"),
    [({}, None), ({}, torch.bfloat16), ({"wire": "paper"}, torch.bfloat16), ({"reduce": "bf16"}, None)],
    ids=["native", "native in bf16", "paper in bf16", "bf16 reductions"],
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
