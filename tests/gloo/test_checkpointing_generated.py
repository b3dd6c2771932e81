"""Activation checkpointing where Inductor generates the code, and as transformers' models turn it on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.marks import slow
from support.saved import keep_products, watched
from support.training import MODES, batch, full_state_dict, graphs, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import zcompile
from zcompile import hierarchical_zero

WIDTH, ROWS = 24, 32


class Stack(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.kind == "none":
                x = x + block(x)
            elif self.kind == "selective":
                contexts = functools.partial(create_selective_checkpoint_contexts, keep_products)
                x = x + checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = x + checkpoint(block, x, use_reentrant=False)
        return x


def two_steps(model: Any, loss: Any) -> tuple[list[float], dict[str, Tensor]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for number in range(2):
        value = loss(model, number)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, full_state_dict(model)


def generated(rank: int, kind: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with watched() as saved:
        model: Any = hierarchical_zero(Stack(kind), topology="2", plan="zero3", codegen=True)
        losses, state = two_steps(model, lambda m, n: m(batch(rank, n, ROWS, WIDTH)).square().mean())
    rows = zcompile.ledger(model)["levels"]
    return {"losses": losses, "state": state, "saved": saved, "ledger": rows, "graphs": graphs(model)}


@pytest.mark.slow
def test_requirement_18_checkpointing_through_generated_code(ranks: Any) -> None:
    plain = ranks(2).run(generated, "none", timeout=200.0)
    for kind in ("full", "selective"):
        for expected, found in zip(plain, ranks(2).run(generated, kind, timeout=200.0), strict=True):
            assert found["graphs"] == ["forward", "backward"]
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
            for name, value in expected["state"].items():
                torch.testing.assert_close(found["state"][name], value, rtol=0, atol=2e-5, msg=name)
            ((bytes_, weights),), ((more, _),) = found["saved"], expected["saved"]
            assert not weights and bytes_ < more
            for row in found["ledger"]["node"].values() if "node" in found["ledger"] else ():
                assert row["predicted"] == row["compiled"] == row["counted"]


def resized(rank: int, kind: str) -> tuple[list[float], dict[str, Tensor]]:
    """Sizes that change between steps: from the second on they are symbols in the graphs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = hierarchical_zero(Stack(kind), topology="2", plan="zero3", codegen=False)
    return two_steps(model, lambda m, n: m(batch(rank, n, ROWS + 8 * n, WIDTH)).square().mean())


@pytest.mark.slow
def test_selective_checkpointing_with_sizes_that_change(ranks: Any) -> None:
    plain = ranks(2).run(resized, "none", timeout=100.0)
    for (losses, state), (expected, other) in zip(
        ranks(2).run(resized, "selective", timeout=100.0), plain, strict=True
    ):
        assert losses == expected
        for name, value in other.items():
            assert torch.equal(state[name], value), name


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=53, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        max_position_embeddings=16, use_cache=False, tie_word_embeddings=True,
    ))  # fmt: skip


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=53, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16,
        use_cache=False, attn_implementation="eager",
    ))  # fmt: skip


def enabled(rank: int, name: str, mode: str, on: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain: Any = globals()[name]()
    if on:
        plain.gradient_checkpointing_enable()
    with watched() as saved:
        model: Any = hierarchical_zero(plain, topology="2x2", plan="zero_topo", **MODES[mode])

        def loss(model: Any, number: int) -> Tensor:
            words = tokens(rank, number, 53, 2, 8)
            found: Tensor = model(input_ids=words, labels=words).loss
            return found

        losses, state = two_steps(model, loss)
    rows = zcompile.ledger(model)["levels"]
    found = zcompile.coverage(model)
    return {
        "losses": losses,
        "state": state,
        "saved": saved,
        "ledger": rows,
        "share": found["share"],
        "graphs": graphs(model),
    }


@pytest.mark.parametrize(
    ("name", "mode"), [("llama", "eager"), ("neox", "eager"), slow("llama", "graph")]
)
def test_gradient_checkpointing_enable(ranks: Any, name: str, mode: str) -> None:
    plain = ranks(4).run(enabled, name, mode, False, timeout=120.0)
    for expected, found in zip(plain, ranks(4).run(enabled, name, mode, True, timeout=120.0), strict=True):
        assert found["losses"] == expected["losses"]
        for key, value in expected["state"].items():
            assert torch.equal(found["state"][key], value), key
        again = 0
        for level, rows in found["ledger"].items():
            for row in rows.values():
                assert row["predicted"] == row["compiled"] == row["counted"]
            again += rows["gather"]["counted"] - expected["ledger"][level]["gather"]["counted"]
            assert rows["reduce"] == expected["ledger"][level]["reduce"]
        # A backward gathers matrices in either case; what is computed again also reads biases, which Llama has not.
        assert again > 0 if name == "neox" and mode == "eager" else again == 0
        if mode == "graph":
            assert found["share"] == 1.0 and found["graphs"] == ["forward", "backward"]
            ((bytes_, weights),), ((more, _),) = found["saved"], expected["saved"]
            assert not weights and bytes_ < more
