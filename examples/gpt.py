"""A small GPT and its data: plain PyTorch, with nothing of zcompile in it.

The data is the bytes of the Python standard library's own sources: there wherever Python is, and the same bytes in the
same order for every rank.
"""

from __future__ import annotations

import pathlib
import sysconfig
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

VOCABULARY = 256  # bytes
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folders that not every Python ships


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    context: int = 128


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys [batch, heads, time, d] by angles [time, d/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.hidden
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden, bias=False), nn.LayerNorm(hidden, bias=False)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, hidden = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(batch, time, hidden))
        return x + self.down(F.relu(self.up(self.norm2(x))).square())


class GPT(nn.Module):
    """forward(x [batch, time], y [batch, time]) -> mean cross entropy of y given x, in nats per byte."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.rotations = shape.hidden // shape.heads // 2
        self.embed = nn.Embedding(VOCABULARY, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden, bias=False)
        self.head = nn.Linear(shape.hidden, VOCABULARY, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() == 2:  # what a block adds to the stream starts small
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.007 if residual else 0.5 * parameter.shape[1] ** -0.5)
        nn.init.normal_(self.head.weight, std=0.5 * shape.hidden**-0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        frequency = 1000.0 ** (-torch.arange(self.rotations, device=x.device) / self.rotations)
        angle = torch.outer(torch.arange(x.shape[1], device=x.device), frequency)
        h = self.embed(x)
        cos, sin = angle.cos().to(h.dtype), angle.sin().to(h.dtype)
        for block in self.blocks:
            h = block(h, cos, sin)
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), y.flatten())


@dataclass
class Corpus:
    """Bytes of the standard library's sources (uint8 [n]), split by file: every 16th is for validation."""

    train: Tensor
    validation: Tensor
    files: int

    @classmethod
    def standard_library(cls) -> Corpus:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts[:-1]))
        if len(paths) < 32:
            raise ValueError(f"{root} holds {len(paths)} Python source files; 32 or more are needed as training data")
        parts: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        for index, path in enumerate(paths):
            parts[index % 16 == 0].extend(path.read_bytes())
        train, validation = (torch.frombuffer(part, dtype=torch.uint8) for part in parts)
        return cls(train, validation, len(paths))


def bigram_entropy(text: Tensor) -> float:
    """H(byte | byte before it) of `text` [n] in nats: the best that any table of byte pairs could do on it."""
    pairs = torch.bincount(text[:-1].long() * VOCABULARY + text[1:].long(), minlength=VOCABULARY**2).double()
    joint = (pairs / pairs.sum()).view(VOCABULARY, VOCABULARY)
    return float(torch.special.entr(joint).sum() - torch.special.entr(joint.sum(1)).sum())


def windows(text: Tensor, picks: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(x, y) int64 [picks, context]: the windows of `text` at picks * context, and the byte after each byte of them."""
    rows = text[picks[:, None] * context + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


@dataclass
class Batches:
    """Training windows in a shuffled order fixed by `seed`; `position` counts those used up, by all ranks together.

    The global batch of a step does not depend on the number of ranks, so a resumed run may have another.
    """

    text: Tensor
    context: int
    seed: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        self.count = (len(self.text) - 1) // self.context
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def take(self, size: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
        """This rank's `size` windows of the next `size * ranks`."""
        epoch, offset = divmod(self.position, self.count)
        if offset + size * ranks > self.count:  # an epoch's last, short batch is passed over
            epoch, offset = epoch + 1, 0
            self.position = epoch * self.count
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator)
        self.position += size * ranks
        return windows(self.text, self.order[offset + rank * size : offset + (rank + 1) * size], self.context)
