"""The lossless delta for Triton: the bytes and the bits of kernels/lossless.py. docs/wire-format.md says what they are.

An exception's place among the others is how many there are before it: each program counts those of its values, torch adds the counts
up, and a second kernel puts each where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcompile.kernels import gpu
from zcompile.kernels.code import LOSSLESS_HEADER, aligned, lossless_bytes, lossless_room
from zcompile.kernels.triton_math import bf16_bits

BLOCK = 2048
"""Values of a program."""
WARPS = 4


@triton.jit
def ordered(bits):
    """Bit patterns of bf16, int32 with their sign -> numbers in the order of the values; its own inverse."""
    return bits ^ ((bits >> 15) & 0x7FFF)


@triton.jit
def wrapped(steps):
    """Modulo 2^16, as a signed number."""
    return (steps << 16) >> 16


@triton.jit
def rounded(x):
    """fp32 -> bit patterns of bf16, int32 with their sign; one NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return wrapped(tl.where(nan, 0x7FC0, bf16_bits(bits)).to(tl.int32))


@triton.jit
def exceptions_at(message, begin):
    """Where the exceptions of a record lie, in a message of bytes."""
    return (message + begin).to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def encode_kernel(master, old, message, counts, sums, begin, n, BLOCK: tl.constexpr):
    """Codes of BLOCK values, how many exceptions there are among them, the sum of the old patterns.

    Args:
        master: [n] fp32. old: [n] int16. message: int8, in which the codes begin at `begin`. counts, sums: [programs] int32.
    """
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    before = tl.load(old + at, mask=inside, other=0).to(tl.int32)
    step = wrapped(ordered(rounded(tl.load(master + at, mask=inside, other=0.0))) - ordered(before))
    far = inside & ((step < -127) | (step > 127))
    tl.store(message + begin + at, tl.where(far, -128, step).to(tl.int8), mask=inside)
    tl.store(counts + program, tl.sum(far.to(tl.int32), axis=0))
    tl.store(sums + program, tl.sum(before & 0xFFFF, axis=0))


@triton.jit
def exceptions_kernel(master, message, ends, begin, tail, n, room, BLOCK: tl.constexpr):
    """New patterns of the exceptions among BLOCK values, as far as there is room.

    Args:
        ends: [programs] int32: exceptions up to the end of each program's values. tail: where those of the message begin.
    """
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    far = tl.load(message + begin + at, mask=at < n, other=0).to(tl.int32) == -128
    count = far.to(tl.int32)
    place = tl.load(ends + program) - tl.sum(count, axis=0) + tl.cumsum(count, axis=0) - 1
    fits = far & (place < room)
    new = rounded(tl.load(master + at, mask=fits, other=0.0)).to(tl.int16)
    tl.store(exceptions_at(message, tail) + place, new, mask=fits)


@triton.jit
def look_kernel(message, values, counts, sums, begin, n, record, stride, programs, BLOCK: tl.constexpr):
    """Exceptions among BLOCK codes of a row, and the sum of the old patterns.

    Args:
        message: int8, rows `record` bytes apart, codes from `begin` on. values: int16, rows `stride` apart. counts, sums: int32, [rows,
            programs].
    """
    program, row = tl.program_id(0), tl.program_id(1)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    code = tl.load(message + row.to(tl.int64) * record + begin + at, mask=inside, other=0)
    before = tl.load(values + row.to(tl.int64) * stride + at, mask=inside, other=0).to(tl.int32)
    place = row * programs + program
    tl.store(counts + place, tl.sum((code.to(tl.int32) == -128).to(tl.int32), axis=0))
    tl.store(sums + place, tl.sum(before & 0xFFFF, axis=0))


@triton.jit
def decode_kernel(message, values, ends, begin, tail, n, room, record, stride, programs, BLOCK: tl.constexpr):
    """Old values -> new ones, in place.

    Args:
        ends: [rows, programs] int32. tail: where the exceptions of a row begin. The rest as in `look_kernel`.
    """
    program, row = tl.program_id(0), tl.program_id(1)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    first = message + row.to(tl.int64) * record
    code = tl.load(first + begin + at, mask=inside, other=0).to(tl.int32)
    far = code == -128
    count = far.to(tl.int32)
    end = tl.load(ends + row * programs + program)
    place = end - tl.sum(count, axis=0) + tl.cumsum(count, axis=0) - 1
    own = values + row.to(tl.int64) * stride + at
    moved = ordered(wrapped(ordered(tl.load(own, mask=inside, other=0).to(tl.int32)) + code))
    sent = tl.load(exceptions_at(first, tail) + place, mask=far & (place < room), other=0).to(tl.int32)
    tl.store(own, tl.where(far, sent, moved).to(tl.int16), mask=inside)


def encode(master: Tensor, old: Sequence[Tensor], message: Tensor) -> Tensor:
    """`lossless.encode`: one row of a message; whether all exceptions found room."""
    fits, begin, start = [], LOSSLESS_HEADER, 0
    for part in old:
        n = part.numel()
        new, room, tail = master[start : start + n], lossless_room(n), begin + aligned(n)
        grid = (triton.cdiv(n, BLOCK),)
        counts, sums = (torch.empty(grid, dtype=torch.int32, device=master.device) for _ in range(2))
        end = begin - LOSSLESS_HEADER + lossless_bytes(n)
        message[begin + n : end].zero_()
        codes = message.view(torch.int8)
        run(encode_kernel, grid, master=new, old=part.view(torch.int16), message=codes, counts=counts, sums=sums, begin=begin, n=n)
        ends = counts.cumsum(0, dtype=torch.int32)
        run(exceptions_kernel, grid, master=new, message=codes, ends=ends, begin=begin, tail=tail, n=n, room=room)
        zero = torch.zeros_like(ends[-1])
        header = torch.stack([ends[-1], sums.sum(dtype=torch.int32), zero, zero])
        message[begin - LOSSLESS_HEADER : begin].copy_(header.view(torch.uint8))
        fits.append(ends[-1] <= room)
        begin, start = end + LOSSLESS_HEADER, start + n
    return torch.stack(fits).all()


def decode(message: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """`lossless.decode`: for each parameter, whether its old values were those of the sender."""
    rows = len(values[0])
    record = message.numel() // rows
    codes, table = message.view(torch.int8), message.view(rows, record)
    right, begin = [], LOSSLESS_HEADER
    for part in values:
        n = part.shape[1]
        room, bits = lossless_room(n), part.view(torch.int16)
        grid = (triton.cdiv(n, BLOCK), rows)
        counts, sums = (torch.empty(grid[::-1], dtype=torch.int32, device=message.device) for _ in range(2))
        place = {"begin": begin, "n": n, "record": record, "stride": bits.stride(0), "programs": grid[0]}
        run(look_kernel, grid, message=codes, values=bits, counts=counts, sums=sums, **place)
        ends = counts.cumsum(1, dtype=torch.int32)
        run(decode_kernel, grid, message=codes, values=bits, ends=ends, tail=begin + aligned(n), room=room, **place)
        header = table[:, begin - LOSSLESS_HEADER : begin - 8].contiguous().view(torch.int32)
        same = (sums.sum(1, dtype=torch.int32) == header[:, 1]) & (ends[:, -1] == header[:, 0]) & (header[:, 0] <= room)
        right.append(same.all())
        begin += lossless_bytes(n)
    return right


def run(kernel: Any, grid: tuple[int, ...], **arguments: Tensor | int) -> None:
    """Launch with the constants that all kernels here share."""
    gpu.launch(kernel, grid, {**arguments, "BLOCK": BLOCK}, WARPS)
