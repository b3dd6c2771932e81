"""The compiled text of every Triton kernel, executed: codes, scales and outputs are those of the reference, bit for bit.

Executed by the interpreter of `amdgcn`, which checks every access, on memory full of garbage and across a multiple of 4 GiB.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
from amdgcn.launch import launch
from support.faulty import chosen, of_module
from support.kernel_runs import AMD, cells, compiled, execute, execute_far
from support.spawn import side_by_side

from zcompile.kernels.calls import supports
from zcompile.kernels.catalogue import (
    Case,
    Variant,
    awkward,
    catalogue,
    delta_case,
    dequantize_case,
    flat,
    quantize_case,
    reduce_case,
    requantize_case,
    whole,
)
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry, Piece

BF16, FP32 = torch.bfloat16, torch.float32


def executed(cell: tuple[str, str]) -> str:
    name, arch = cell
    (variant,) = (each for each in catalogue() if each.name == name)
    return execute(variant.make(arch, seed=1), arch, seed=1)


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest) -> dict[tuple[str, str], str]:
    """(variant, architecture) -> what differs from the reference, of those that this session will look at."""
    given = [item.callspec.params for item in of_module(request) if item.originalname == "test_equals_the_reference"]
    return side_by_side(executed, [(params["variant"].name, params["arch"]) for params in given])


@pytest.mark.parametrize(("variant", "arch"), cells(AMD))
def test_equals_the_reference(differences: dict[tuple[str, str], str], variant: Variant, arch: str) -> None:
    assert differences[variant.name, arch] == ""


MORE: dict[str, Callable[[str], Case]] = {
    "int8/64 quantize": lambda arch: quantize_case(Code("int8", 64), flat(64), BF16, arch, seed=3),
    "int8/1024/fp32/stochastic quantize whole": lambda arch: quantize_case(
        Code("int8", 1024, "fp32", "stochastic"), whole(1024, odd=False), FP32, arch, seed=4
    ),
    "int4/2048/fp32/stochastic quantize": lambda arch: quantize_case(
        Code("int4", 2048, "fp32", "stochastic"), flat(2048, rows=1), FP32, arch, seed=5
    ),
    "int8/32 dequantize odd fp32": lambda arch: dequantize_case(Code("int8", 32), whole(32, odd=True), FP32, arch, seed=2),
    "int8 apply delta fp32": lambda arch: dequantize_case(Code("int8"), flat(256), FP32, arch, apply=True, seed=3),
    "int8 quantize delta fp32": lambda arch: delta_case(Code("int8"), flat(256), FP32, arch, seed=3),
    "int4 peer gather of four, odd": lambda arch: dequantize_case(
        Code("int4"), whole(256, odd=True), BF16, arch, ranks=4, seed=6
    ),
    "int4/128/fp32 reduce one part": lambda arch: reduce_case(Code("int4", 128, "fp32"), flat(128), arch, parts=1, seed=7),
    "int8 reduce and add mains": lambda arch: reduce_case(Code("int8"), flat(256), arch, parts=3, mains=True, seed=8),
    "int4/64 to int8/64/fp32, 5 parts": lambda arch: requantize_case(
        Code("int4", 64), Code("int8", 64, "fp32"), flat(64), arch, parts=5, seed=9
    ),
    "int4/32/fp32 to int4/32/stochastic, 3 parts": lambda arch: requantize_case(
        Code("int4", 32, "fp32"), Code("int4", 32, rounding="stochastic"), flat(32), arch, parts=3, seed=10
    ),
    "int4/2048 to int4/2048/fp32, one part": lambda arch: requantize_case(
        Code("int4", 2048), Code("int4", 2048, "fp32"), flat(2048, rows=1), arch, parts=1, seed=11
    ),
    "int4/128, 17 parts": lambda arch: requantize_case(Code("int4", 128), Code("int4", 128), flat(128, rows=1), arch, parts=17, seed=12),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_other_blocks_scales_and_parts(name: str) -> None:
    assert execute(MORE[name]("gfx90a"), "gfx90a", small=False) == ""


def shuffled(seed: int) -> list[str]:
    """What differs where the seed says which block is which kind of awkward, kernel by kernel."""
    rows, found = flat(256, rows=1), []
    for code in (Code("int8"), Code("int4"), Code("int8", rounding="stochastic"), Code("int4", scale="fp32")):
        found.append(execute(quantize_case(code, rows, FP32, "gfx90a", seed=seed), "gfx90a", seed=seed))
    found.append(execute(dequantize_case(Code("int8"), rows, BF16, "gfx90a", seed=seed), "gfx90a"))
    for code in (Code("int8"), Code("int4")):
        found.append(
            execute(requantize_case(code, Code("int4"), rows, "gfx90a", parts=2, seed=seed), "gfx90a", seed=seed)
        )
    return found


@pytest.fixture(scope="module")
def places(request: pytest.FixtureRequest) -> dict[int, list[str]]:
    return side_by_side(shuffled, chosen(request, "seed"))


@pytest.mark.parametrize("seed", range(2, 15))
@pytest.mark.slow
def test_every_kind_of_block_at_every_place(places: dict[int, list[str]], seed: int) -> None:
    assert places[seed] == [""] * 7


def test_tensors_that_begin_anywhere() -> None:
    """Sources that are views into larger storages: no 16-byte load may touch them, and the result is the same."""
    block = 256
    geometry = Geometry(2, (Piece(33 * block, 66 * block), Piece(block, 2 * block)), False)
    code = Code("int8", block)
    for shift in (1, 3):
        xs = [awkward(shift + piece.numel, block, 5, BF16)[shift:] for piece in geometry.pieces]
        assert any(x.data_ptr() % 16 for x in xs)
        case = quantize_case(code, geometry, BF16, "gfx90a", xs=xs)
        assert case.call.constants["ODD"]
        assert execute(case, "gfx90a") == ""


@pytest.mark.parametrize("distance", [(1 << 32) - 1024, 5 << 32], ids=["across 4 GiB", "20 GiB"])
@pytest.mark.parametrize("arch", ["gfx90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in AMD[1:])])
def test_offsets_of_more_than_32_bits(arch: str, distance: int) -> None:
    """Messages and buffers above 4 GiB: what a tile's offset is added to is 64 bits wide, everywhere."""
    rows = flat(256, rows=1)
    for case in (
        quantize_case(Code("int8"), rows, BF16, arch, seed=1),
        dequantize_case(Code("int4"), rows, BF16, arch, seed=1),
        delta_case(Code("int4"), rows, FP32, arch, seed=1),
        reduce_case(Code("int8"), rows, arch, parts=2, seed=1),
        requantize_case(Code("int4"), Code("int8"), rows, arch, parts=2, seed=1),
        requantize_case(Code("int4"), Code("int4"), rows, arch, parts=2, seed=1),
    ):
        assert execute_far(case, arch, distance) == ""


def test_a_part_that_is_far_behind_the_first() -> None:
    """The sum over parts of more than 2 GiB each: the step from one to the next is 64 bits wide, unrolled and in the loop."""

    step, rows, code = 3 << 30, flat(256, rows=1), Code("int8")
    for parts in (3, 17):
        case = reduce_case(code, rows, "gfx90a", parts=parts, seed=2)
        messages = case.call.arguments["message"]
        assert isinstance(messages, torch.Tensor)
        base = 1 << 40
        pieces = {f"part {index}": part.clone() for index, part in enumerate(messages.view(parts, -1))}
        places = {f"part {index}": base + index * step for index in range(parts)}
        arguments = {**case.call.arguments, "message": base, "stride": step // 16}
        passed = [value for value in arguments.values() if value is not None]
        launch(compiled(case.call, "gfx90a", small=False), case.call.grid, passed, addresses=places, extra=pieces)
        assert case.wrong() == ""


def test_fp8_where_the_chip_has_it() -> None:
    assert [arch for arch in AMD if supports(arch, Code("e4m3fn"))] == ["gfx950"]
    new = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)  # older ones stop at an assertion of their own
    assert [arch for arch in AMD if supports(arch, Code("e4m3fnuz"))] == (["gfx942"] if new else [])


def test_a_case_notices() -> None:
    """The judge itself: a changed code, a changed guard byte and a lost NaN are seen."""
    case = quantize_case(Code("int8"), flat(256), BF16, "gfx90a")
    found, right, _ = case.wanted[0]
    assert case.wrong() != ""
    found.copy_(right)
    assert case.wrong() == ""
    found[5] += 1
    assert "1 of" in case.wrong()
    found[5] -= 1
    case.guards[1][0] = 0
    assert "around" in case.wrong()
    case = dequantize_case(Code("int8"), flat(256), FP32, "gfx90a")
    found, right, _ = case.wanted[0]
    found.copy_(right)
    found.view(torch.int32)[right.isnan()] ^= 1
    assert right.isnan().any() and case.wrong() == ""
    found[right.isnan()] = 0
    assert case.wrong() != ""
