"""Meta start: the plain constructor's weights, to the bit, on every mesh, with a few whole tensors alive at once."""

from __future__ import annotations

import contextlib
import copy
import math
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.spawn import run
from support.state import Awkward, one_step, same_bits, whole_state
from torch import Tensor, nn

from zcompile import deferred_init, hierarchical_zero
from zcompile.shapes import SHAPES, Decoder


class Own(nn.Module):
    """Everything that constructors do to tensors: own draws over default ones, scaling, views, functions that compute on values, given
    data, copies, chunks of one tensor, buffers, and a tensor that is registered nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 12)
        nn.init.normal_(self.first.weight, std=0.02)
        self.first.weight.data[3:5].zero_()
        self.second = nn.Linear(12, 12)
        nn.init.trunc_normal_(self.second.weight, std=0.5)
        with torch.no_grad():
            self.second.weight *= 2.5
            self.second.bias.copy_(self.first.bias + 1)
        self.third = nn.Linear(12, 12, bias=False)
        nn.init.orthogonal_(self.third.weight)
        self.twin = copy.deepcopy(self.third)
        self.scale = nn.Parameter(torch.tensor([1.0, -2.5, 0.5]))
        both = torch.randn(6, 5)
        self.left, self.right = nn.Parameter(both[:, :2].clone()), nn.Parameter(both.view(-1)[3:10])
        self.norm = nn.BatchNorm1d(12)
        self.embed = nn.Embedding(5, 6, padding_idx=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
        self.lstm = nn.LSTM(3, 4)
        self.angles: Tensor
        self.register_buffer("angles", torch.outer(torch.arange(4), 10 ** -torch.arange(3.0)).cos(), persistent=False)
        self.loose = torch.linspace(0, 1, 5)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def everything(model: nn.Module) -> dict[str, Any]:
    state = (
        {name: value for name, value in whole_state(model).items()}
        if hasattr(model, "zero")
        else dict(model.state_dict())
    )
    return {**state, **dict(model.named_buffers()), "drawn next": torch.rand(3)}


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own": Own, "awkward": Awkward, "decoder": lambda: Decoder(SHAPES["tiny"]), "t5": _t5, "llama": _llama,
}  # fmt: skip


def _deferred(rank: int, topologies: dict[str, str], models: list[str]) -> None:
    for make in (MODELS[name] for name in models):
        torch.manual_seed(11)
        plain = make()
        expected = everything(plain)
        for topology, plan in topologies.items():
            torch.manual_seed(11)
            with deferred_init():
                model: Any = make()
            assert all(p.is_meta for p in model.parameters())
            model = hierarchical_zero(model, topology=topology, plan=plan, compile=False)
            same_bits(everything(model), expected)
            assert not any(
                t.is_meta for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)
            )
            if make is Own:
                assert torch.equal(model.loose, plain.loose)  # type: ignore[arg-type]
            largest = max(p.numel() * p.itemsize for p in plain.parameters())
            assert largest <= model.zero.start_peak, (model.zero.start_peak, largest)


def test_deferred_init_is_the_plain_constructor(ranks: Any) -> None:
    ranks(2).run(_deferred, {"2": "zero_topo"}, ["own", "awkward", "decoder"], timeout=200)


@pytest.mark.slow
def test_deferred_init_is_the_plain_constructor_on_every_mesh(ranks: Any) -> None:
    ranks(4).run(_deferred, {"2x2": "zero_topo", "4": "zero3", "2x1x2": "ddp"}, list(MODELS), timeout=200)


class Bare(nn.Module):
    """A parameter that nobody fills."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 7))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@hierarchical_zero(topology="2", plan="zero3", compile=False)
class Decorated(Awkward):
    pass


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5), nn.LayerNorm(5))


def _plain_meta(rank: int) -> None:
    """torch.device("meta") alone: the modules' own initialisers, children first; what has none is named."""
    settings: dict[str, Any] = {"topology": "2", "plan": "zero3", "compile": False}

    def on_meta(make: Callable[[], nn.Module], **more: Any) -> Any:
        with torch.device("meta"):
            plain = make()
        torch.manual_seed(4)
        return hierarchical_zero(plain, **settings, **more)

    for make in (small, _llama):
        torch.manual_seed(4)
        expected = make()
        if make is _llama:
            torch.manual_seed(4)
            for module in expected.modules():
                module._is_hf_initialized = False  # type: ignore[assignment]
            expected.initialize_weights()  # type: ignore[operator]
        state = everything(expected)
        same_bits(everything(on_meta(make)), state)

    refused = {
        Bare: ("parameter 'weight' of a Bare", "reset_parameters", "deferred_init"),
        lambda: nn.Sequential(small(), nn.Sequential(nn.Linear(5, 7), Bare())): ("parameter '1.1.weight' of a Bare",),
        lambda: Decoder(SHAPES["tiny"]): ("buffer 'cos' of a Decoder", "1 more: sin"),
    }
    for make, words in refused.items():
        try:
            on_meta(make)
        except ValueError as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError(words)
    with torch.device("meta"):
        half = nn.BatchNorm1d(3)
    half.weight, half.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    for wrong, keywords, words in (
        (half, {}, "buffer 'running_mean' is on the meta device"),
        (small(), {"device": "cuda"}, "the model is on cpu"),
        (small(), {"init": small}, "has its values already"),
    ):
        with pytest.raises(ValueError, match=words):
            hierarchical_zero(wrong, **settings, **keywords)

    def ones(model: nn.Module) -> None:
        for parameter in model.parameters():
            nn.init.ones_(parameter)

    assert all(torch.equal(v, torch.ones_like(v)) for v in whole_state(on_meta(Bare, init=ones)).values())
    odd: Any = {"init": lambda model: nn.init.constant_(model.weight, float(rank))}
    with pytest.raises(ValueError, match="'weight' starts from other values on rank 1"):
        on_meta(Bare, **odd)
    same_bits(whole_state(on_meta(Bare, **odd, sync_init=True)), {"weight": torch.zeros(3, 7)})

    torch.manual_seed(6)
    plain = Awkward()
    torch.manual_seed(6)
    with torch.device("meta"):
        decorated: Any = Decorated()  # the decorator sees the constructor
    same_bits(whole_state(decorated), dict(plain.state_dict()))
    assert math.isfinite(
        one_step(decorated, [torch.optim.SGD([p for p in decorated.parameters() if p.requires_grad])], 0)
    )


def test_modules_initialise_themselves_and_one_that_cannot_is_named(ranks: Any) -> None:
    ranks(2).run(_plain_meta, timeout=120)


class Drawn(nn.Module):
    """Its dtype is the default one when it is made, not when it gets its values."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_default_dtype(torch.bfloat16)
        try:
            self.drawn, self.ones = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.ones(3))
            self.linear = nn.Linear(3, 4)
        finally:
            torch.set_default_dtype(torch.float32)


def _peak(rank: int) -> None:
    """Sixteen layers: never more than a few of their tensors at once."""

    def make() -> nn.Module:
        layers = [nn.Linear(64, 64) for _ in range(16)]
        for layer in layers:  # drawn a second time after all of them were made
            nn.init.normal_(layer.weight)
        return nn.Sequential(*layers)

    with deferred_init():
        model: Any = make()
    model = hierarchical_zero(model, topology="2", plan="zero3", compile=False)
    one, drawn = 64 * 64 * 4, model.zero.start_peak
    assert one <= drawn <= 2 * one, drawn
    torch.manual_seed(2)
    plain = Drawn()
    torch.manual_seed(2)
    with deferred_init():
        drawn_model: Any = Drawn()
    drawn_model = hierarchical_zero(drawn_model, topology="2", plan="zero3", compile=False)
    same_bits(whole_state(drawn_model), {name: value.float() for name, value in plain.state_dict().items()})
    with pytest.raises(ValueError, match="several deferred_init"):
        with deferred_init():
            first = small()
        with deferred_init():
            second = small()
        hierarchical_zero(nn.Sequential(first, second), topology="2", compile=False)
    hooks = nn.modules.module._global_parameter_registration_hooks
    assert not hooks, "deferred_init left its hooks behind"


def test_whole_tensors_are_given_up_one_by_one(ranks: Any) -> None:
    ranks(2).run(_peak)


def _resident(rank: int, deferred: bool, layers: int, width: int) -> tuple[int, int]:
    """(bytes by which this process grew at most, whole tensors alive at once) while a stack of square matrices was built and sharded."""

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    hierarchical_zero(nn.Linear(4, 4), topology="4", plan="zero3", compile=False, sync_init=True)  # what every job has
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    with deferred_init() if deferred else contextlib.nullcontext():
        plain = make()
    model: Any = hierarchical_zero(plain, topology="4", plan="zero3", compile=False)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # Linux counts in KiB
    return grown, model.zero.start_peak


@pytest.mark.slow
def test_the_process_never_holds_the_whole_model() -> None:
    """16 matrices of 4 MiB on four ranks: 16 MiB of shards each, and a few matrices on top; a plain start holds all 64 MiB."""
    layers, one = 16, 4 << 20
    (deferred, *_), (plain, *_) = (run(_resident, 4, deferred, layers, 1024, timeout=120) for deferred in (True, False))
    assert deferred[1] == one
    assert plain[0] > layers * one
    assert deferred[0] < layers * one / 4 + 8 * one, deferred  # between them the allocator's own, which differs
