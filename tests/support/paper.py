"""Worlds that exist on paper: this process is one rank of a fake process group, nothing travels."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from zcompile import hierarchical_zero
from zcompile.backend import Compilation


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Tiny(nn.Module):
    """Blocks, and a head whose rows nothing divides."""

    def __init__(self, blocks: int = 1, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def world(rank: int, size: int) -> None:
    """Become `rank` of `size` fake ranks, as a new process would."""
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    Compilation._numbers = itertools.count()


def wrapped(
    rank: int = 0, topology: str = "2x2x2", plan: Any = "zero_topo", blocks: int = 1, width: int = 8, **settings: Any
) -> Any:
    """A Tiny on `rank` of a fake world of `topology`; node by node unless `settings` say otherwise."""
    size = 1
    for text in topology.split("x"):
        size *= int(text)
    world(rank, size)
    torch.manual_seed(0)
    return hierarchical_zero(Tiny(blocks, width), topology=topology, plan=plan, **{"codegen": False, **settings})


def step(model: Any, rows: int = 4) -> None:
    """One forward and backward."""
    model(torch.ones(rows, model.head.in_features)).square().mean().backward()
