"""What each operation passes to which kernel: one `Call` per bucket, whatever runs it (a GPU, Triton's interpreter, a test)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcompile.kernels import blocks
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry
from zcompile.kernels.triton_nibbles import requantize_words_kernel
from zcompile.kernels.triton_quantize import (
    dequantize_kernel,
    peer_gather_kernel,
    quantize_delta_kernel,
    quantize_kernel,
)
from zcompile.kernels.triton_reduce import UNROLL, reduce_kernel, requantize_kernel

FP8 = {
    "gfx942": "e4m3fnuz",
    "gfx950": "e4m3fn",
    "sm_89": "e4m3fn",
    "sm_90": "e4m3fn",
    "sm_100": "e4m3fn",
    "sm_120": "e4m3fn",
}
"""The fp8 kind that a chip has in hardware; the others have none."""
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    del FP8["gfx942"]  # Triton 3.6 stops at an assertion of its own in the conversion (Fp32_to_Fp8E4M3FNUZ_SW)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
"""dtypes of plain values; the names that Triton has for them."""
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int64: "*i64"}
# Lanes by what they hold: quantising, 32 values each, as two divisions per block and lane weigh more than anything else;
# otherwise 16, which are 16 bytes of bf16 in either half of the block, so that values need not change lanes to be stored.
_FEW, _MANY = 4, 8


@dataclass(frozen=True)
class Call:
    """One launch. `arguments` in the order of the kernel: tensors and integers, None where a kernel takes one; `constants`: constexpr."""

    kernel: Any
    tiles: int
    arguments: Mapping[str, Tensor | int | None]
    constants: Mapping[str, Any]
    warps: int

    @property
    def grid(self) -> tuple[int]:
        return (self.tiles,)

    @property
    def signature(self) -> dict[str, str]:
        """Name -> Triton type of each run-time argument."""
        return {
            name: _TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            for name, value in self.arguments.items()
            if value is not None
        }

    @property
    def all_constants(self) -> dict[str, Any]:
        """The constants, and the arguments that are None."""
        return {**self.constants, **{name: None for name, value in self.arguments.items() if value is None}}


def supports(arch: str, code: Code) -> bool:
    """Has the chip hardware for this kind of code?"""
    return code.integer or FP8.get(arch) == code.kind


def quantize(xs: Sequence[Tensor], addresses: Tensor | None, message: Tensor, geometry: Geometry, code: Code) -> Call:
    """`reference.quantize` into `message`.

    Args:
        xs: one flat tensor, or one per parameter; fp32 or bf16, all of one dtype, contiguous.
        addresses: not for a flat geometry: [parameters] int64, where they lie.
    """
    source: Tensor | None
    if geometry.flat:
        source, odd, dtype = xs[0], False, None
    else:
        source, odd, dtype = addresses, _odd(geometry.text) or _crooked(xs), DTYPES[xs[0].dtype]
    table = tiles(geometry.text, code.text, message.device)
    arguments = {"source": source, "message": message, "tiles": table}
    constants = _into(code) | _shape(code) | {"ODD": odd, "DTYPE": dtype}
    return Call(quantize_kernel, len(table), arguments, constants, _FEW)


def quantize_delta(x: Tensor, image: Tensor, message: Tensor, geometry: Geometry, code: Code) -> Call:
    """`reference.quantize_delta` into `message`; x fp32, image fp32 or bf16."""
    table = tiles(geometry.text, code.text, message.device)
    arguments = {"source": x, "image": image, "message": message, "tiles": table}
    return Call(quantize_delta_kernel, len(table), arguments, _into(code) | _shape(code), _FEW)


def dequantize(message: Tensor, out: Tensor, geometry: Geometry, code: Code, arch: str, *, apply: bool = False) -> Call:
    """`reference.dequantize` into `out`, or `apply_delta` to it; fp32 or bf16."""
    table = tiles(geometry.text, code.text, message.device)
    odd = not geometry.flat and _odd(geometry.text)
    constants = _from(code) | _shape(code) | {"ODD": odd, "APPLY": apply, "CONVERT": _converts(arch)}
    return Call(dequantize_kernel, len(table), {"message": message, "out": out, "tiles": table}, constants, _MANY)


def peer_gather(pointers: Tensor, out: Tensor, geometry: Geometry, code: Code, arch: str, rank: int = 0) -> Call:
    """The dequantisation of the messages at `pointers`, one behind another, into `out`.

    Args:
        pointers: [ranks] int64.
        geometry: of the gathered message, of which each rank has an equal number of rows.
        rank: whose message to begin with.
    """
    ranks = len(pointers)
    table = tiles(geometry.text, code.text, out.device, ranks)
    odd = not geometry.flat and _odd(geometry.text)
    first = len(table) // ranks * rank
    arguments: dict[str, Tensor | int | None] = {
        "pointers": pointers,
        "out": out,
        "tiles": table,
        "first": first,
        "count": len(table),
    }
    constants = _from(code) | _shape(code) | {"ODD": odd, "CONVERT": _converts(arch)}
    return Call(peer_gather_kernel, len(table), arguments, constants, _MANY)


def reduce(
    message: Tensor,
    parts: int,
    mains: Sequence[Tensor],
    addresses: Tensor | None,
    out: Tensor | None,
    geometry: Geometry,
    code: Code,
) -> Call:
    """`reference.reduce` into `out`, or `accumulate` into the mains if that is None.

    Args:
        addresses: with mains: [parameters] int64, where they lie.
    """
    table = tiles(geometry.text, code.text, message.device)
    arguments = {"message": message, "mains": addresses, "out": out, "tiles": table, **_parts(parts, geometry, code)}
    constants = {
        "PARTS": _unrolled(parts), "MAINS": bool(mains), **_from(code), **_shape(code), "ODD": _crooked(mains),
    }  # fmt: skip
    return Call(reduce_kernel, len(table), arguments, constants, _MANY)


def requantize(message: Tensor, parts: int, out: Tensor, geometry: Geometry, code: Code, into: Code) -> Call:
    """`reference.requantize` into `out`, between codes of one block."""
    if code.block != into.block:
        raise ValueError(f"requantize from {code.text} to {into.text}: one launch needs one block")
    table = tiles(geometry.text, code.text, message.device)
    arguments: dict[str, Tensor | int | None] = {
        "message": message, "out": out, "tiles": table, "out_tiles": tiles(geometry.text, into.text, message.device),
        **_parts(parts, geometry, code),
    }  # fmt: skip
    constants = {
        "PARTS": _unrolled(parts), "SCALE": code.scale, "OUT_SCALE": into.scale, "STOCHASTIC": into.rounding == "stochastic",
        **_shape(code),
    }  # fmt: skip
    if code.kind == into.kind == "int4":
        return Call(requantize_words_kernel, len(table), arguments, constants, _FEW)
    constants |= {"KIND": code.kind, "OUT_KIND": into.kind}
    # Where arithmetic is the limit, fewer lanes with more values each, as in quantising; else they take too many registers.
    return Call(
        requantize_kernel, len(table), arguments, constants, _FEW if code.kind == "int4" or parts <= 4 else _MANY
    )


@cache
def tiles(geometry: str, code: str, device: torch.device, ranks: int = 1) -> Tensor:
    """`blocks.tiles` on a device, made once: it depends on nothing but texts."""
    return blocks.tiles(Geometry.parse(geometry), Code.parse(code), ranks).to(device)


@cache
def _odd(geometry: str) -> bool:
    return blocks.odd(Geometry.parse(geometry))


def _crooked(tensors: Sequence[Tensor]) -> bool:
    """Does any begin where a 16-byte load may not?"""
    return any(tensor.data_ptr() % 16 for tensor in tensors)


def _shape(code: Code) -> dict[str, Any]:
    return {"BLOCK": code.block, "ROWS": blocks.tile_blocks(code)}


def _from(code: Code) -> dict[str, Any]:
    return {"KIND": code.kind, "SCALE": code.scale}


def _into(code: Code) -> dict[str, Any]:
    return {"KIND": code.kind, "SCALE": code.scale, "STOCHASTIC": code.rounding == "stochastic"}


def _parts(parts: int, geometry: Geometry, code: Code) -> dict[str, int]:
    # The bytes of a part in sixteens, as a record is a multiple of that: 31 bits are then enough for 32 GiB.
    return {"parts": parts, "stride": geometry.message_bytes(code) // 16}


def _unrolled(parts: int) -> int:
    return parts if parts <= UNROLL else 0


def _converts(arch: str) -> bool:
    """Has the chip an instruction that rounds fp32 to bf16? NVIDIA's have, from sm_80 on; AMD's CDNA from gfx950 on."""
    return arch == "gfx950" or (arch.startswith("sm_") and int(arch[3:]) >= 80)
