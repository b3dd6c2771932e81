"""What `zcompile kernel-bench` measures: each operation of the quantisers on a bucket, and the ways to do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zcompile.kernels import reference
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry, Piece

PARTS = 4
"""Messages in a sum."""
BLOCK = 256


@dataclass
class Operation:
    """One thing to measure, and the ways to do it.

    Attributes:
        size: bytes of the plain side.
        moved: bytes that the operation itself reads and writes, by its result alone.
        ways: name -> call; "copy" copies the plain side into memory that is there already, "clone" into new memory, as the others do.
        check: False if the ways do not give the same values.
    """

    name: str
    code: Code
    elements: int
    size: int
    moved: int
    ways: dict[str, Callable[[], Any]]
    check: Callable[[], bool]


def operations(
    kind: str, elements: int, device: torch.device, kernels: ModuleType, inductor: bool = True
) -> list[Operation]:
    """The operations of one kind of code on one flat bucket.

    Args:
        kernels: a module with the functions of `reference`: `kernels.cpu` or `kernels.gpu`.
        inductor: also torch.compile of the same arithmetic, without what the format asks for besides (records, padding).
    """
    code = Code(kind, BLOCK)
    geometry = Geometry.of_rows(1, (elements,))
    generator = torch.Generator(device).manual_seed(1)
    wide = torch.randn(elements, generator=generator, device=device)
    x, image = wide.bfloat16(), (wide + 0.01 * torch.randn(elements, generator=generator, device=device)).bfloat16()
    message = reference.quantize([x], geometry, code)
    several = torch.cat([reference.quantize([x * (part + 1)], geometry, code) for part in range(PARTS)])
    delta = reference.quantize_delta(wide, image, geometry, code)
    target = image.clone()

    def record(raw: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scales) of a message of one record."""
        end = code.code_bytes(elements)
        scales = raw[end : end + code.scale_bytes(elements)].clone().view(torch.bfloat16)
        return raw[:end].clone().view(elements // BLOCK, -1), scales

    codes, scales = record(message)
    parts = [record(part) for part in several.view(PARTS, -1)]
    many_codes, many_scales = torch.stack([c for c, _ in parts]), torch.stack([s for _, s in parts])
    delta_codes, delta_scales = record(delta)

    def encode(values: Tensor) -> tuple[Tensor, Tensor]:
        return reference.encode(values.view(-1, BLOCK), code)

    def total(codes: Tensor, scales: Tensor) -> Tensor:
        found = reference.decode(codes[0], scales[0], code)
        for part in range(1, PARTS):
            found = found + reference.decode(codes[part], scales[part], code)
        return found

    # name, plain values, what is moved, (a function of torch, its arguments), the same by a module of kernels
    sent, added = message.nbytes, several.nbytes
    listed: list[tuple[str, Tensor, int, tuple[Callable[..., Any], tuple[Tensor, ...]], Callable[[Any], Any]]] = [
        ("quantise", x, x.nbytes + sent, (encode, (x,)), lambda m: m.quantize([x], geometry, code)),
        (
            "dequantise", x, sent + x.nbytes, (lambda c, s: reference.decode(c, s, code).bfloat16(), (codes, scales)),
            lambda m: m.dequantize(message, geometry, code, torch.bfloat16),
        ),
        (
            f"sum of {PARTS}", wide, added + wide.nbytes, (total, (many_codes, many_scales)),
            lambda m: m.reduce(several, PARTS, (), geometry, code),
        ),
        (
            f"sum of {PARTS}, quantised", wide, added + sent, (lambda c, s: encode(total(c, s)), (many_codes, many_scales)),
            lambda m: m.requantize(several, PARTS, geometry, code, code),
        ),
        (
            "quantise delta", wide, wide.nbytes + image.nbytes + sent, (lambda a, b: encode(a - b.float()), (wide, image)),
            lambda m: m.quantize_delta(wide, image, geometry, code),
        ),
        (
            "apply delta", x, 2 * x.nbytes + sent,
            (lambda i, c, s: (i.float() + reference.decode(c, s, code).view(-1)).bfloat16(), (image, delta_codes, delta_scales)),
            lambda m: m.apply_delta(target, delta, geometry, code),
        ),
    ]  # fmt: skip
    found = []
    for name, plain, moved, (function, arguments), call in listed:
        copy = torch.empty_like(plain)
        ways: dict[str, Callable[[], Any]] = {
            "copy": _bound(copy.copy_, plain),
            "clone": plain.clone,
            "zcompile": _bound(call, kernels),
            "eager": _bound(call, reference),
        }
        if inductor:
            ways["inductor"] = _bound(torch.compile(function, dynamic=False, fullgraph=True), *arguments)
        found.append(Operation(name, code, elements, plain.nbytes, moved, ways, _equal(call, kernels, target, image)))
    return found


def layer(kind: str, hidden: int, device: torch.device, kernels: ModuleType, rows: int = 8) -> Operation:
    """The unpack of a gather: the parameters of a decoder layer, whole, from the shards of `rows` ranks.

    Unfused, torch decodes the records one by one and copies each row to its place.
    """
    code = Code(kind, BLOCK)
    sizes = (
        hidden,
        hidden,
        3 * hidden * hidden,
        hidden * hidden,
        4 * hidden * hidden,
        4 * hidden,
        4 * hidden * hidden,
        hidden,
    )
    pieces = []
    for numel in sizes:
        n = -(-numel // (rows * BLOCK)) * BLOCK
        pieces.append(Piece(n, numel, tuple((r * n, min(max(numel - r * n, 0), n)) for r in range(rows))))
    geometry = Geometry(rows, tuple(pieces), False)
    xs = [torch.randn(numel, device=device).bfloat16() for numel in sizes]
    message = kernels.quantize(xs, geometry, code)
    plain = torch.cat(xs)
    copy = torch.empty_like(plain)

    def call(module: ModuleType) -> Tensor:
        found: Tensor = module.dequantize(message, geometry, code, torch.bfloat16)
        return found

    def check() -> bool:
        ours, theirs = call(kernels), call(reference)
        places = zip(geometry.starts, sizes, strict=False)
        return all(torch.equal(ours[at : at + numel], theirs[at : at + numel]) for at, numel in places)

    ways: dict[str, Callable[[], Any]] = {
        "copy": _bound(copy.copy_, plain),
        "clone": plain.clone,
        "zcompile": _bound(call, kernels),
        "eager": _bound(call, reference),
    }
    return Operation("gathered layer", code, sum(sizes), plain.nbytes, message.nbytes + plain.nbytes, ways, check)


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _equal(call: Callable[[Any], Any], kernels: ModuleType, target: Tensor, image: Tensor) -> Callable[[], bool]:
    """Do the kernels and the reference give the same? What is done in place is done to `target`, from `image`."""

    def result(module: ModuleType) -> Tensor:
        target.copy_(image)
        found = call(module)
        return target.clone() if found is None else found

    return lambda: torch.equal(result(kernels), result(reference))
