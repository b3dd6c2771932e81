"""The lossless delta: bf16 values by what their bit patterns have moved, a byte each, and the few that moved further as they are.

bf16 bit patterns in the order of their values are integers, of which an optimizer step moves most by less than 128. One value in
LOSSLESS_SHARE may be an exception; where there are more, a message cannot be made, and the values themselves have to be sent.
docs/wire-format.md says what the bytes are. On CPUs `lossless.cpp` does the work (in the library of zcompile.kernels.cpu), on GPUs
`triton_lossless`, elsewhere, and where there is no compiler, the torch operations here: the same bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from zcompile.kernels import cpu
from zcompile.kernels.code import LOSSLESS_HEADER, aligned, lossless_bytes, lossless_room

ESCAPE = -128
"""The code of an exception; the others are how far a bit pattern has moved, -127 .. 127."""


class Changed(RuntimeError):
    """The values that a message is to be added to are not those from which it was made. `parameter`: which one of the message's."""

    def __init__(self, parameter: int) -> None:
        super().__init__(f"parameter {parameter}: its values are not those that the message was made from")
        self.parameter = parameter


def encode(master: Tensor, old: Sequence[Tensor], message: Tensor) -> Tensor | bool:
    """One row of a message into `message`.

    Args:
        master: the new values, of all parameters side by side, flat fp32; they are sent rounded to bf16.
        old: per parameter the values that its receivers have, flat bf16.
        message: [sum of lossless_bytes] uint8, contiguous.

    Returns:
        Whether all exceptions found room; else the message is not to be sent. On a GPU a tensor, so that nobody waits for it here.
    """
    sizes = [part.numel() for part in old]
    _check("master", master, torch.float32, sum(sizes))
    _check("message", message, torch.uint8, sum(map(lossless_bytes, sizes)))
    for index, part in enumerate(old):
        _check(f"old[{index}]", part, torch.bfloat16, part.numel())
    if master.is_cuda:
        from zcompile.kernels import triton_lossless

        return triton_lossless.encode(master, old, message)
    library = cpu.library() if master.is_cpu else None
    if library is None:
        return _encode(master, old, message)
    left = ctypes.c_int64()
    library.zcompile_lossless_encode(
        master.data_ptr(), cpu.pointers(old), _integers(sizes), len(sizes), message.data_ptr(), ctypes.addressof(left)
    )
    return left.value == 0


def decode(message: Tensor, values: Sequence[Tensor]) -> None:
    """Old values -> new ones, in place.

    Args:
        message: [rows * sum of lossless_bytes] uint8, contiguous.
        values: per parameter [rows, n] bf16, each row contiguous.

    Raises:
        Changed: the old values are not those of the sender. What is in `values` then is of no use. On a GPU the device says so, later.
    """
    rows = values[0].shape[0]
    sizes = [part.shape[1] for part in values]
    _check("message", message, torch.uint8, rows * sum(map(lossless_bytes, sizes)))
    for index, part in enumerate(values):
        if part.dtype != torch.bfloat16 or part.shape[0] != rows or (part.shape[1] > 1 and part.stride(1) != 1):
            raise ValueError(
                f"values[{index}] is {part.dtype} of shape {tuple(part.shape)}, strides {part.stride()}: valid: torch.bfloat16, "
                f"{rows} contiguous rows"
            )
    if message.is_cuda:
        from zcompile.kernels import triton_lossless

        for index, same in enumerate(triton_lossless.decode(message, values)):
            torch._assert_async(same, f"zcompile: lossless delta: {Changed(index)}")
        return
    library = cpu.library() if message.is_cpu else None
    if library is None:
        wrong = next((index for index, same in enumerate(_decode(message, values)) if not same), -1)
    else:
        found = ctypes.c_int64()
        library.zcompile_lossless_decode(
            message.data_ptr(), rows, cpu.pointers(values), _integers(sizes), _integers([part.stride(0) for part in values]),
            len(sizes), ctypes.addressof(found),
        )  # fmt: skip
        wrong = found.value
    if wrong >= 0:
        raise Changed(wrong)


# ---- in torch operations


def _encode(master: Tensor, old: Sequence[Tensor], message: Tensor) -> Tensor:
    fits = torch.ones((), dtype=torch.bool, device=master.device)
    records = message.split([lossless_bytes(part.numel()) for part in old])
    for new, part, record in zip(master.split([part.numel() for part in old]), old, records, strict=True):
        n = part.numel()
        bits = new.to(torch.bfloat16).view(torch.int16)
        bits = torch.where(new.isnan(), torch.full_like(bits, 0x7FC0), bits)  # one NaN for all targets
        step = _wrapped(_ordered(bits) - _ordered(part.view(torch.int16)))
        far = step.abs() >= -ESCAPE
        codes = torch.where(far, ESCAPE, step).to(torch.int8)
        found = far.sum()
        # Exceptions in order, one behind another; what is none, or finds no room, goes to a place behind them.
        place = torch.where(far, far.cumsum(0) - 1, lossless_room(n)).clamp(max=lossless_room(n))
        exceptions = bits.new_zeros(lossless_room(n) + 1).scatter_(0, place, bits)[: lossless_room(n)]
        header = torch.stack([found.to(torch.int32), _sum(part.view(torch.int16))])
        record.zero_()
        record[:8].copy_(header.view(torch.uint8))
        record[LOSSLESS_HEADER : LOSSLESS_HEADER + n].copy_(codes.view(torch.uint8))
        begin = LOSSLESS_HEADER + aligned(n)
        record[begin : begin + 2 * lossless_room(n)].copy_(exceptions.view(torch.uint8))
        fits &= found <= lossless_room(n)
    return fits


def _decode(message: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    right = []
    sizes = [part.shape[1] for part in values]
    per_row = message.view(len(values[0]), -1).split([lossless_bytes(n) for n in sizes], dim=1)
    for part, records, n in zip(values, per_row, sizes, strict=True):
        records = records.clone()  # begin where their dtypes may be viewed
        found, total = records[:, :8].view(torch.int32).unbind(1)
        codes = records[:, LOSSLESS_HEADER : LOSSLESS_HEADER + n].view(torch.int8)
        begin = LOSSLESS_HEADER + aligned(n)
        exceptions = records[:, begin : begin + 2 * lossless_room(n)].view(torch.int16)
        far = codes == ESCAPE
        old = part.view(torch.int16)
        right.append(((_sum(old) == total) & (far.sum(1) == found) & (found <= lossless_room(n))).all())
        moved = _ordered(_wrapped(_ordered(old) + codes)).to(torch.int16)
        place = (far.cumsum(1) - 1).clamp(0, max(lossless_room(n) - 1, 0))
        old.copy_(torch.where(far, exceptions.gather(1, place), moved))
    return right


def _sum(bits: Tensor) -> Tensor:
    """Of int16 bit patterns, over the last axis, as unsigned numbers, modulo 2^32: int32."""
    return (bits.to(torch.int64) & 0xFFFF).sum(-1).to(torch.int32)


def _wrapped(steps: Tensor) -> Tensor:
    """Modulo 2^16, as a signed number."""
    return (steps + 0x8000) % 0x10000 - 0x8000


def _ordered(bits: Tensor) -> Tensor:
    """int16 bit patterns of bf16 -> int32 in the order of the values; its own inverse."""
    wide = bits.to(torch.int32)
    return torch.where(wide < 0, wide ^ 0x7FFF, wide)


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _check(name: str, x: Tensor, dtype: torch.dtype, size: int) -> None:
    if x.dtype != dtype or x.numel() != size or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}, strides {x.stride()}: valid: {dtype}, {size} elements, contiguous"
        )
