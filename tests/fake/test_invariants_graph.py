"""Invariants that a graph on paper can show, each named after its number, each red when its mechanism is taken out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import paper as world
from support.patches import replaced
from support.spawn import Pool, RanksFailed
from torch import Tensor, nn

from zcompile import backend, hierarchical_zero, passes
from zcompile.passes import merge, tag
from zcompile.passes.nodes import SEMANTIC, find

PLANS = ("zero3", "zeropp", "zero_topo", "hsdp")


# -- 1 -----------------------------------------------------------------------------------------------------------------------------


def whole_weights_saved(model: Any) -> list[tuple[int, ...]]:
    """Shapes of what a forward saves that is as large as a weight. The batch of 3 keeps activations at other sizes."""
    sizes = {spec.layout.numel for unit in model.zero.units for spec in unit.specs if len(spec.shape) > 1}
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() in sizes and tensor.untyped_storage().nbytes() <= 4 * tensor.numel():
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.ones(3, 8)).square().mean().backward()
    return saved


def saved_weights(_: int, plan: str, tagged: bool, verified: bool) -> list[tuple[int, ...]]:
    with replaced(passes, "JOINT", (merge, tag) if tagged else (merge,)), \
            replaced(passes, "LOWERED", passes.LOWERED if verified else passes.LOWERED[:-1]):  # fmt: skip
        return whole_weights_saved(world.wrapped(plan=plan, blocks=2))


@pytest.mark.parametrize("plan", PLANS)
def test_invariant_1_no_gathered_weight_is_saved_for_backward(paper: Pool, plan: str) -> None:
    assert paper.run(saved_weights, plan, True, True) == [[]]


def test_invariant_1_without_the_tag_pass_whole_weights_are_saved(paper: Pool) -> None:
    (saved,) = paper.run(saved_weights, "zero_topo", False, False)
    assert len(saved) >= 3


def test_invariant_1_without_the_tag_pass_verify_refuses(paper: Pool) -> None:
    with pytest.raises(RanksFailed, match="is saved for backward and derives from a gather"):
        paper.run(saved_weights, "zero_topo", False, True)


# -- 6 -----------------------------------------------------------------------------------------------------------------------------


def semantic_ops(_: int) -> dict[str, tuple[int, int]]:
    """stage -> (semantic ops before, after the passes)."""
    count: dict[str, list[int]] = {}

    def observer(gm: Any, context: Any, name: str) -> None:
        if name in ("input", "verify"):
            count.setdefault(context.stage, []).append(len(find(gm.graph, *SEMANTIC)))

    init = backend.Compilation.__init__

    def patched(self: Any, *args: Any) -> None:
        init(self, *args)
        self.observer = observer

    with replaced(backend.Compilation, "__init__", patched):
        model = world.wrapped()
        world.step(model)
        with torch.no_grad():
            model(torch.ones(4, 8))
    return {stage: (numbers[0], numbers[-1]) for stage, numbers in count.items() if stage != "joint"}


def test_invariant_6_no_semantic_op_is_left_in_any_lowered_graph(paper: Pool) -> None:
    (found,) = paper.run(semantic_ops)
    assert set(found) == {"forward", "backward", "inference"}
    for stage, (before, after) in found.items():
        assert before >= 5, stage
        assert after == 0, stage


# -- pitfalls of torch -------------------------------------------------------------------------------------------------------------


def configuration_of_the_halves(_: int) -> dict[str, tuple[bool, ...]]:
    import torch._inductor.config as inductor

    found: dict[str, tuple[bool, ...]] = {}
    half = backend.Compilation.half

    def patched(self: Any, gm: Any, inputs: Any, **details: Any) -> Any:
        stage = "backward" if details.get("is_backward") else "forward"
        found[stage] = (inductor.reorder_for_peak_memory, inductor.reorder_for_locality)
        return half(self, gm, inputs, **details)

    with replaced(backend.Compilation, "half", patched):
        world.step(world.wrapped())
    return found


def test_pitfall_config_patches_reach_the_backward_which_is_compiled_later(paper: Pool) -> None:
    (found,) = paper.run(configuration_of_the_halves)
    assert found == {"forward": (False, False), "backward": (False, False)}


def copies_written_before_the_backward(_: int, flag: str) -> None:
    with replaced(tag, "NO_VERSION_CHECK", flag):
        model = world.wrapped()
        loss = model(torch.ones(4, 8)).square().mean()
        for unit in model.zero.units:
            with torch.no_grad():
                unit.copy.add_(0)
        loss.backward()


def test_pitfall_a_copy_that_a_refresh_writes_between_forward_and_backward_is_not_version_checked(paper: Pool) -> None:
    """Watches torch's own mark: see NO_VERSION_CHECK in the tag pass."""
    paper.run(copies_written_before_the_backward, tag.NO_VERSION_CHECK)
    with pytest.raises(RanksFailed, match="modified by an inplace operation"):
        paper.run(copies_written_before_the_backward, "some other mark")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = self.cell(x).tanh()
        return x


def reads(_: int, phase: str) -> dict[str, list[str]]:
    world.world(0, 8)
    model = hierarchical_zero(Recurrent(), topology="2x2x2", codegen=False)
    if phase != "direct":
        with model.no_sync():
            model(torch.ones(4, 8)).sum().backward()
    if phase != "accumulate":
        model(torch.ones(4, 8)).sum().backward()
    return {p.stage: [f"{e.transfer} {e.level}" for e in p.collectives] for p in model.zero.programs}


@pytest.mark.parametrize(
    ("phase", "backward"),
    [
        ("direct", ["gather pair", "reduce pair", "reduce node", "sync cluster"]),
        ("accumulate", ["gather pair", "reduce pair", "reduce node"]),
        ("sync", ["gather pair", "reduce pair", "reduce node", "sync cluster"]),
    ],
)
def test_pitfall_five_reads_of_one_weight_make_one_gather_and_one_reduction(
    paper: Pool, phase: str, backward: list[str]
) -> None:
    (found,) = paper.run(reads, phase)
    assert found == {"forward": ["gather pair"], "backward": backward}


def unread_parameter(_: int) -> list[str]:
    """A weight whose product nobody uses: dead chains are taken out, waits included, the same on every rank."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x)

    world.world(0, 8)
    model = hierarchical_zero(Idle(), topology="2x2x2", codegen=False)
    model(torch.ones(4, 8)).sum().backward()
    return [name for p in model.zero.programs for e in p.collectives for name in e.parameters]


def test_pitfall_a_wait_that_nobody_uses_does_not_keep_its_gather_alive(paper: Pool) -> None:
    (names,) = paper.run(unread_parameter)
    assert set(names) == {"used.weight"}
