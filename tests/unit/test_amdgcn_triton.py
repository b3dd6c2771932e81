"""The interpreter of amdgcn text on small compiled Triton kernels, against numpy, bit for bit; and what their text says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from amdgcn.assemble import spread
from amdgcn.launch import launch
from amdgcn.mutate import Case, delete_each
from amdgcn.program import parse

from zcompile.kernels.aot import TARGETS, Compiled, compile_kernel

ARCHES = ("gfx90a", "gfx942", "gfx950")
U32, F32 = np.uint32, np.float32


@triton.jit
def quantize(x, codes, scales, n, BLOCK: tl.constexpr):
    """Block maximum on integers, scale by exact division, magic-number rounding, int8 stores."""
    row = tl.program_id(0).to(tl.int64)
    at = row * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    inverse = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
    code = (value * inverse + 12582912.0) - 12582912.0
    tl.store(codes + at, code.to(tl.int8), mask=at < n)
    tl.store(scales + row, scale)


@triton.jit
def divide(a, b, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.div_rn(tl.load(a + at), tl.load(b + at)))


@triton.jit
def sum_table(table, out, parts, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A table of pointers, a loop of run-time length, explicit rounding to bf16."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(parts):
        source = tl.load(table + i).to(tl.pointer_type(tl.float32))
        total += tl.load(source + at, mask=at < SIZE, other=0.0)
    word = total.to(tl.uint32, bitcast=True)
    word = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    tl.store(out + at, word.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=at < SIZE)


@triton.jit
def nibbles(x, out, seed, BLOCK: tl.constexpr):
    """A hash by 32-bit products, and two 4-bit codes in a byte."""
    half: tl.constexpr = BLOCK // 2
    row = tl.program_id(0)
    place = tl.arange(0, half)
    low, high = tl.load(x + row * BLOCK + place), tl.load(x + row * BLOCK + half + place)
    h = (row * BLOCK + place).to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    noise = ((h ^ (h >> 13)) >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    low = tl.minimum(tl.maximum(tl.floor(low + noise), -7.0), 7.0).to(tl.int32) + 8
    high = tl.minimum(tl.maximum(tl.floor(high + noise), -7.0), 7.0).to(tl.int32) + 8
    tl.store(out + row * half + place, (low | (high << 4)).to(tl.uint8))


def built(kernel: Any, arch: str, small: bool, signature: dict[str, str], **constants: Any) -> Compiled:
    return compile_kernel(kernel, signature, constants, arch, small_pointers=small)


everywhere = pytest.mark.parametrize(("arch", "small"), [(arch, small) for arch in ARCHES for small in (True, False)])
QUANTIZE = {"x": "*fp32", "codes": "*i8", "scales": "*fp32", "n": "i64"}


@everywhere
def test_quantize(arch: str, small: bool) -> None:
    rows, block = 40, 512
    n = rows * block - 100
    generator = np.random.default_rng(4)
    x = (generator.standard_normal(rows * block) * np.exp(4 * generator.standard_normal(rows * block))).astype(F32)
    x[:block] = 0
    codes, scales = np.full(rows * block, 99, np.int8), np.zeros(rows, F32)
    launch(built(quantize, arch, small, QUANTIZE, BLOCK=block), (rows,), [x, codes, scales, n], seed=1)
    x[n:] = 0
    tiles = x.reshape(rows, block)
    scale = np.abs(tiles).max(1) / F32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, F32(1) / scale, F32(0))
    wanted = np.rint(tiles * inverse[:, None]).astype(np.int8).reshape(-1)
    wanted[n:] = 99
    assert (scales == scale).all() and (codes == wanted).all()


@everywhere
def test_division_is_exact(arch: str, small: bool) -> None:
    """All sizes of operands and quotients, denormals, infinities and NaN, for several choices of the reciprocal."""
    count = 1 << 14
    a, b, out = spread(count, 1), spread(count, 2), np.zeros(count, F32)
    quotients = np.exp2(-np.random.default_rng(1).uniform(120, 151, 2048))  # around the smallest normal number
    kernel = built(divide, arch, small, {"a": "*fp32", "b": "*fp32", "out": "*fp32"}, BLOCK=1024)
    with np.errstate(all="ignore"):
        a[4096:6144] = (b[4096:6144] * quotients).astype(F32)
        wanted = a / b
    for seed in range(3):
        launch(kernel, (count // 1024,), [a, b, out], seed=seed)
        same = (out.view(U32) == wanted.view(U32)) | (np.isnan(out) & np.isnan(wanted))
        assert same.all(), [(x, y, z) for x, y, z in zip(a[~same], b[~same], out[~same], strict=True)][:5]


@everywhere
def test_table_of_pointers(arch: str, small: bool) -> None:
    size, parts = 1000, 5
    sources = list(np.random.default_rng(6).standard_normal((parts, size)).astype(F32))
    out = torch.zeros(size, dtype=torch.bfloat16)
    kernel = built(sum_table, arch, small, {"table": "*i64", "out": "*bf16", "parts": "i32"}, SIZE=size, BLOCK=256)
    launch(kernel, (4,), [sources, out, parts], addresses={"table[0]": 2**33 + 256, "table[3]": 2**32 - 2048})
    total = np.zeros(size, F32)
    for each in sources:
        total += each
    assert torch.equal(out, torch.from_numpy(total).bfloat16())


@everywhere
def test_nibbles(arch: str, small: bool) -> None:
    rows, block, seed = 16, 256, 12345
    x = (np.random.default_rng(7).standard_normal((rows, block)) * 5).astype(F32)
    out = np.zeros((rows, block // 2), np.uint8)
    launch(
        built(nibbles, arch, small, {"x": "*fp32", "out": "*u8", "seed": "i32"}, BLOCK=block), (rows,), [x, out, seed]
    )
    place = (np.arange(rows)[:, None] * block + np.arange(block // 2)).astype(U32)
    h = place * U32(0x9E3779B1) + U32(seed)
    h = (h ^ (h >> U32(16))) * U32(0x85EBCA6B)
    noise = ((h ^ (h >> U32(13))) >> U32(8)).astype(F32) * F32(2.0**-24)
    low, high = (
        np.clip(np.floor(half + noise), -7, 7).astype(int) + 8 for half in (x[:, : block // 2], x[:, block // 2 :])
    )
    assert (out == low + 16 * high).all()


def test_deleted_instructions_are_noticed() -> None:
    """Most deletions of the quantiser change a result; the survivors are listed."""
    kernel = built(quantize, "gfx942", True, QUANTIZE, BLOCK=256)

    def case(name: str, values: np.ndarray) -> Case:
        return Case(name, (2,), lambda: [values.astype(F32), np.full(512, 99, np.int8), np.zeros(2, F32), 500])

    generator = np.random.default_rng(8)
    normal = generator.standard_normal(512)
    heavy = normal * np.exp(4 * generator.standard_normal(512))
    report = delete_each(kernel, [case("heavy", heavy), case("zero", normal * 0), case("tiny", heavy * 1e-42)], every=2)
    assert report.tried > 40 and report.rate > 0.7, [str(each) for each in report.survivors]
    assert report.tried == len(report.survivors) + sum(report.detected.values())


def test_compile_facts() -> None:
    for arch in TARGETS:
        facts = compile_kernel(quantize, QUANTIZE, {"BLOCK": 2048}, arch, divisible=["n"]).facts()
        assert facts.lds > 0 and facts.widest_load == 16 and facts.widest_store >= 8 and not facts.spills
        assert facts.narrow_stores == facts.short_stores == 0
        assert "barrier" in facts.cross_lane
    with pytest.raises(ValueError, match="gfx90a, gfx942, gfx950, sm_90"):
        built(quantize, "gfx1100", True, QUANTIZE, BLOCK=256)
    with pytest.raises(ValueError, match="scales"):
        compile_kernel(quantize, {"x": "*fp32", "codes": "*i8", "n": "i64"}, {"BLOCK": 256}, "gfx942")
    assert parse(built(quantize, "gfx90a", True, QUANTIZE, BLOCK=2048).text).descriptor["user_sgpr_count"] == 16
