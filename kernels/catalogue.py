"""Every kernel variant that matters, with arguments to compile it for and cases to run it on.

One list for the ahead-of-time compiler, the facts that tests hold and the tests that execute: what is inspected is what runs.
A case is an ordinary `Call` on small tensors and what the reference makes of the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zcompile.kernels import calls, reference
from zcompile.kernels.calls import Call
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry, Piece

ARCHS = ("gfx90a", "gfx942", "gfx950", "sm_90")
GUARD = 256
"""Bytes around every output of a case that must stay as they are."""


@dataclass
class Case:
    """A call, and what its outputs must be. `tables`: for arguments that hold addresses, the tensors they are the addresses of."""

    call: Call
    wanted: list[tuple[Tensor, Tensor, bool]]
    """(output, what it must become, are its bytes compared). Otherwise two NaN are equal, whatever their bits."""
    values: int
    """How many the message of one part holds."""
    tables: dict[str, list[Tensor]] = field(default_factory=dict)
    guards: list[Tensor] = field(default_factory=list)

    @property
    def traffic(self) -> float:
        """Bytes that a launch reads and writes, per value."""
        tables = {"tiles", "out_tiles", *self.tables}
        moved = [x for name, x in self.call.arguments.items() if isinstance(x, Tensor) and name not in tables]
        moved += [tensor for table in self.tables.values() for tensor in table]
        if self.call.constants.get("APPLY") or ("mains" in self.tables and self.call.arguments["out"] is None):
            moved += [out for out, _, _ in self.wanted]  # in place: read and written
        return sum(tensor.nbytes for tensor in moved) / self.values

    def wrong(self) -> str:
        """What differs, "" if nothing does."""
        for index, (found, right, raw) in enumerate(self.wanted):
            differs = found.view(_bits(found)) != right.view(_bits(right))
            if not raw and found.is_floating_point():
                differs &= ~(found.isnan() & right.isnan())
            if differs.any():
                at = differs.nonzero().flatten()
                few = ", ".join(f"[{i}] {found[i].item()} for {right[i].item()}" for i in at[:4].tolist())
                return f"output {index}: {len(at)} of {len(found)} differ: {few}"
        if any((guard != _GARBAGE).any() for guard in self.guards):
            return "bytes around an output were written"
        return ""


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants. `make` gives a case for an architecture, on `device`, from a seed."""

    name: str
    code: Code
    make: Callable[..., Case]

    def archs(self) -> tuple[str, ...]:
        """Those that have the hardware."""
        return tuple(arch for arch in ARCHS if calls.supports(arch, self.code))


_GARBAGE = 0xA5


def guarded(size: int, dtype: torch.dtype, case_guards: list[Tensor], device: str | torch.device = "cpu") -> Tensor:
    """An output full of garbage, with GUARD bytes of it on either side."""
    raw = torch.full((GUARD + size * dtype.itemsize + GUARD,), _GARBAGE, dtype=torch.uint8, device=device)
    case_guards += [raw[:GUARD], raw[len(raw) - GUARD :]]
    return raw[GUARD : len(raw) - GUARD].view(dtype)


def awkward(size: int, block: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of many magnitudes, among them blocks of every kind that the specification names."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * torch.exp(2 * torch.randn(size, generator=generator))
    rows = x[: size // block * block].view(-1, block)
    # Magnitudes whose bf16 scale is rounded down as far as it can be: the largest value then ends half a code above the top.
    edge = torch.linspace(-127.4, 127.4, block)
    kinds: tuple[Callable[[Tensor], Any], ...] = (
        lambda row: row.zero_(),
        lambda row: row[3].fill_(torch.nan),
        lambda row: row[block // 2 + 1].fill_(torch.inf),
        lambda row: row[block - 1].fill_(-torch.inf),
        lambda row: row.mul_(1e-40),
        lambda row: row.copy_(torch.linspace(0, 1, block) * 2.0**-80),
        lambda row: row.copy_(torch.linspace(0, 1, block) * 2.0**-80 * (1 - 2.0**-24)),
        lambda row: row.copy_(torch.linspace(-1, 1, block) * 3.4e38),
        lambda row: row.fill_(-0.0),
        lambda row: row[::2].mul_(1e-42),
        lambda row: row.copy_(edge).__setitem__(0, 127 * (1 + 2.0**-8)),
        lambda row: row.copy_(edge / 127 * 7).__setitem__(-1, -7 * (1 + 2.0**-8)),
        lambda row: row.copy_((torch.arange(block) % 255 - 127.0) / 2).__setitem__(0, 127),
        lambda row: row.copy_((torch.arange(block) % 31 - 15.0) / 2).__setitem__(1, 7),
    )  # fmt: skip
    for index in range(len(rows)):
        if index % 2:
            kinds[(index // 2 + seed) % len(kinds)](rows[index])
    return x.to(dtype)


def message_of(geometry: Geometry, code: Code, seed: int, parts: int = 1) -> Tensor:
    """`parts` messages of awkward values, as the reference makes them."""
    values = (awkward(geometry.size, code.block, seed + part) for part in range(parts))
    return torch.cat([reference.quantize([x], geometry, code) for x in values])


def flat(block: int, rows: int = 2) -> Geometry:
    """Parameters of less than a tile, of one block, and of more than a tile that its blocks do not fill."""
    tile = max(8, 8192 // block)
    return Geometry.of_rows(rows, (3 * block, block, (tile + 2) * block))


def whole(block: int, *, odd: bool) -> Geometry:
    """Whole parameters: one without holes, one of short rows, one that most rows hold nothing of."""
    tile = max(8, 8192 // block) * block
    off = 3 if odd else 0
    return Geometry(
        4,
        (
            Piece(tile + 2 * block, 4 * (tile + 2 * block)),
            Piece(block, 3 * block + off, ((0, block), (block + off, block - 8), (2 * block, block - 16), (3 * block - 16, 16 + off))),
            Piece(2 * block, 16 + off, ((0, 8 + off), (8 + off, 8), (16 + off, 0), (16 + off, 0))),
        ),
        False,
    )  # fmt: skip


def quantize_case(
    code: Code,
    geometry: Geometry,
    dtype: torch.dtype,
    arch: str,
    *,
    xs: list[Tensor] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Of `xs`, or of awkward values."""
    guards: list[Tensor] = []
    if xs is None:
        sizes = [geometry.size] if geometry.flat else [piece.numel for piece in geometry.pieces]
        xs = [awkward(size, min(code.block, size), seed + i, dtype).to(device) for i, size in enumerate(sizes)]
    message = guarded(geometry.message_bytes(code), torch.uint8, guards, device)
    right = reference.quantize([x.cpu() for x in xs], geometry, code).to(device)
    call = calls.quantize(xs, None if geometry.flat else _addresses(xs), message, geometry, code)
    return Case(call, [(message, right, True)], _values(geometry), {} if geometry.flat else {"source": xs}, guards)


def delta_case(
    code: Code, geometry: Geometry, dtype: torch.dtype, arch: str, *, seed: int = 0, device: str = "cpu"
) -> Case:
    guards: list[Tensor] = []
    x, image = awkward(geometry.size, code.block, seed), awkward(geometry.size, code.block, seed + 1, dtype)
    message = guarded(geometry.message_bytes(code), torch.uint8, guards, device)
    right = reference.quantize_delta(x, image, geometry, code).to(device)
    call = calls.quantize_delta(x.to(device), image.to(device), message, geometry, code)
    return Case(call, [(message, right, True)], _values(geometry), guards=guards)


def dequantize_case(
    code: Code,
    geometry: Geometry,
    dtype: torch.dtype,
    arch: str,
    *,
    apply: bool = False,
    ranks: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """With `ranks` a peer gather, with `apply` a delta that is applied."""
    guards: list[Tensor] = []
    source = Geometry.of_rows(geometry.rows, tuple(piece.n for piece in geometry.pieces))
    message = message_of(source, code, seed)
    out = guarded(geometry.size, dtype, guards, device)
    if apply:
        out.copy_(awkward(geometry.size, code.block, seed + 1, dtype))
    right = out.cpu().clone()
    if apply:
        reference.apply_delta(right, message, geometry, code)
    else:
        _write_valid(right, reference.dequantize(message, geometry, code, dtype), geometry)
    message = message.to(device)
    tables = {}
    if ranks:
        messages = [part.clone() for part in message.view(ranks, -1)]
        tables["pointers"] = messages
        call = calls.peer_gather(_addresses(messages), out, geometry, code, arch, rank=1)
    else:
        call = calls.dequantize(message, out, geometry, code, arch, apply=apply)
    return Case(call, [(out, right.to(device), False)], _values(geometry), tables, guards)


def reduce_case(
    code: Code,
    geometry: Geometry,
    arch: str,
    *,
    parts: int = 8,
    mains: bool = False,
    into_mains: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    guards: list[Tensor] = []
    message = message_of(geometry, code, seed, parts)
    added: list[Tensor] = []
    for index, piece in enumerate(geometry.pieces if mains or into_mains else ()):
        added.append(guarded(geometry.rows * piece.n, torch.float32, guards, device))
        added[-1].copy_(awkward(geometry.rows * piece.n, code.block, seed + 100 + index))
    before = [main.cpu().clone() for main in added]
    tables = {"mains": added} if added else {}
    addresses = _addresses(added) if added else None
    if into_mains:
        reference.accumulate(message, parts, before, geometry, code)
        call = calls.reduce(message.to(device), parts, added, addresses, None, geometry, code)
        wanted = [(main, right.to(device), False) for main, right in zip(added, before, strict=True)]
        return Case(call, wanted, _values(geometry), tables, guards)
    out = guarded(geometry.size, torch.float32, guards, device)
    right = reference.reduce(message, parts, before, geometry, code).to(device)
    call = calls.reduce(message.to(device), parts, added, addresses, out, geometry, code)
    return Case(call, [(out, right, False)], _values(geometry), tables, guards)


def requantize_case(
    code: Code, into: Code, geometry: Geometry, arch: str, *, parts: int = 8, seed: int = 0, device: str = "cpu"
) -> Case:
    guards: list[Tensor] = []
    message = message_of(geometry, code, seed, parts)
    out = guarded(geometry.message_bytes(into), torch.uint8, guards, device)
    right = reference.requantize(message, parts, geometry, code, into).to(device)
    call = calls.requantize(message.to(device), parts, out, geometry, code, into)
    return Case(call, [(out, right, True)], _values(geometry), guards=guards)


@cache
def catalogue() -> tuple[Variant, ...]:
    return tuple(_variants())


def _variants() -> Iterator[Variant]:
    bf16, fp32 = torch.bfloat16, torch.float32

    def named(what: str, code: Code, make: Callable[..., Case], *arguments: Any, **options: Any) -> Variant:
        return Variant(f"{what} {_short(code)}", code, lambda arch, **given: make(*arguments, arch, **options, **given))

    for kind in ("int8", "int4", "e4m3fn", "e4m3fnuz"):
        code = Code(kind)
        rows = flat(code.block)
        yield named("quantize bf16", code, quantize_case, code, rows, bf16)
        yield named("quantize fp32", code, quantize_case, code, rows, fp32)
        yield named("dequantize bf16", code, dequantize_case, code, rows, bf16)
        yield named("dequantize fp32", code, dequantize_case, code, rows, fp32)
        yield named("reduce 8", code, reduce_case, code, rows)
        yield named("requantize 8", code, requantize_case, code, code, rows)
        if not code.integer:
            continue
        yield named("quantize whole bf16", code, quantize_case, code, whole(code.block, odd=False), bf16)
        yield named("quantize odd bf16", code, quantize_case, code, whole(code.block, odd=True), bf16)
        random = Code(kind, rounding="stochastic")
        yield named("quantize bf16", random, quantize_case, random, rows, bf16)
        yield named("quantize delta bf16", code, delta_case, code, rows, bf16)
        yield named("apply delta bf16", code, dequantize_case, code, rows, bf16, apply=True)
        yield named("dequantize odd bf16", code, dequantize_case, code, whole(code.block, odd=True), bf16)
        yield named("peer gather bf16", code, dequantize_case, code, whole(code.block, odd=False), bf16, ranks=2)
        yield named("reduce loop", code, reduce_case, code, rows, parts=17)
        yield named("accumulate 8", code, reduce_case, code, rows, into_mains=True)
        for other in (Code(kind, 32, "fp32"), Code(kind, 2048)):
            yield named("quantize bf16", other, quantize_case, other, flat(other.block), bf16)
            yield named("dequantize bf16", other, dequantize_case, other, flat(other.block), bf16)
    few = Code("int4", 128)
    yield named("requantize 4", few, requantize_case, few, few, flat(few.block), parts=4)
    yield named("requantize loop", few, requantize_case, few, few, flat(few.block), parts=17)
    mixed = Code("int8"), Code("int4", rounding="stochastic")
    yield Variant(
        "requantize 2 int8 to int4/stochastic",
        mixed[0],
        lambda arch, **given: requantize_case(*mixed, flat(256), arch, parts=2, **given),
    )


def _short(code: Code) -> str:
    return code.text.replace("/256/bf16/nearest", "").replace("/nearest", "").replace("/256/bf16", "")


def _values(geometry: Geometry) -> int:
    return geometry.rows * geometry.width


def _addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=tensors[0].device)


def _write_valid(out: Tensor, values: Tensor, geometry: Geometry) -> None:
    """What a dequantisation writes: not the gaps between whole parameters, which stay as they are."""
    if geometry.flat:
        out.copy_(values)
        return
    for piece, at in zip(geometry.pieces, geometry.starts, strict=False):
        for row in range(geometry.rows):
            start, valid = piece.span(row)
            out[at + start : at + start + valid] = values[at + start : at + start + valid]


def _bits(x: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
