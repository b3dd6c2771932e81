"""Named model shapes for worlds that exist on paper: plain torch modules, usually built on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """A decoder of GPT-NeoX's kind: parallel residual, rotary embedding on a quarter of each head, untied embeddings.

    Attributes:
        layers, hidden, heads, vocabulary: as published.
        sequence: tokens per sample.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int


SHAPES = {
    "gpt-neox-20b": Shape(44, 6144, 64, 50432, 2048),  # EleutherAI/gpt-neox configs/20B.yml
    "gpt-175b": Shape(96, 12288, 96, 50304, 2048),  # GPT-3's layers, width and heads, in NeoX's kind of block
    "gpt-18b": Shape(40, 6144, 32, 50304, 2048),  # DeepSpeed's ZeRO++ tutorial: 40 layers of 6144, 32 heads
    "pythia-6.9b": Shape(32, 4096, 32, 50432, 2048),
    "pythia-160m": Shape(12, 768, 12, 50304, 2048),
    "gpt-21m": Shape(6, 512, 8, 2048, 128),  # ours: large enough to quantise, small enough for eight local processes
    "gpt-60m": Shape(8, 768, 12, 2048, 128),
    "gpt-4m": Shape(4, 256, 4, 2048, 128),  # ours: a step takes seconds over a slow network
    "tiny": Shape(2, 64, 4, 257, 32),
}


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal; fused on the meta device too, where torch would take its scores apart, which no device that this stands for does."""
    if q.is_meta:
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
        return found
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        h = shape.hidden
        self.heads, self.size = shape.heads, h // shape.heads
        self.rotary = self.size // 4 // 2 * 2
        self.attention_norm, self.mlp_norm = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, h = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(b, t, self.heads, 3, self.size).permute(3, 0, 2, 1, 4)
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        a = _attention(q, k, v).transpose(1, 2).reshape(b, t, h)
        return x + self.proj(a) + self.down(F.gelu(self.up(self.mlp_norm(x))))

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x[..., : self.rotary], x[..., self.rotary :]
        left, right = turned.chunk(2, -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin, kept), -1)


class Decoder(nn.Module):
    """forward(tokens [B, T+1] int64) -> mean next-token cross entropy. recompute: backward computes each block's activations again."""

    def __init__(self, shape: Shape, recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        rotary = shape.hidden // shape.heads // 4 // 2
        angles = torch.outer(torch.arange(shape.sequence), 10000 ** (-torch.arange(rotary) / max(rotary, 1)))
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, y = tokens[:, :-1], tokens[:, 1:]
        t = x.shape[1]
        hidden = self.embed(x)
        cos, sin = self.cos[:t].to(hidden.dtype), self.sin[:t].to(hidden.dtype)
        for block in self.blocks:
            hidden = (
                checkpoint(block, hidden, cos, sin, use_reentrant=False) if self.recompute else block(hidden, cos, sin)
            )
        logits = self.head(self.norm(hidden)).flatten(0, 1).float()
        if (
            logits.is_meta
        ):  # where tracing in torch 2.13 finds no derivative of nll_loss, and traces a backward of zeros
            return -F.log_softmax(logits, -1).gather(-1, y.reshape(-1, 1)).mean()
        return F.cross_entropy(logits, y.flatten())
