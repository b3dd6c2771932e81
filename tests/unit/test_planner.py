"""The planner: what a model computes, what a plan costs, which plan is best. Small shapes, no process group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zcompile import cost
from zcompile.cli import main
from zcompile.machines import Device, Level
from zcompile.plan import PRESETS, Auto, Plan
from zcompile.planner import step as steps
from zcompile.planner.auto import choose, of_parameters
from zcompile.planner.command import allowed, size
from zcompile.planner.search import NothingFits, Request, formats, placements, search
from zcompile.planner.skeleton import Skeleton
from zcompile.planner.step import of_skeleton, play
from zcompile.planner.workload import Workload, WorkloadError, of_module, of_text
from zcompile.shapes import SHAPES
from zcompile.topology import Topology

DEVICE = Device("test", (("bfloat16", 1e12), ("float32", 1e12)), memory=1e9, memory_bandwidth=1e11)
LEVELS = Level("pair", 2, 4e9, 1e-6), Level("node", 2, 2e9, 2e-6), Level("cluster", 4, 1e9, 5e-6, steps="ring")
MACHINE = Topology(LEVELS, DEVICE)
SLOW = Topology((LEVELS[0], LEVELS[1], replace(LEVELS[2], bandwidth=1e7)), DEVICE)


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return of_text("tiny", micro_batch=2)


def skeleton(workload: Workload, plan: Plan, topology: Topology = MACHINE, overlap: int = 2) -> Skeleton:
    return Skeleton(workload, plan.resolve(topology, "bfloat16"), overlap)


# -- workloads -------------------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_products(tiny: Workload) -> None:
    """Six for each weight of a product and token, and attention: 4 t t h forward (scores and values), 5/2 of it backward."""
    shape, tokens = SHAPES["tiny"], 2 * SHAPES["tiny"].sequence
    weights = sum(p.numel() for n, p in tiny.module.named_parameters() if p.dim() == 2 and not n.startswith("embed"))
    attention = shape.layers * 4 * tokens * shape.sequence * shape.hidden * 3.5
    assert tiny.tokens == tokens and tiny.flops == 6 * weights * tokens + attention


def test_parameters_are_needed_in_order_and_gradients_come_in_the_other(tiny: Workload) -> None:
    uses = tiny.uses
    first, second = uses["blocks.0.up.weight"], uses["blocks.1.up.weight"]
    assert 0 <= first.forward < second.forward < tiny.split <= second.backward < first.backward
    assert second.gradient < first.gradient <= uses["embed.weight"].gradient < len(tiny.ops)
    assert uses["blocks.0.up.bias"].backward == -1, "no product reads a bias in backward"


def test_recomputing_costs_flops_and_saves_memory(tiny: Workload) -> None:
    again = of_text("tiny", micro_batch=2, recompute=True)
    assert again.flops > tiny.flops and again.activations < tiny.activations <= tiny.peak
    assert again.uses["blocks.0.qkv.bias"].backward > again.split, "recomputing reads it once more"


def test_a_fused_chain_moves_only_its_ends() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1000))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((x * self.w) + x).tanh().sum()

    found = of_module("chain", Chain(), (torch.zeros(1000),))
    seconds = found.seconds(Device("d", (("float32", 1e30),), 1e9, memory_bandwidth=4000.0))
    assert seconds[:3] == pytest.approx([2.0, 1.0, 1.0]), "two inputs read; x again; the result, for the sum, written"


def test_the_module_is_as_it_was(tiny: Workload) -> None:
    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in tiny.module.parameters())
    model = nn.Linear(4, 4)
    before = model.weight
    of_module("linear", model, (torch.zeros(2, 4),))
    assert model.weight is before and model.weight.grad is None and not before._post_accumulate_grad_hooks


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x) if x.sum().item() > 0 else x


def test_a_model_that_does_not_run_on_fake_tensors_says_so() -> None:
    with pytest.raises(WorkloadError, match=r"'looks' does not run on fake tensors.*DataDependent"):
        of_module("looks", Looks(), (torch.zeros(2, 4),))
    with pytest.raises(WorkloadError, match="nothing to train"):
        of_module("frozen", nn.Linear(4, 4).requires_grad_(False), (torch.zeros(2, 4),))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"text": "gpt-5"}, "known shapes are gpt-neox-20b"), ({"text": "tiny", "sequence": 33}, "has 1 to 32 tokens"),
     ({"text": "tiny", "micro_batch": 0}, "from 1"), ({"text": "absent.py:model"}, "there is no file absent.py")],
)  # fmt: skip
def test_unknown_models(arguments: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        of_text(**arguments)


def test_a_transformers_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16
    ).save_pretrained(tmp_path)  # fmt: skip
    found = of_text(str(tmp_path), micro_batch=2)
    assert found.tokens == 32 and found.flops > 6 * 32 * found.parameters * 0.5


# -- steps -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("fsdp", "mics")])
@pytest.mark.parametrize("wire", [None, "paper"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_step_receives_the_bytes_of_the_closed_forms(tiny: Workload, preset: str, wire: str | None, k: int) -> None:
    made = skeleton(tiny, Plan.preset(preset, wire=wire))
    expected: cost.Bytes = {}
    for piece in made.pieces:
        for spec in piece.specs:
            use = tiny.uses[spec.name]
            times = {"gather": k * ((use.forward >= 0) + (use.backward >= 0)), "reduce": k, "sync": 1, "refresh": 1}
            for transfer, count in times.items():
                for key, amount in cost.transfer_bytes(spec, transfer).items():
                    expected[key] = expected.get(key, 0) + count * amount
    assert play(of_skeleton(made, k), k).received == expected


def test_no_step_is_shorter_than_its_lanes_and_overlap_hides(tiny: Workload) -> None:
    results = {n: play(of_skeleton(skeleton(tiny, Plan.preset("zero3"), overlap=n))) for n in (0, 1, 4)}
    assert results[4].seconds <= results[1].seconds < results[0].seconds
    for found in results.values():
        lanes = found.timeline.lanes
        assert found.seconds >= max(found.timeline.busy(lane) for lane in lanes) - 1e-12
        assert found.compute + found.exposed == pytest.approx(found.seconds, rel=0.02)
        assert sum(found.levels.values()) == pytest.approx(found.exposed)


def test_micro_batches_that_are_not_played_take_what_the_middle_one_takes(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = of_skeleton(skeleton(tiny, Plan.preset("zero_topo")), 6)
    short = play(made, 6)
    monkeypatch.setattr(steps, "MOST_PLAYED", 6)
    whole = play(made, 6)
    assert short.seconds == pytest.approx(whole.seconds, rel=1e-3) and short.received == whole.received
    assert short.flops == pytest.approx(whole.flops) and short.exposed == pytest.approx(whole.exposed, rel=1e-2)


def test_memory_is_state_and_activations(tiny: Workload) -> None:
    found = play(of_skeleton(skeleton(tiny, Plan.preset("zero_topo"))))
    state = skeleton(tiny, Plan.preset("zero_topo")).state(accumulating=False)
    assert found.memory["weights"] == sum(state.values()) - state["gradient"] - state["main"]
    peak = max(each.bytes.get("activations", 0) for each in found.timeline.memory)
    assert tiny.peak * 0.9 <= peak <= tiny.peak * 1.1


def test_frozen_parameters_are_gathered_and_no_more() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    module[0].requires_grad_(False)
    made = skeleton(of_module("half", module, (torch.zeros(8, 64),), torch.bfloat16), Plan.preset("zero3"))
    frozen = [piece for piece in made.pieces if not piece.trainable]
    assert frozen and all(piece.gradient == -1 for piece in frozen)
    names = {
        name for hop in play(of_skeleton(made)).timeline.hops if hop.transfer != "gather" for name in hop.parameters
    }
    assert names == {"1.weight", "1.bias"}


# -- search ----------------------------------------------------------------------------------------------------------------------


def test_the_plan_space() -> None:
    assert len(placements(MACHINE)) == 20 and len(set(placements(MACHINE))) == 20
    assert len(placements(Topology((LEVELS[0], Level("cluster", 1, 1e9, 0.0)), DEVICE))) == 4, (
        "levels of one rank say nothing"
    )
    assert formats(()) == [{}]
    assert {"gather": "int8", "reduce": "int4/128"} in formats(("int8", "int4")) and len(formats(("int8", "int4"))) == 6


def test_the_best_plan_is_the_fastest_that_fits_and_the_same_again(tiny: Workload) -> None:
    one, two = (search(tiny, MACHINE, Request()) for _ in range(2))
    assert one.best.label == two.best.label and [c.label for c in one.ranked] == [c.label for c in two.ranked]
    assert one.best.result is not None
    for preset in one.presets.values():
        assert preset.result is not None and preset.verdict
        assert one.best.result.seconds <= preset.result.seconds * 1.002
    assert one.best.verdict == "" and all(c.verdict for c in one.ranked if c is not one.best)


def test_formats_are_chosen_only_where_they_are_allowed(tiny: Workload) -> None:
    plain = search(tiny, SLOW, Request()).best
    assert all(not getattr(plain.plan, t).quantized for t in ("gather", "reduce"))
    free = search(tiny, SLOW, Request(allowed=("int8", "int4"))).best
    assert free.plan.reduce.short.startswith("int4"), "over a slow network the smaller message wins"
    assert free.result is not None and plain.result is not None and free.result.seconds < plain.result.seconds


def test_less_memory_shards_more(tiny: Workload) -> None:
    free = search(tiny, MACHINE, Request()).best
    assert free.result is not None
    limit = int(free.result.bytes * 0.95)
    tight = search(tiny, MACHINE, Request(memory=limit)).best
    assert tight.result is not None and tight.result.bytes <= limit and tight.label != free.label


def test_nothing_fits_says_what_would(tiny: Workload) -> None:
    with pytest.raises(
        NothingFits, match=r"no plan fits 0\.0 GB: the one that needs least, world/world/world .* too much .*would help"
    ):
        search(tiny, MACHINE, Request(memory=1000))


@pytest.mark.parametrize("bad", [{"allowed": ("int2",)}, {"micro_batches": 0}, {"memory": -1}])
def test_requests_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"int2|from 1"):
        Request(**bad)


# -- auto ------------------------------------------------------------------------------------------------------------------------


def test_auto_with_and_without_an_example(tiny: Workload) -> None:
    compute = dict.fromkeys(tiny.uses, torch.bfloat16)
    tokens = torch.zeros(2, 33, dtype=torch.int64)
    for example in (None, (tokens,)):
        plan, options, said = choose(tiny.module, Auto(), MACHINE, compute, example)
        assert (plan, options, said) == choose(tiny.module, Auto(), MACHINE, compute, example)
        assert plan.name == "auto" and options["overlap"] >= 1 and "ms a step" in said
        assert options["tokens"] == (tokens.numel() if example else 0), "none is made up"
        assert not plan.gather.quantized and not plan.reduce.quantized
    quantised, _, _ = choose(tiny.module, Auto(max_wire_bits=4), SLOW, compute, (tokens,))
    assert quantised.reduce.quantized


def test_closed_forms_of_parameters_alone(tiny: Workload) -> None:
    found = of_parameters(tiny.module, dict.fromkeys(tiny.uses, torch.bfloat16))
    weights = sum(p.numel() for p in tiny.module.parameters() if p.dim() > 1)
    assert found.flops == 6 * weights * 2048 and found.uses["embed.weight"].forward < found.uses["head.weight"].forward


@pytest.mark.parametrize("bad", [{"allow": ("int3",)}, {"max_wire_bits": 12}, {"memory": -1}, {"micro_batches": 0}])
def test_autos_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"Auto.{next(iter(bad))}"):
        Auto(**bad)


# -- command ---------------------------------------------------------------------------------------------------------------------


def test_command_writes_tables_formulas_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    arguments = [
        "plan",
        "--model",
        "tiny",
        "--topology",
        "2x2x2",
        "--micro-batches",
        "2",
        "--explain",
        "--json",
        str(path),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert (
        "best plans" in text
        and "P*b*(1/E_{j-1} - 1/E_j)" in text
        and "Max(C, L_j)" in text
        and "take: plan=Plan(" in text
    )
    found = json.loads(path.read_text())
    assert set(found["presets"]) == {"ddp", "zero1", "zero2", "zero3", "hsdp", "zeropp", "zero_topo"}
    assert found["best"]["seconds"] > 0 and found["ranks"] == 8


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plan", "--model", "tiny", "--topology", "frontier:2", "--plot", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{n}.{k}" for n in ("scaling", "levels", "memory") for k in ("png", "svg")
    }


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [(["--memory", "1KB"], 1, "no plan fits"), (["--memory", "much"], 2, "a size such as 64GB"), (["--allow", "int2"], 2, "int2"),
     (["--topology", "frontear:2"], 2, "unknown topology"), (["--model", "gpt-5"], 2, "known shapes"), (["--jitter", "2"], 2, "jitter")],
)  # fmt: skip
def test_what_the_command_refuses(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", "tiny", "--topology", "2x2x2", *arguments]) == code
    assert says in capsys.readouterr().err


def test_sizes_and_formats() -> None:
    assert size("64GB") == 64 * 10**9 and size("1.5 GiB") == 3 * 2**29 and size(None) == 0
    assert allowed("paper, bf16") == ("int8", "int4", "bf16")
