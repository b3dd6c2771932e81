"""Compiles the call of a catalogue case for an architecture and executes its text in the interpreter of `amdgcn`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import pytest
from amdgcn.launch import launch
from torch import Tensor

from zcompile.kernels.aot import Compiled, compile_kernel
from zcompile.kernels.calls import Call
from zcompile.kernels.catalogue import Case, Variant, catalogue

AMD = ("gfx90a", "gfx942", "gfx950")
_EVERYWHERE = {
    f"{what} bf16 {kind}" for what in ("quantize", "dequantize") for kind in ("int8", "int4", "e4m3fn", "e4m3fnuz")
}
_EVERYWHERE |= {"requantize 8 int4"}


def cells(archs: Iterable[str], *, all_of: str = "gfx90a") -> list[Any]:
    """(variant, arch) of the catalogue, as parameters. The quick suite has all of one architecture, of the others the main ones."""
    made = []
    for variant in catalogue():
        for arch in variant.archs():
            marks = () if arch == all_of or variant.name in _EVERYWHERE else (pytest.mark.slow,)
            if arch in archs:
                made.append(pytest.param(variant, arch, id=f"{variant.name.replace(' ', '-')}-{arch}", marks=marks))
    return made


_compiled: dict[tuple[Any, ...], Compiled] = {}


@cache
def text_of(variant: Variant, arch: str, small: bool = True) -> tuple[Compiled, Call]:
    """The compiled text of a variant, and the call that it is for."""
    call = variant.make(arch).call
    return compiled(call, arch, small=small), call


def compiled(call: Call, arch: str, *, small: bool = True) -> Compiled:
    """As `gpu.run` would have it compiled, once for all tests of a process. small: for tensors below 2 GB."""
    constants = call.all_constants
    key = (call.kernel, str(call.signature), str(constants), arch, call.warps, small)
    if key not in _compiled:
        _compiled[key] = compile_kernel(
            call.kernel, call.signature, constants, arch, warps=call.warps, small_pointers=small, stages=1
        )
    return _compiled[key]


def arguments(case: Case) -> list[Any]:
    """The arguments that are passed, in order; for a table of addresses the tensors, to which the launch gives addresses."""
    return [case.tables.get(name, value) for name, value in case.call.arguments.items() if value is not None]


def execute(case: Case, arch: str, *, small: bool = True, seed: int = 0) -> str:
    """Runs a case; what differs from the reference, "" if nothing does."""
    launch(compiled(case.call, arch, small=small), case.call.grid, arguments(case), seed=seed)
    return case.wrong()


def execute_far(case: Case, arch: str, distance: int) -> str:
    """Runs a case as if everything lay `distance` bytes into its tensors, a multiple of 64: offsets of more than 32 bits.

    The pointers that are passed lie that far before the buffers, the table says so much more.
    """
    call = case.call
    width = {name: value.element_size() for name, value in call.arguments.items() if isinstance(value, Tensor)}
    tiles: Mapping[str, Tensor] = {
        name: value.clone() for name, value in call.arguments.items() if isinstance(value, Tensor) and "tiles" in name
    }
    far = [name for name in call.arguments if name in ("source", "image", "message", "out") and name in width]
    plain = {width[name] for name in far if width[name] > 1}
    assert len(plain) <= 1, "one table, one unit"
    for table in tiles.values():
        table[:, 2] += distance // max(plain, default=1)
        table[:, 4:6] += distance
    places = {name: (index + 1 << 36) + 256 for index, name in enumerate(far)}
    passed = [
        tiles.get(name, places[name] - distance if name in places else value)
        for name, value in call.arguments.items()
        if value is not None
    ]
    extra = {name: call.arguments[name] for name in far}
    launch(compiled(call, arch, small=False), call.grid, passed, addresses=places, extra=extra)
    return case.wrong()
