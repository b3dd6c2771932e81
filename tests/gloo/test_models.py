"""Models as people write them: tied, recurrent, partly frozen, mixed, broken graphs, buffers, and transformers' own (F18, F24-F26)."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.marks import TWO, slow
from support.training import Loss, both, graphs, mlp, received, same, sgd, square, step, tokens, train, trained, twins
from torch import Tensor, nn

from zcompile import cost, coverage
from zcompile.backend import Compilation
from zcompile.cli import main
from zcompile.topology import Topology

WORLD = 4
SEQUENCE = square(2, 3, 6)


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a matrix under two names of one module."""

    def __init__(self, freeze: str = "") -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.one = nn.Parameter(torch.randn(6, 6))
        self.other = self.one
        self.freeze = freeze

    def forward(self, words: Tensor) -> Tensor:
        table = self.table(words)
        if self.freeze == "table":
            table = table.detach()
        hidden = (table @ self.one).tanh() @ self.other
        weight = self.head.weight.detach() if self.freeze == "head" else self.head.weight
        out: Tensor = nn.functional.linear(hidden, weight)
        return out


def words_loss(model: Any, rank: int, number: int) -> Tensor:
    words = tokens(rank, number, 11, 2, 5)
    out = model(words)
    return nn.functional.cross_entropy(out.flatten(0, 1), words.flatten())


def gathers(model: Any) -> list[int]:
    """Parameters that each graph that ran gathers; none of them twice (over one level, of two)."""
    found = []
    for program in model.zero.programs:
        names = [n for entry in program.collectives if entry.transfer == "gather" for n in entry.parameters]
        assert len(names) == len(set(names)), f"{program.name} gathers twice: {names}"
        if program.runs:
            found.append(len(names))
    return found


def _tied(rank: int, mode: str, freeze: str, micro: int) -> None:
    model, dense = twins(lambda: Tied(freeze), mode)
    assert len(model.zero.slots) == 2 and sum(p.numel() for p in model.parameters()) == 11 * 6 + 36
    assert model.table.weight is model.head.weight and model.one is model.other
    train(model, dense, words_loss, micro=micro)
    assert set(model.state_dict()) == {"table.weight", "head.weight", "one", "other"}
    one_each = {level: bytes_ for level, bytes_ in received(model, "gather").items()}
    padded = sum(slot.spec.layout.shard * slot.spec.layout.shards for slot in model.zero.slots)
    if mode == "graph":  # one gather of each parameter, each way, of each micro-batch
        assert gathers(model) == [2, 2] * micro
        assert sum(one_each.values()) == 2 * micro * padded * 4 // 2  # half of it is at home (W = node, of two)
    reduced = sum(received(model, "reduce").values())
    assert reduced == micro * padded * 4 // 2, "gradients of tied uses travel once a micro-batch"


@TWO
@pytest.mark.parametrize("freeze", ["", "table", "head"])
def test_f24_tied_weights_and_one_frozen_use(ranks: Any, mode: str, freeze: str) -> None:
    ranks(WORLD).run(_tied, mode, freeze, 1 if freeze and mode == "graph" else 2)


class Cell(nn.Module):
    """A recurrent cell: every weight is read once a step of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.gate = nn.Linear(6, 5), nn.Linear(5, 5, bias=False), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 5)
        for piece in x.unbind(1):
            state = (self.inner(piece) + self.outer(state)).tanh() * self.gate
        return state


class Deep(nn.Module):
    """Parameters in lists and dicts, read by index."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList(nn.Parameter(torch.randn(6, 6) / 3) for _ in range(3))
        self.dict = nn.ParameterDict({"scale": nn.Parameter(torch.randn(6)), "shift": nn.Parameter(torch.randn(1, 6))})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.list:
            x = (x @ weight).tanh() * self.dict["scale"] + self.dict["shift"]
        return x + self.list[0].sum()


class Lstm(nn.Module):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.rnn, self.head = cls(6, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0])
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.attention(x, x, x, need_weights=False)[0])
        return out


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.ConvTranspose2d(3, 2, 2), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x[:, None])
        return out


class Normed(nn.Module):
    """Weight normalisation: a parametrisation computes the weight from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cell": Cell, "lists": Deep, "lstm": lambda: Lstm(nn.LSTM), "gru": lambda: Lstm(nn.GRU), "attention": Attention,
    "pictures": Pictures, "parametrised": Normed,
}  # fmt: skip


def _model(rank: int, mode: str, name: str, micro: int) -> None:
    model, dense = twins(MODELS[name], mode)
    train(model, dense, SEQUENCE, steps=2, micro=micro)
    for module in (model, dense):
        module.eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(rank))
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-6)
    if mode == "graph":
        found = coverage(model)
        whole = name not in ("lstm", "gru")  # which Dynamo leaves to eager torch
        assert found["share"] == float(whole) and bool(found["eager"]) is not whole and found["breaks"] == [], found
        assert not whole or graphs(model) == ["forward", "backward", "inference"]
    if mode == "graph" and name in ("cell", "lists"):
        forward, backward, _ = gathers(model)  # the backward needs no bias
        assert forward == sum(slot.spec.w > 0 for slot in model.zero.slots) and 0 < backward <= forward


@pytest.mark.parametrize("name", MODELS)
def test_models_as_people_write_them(ranks: Any, name: str) -> None:
    ranks(WORLD).run(_model, "eager", name, 2)


def _dumped(rank: int, name: str, folder: str) -> None:
    """The same with a dump of every rank."""
    Compilation._numbers = itertools.count()
    os.environ.update(ZCOMPILE_DUMP=folder, ZCOMPILE_DUMP_RANKS="all")
    try:
        _model(rank, "graph", name, 1)
    finally:
        del os.environ["ZCOMPILE_DUMP"], os.environ["ZCOMPILE_DUMP_RANKS"]


@pytest.mark.parametrize("name", [name if name == "attention" else slow(name) for name in MODELS])
def test_models_as_people_write_them_compiled(ranks: Any, tmp_path: Path, name: str) -> None:
    """Each with its dump: what goes wrong in that is an error in tests. All ranks dump the same."""
    ranks(2).run(_dumped, name, str(tmp_path))
    found = {path.name for path in tmp_path.iterdir()}
    if name in ("lstm", "gru"):  # which Dynamo leaves to eager torch
        assert found == set()
        return
    assert {"rank0", "rank1", "ledger.json", "report.html", "trace.json"} <= found
    assert main(["diff", str(tmp_path)]) == 0


# -- frozen, mixed -------------------------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """A bf16 base that stays as it is and fp32 adapters of rank r beside it."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).to(torch.bfloat16)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(6, r, bias=False), nn.Linear(r, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x.to(torch.bfloat16)).float() + self.up(self.down(x))
        return out


def _lora(rank: int, mode: str, r: int) -> None:
    model, dense = twins(lambda: Lora(r), mode)
    frozen = {name: p.to_local().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2
    train(model, dense, square(3, 6))
    adapters = [slot for slot in model.zero.slots if slot.master.requires_grad]
    for transfer in ("reduce", "sync"):
        found = received(model, transfer)
        expected = sum(sum(cost.transfer_bytes(slot.spec, transfer).values()) for slot in adapters)
        assert sum(found.values()) == expected, f"{transfer}: {found}"
    for name, p in model.named_parameters():
        if name in frozen:
            assert p.grad is None and torch.equal(p.to_local(), frozen[name])
    base = [unit for unit in model.zero.units if not unit.slots[0].master.requires_grad]
    assert base and all(unit.copy.dtype == torch.bfloat16 for unit in base), "a frozen bf16 weight travels as bf16"
    copies = {unit: unit.seen for unit in base}
    train(model, dense, square(3, 6), steps=1)
    assert all(unit.seen == copies[unit] for unit in base), "not refreshed for a step of others"


@pytest.mark.parametrize(("r", "mode"), [*((r, "eager") for r in (1, 8, 16, 32)), *(slow(r, "graph") for r in (1, 32))])
def test_f25_adapters_in_fp32_on_a_frozen_bf16_base(ranks: Any, mode: str, r: int) -> None:
    ranks(WORLD).run(_lora, mode, r)


def _thawed(rank: int, mode: str) -> None:
    """Freezing and thawing between steps."""
    model, dense = twins(mlp, mode)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, dense)]
    for number, frozen in enumerate((False, True, False)):
        for module in (model, dense):
            module[0].requires_grad_(not frozen)
        both(model, dense, square(4, 7), number)
        assert (model[0].weight.grad is None) == frozen
        step(optimizers)
        same(model, dense)


@TWO
def test_freezing_and_thawing_between_steps(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_thawed, mode)


def _all_frozen(rank: int) -> None:
    model, dense = twins(lambda: mlp().requires_grad_(False), "eager")
    same(model, dense, 0.0)
    x = torch.ones(2, 7, requires_grad=True)
    y = torch.ones(2, 7, requires_grad=True)
    model(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)


def test_a_model_that_is_frozen_altogether_passes_gradients_on(ranks: Any) -> None:
    ranks(WORLD).run(_all_frozen)


# -- buffers, breaks -----------------------------------------------------------------------------------------------------------------


def _batch_norm(rank: int, mode: str) -> None:
    """Buffers are each rank's own, as in DDP without broadcast; the same batch everywhere shows that they move as the dense model's."""
    model, dense = twins(lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), mode)
    optimizers = sgd(model, dense)
    for number in range(3):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(number))
        for module in (model, dense):
            module(x).square().mean().backward()
        step(optimizers)
        same(model, dense)
    assert int(dense[1].num_batches_tracked) == 3
    for module in (model, dense):
        module.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-6)


@TWO
def test_buffers_move_as_the_plain_models(ranks: Any, mode: str) -> None:
    ranks(WORLD).run(_batch_norm, mode)


class Aside(nn.Linear):
    """Never compiled."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Broken(nn.Module):
    """A graph break in the middle, a module that is never compiled, and a branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), Aside(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        torch._dynamo.graph_break()
        x = self.second(x) + self.first(x)  # a weight that graphs on both sides of the break read
        x = self.third(x).tanh()
        if x.sum().item() > 1e9:
            x = -x
        out: Tensor = self.second(x)
        return out


def _breaks(rank: int, mode: str) -> None:
    model, dense = twins(Broken, mode)
    train(model, dense, SEQUENCE, micro=2)
    if mode != "eager":
        assert graphs(model).count("forward") >= 4, graphs(model)
    # its ledger still adds up: eager transfers and graphs together
    assert received(model, "gather") and received(model, "reduce")
    assert bool(received(model, "sync")) == (dist.get_world_size() > 2)


@pytest.mark.parametrize(("mode", "world"), [("eager", WORLD), ("graph", 2)])
def test_f26_graph_breaks_and_modules_left_uncompiled(ranks: Any, mode: str, world: int) -> None:
    """Of each graph's sync, which needs a second level, tests/fake/test_dump_books.py has the books."""
    ranks(world).run(_breaks, mode)


def _full_graph(rank: int) -> str:
    model, _ = twins(Broken, "graph", fullgraph=True)
    try:
        SEQUENCE(model, rank, 0)
    except Exception as error:
        return str(error)
    return "accepted"


def test_f26_fullgraph_refuses_a_break_with_its_reason(ranks: Any) -> None:
    for message in ranks(2).run(_full_graph):
        assert "graph_break" in message


# -- transformers --------------------------------------------------------------------------------------------------------------------


def neox(layers: int = 2) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=53, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16,
        use_cache=False, attn_implementation="eager",
    ))  # fmt: skip


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=53, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        max_position_embeddings=16, use_cache=False, tie_word_embeddings=True,
    ))  # fmt: skip


def t5(layers: int = 2) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(
        vocab_size=53, d_model=16, d_kv=8, d_ff=24, num_layers=layers, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0,
        use_cache=False, attn_implementation="eager",
    ))  # fmt: skip


def mixtral(layers: int = 2) -> nn.Module:
    """Its experts as one batched product: a loop over those that a batch has hit reads other weights on each rank, which is refused."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(
        vocab_size=53, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=16, use_cache=False, attn_implementation="eager",
        experts_implementation="batched_mm",
    ))  # fmt: skip


def demo(layers: int = 2) -> nn.Module:
    """The example's."""
    spec = importlib.util.spec_from_file_location("gpt", Path(__file__).parents[2] / "examples" / "gpt.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.GPT(module.Shape(layers=layers, hidden=32, heads=2, context=8))
    return model


def following(model: Any, rank: int, number: int) -> Tensor:
    """The demo's loss."""
    words = tokens(rank, number, 256, 2, 9)
    found: Tensor = model(words[:, :-1], words[:, 1:])
    return found


def language(model: Any, rank: int, number: int) -> Tensor:
    words = tokens(rank, number, 53, 2, 8)
    found: Tensor = model(input_ids=words, labels=words).loss
    return found


def _trains(rank: int, mode: str, topology: str, make: Callable[[], nn.Module], loss: Loss, micro: int) -> None:
    model, dense = twins(make, mode, topology=topology)
    optimizers = [torch.optim.SGD(trained(m), lr=0.5) for m in (model, dense)]
    for number in range(2):
        for k in range(micro):
            both(model, dense, loss, 2 * number + k, sync=k == micro - 1)
        step(optimizers)
        same(model, dense, 2e-6)
    found = coverage(model)
    if mode == "eager":
        assert graphs(model) == [] and found["share"] == 0.0
    else:
        assert graphs(model) == ["forward", "backward"] * micro, "one graph each way for each kind of micro-step"
        assert found["share"] == 1.0 and found["breaks"] == [] and not found["eager"]


PEOPLE: dict[str, tuple[Callable[..., nn.Module], Loss, str, str, int]] = {
    "demo": (demo, following, "2x2", "4x2", 2),
    "neox": (neox, language, "2x2", "2x2x2", 1),
    "llama": (llama, language, "4x2", "2x2x2", 1),
    "t5": (t5, language, "2x2", "4x2", 1),
    "mixtral": (mixtral, language, "2x2", "4x2", 1),
}
"""name -> (model, loss, mesh of the compiled run, mesh of the one in eager torch, kinds of micro-batches)"""
QUICK = [name if name == "neox" else slow(name) for name in PEOPLE]


@pytest.mark.slow
@pytest.mark.parametrize("name", PEOPLE)
def test_models_of_others_train_compiled(ranks: Any, name: str) -> None:
    """Each rank compiles for itself. So eight do for Llama, and four for the others; the demo has two layers, and T5 two
    stacks; of the others one layer has what is special about them. In eager torch all have two layers and eight ranks."""
    make, loss, mesh, _, micro = PEOPLE[name]
    given = functools.partial(make, 2 if name == "demo" else 1)
    ranks(Topology.parse(mesh).world_size).run(_trains, "graph", mesh, given, loss, micro, timeout=500)


@pytest.mark.parametrize("name", QUICK)
def test_models_of_others_train_in_eager_torch(ranks: Any, name: str) -> None:
    make, loss, _, mesh, micro = PEOPLE[name]
    ranks(Topology.parse(mesh).world_size).run(_trains, "eager", mesh, make, loss, micro, timeout=200)


@pytest.mark.slow
def test_a_transformers_model_trains_through_inductor(ranks: Any) -> None:
    ranks(2).run(_trains, "code", "2", functools.partial(neox, 1), language, 1, timeout=500)
