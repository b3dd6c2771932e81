"""The quantisers as torch ops, `zcompile_kernels::*`: what graphs hold and eager code calls; one launch each, whatever the bucket.

An op knows tensors, and texts that say where things lie (`Geometry.text`) and how they are coded (`Code.text`). CPU tensors go to C++
(zcompile.kernels.cpu), those of a GPU to Triton (zcompile.kernels.gpu), anything else to the torch reference: the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zcompile.kernels import peers, reference
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry

_SIGNATURES = {
    "quantize": "(Tensor[] xs, str geometry, str code) -> Tensor",
    "dequantize": "(Tensor message, str geometry, str code, ScalarType dtype) -> Tensor",
    "reduce": "(Tensor message, int parts, Tensor[] mains, str geometry, str code) -> Tensor",
    "requantize": "(Tensor message, int parts, str geometry, str code, str into) -> Tensor",
    "accumulate": "(Tensor message, int parts, Tensor(a!)[] mains, str geometry, str code) -> ()",
    "peer_gather": "(Tensor copy, int size, str role, str geometry, str code, ScalarType dtype) -> Tensor",
    "quantize_delta": "(Tensor x, Tensor image, str geometry, str code) -> Tensor",
    "apply_delta": "(Tensor(a!) image, Tensor message, str geometry, str code) -> ()",
}
for _name, _signature in _SIGNATURES.items():
    torch.library.define(f"zcompile_kernels::{_name}", _signature)

quantize = torch.ops.zcompile_kernels.quantize
dequantize = torch.ops.zcompile_kernels.dequantize
reduce = torch.ops.zcompile_kernels.reduce
requantize = torch.ops.zcompile_kernels.requantize
accumulate = torch.ops.zcompile_kernels.accumulate
peer_gather = torch.ops.zcompile_kernels.peer_gather
quantize_delta = torch.ops.zcompile_kernels.quantize_delta
apply_delta = torch.ops.zcompile_kernels.apply_delta


def implementation(device: torch.device, code: Code) -> ModuleType:
    """The module whose functions serve a device: C++ on CPUs (which have no fp8), Triton on GPUs."""
    if device.type == "cuda":
        from zcompile.kernels import gpu

        return gpu
    if device.type == "cpu" and code.integer:
        from zcompile.kernels import cpu

        return cpu
    return reference


def _quantize(xs: Sequence[Tensor], geometry: str, code: str) -> Tensor:
    how = Code.parse(code)
    found: Tensor = implementation(xs[0].device, how).quantize(xs, Geometry.parse(geometry), how)
    return found


def _dequantize(message: Tensor, geometry: str, code: str, dtype: torch.dtype) -> Tensor:
    how = Code.parse(code)
    found: Tensor = implementation(message.device, how).dequantize(message, Geometry.parse(geometry), how, dtype)
    return found


def _reduce(message: Tensor, parts: int, mains: Sequence[Tensor], geometry: str, code: str) -> Tensor:
    how = Code.parse(code)
    found: Tensor = implementation(message.device, how).reduce(message, parts, mains, Geometry.parse(geometry), how)
    return found


def _requantize(message: Tensor, parts: int, geometry: str, code: str, into: str) -> Tensor:
    how, then = Code.parse(code), Code.parse(into)
    module = implementation(message.device, how if then.integer else then)
    found: Tensor = module.requantize(message, parts, Geometry.parse(geometry), how, then)
    return found


def _accumulate(message: Tensor, parts: int, mains: Sequence[Tensor], geometry: str, code: str) -> None:
    how = Code.parse(code)
    implementation(message.device, how).accumulate(message, parts, mains, Geometry.parse(geometry), how)


def _peer_gather(copy: Tensor, size: int, role: str, geometry: str, code: str, dtype: torch.dtype) -> Tensor:
    """`size` and `role` are for those who read the graph: how many ranks' memory is read, and over which level."""
    return peers.gather(copy, geometry, code, dtype)


def _quantize_delta(x: Tensor, image: Tensor, geometry: str, code: str) -> Tensor:
    how = Code.parse(code)
    found: Tensor = implementation(x.device, how).quantize_delta(x, image, Geometry.parse(geometry), how)
    return found


def _apply_delta(image: Tensor, message: Tensor, geometry: str, code: str) -> None:
    how = Code.parse(code)
    implementation(image.device, how).apply_delta(image, message, Geometry.parse(geometry), how)


def _message(like: Tensor, geometry: str, code: str) -> Tensor:
    return like.new_empty(Geometry.parse(geometry).message_bytes(Code.parse(code)), dtype=torch.uint8)


def _fp32(like: Tensor, geometry: str) -> Tensor:
    return like.new_empty(Geometry.parse(geometry).size, dtype=torch.float32)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize": (_quantize, lambda xs, geometry, code: _message(xs[0], geometry, code)),
    "dequantize": (
        _dequantize,
        lambda message, geometry, code, dtype: message.new_empty(Geometry.parse(geometry).size, dtype=dtype),
    ),
    "reduce": (_reduce, lambda message, parts, mains, geometry, code: _fp32(message, geometry)),
    "requantize": (_requantize, lambda message, parts, geometry, code, into: _message(message, geometry, into)),
    "accumulate": (_accumulate, lambda message, parts, mains, geometry, code: None),
    "peer_gather": (
        _peer_gather,
        lambda copy, size, role, geometry, code, dtype: copy.new_empty(Geometry.parse(geometry).size, dtype=dtype),
    ),
    "quantize_delta": (_quantize_delta, lambda x, image, geometry, code: _message(x, geometry, code)),
    "apply_delta": (_apply_delta, lambda image, message, geometry, code: None),
}
for _name, (_real, _fake) in _IMPLEMENTATIONS.items():
    torch.library.impl(f"zcompile_kernels::{_name}", "CompositeExplicitAutograd", _real)
    torch.library.register_fake(f"zcompile_kernels::{_name}", _fake)
