"""The quantisers in plain torch operations: what every kernel must equal, bit for bit, on every target.

Slow, readable, on any device. All arithmetic is fp32, each operation rounded once, to nearest even; no fused multiply-add.
NaN outputs are equal if both are NaN: their payloads are not part of the contract.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zcompile.kernels.code import SMALLEST, Code
from zcompile.kernels.geometry import Geometry

_SCALE = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FLOAT8 = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}
_FINITE = 0x7F800000
"""Bit patterns of magnitudes below this are finite; compared as integers, NaN is the largest of all."""


def noise(x: Tensor) -> Tensor:
    """What stochastic rounding adds before it rounds down: a hash of the value's bits and its place in the block, in [0, 1).

    No state and no seed: a step that is run twice gives the same bits, on every target.

    Args:
        x: [..., block] fp32.
    """
    place = torch.arange(x.shape[-1], device=x.device, dtype=torch.int64)
    h = (x.contiguous().view(torch.int32).to(torch.int64) & _MASK) ^ (place * 0x9E3779B1 & _MASK)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ (h >> shift)) * factor & _MASK
    h = h ^ (h >> 16)
    return (h >> 8).to(torch.float32) * 2.0**-24


_MASK = 0xFFFFFFFF


def encode(x: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Blocks -> (codes [..., bytes] uint8, scales [...] of the code's scale dtype).

    Args:
        x: [..., block] of any floating dtype.
    """
    x = x.to(torch.float32).contiguous()
    largest = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1)
    amax = largest.view(torch.float32)
    # By a tensor: CUDA divides by a Python number as a product with its inverse, which is rounded twice.
    scale = torch.where(amax < SMALLEST, 0.0, amax / torch.full_like(amax, code.top)).to(_SCALE[code.scale])
    integer, nan = (torch.int16, 0x7FC0) if code.scale == "bf16" else (torch.int32, 0x7FC00000)
    scale = (
        torch.where(largest >= _FINITE, nan, scale.view(integer)).to(integer).view(scale.dtype)
    )  # one NaN for all targets
    wide = scale.to(torch.float32)
    good = wide > 0
    inverse = torch.where(good, torch.ones_like(wide) / wide, 0.0)
    scaled = torch.where(good[..., None], x * inverse[..., None], 0.0)
    if not code.integer:
        return scaled.clamp(-code.top, code.top).to(_FLOAT8[code.kind]).view(torch.uint8), scale
    rounded = torch.floor(scaled + noise(x)) if code.rounding == "stochastic" else torch.round(scaled)
    values = rounded.clamp(-code.top, code.top)
    if code.kind == "int8":
        return values.to(torch.int8).view(torch.uint8), scale
    low, high = (values + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4, scale


def decode(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """(codes [..., bytes] uint8, scales [...]) -> [..., block] fp32."""
    if code.kind == "int8":
        values = codes.view(torch.int8).to(torch.float32)
    elif code.kind == "int4":
        values = torch.cat((codes & 15, codes >> 4), dim=-1).to(torch.float32) - 8
    else:
        values = codes.view(_FLOAT8[code.kind]).to(torch.float32)
    return values * scales.to(torch.float32)[..., None]


def quantize(xs: Sequence[Tensor], geometry: Geometry, code: Code) -> Tensor:
    """Plain values -> a message [rows * row bytes] uint8."""
    return _write([_rows(xs, geometry, index) for index in range(len(geometry.pieces))], geometry, code)


def dequantize(message: Tensor, geometry: Geometry, code: Code, dtype: torch.dtype) -> Tensor:
    """A message -> plain values in one buffer [geometry.size] of `dtype`: flat rows, or whole parameters at `geometry.starts`.

    Elements between two whole parameters are not written.
    """
    pieces = [piece.to(dtype) for piece in _read(message, geometry, code)]
    if geometry.flat:
        return torch.cat(pieces, dim=1).reshape(-1)
    out = message.new_empty(geometry.size, dtype=dtype)
    for piece, at, values in zip(geometry.pieces, geometry.starts, pieces, strict=False):
        for row in range(geometry.rows):
            start, valid = piece.span(row)
            out[at + start : at + start + valid] = values[row, :valid]
    return out


def reduce(message: Tensor, parts: int, mains: Sequence[Tensor], geometry: Geometry, code: Code) -> Tensor:
    """`parts` messages, one after another -> their sum in that order, flat [rows * width] fp32.

    Args:
        message: [parts * rows * row bytes] uint8; `geometry` (flat) is that of one part.
        mains: none, or per parameter [rows * n] fp32, to which the sum is added: main + (part_0 + part_1 + ...).
    """
    total: list[Tensor] = []
    for part in message.view(parts, -1):
        values = _read(part, geometry, code)
        total = [a + b for a, b in zip(total, values, strict=True)] if total else values
    if mains:
        total = [main.view(geometry.rows, -1) + part for main, part in zip(mains, total, strict=True)]
    return torch.cat(total, dim=1).reshape(-1)


def accumulate(message: Tensor, parts: int, mains: Sequence[Tensor], geometry: Geometry, code: Code) -> None:
    """Each main [rows * n] fp32 += its part of the sum, in place: what the last hop of a reduction does while micro-batches add up."""
    total = reduce(message, parts, (), geometry, code).view(geometry.rows, -1)
    for main, part in zip(mains, total.split([piece.n for piece in geometry.pieces], dim=1), strict=True):
        main.view(geometry.rows, -1).add_(part)


def requantize(message: Tensor, parts: int, geometry: Geometry, code: Code, into: Code) -> Tensor:
    """`parts` messages in `code` -> one message of their sum in `into`: what happens between two hops of a reduction."""
    return quantize([reduce(message, parts, (), geometry, code)], geometry, into)


def quantize_delta(x: Tensor, image: Tensor, geometry: Geometry, code: Code) -> Tensor:
    """A message of x - image; both flat, x [rows * width] fp32, image of any floating dtype."""
    return quantize([x - image.reshape(-1).to(torch.float32)], geometry, code)


def apply_delta(image: Tensor, message: Tensor, geometry: Geometry, code: Code) -> None:
    """image += what the message says, in fp32, rounded to image's dtype; in place; image flat [rows * width], contiguous."""
    flat = image.view(-1)
    flat.copy_(flat.to(torch.float32) + dequantize(message, geometry, code, torch.float32))


def _rows(xs: Sequence[Tensor], geometry: Geometry, index: int) -> Tensor:
    """The values of one parameter as they lie in the message: [rows, n], zeros where a row has fewer."""
    piece, rows = geometry.pieces[index], geometry.rows
    if geometry.flat:
        return xs[0].reshape(rows, geometry.width).narrow(1, geometry.starts[index], piece.n)
    flat = xs[index].reshape(-1)
    if not piece.spans:
        return flat.view(rows, piece.n)
    out = flat.new_zeros(rows, piece.n)
    for row, (start, valid) in enumerate(piece.spans):
        out[row, :valid] = flat[start : start + valid]
    return out


def _write(pieces: list[Tensor], geometry: Geometry, code: Code) -> Tensor:
    records = geometry.records(code)
    message = torch.zeros(geometry.rows, records[-1], dtype=torch.uint8, device=pieces[0].device)
    for piece, values, at in zip(geometry.pieces, pieces, records, strict=False):
        codes, scales = encode(values.reshape(geometry.rows, -1, code.block), code)
        end = at + code.code_bytes(piece.n)
        message[:, at:end] = codes.reshape(geometry.rows, -1)
        message[:, end : end + code.scale_bytes(piece.n)] = scales.contiguous().view(torch.uint8)
    return message.view(-1)


def _read(message: Tensor, geometry: Geometry, code: Code) -> list[Tensor]:
    """Per parameter [rows, n] fp32."""
    records = geometry.records(code)
    rows = message.reshape(geometry.rows, records[-1])
    found = []
    for piece, at in zip(geometry.pieces, records, strict=False):
        end = at + code.code_bytes(piece.n)
        codes = rows[:, at:end].reshape(geometry.rows, piece.n // code.block, -1)
        raw = rows[:, end : end + code.scale_bytes(piece.n)].contiguous()
        found.append(decode(codes.contiguous(), raw.view(_SCALE[code.scale]), code).view(geometry.rows, piece.n))
    return found
