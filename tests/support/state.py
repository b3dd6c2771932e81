"""Models, training and comparisons for tests of checkpoints: everything that a rank holds, as whole tensors, to the bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.training import tokens
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zcompile import full_state_dict

VOCABULARY = 11


class Awkward(nn.Module):
    """forward(tokens [B, T]) -> loss. Tied, frozen, scalar, empty and odd parameters, some read only with `more`, and a buffer."""

    def __init__(self, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        wide = width + width // 2
        self.embed = nn.Embedding(VOCABULARY, width)
        self.body = nn.Sequential(
            nn.Linear(width, wide), nn.GELU(), nn.Dropout(dropout), nn.Linear(wide, width, bias=False)
        )
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.sometimes = nn.Linear(3, 5)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor, more: bool = False) -> Tensor:
        h = self.embed(ids)
        h = self.frozen(h + self.scale * self.body(self.norm(h)))
        self.seen = self.seen + 1
        loss = F.cross_entropy(self.head(h).flatten(0, 1), ids.roll(-1, 1).flatten())
        return loss + 0.1 * self.sometimes(ids[:, :3].float()).sum() if more else loss


def one_step(model: Any, optimizers: Any, number: int, micro: int = 1) -> float:
    """One optimizer step; the loss of this rank's last micro-batch."""
    loss = torch.zeros(())
    for k in range(micro):
        model.set_requires_gradient_sync(k == micro - 1)
        loss = model(tokens(dist.get_rank(), number * micro + k, VOCABULARY, 2, 5))
        loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def whole_state(model: Any, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights, buffers and moments by name, as whole tensors on the CPU; every rank calls it."""
    out: dict[str, Any] = {name: value.cpu() for name, value in full_state_dict(model).items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                out[f"{names[id(parameter)]}/{key}"] = (
                    whole.detach().cpu().clone() if isinstance(whole, Tensor) else whole
                )
    return out


def same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    for name, value in expected.items():
        other = found[name]
        if not isinstance(value, Tensor):
            assert other == value, name
            continue
        assert other.shape == value.shape and other.dtype == value.dtype, f"{name}: {other.shape} {other.dtype}"
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (other, value))
        assert torch.equal(a, b), f"{name} differs: {other.flatten()[:5]} {value.flatten()[:5]}"
