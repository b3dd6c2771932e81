"""The quantisers on a GPU, or under Triton's interpreter on CPU tensors: `reference.py`, one launch per bucket, the same bits."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from zcompile.kernels import calls
from zcompile.kernels.calls import Call
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry


def quantize(xs: Sequence[Tensor], geometry: Geometry, code: Code) -> Tensor:
    """Plain values -> a message [rows * row bytes] uint8."""
    xs = _plain(xs)
    message = _message(xs[0].device, geometry, code)
    run(calls.quantize(xs, None if geometry.flat else addresses(xs), message, geometry, code))
    return message


def dequantize(message: Tensor, geometry: Geometry, code: Code, dtype: torch.dtype) -> Tensor:
    """A message -> plain values in one buffer [geometry.size] of `dtype`: flat rows, or whole parameters at `geometry.starts`.

    Elements between two whole parameters are not written.
    """
    _check(message.device, code)
    if dtype not in calls.DTYPES:
        return dequantize(message, geometry, code, torch.float32).to(dtype)
    out = torch.empty(geometry.size, dtype=dtype, device=message.device)
    run(calls.dequantize(message.contiguous(), out, geometry, code, arch(message.device)))
    return out


def reduce(message: Tensor, parts: int, mains: Sequence[Tensor], geometry: Geometry, code: Code) -> Tensor:
    """`parts` messages, one after another -> their sum in that order, flat [rows * width] fp32.

    Args:
        message: [parts * rows * row bytes] uint8; `geometry` (flat) is that of one part.
        mains: none, or per parameter [rows * n] fp32, to which the sum is added: main + (part_0 + part_1 + ...).
    """
    _check(message.device, code)
    mains = [main.contiguous() for main in mains]
    out = torch.empty(geometry.size, dtype=torch.float32, device=message.device)
    where = addresses(mains) if mains else None
    run(calls.reduce(message.contiguous(), parts, mains, where, out, geometry, code))
    return out


def accumulate(message: Tensor, parts: int, mains: Sequence[Tensor], geometry: Geometry, code: Code) -> None:
    """Each main [rows * n] fp32 += its part of the sum, in place."""
    _check(message.device, code)
    for main in mains:
        if main.dtype != torch.float32 or not main.is_contiguous():
            raise ValueError(
                f"accumulate: mains must be contiguous float32, not {main.dtype} with strides {main.stride()}"
            )
    run(calls.reduce(message.contiguous(), parts, mains, addresses(mains), None, geometry, code))


def requantize(message: Tensor, parts: int, geometry: Geometry, code: Code, into: Code) -> Tensor:
    """`parts` messages in `code` -> one message of their sum in `into`. Two launches if the codes differ in their block."""
    _check(message.device, code)
    if code.block != into.block:
        return quantize([reduce(message, parts, (), geometry, code)], geometry, into)
    out = _message(message.device, geometry, into)
    run(calls.requantize(message.contiguous(), parts, out, geometry, code, into))
    return out


def quantize_delta(x: Tensor, image: Tensor, geometry: Geometry, code: Code) -> Tensor:
    """A message of x - image; both flat, x [rows * width] fp32, image of any floating dtype."""
    x, image = x.to(torch.float32).contiguous(), _plain([image])[0]
    message = _message(x.device, geometry, code)
    run(calls.quantize_delta(x, image, message, geometry, code))
    return message


def apply_delta(image: Tensor, message: Tensor, geometry: Geometry, code: Code) -> None:
    """image += what the message says, in fp32, rounded to image's dtype; in place; image flat [rows * width], contiguous."""
    _check(message.device, code)
    if image.dtype not in calls.DTYPES or not image.is_contiguous():
        raise ValueError(f"apply_delta: the image must be contiguous float32 or bfloat16, not {image.dtype}")
    run(calls.dequantize(message.contiguous(), image, geometry, code, arch(image.device), apply=True))


def peer_gather(pointers: Tensor, geometry: Geometry, code: Code, dtype: torch.dtype, rank: int = 0) -> Tensor:
    """The messages of all ranks of a level, read where they lie -> what `dequantize` makes of them, one behind another.

    Args:
        pointers: [ranks] int64: where each rank's message lies in the memory of this device (torch symmetric memory's
            `buffer_ptrs`), at multiples of 16. Rank c has rows [c * rows / ranks, (c + 1) * rows / ranks).
        geometry: of the gathered message.
        rank: this rank; it begins with its own message, so that not all ranks read one at once.

    Whoever calls sees to it that the messages are complete before, and stay until all have read them.
    """
    _check(pointers.device, code)
    out = torch.empty(geometry.size, dtype=dtype, device=pointers.device)
    run(calls.peer_gather(pointers, out, geometry, code, arch(pointers.device), rank))
    return out


def run(call: Call) -> None:
    """Launches a call on the current stream of its tensors' device."""
    if call.tiles:
        launch(call.kernel, call.grid, {**call.arguments, **call.constants}, call.warps)


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], warps: int) -> None:
    """Launches a kernel on the current stream of its tensors' device."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Contraction would round twice as one and change codes, so it is off; both GPU backends take the option.
        kernel[grid](**arguments, num_warps=warps, num_stages=1, enable_fp_fusion=False)


@cache
def arch(device: torch.device) -> str:
    """ "gfx90a", "sm_90"; "" on a CPU, where only Triton's interpreter runs."""
    if device.type != "cuda":
        if not knobs.runtime.interpret:
            raise ValueError(
                f"no Triton kernel runs on {device}: set TRITON_INTERPRET=1 before the first import, or use a GPU"
            )
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


_KEPT = 512
_kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_lock = Lock()


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """[tensors] int64 on their device: where they begin. Kept, as from step to step the allocator gives the same places.

    One per stream, so that a table which is dropped is reused in the order of the stream that read it.
    """
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    places = [tensor.data_ptr() for tensor in tensors]
    key = (device, stream, *places)
    with _lock:
        found = _kept.get(key)
        if found is None:
            found = _kept[key] = torch.tensor(places, dtype=torch.int64, device=device)
        _kept.move_to_end(key)
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return found


def _plain(xs: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, and of one dtype that the kernels read."""
    dtype = xs[0].dtype
    if dtype not in calls.DTYPES or any(x.dtype != dtype for x in xs):
        dtype = torch.float32
    return [x.to(dtype).contiguous() for x in xs]


def _message(device: torch.device, geometry: Geometry, code: Code) -> Tensor:
    _check(device, code)
    return torch.empty(geometry.message_bytes(code), dtype=torch.uint8, device=device)


def _check(device: torch.device, code: Code) -> None:
    chip = arch(device)
    if chip and not calls.supports(chip, code):
        raise ValueError(f"{code.kind}: {chip} has no such codes in hardware; valid: int8, int4{_also(chip)}")


def _also(chip: str) -> str:
    return f", {calls.FP8[chip]}" if chip in calls.FP8 else ""
