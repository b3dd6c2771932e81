"""The quantisers on CPU tensors: `cpu.cpp` (beside `lossless.cpp`), built once per machine with the C++ compiler and called through ctypes.

The functions have the signatures of `reference.py` and give its bits. Where there is no compiler, where a build fails, for fp8
codes and for dtypes other than fp32 and bf16, the reference itself does the work: the same bits, more slowly. ctypes lets go
of the GIL during a call, and the library keeps no state, so any thread may call these.
"""

from __future__ import annotations

import ctypes
import subprocess
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zcompile.kernels import cpu_build, reference
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_KINDS = {"int8": 0, "int4": 1}
_SCALES = {"fp32": 0, "bf16": 1}


def quantize(xs: Sequence[Tensor], geometry: Geometry, code: Code) -> Tensor:
    """Plain values -> a message [rows * row bytes] uint8.

    Args:
        xs: one tensor [rows * width] if the geometry is flat, else one of `numel` elements per parameter, of any floating dtype.
    """
    sizes = (geometry.size,) if geometry.flat else tuple(piece.numel for piece in geometry.pieces)
    if len(xs) != len(sizes):
        raise ValueError(f"{len(xs)} tensors: valid: {len(sizes)}, one in all for flat rows and else one per parameter")
    xs = [_checked(x, f"xs[{index}]", size) for index, (x, size) in enumerate(zip(xs, sizes, strict=True))]
    table, library, dtypes = _table(geometry.text, code), _use(code), {x.dtype for x in xs}
    if library is None or not dtypes <= _DTYPES.keys():
        return reference.quantize(xs, geometry, code)
    if len(dtypes) > 1:  # widening changes no value
        xs = [x.to(torch.float32) for x in xs]
    message = torch.empty(table.bytes, dtype=torch.uint8)
    if xs:
        library.zcompile_quantize(table.at, pointers(xs), _DTYPES[xs[0].dtype], geometry.flat, message.data_ptr())
    return message


def dequantize(message: Tensor, geometry: Geometry, code: Code, dtype: torch.dtype) -> Tensor:
    """A message -> plain values in one buffer [geometry.size] of `dtype`: flat rows, or whole parameters at `geometry.starts`.

    Elements between two whole parameters are not written, nor are those that no span covers.
    """
    table, library = _table(geometry.text, code), _use(code)
    message = _checked(message, "message", table.bytes, (torch.uint8,))
    if library is None or dtype not in _DTYPES:
        return reference.dequantize(message, geometry, code, dtype)
    out = torch.empty(geometry.size, dtype=dtype)
    library.zcompile_dequantize(table.at, message.data_ptr(), _DTYPES[dtype], out.data_ptr())
    return out


def peer_gather(buffers: Sequence[Tensor], geometry: Geometry, code: Code, dtype: torch.dtype, rank: int) -> Tensor:
    """The messages of all ranks of a level, read where they lie -> what `dequantize` makes of them, one behind another.

    Args:
        buffers: one per rank, mapped into this process; rank c has rows [c * rows / ranks, (c + 1) * rows / ranks).
        geometry: of the gathered message.
        rank: this rank; it begins with its own message, so that not all read one at once.
    """
    ranks, library = len(buffers), _use(code)
    tables = [_table(geometry.text, code, part, ranks) for part in range(ranks)]
    buffers = [
        _checked(buffer, f"buffers[{part}]", table.bytes, (torch.uint8,))
        for part, (buffer, table) in enumerate(zip(buffers, tables, strict=True))
    ]
    if library is None or dtype not in _DTYPES:
        return reference.dequantize(torch.cat(buffers), geometry, code, dtype)
    out = torch.empty(geometry.size, dtype=dtype)
    for part in (*range(rank, ranks), *range(rank)):
        library.zcompile_dequantize(tables[part].at, buffers[part].data_ptr(), _DTYPES[dtype], out.data_ptr())
    return out


def reduce(message: Tensor, parts: int, mains: Sequence[Tensor], geometry: Geometry, code: Code) -> Tensor:
    """`parts` messages, one after another -> their sum in that order, flat [rows * width] fp32.

    Args:
        message: [parts * rows * row bytes] uint8; `geometry` (flat) is that of one part.
        mains: none, or per parameter [rows * n] fp32, to which the sum is added: main + (part_0 + part_1 + ...).
    """
    library, table, message = _parts(message, parts, geometry, code)
    if mains:
        mains = _mains(mains, geometry, False)
    if library is None:
        return reference.reduce(message, parts, mains, geometry, code)
    out = torch.empty(geometry.rows * geometry.width, dtype=torch.float32)
    library.zcompile_reduce(table.at, message.data_ptr(), parts, pointers(mains) if mains else None, out.data_ptr())
    return out


def accumulate(message: Tensor, parts: int, mains: Sequence[Tensor], geometry: Geometry, code: Code) -> None:
    """`reduce` with mains, in place: main += part_0 + part_1 + ...

    Args:
        message: [parts * rows * row bytes] uint8; `geometry` (flat) is that of one part.
        mains: per parameter [rows * n] fp32, contiguous.
    """
    library, table, message = _parts(message, parts, geometry, code)
    mains = _mains(mains, geometry, True)
    if library is None:
        total = reference.reduce(message, parts, mains, geometry, code).view(geometry.rows, geometry.width)
        for main, values in zip(mains, total.split([piece.n for piece in geometry.pieces], dim=1), strict=True):
            main.view(geometry.rows, -1).copy_(values)
    elif mains:
        library.zcompile_reduce(table.at, message.data_ptr(), parts, pointers(mains), None)


def requantize(message: Tensor, parts: int, geometry: Geometry, code: Code, into: Code) -> Tensor:
    """`parts` messages in `code` -> one message of their sum in `into`: what happens between two hops of a reduction."""
    library, table, message = _parts(message, parts, geometry, code)
    if library is None or not into.integer:
        return reference.requantize(message, parts, geometry, code, into)
    target = _table(geometry.text, into)
    out = torch.empty(target.bytes, dtype=torch.uint8)
    library.zcompile_requantize(table.at, target.at, message.data_ptr(), parts, out.data_ptr())
    return out


def quantize_delta(x: Tensor, image: Tensor, geometry: Geometry, code: Code) -> Tensor:
    """A message of x - image; both flat, x [rows * width] fp32, image of any floating dtype."""
    _flat(geometry, "quantize_delta")
    x, image = _checked(x, "x", geometry.size, (torch.float32,)), _checked(image, "image", geometry.size)
    table, library = _table(geometry.text, code), _use(code)
    if library is None or image.dtype not in _DTYPES:
        return reference.quantize_delta(x.reshape(-1), image, geometry, code)
    message = torch.empty(table.bytes, dtype=torch.uint8)
    library.zcompile_quantize_delta(table.at, x.data_ptr(), image.data_ptr(), _DTYPES[image.dtype], message.data_ptr())
    return message


def apply_delta(image: Tensor, message: Tensor, geometry: Geometry, code: Code) -> None:
    """image += what the message says, in fp32, rounded to image's dtype; in place; image flat [rows * width], contiguous."""
    _flat(geometry, "apply_delta")
    image = _checked(image, "image", geometry.size, in_place=True)
    table, library = _table(geometry.text, code), _use(code)
    message = _checked(message, "message", table.bytes, (torch.uint8,))
    if library is None or image.dtype not in _DTYPES:
        reference.apply_delta(image, message, geometry, code)
    else:
        library.zcompile_apply_delta(table.at, message.data_ptr(), _DTYPES[image.dtype], image.data_ptr())


# ---- arguments


def _checked(x: Tensor, name: str, size: int, dtypes: tuple[torch.dtype, ...] = (), in_place: bool = False) -> Tensor:
    """`x` as the library reads it: contiguous, each element at a multiple of its size. Errors name what does not fit."""
    if x.dtype not in dtypes if dtypes else not x.dtype.is_floating_point:
        raise TypeError(f"{name} is {x.dtype}: valid: {', '.join(map(str, dtypes)) or 'a floating dtype'}")
    if x.numel() != size:
        raise ValueError(
            f"{name} has {x.numel()} elements, of shape {tuple(x.shape)}: valid: {size}, as the geometry says"
        )
    if not x.is_cpu:
        raise ValueError(f"{name} is on {x.device}: valid: cpu")
    if x.is_contiguous() and not x.data_ptr() % x.element_size():
        return x
    if in_place:
        raise ValueError(
            f"{name} has strides {x.stride()} and begins at {x.data_ptr():#x}: what is written in place is contiguous"
        )
    return x.clone(memory_format=torch.contiguous_format)


def _flat(geometry: Geometry, name: str) -> None:
    if not geometry.flat:
        raise ValueError(f"{name} with a geometry of whole parameters: valid: a flat one")


def _mains(mains: Sequence[Tensor], geometry: Geometry, in_place: bool) -> list[Tensor]:
    if len(mains) != len(geometry.pieces):
        raise ValueError(f"{len(mains)} mains: valid: {len(geometry.pieces)}, one per parameter")
    return [
        _checked(main, f"mains[{index}]", geometry.rows * piece.n, (torch.float32,), in_place)
        for index, (main, piece) in enumerate(zip(mains, geometry.pieces, strict=True))
    ]


def _parts(message: Tensor, parts: int, geometry: Geometry, code: Code) -> tuple[Any, _Prepared, Tensor]:
    """(library, table, message) of a reduction."""
    _flat(geometry, "a sum")
    if parts < 1:
        raise ValueError(f"parts={parts}: valid: 1 or more messages")
    table = _table(geometry.text, code)
    return _use(code), table, _checked(message, "message", parts * table.bytes, (torch.uint8,))


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Where tensors begin, as the library takes it."""
    return (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


# ---- tables


class _Run(ctypes.Structure):
    """One record: see `Run` in cpu.cpp."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("piece", "n", "valid", "record", "own", "joint"))


class _Table(ctypes.Structure):
    """A geometry and a code: see `Table` in cpu.cpp."""

    _fields_ = (
        ("runs", ctypes.POINTER(_Run)), ("count", ctypes.c_int64), ("bytes", ctypes.c_int64), ("block", ctypes.c_int64),
        ("kind", ctypes.c_int32), ("scale", ctypes.c_int32), ("stochastic", ctypes.c_int32), ("unused", ctypes.c_int32),
    )  # fmt: skip


@dataclass(frozen=True)
class _Prepared:
    """at: the address of a table; bytes: of a message; table: what keeps both alive."""

    at: int
    bytes: int
    table: _Table


@lru_cache(maxsize=1024)
def _table(text: str, code: Code, part: int = 0, parts: int = 1) -> _Prepared:
    """The table of a geometry; of several parts: of that part of its rows, whose message stands alone.

    Raises ValueError for a piece that is not made of whole blocks or has values outside its tensor."""
    geometry = Geometry.parse(text)
    records = geometry.records(code)
    rows = geometry.rows // parts
    runs = (_Run * (rows * len(geometry.pieces)))()
    count = 0
    for row in range(part * rows, (part + 1) * rows):
        for index, (piece, start) in enumerate(zip(geometry.pieces, geometry.starts, strict=False)):
            if piece.n % code.block or piece.n < 0:
                raise ValueError(
                    f"parameter {index} has {piece.n} values in a row: valid: whole blocks of {code.block}"
                )
            at, valid = (row * piece.n, piece.n) if geometry.flat else piece.span(row)
            if not 0 <= valid <= piece.n or (valid and not 0 <= at <= piece.numel - valid):
                raise ValueError(
                    f"row {row} of parameter {index} holds {valid} values from {at} on: valid: up to {piece.n} of its {piece.numel}"
                )
            joint = row * geometry.width + start if geometry.flat else start + at
            record = (row - part * rows) * records[-1] + records[index]
            runs[count] = _Run(index, piece.n, valid, record, at, joint)
            count += 1
    table = _Table(
        runs, count, rows * records[-1], code.block,
        _KINDS.get(code.kind, -1), _SCALES[code.scale], code.rounding == "stochastic", 0,
    )  # fmt: skip
    return _Prepared(ctypes.addressof(table), table.bytes, table)


# ---- the library

_SIGNATURES = {
    "zcompile_quantize": "ppiip",
    "zcompile_quantize_delta": "pppip",
    "zcompile_dequantize": "ppip",
    "zcompile_apply_delta": "ppip",
    "zcompile_reduce": "ppipp",
    "zcompile_requantize": "pppip",
    "zcompile_lossless_encode": "pppipp",
    "zcompile_lossless_decode": "pipppip",
}
"""p: an address, i: an int64."""

_lock = threading.Lock()
_library: list[ctypes.CDLL | None] = []
"""Empty until first use; then the library, or None where the reference does its work."""


def _use(code: Code) -> Any:
    """The library; None if the reference is to do the work."""
    return library() if code.integer else None


def library() -> Any:
    """The library, built or loaded at first use; None where it cannot be had."""
    if not _library:
        with _lock:
            if not _library:
                _library.append(_load_or_warn())
    return _library[0]


def available() -> bool:
    """Whether the compiled kernels are in use (builds them if need be)."""
    return _use(Code("int8")) is not None


def _load_or_warn() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(cpu_build.build()))
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p if letter == "p" else ctypes.c_int64 for letter in signature]
            function.restype = None
        return library
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"zcompile quantises with plain torch operations, the same bits but more slowly: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
