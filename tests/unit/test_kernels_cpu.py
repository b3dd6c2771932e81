"""The C++ kernels give the bits of the torch reference: kinds, blocks, scales, roundings, layouts, special values, wrong arguments."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import multiprocessing
import shutil
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zcompile import kernel_bench, kernel_operations
from zcompile.kernels import cpu, cpu_build, reference
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry, Piece

INTEGER = [
    Code(kind, block, scale, rounding)
    for kind, block, scale, rounding in itertools.product(
        ("int8", "int4"), (32, 256, 2048), ("bf16", "fp32"), ("nearest", "stochastic")
    )
]
DTYPES = (torch.float32, torch.bfloat16)
GUARD, POISON = 64, 0xAB


class GuardedTorch:
    """torch, but for `empty`: memory of a known pattern between two guards, at an odd address if it holds bytes."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, *, dtype: torch.dtype) -> Tensor:
        width = dtype.itemsize
        whole = torch.full((GUARD + size * width + GUARD,), POISON, dtype=torch.uint8)
        shift = width if width > 1 else 1
        self.made.append(whole)
        return whole[GUARD - shift : GUARD - shift + size * width].view(dtype)

    def check(self) -> None:
        for whole in self.made:
            assert whole[: GUARD - 4].eq(POISON).all() and whole[-GUARD:].eq(POISON).all(), "written outside"
        self.made.clear()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardedTorch]:
    assert cpu.available(), "these tests need a C++ compiler"
    guard = GuardedTorch()
    monkeypatch.setattr(cpu, "torch", guard)
    yield guard
    guard.check()


def same(ours: Tensor, theirs: Tensor) -> None:
    """Bit for bit, but for the payloads of NaNs."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.dtype.is_floating_point:
        nan = theirs.isnan()
        assert torch.equal(ours.isnan(), nan)
        bits = {4: torch.int32, 2: torch.int16}[ours.element_size()]
        ours, theirs = (x.contiguous().view(bits).masked_fill(nan, 0) for x in (ours, theirs))
    wrong = (ours != theirs).nonzero()
    assert not len(wrong), f"{len(wrong)} of {ours.numel()} differ, the first at {wrong[0].tolist()}"


def values(size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers whose magnitude changes from place to place."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator)
    return (x * torch.exp2(torch.randint(-12, 4, (size,), generator=generator).float())).to(dtype)


def special_blocks(block: int) -> Tensor:
    """[blocks, block] fp32: everything that docs/wire-format.md has a rule for."""
    base = values(block, 5)
    ramp = torch.arange(block, dtype=torch.float32)
    rows = [torch.zeros(block), torch.full((block,), -0.0), base, torch.full((block,), 0.3), torch.full((block,), -5.0)]
    for number in (
        float("nan"),
        float("inf"),
        -float("inf"),
        torch.finfo(torch.bfloat16).max,
        -torch.finfo(torch.float32).max,
    ):
        for place in (0, block // 2 - 1, block - 1):
            rows.append(base.clone().index_fill_(0, torch.tensor([place]), number))
    both = base.clone()
    both[0], both[1] = float("inf"), float("nan")
    for top in (127.0, 7.0):  # scale 1: every value a tie
        ties = (ramp % (2 * top)) - top + 0.5
        ties[0] = top
        rows += [ties, -ties, ties * 0.25, ties * 3.0]
    for size in (2.0**-149, 2.0**-127, 2.0**-81, 2.0**-80 * (1 - 2**-24), 2.0**-80, 2.0**-79, 1e30, 3e38):
        rows.append(base.sign() * size)
        rows.append(torch.where(ramp == 3, 1.0, base.sign() * size))
    # Scales that are halfway between two bf16 numbers: rounding them down clamps the largest value.
    rows += [base.clamp(-1, 1).index_fill_(0, torch.tensor([1]), top * (1 + 2**-8)) for top in (127.0, 7.0)]
    return torch.stack([*rows, both])


def outputs(x: Tensor, code: Code, geometry: Geometry, module: Any) -> Iterator[Tensor]:
    """What a module makes of one flat tensor, by all of its functions."""
    message = reference.quantize([x], geometry, code)
    yield module.quantize([x], geometry, code)
    mains = [values(geometry.rows * piece.n, 7) for piece in geometry.pieces]
    for parts in (1, 5):  # the first as it is; the others as a broken sender would send them
        several = torch.cat([message, *(message.roll(7 * part) for part in range(1, parts))])
        yield module.reduce(several, parts, (), geometry, code)
        yield module.reduce(several, parts, mains, geometry, code)
        yield module.requantize(several, parts, geometry, code, code)
    for dtype in DTYPES:
        for broken in (0, 3):
            yield module.dequantize(message.roll(broken), geometry, code, dtype)
            image = values(geometry.size, 11, dtype)
            module.apply_delta(image, message.roll(broken), geometry, code)
            yield image
        yield module.quantize_delta(x.float(), image, geometry, code)


def compare(x: Tensor, code: Code, geometry: Geometry) -> None:
    for ours, theirs in zip(*(outputs(x, code, geometry, module) for module in (cpu, reference)), strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("code", INTEGER, ids=lambda code: code.text)
def test_special_values_are_coded_as_in_the_reference(code: Code, guarded: GuardedTorch) -> None:
    x = special_blocks(max(code.block, 256))
    geometry = Geometry.of_rows(1, (x.numel() // 2048 * 2048,))
    for dtype in DTYPES:
        compare(x.reshape(-1)[: geometry.size].to(dtype), code, geometry)


@pytest.mark.parametrize("code", INTEGER, ids=lambda code: code.text)
def test_several_parameters_and_rows(code: Code, guarded: GuardedTorch) -> None:
    unit = max(code.block, 256)
    geometry = Geometry.of_rows(3, (unit, 5 * unit, 2 * unit))
    for dtype in DTYPES:
        compare(values(geometry.size, 1, dtype), code, geometry)


def test_requantise_between_every_pair_of_codes() -> None:
    geometry = Geometry.of_rows(2, (2048, 4096))
    some = [code for code in INTEGER if code.rounding == "nearest" or code.block == 256]
    for code, into in itertools.product(some, some):
        message = torch.cat([cpu.quantize([values(geometry.size, seed)], geometry, code) for seed in range(2)])
        same(cpu.requantize(message, 2, geometry, code, into), reference.requantize(message, 2, geometry, code, into))


@pytest.mark.parametrize("parts", range(1, 10))
@pytest.mark.parametrize(
    "scale", ["bf16", "fp32"]
)  # with bf16 scales most sums are exact, and their order does not show
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_sums_of_parts(kind: str, scale: str, parts: int, guarded: GuardedTorch) -> None:
    code, geometry = Code(kind, 64, scale), Geometry.of_rows(2, (64, 320))
    messages = [cpu.quantize([values(geometry.size, seed) * 3.0**seed], geometry, code) for seed in range(parts)]
    message = torch.cat(messages)
    mains = [values(geometry.rows * piece.n, 100 + piece.n) for piece in geometry.pieces]
    kept = [main.clone() for main in mains]
    total = reference.reduce(message, parts, mains, geometry, code)
    same(cpu.reduce(message, parts, mains, geometry, code), total)
    same(cpu.reduce(message, parts, (), geometry, code), reference.reduce(message, parts, (), geometry, code))
    assert all(map(torch.equal, mains, kept))
    cpu.accumulate(message, parts, mains, geometry, code)
    columns = total.view(geometry.rows, -1).split([piece.n for piece in geometry.pieces], dim=1)
    for main, column in zip(mains, columns, strict=True):
        same(main, column.reshape(-1))


def whole(numels: Sequence[int], rows: int, block: int) -> Geometry:
    """Whole parameters of any size, sharded over `rows`: padded to whole blocks, the last rows shorter or empty."""
    pieces = []
    for numel in numels:
        n = -(-numel // (rows * block)) * block
        pieces.append(Piece(n, numel, tuple((r * n, min(max(numel - r * n, 0), n)) for r in range(rows))))
    return Geometry(rows, tuple(pieces), False)


def check_whole(geometry: Geometry, code: Code, guarded: GuardedTorch) -> None:
    """Both ways; the receiver writes what the spans cover and nothing else."""
    for dtype in DTYPES:
        xs = [values(piece.numel, index, dtype) for index, piece in enumerate(geometry.pieces)]
        message = cpu.quantize(xs, geometry, code)
        same(message, reference.quantize(xs, geometry, code))
        covered = torch.zeros(geometry.size, dtype=torch.bool)
        for piece, at in zip(geometry.pieces, geometry.starts, strict=False):
            for row in range(geometry.rows):
                start, valid = piece.span(row)
                covered[at + start : at + start + valid] = True
        ours, theirs = (
            cpu.dequantize(message, geometry, code, dtype),
            reference.dequantize(message, geometry, code, dtype),
        )
        same(ours[covered], theirs[covered])
        assert ours[~covered].view(torch.uint8).eq(POISON).all()


@pytest.mark.parametrize("code", [code for code in INTEGER if code.block < 2048], ids=lambda code: code.text)
def test_f19_blocks_do_not_divide_the_shards(code: Code, guarded: GuardedTorch) -> None:
    """Last blocks of one element, of all but one, rows without any, and a parameter smaller than a block."""
    block = code.block
    check_whole(whole((3 * block + 1, 1, 8 * block - 1, 2 * block, 77), 4, block), code, guarded)


def test_f19_spans_with_holes_and_out_of_order(guarded: GuardedTorch) -> None:
    code = Code("int4", 32)
    pieces = (Piece(64, 200, ((150, 50), (3, 33), (0, 0))), Piece(32, 10, ((9, 1), (0, 0), (2, 7))), Piece(32, 96))
    check_whole(Geometry(3, pieces, False), code, guarded)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_f20_zeros_subnormals_and_the_largest_numbers_stay_finite(kind: str) -> None:
    biggest = torch.finfo(torch.bfloat16).max
    for code in (Code(kind), Code(kind, 256, "fp32"), Code(kind, 256, "bf16", "stochastic")):
        x = torch.zeros(5, 256)
        x[1] = -0.0
        x[2] = 2.0**-140
        x[3, ::2], x[3, 1::2] = biggest, -biggest
        x[4, 7] = 1.0
        geometry = Geometry.of_rows(5, (256,))
        for source in (x, x.bfloat16()):
            y = cpu.dequantize(cpu.quantize([source.reshape(-1)], geometry, code), geometry, code, torch.float32).view(
                5, 256
            )
            assert y.isfinite().all()
            assert torch.equal(y[:3].view(torch.int32), torch.zeros(3, 256, dtype=torch.int32))  # +0.0, also for -0.0
            assert torch.equal(y[4] != 0, x[4] != 0)
            assert (y[3] / x[3] - 1).abs().max() < (0.01 if code.rounding == "nearest" else 0.15)


@pytest.mark.xfail(
    strict=True, reason="a bf16 scale that was rounded up: top * scale is beyond the largest bf16 number"
)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_f20_the_largest_bf16_number_comes_back_finite_as_bf16(kind: str) -> None:
    code, geometry = Code(kind), Geometry.of_rows(1, (256,))
    x = torch.full((256,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert cpu.dequantize(cpu.quantize([x], geometry, code), geometry, code, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_f21_a_number_that_is_not_finite_makes_its_block_nan(kind: str, bad: float) -> None:
    code, geometry = Code(kind, 64), Geometry.of_rows(1, (192,))
    x = values(192, 3)
    x[70] = bad
    message = cpu.quantize([x], geometry, code)
    codes, scales = message[: code.code_bytes(192)], message[code.code_bytes(192) : code.code_bytes(192) + 6]
    assert scales.view(torch.int16)[1].item() == 0x7FC0
    zero = 0 if kind == "int8" else 0x88
    assert codes.view(3, -1)[1].eq(zero).all()
    for y in (
        cpu.dequantize(message, geometry, code, torch.bfloat16),
        cpu.reduce(torch.cat([message] * 3), 3, (), geometry, code),
        cpu.dequantize(cpu.requantize(message, 1, geometry, code, code), geometry, code, torch.float32),
    ):
        assert torch.equal(y.isnan().view(3, 64).all(1), torch.tensor([False, True, False]))
        assert not y.isnan().view(3, 64)[::2].any()
    images = values(192, 4, torch.bfloat16)
    cpu.apply_delta(images, message, geometry, code)
    assert torch.equal(images.isnan(), torch.arange(192) // 64 == 1)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_f21_any_nan_for_a_scale_gives_nan(kind: str) -> None:
    """Also one whose payload would run over into the sign if it were rounded as a number."""
    code, geometry = Code(kind, 64, "fp32"), Geometry.of_rows(1, (64,))
    message = cpu.quantize([values(64, 3)], geometry, code)
    message[code.code_bytes(64) :].view(torch.int32)[0] = 0x7FFFFFFF
    for dtype in DTYPES:
        assert cpu.dequantize(message, geometry, code, dtype).isnan().all()
        image = values(64, 4, dtype)
        cpu.apply_delta(image, message, geometry, code)
        assert image.isnan().all()


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2)[::2]


def shifted(x: Tensor) -> Tensor:
    """The same values, from an address that is a multiple of the element size and of nothing more."""
    return torch.cat((x[:1], x))[1:]


def unaligned(x: Tensor) -> Tensor:
    """From an address that is not even that; no torch function makes such a tensor, other libraries' buffers do."""
    raw = bytearray(1) + bytearray(x.view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel())


@pytest.mark.parametrize("spoil", [strided, shifted, unaligned])
def test_f22_strided_and_misaligned_tensors(spoil: Callable[[Tensor], Tensor], guarded: GuardedTorch) -> None:
    for code, dtype in itertools.product((Code("int8", 32), Code("int4", 32)), DTYPES):
        geometry = Geometry.of_rows(2, (96, 32))
        x, main, image = values(256, 1, dtype), values(192, 2), values(256, 3, dtype)
        message = reference.quantize([x], geometry, code)
        odd, twice = spoil(message), spoil(torch.cat((message, message)))
        same(cpu.quantize([spoil(x)], geometry, code), message)
        same(cpu.dequantize(odd, geometry, code, dtype), reference.dequantize(message, geometry, code, dtype))
        mains = [main, values(64, 4)]
        expected = reference.reduce(torch.cat((message, message)), 2, mains, geometry, code)
        same(cpu.reduce(twice, 2, [spoil(m) for m in mains], geometry, code), expected)
        same(cpu.requantize(odd, 1, geometry, code, code), reference.requantize(message, 1, geometry, code, code))
        delta = reference.quantize_delta(x.float(), image, geometry, code)
        same(cpu.quantize_delta(spoil(x.float()), spoil(image), geometry, code), delta)
        target, other = spoil(image.clone()), image.clone()
        reference.apply_delta(other, delta, geometry, code)
        if spoil is shifted:
            cpu.apply_delta(target, spoil(delta), geometry, code)
            same(target, other)
        else:
            with pytest.raises(ValueError, match=r"image has strides .* contiguous"):
                cpu.apply_delta(target, delta, geometry, code)


def test_f22_more_than_2_31_elements() -> None:
    """One row that lies behind the 2^31st element of a parameter; the pages before it are never touched."""
    start, code = 2**31 + 5, Code("int8")
    geometry = Geometry(1, (Piece(512, start + 300, ((start, 300),)),), False)
    try:
        x = torch.empty(start + 300, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no room for 4 GiB of addresses")
    x[start:] = values(300, 1, torch.bfloat16)
    small = Geometry(1, (Piece(512, 300, ((0, 300),)),), False)
    message = cpu.quantize([x], geometry, code)
    same(message, reference.quantize([x[start:]], small, code))
    del x
    y = cpu.dequantize(message, geometry, code, torch.bfloat16)
    same(y[start : start + 300], reference.dequantize(message, small, code, torch.bfloat16)[:300])


def test_parameters_of_different_dtypes_share_a_message() -> None:
    code, geometry = Code("int8", 32), whole((40, 70), 2, 32)
    for dtypes in (DTYPES, DTYPES[::-1], (torch.float16, torch.float64)):
        xs = [values(n, n, dtype) for n, dtype in zip((40, 70), dtypes, strict=True)]
        same(cpu.quantize(xs, geometry, code), reference.quantize(xs, geometry, code))


def test_what_only_the_reference_can_do_is_left_to_it() -> None:
    """fp8, and dtypes other than fp32 and bf16."""
    geometry, x = Geometry.of_rows(2, (32, 64)), values(192, 1)
    fp8, int8 = Code("e4m3fn", 32), Code("int8", 32)
    message = cpu.quantize([x], geometry, fp8)
    same(message, reference.quantize([x], geometry, fp8))
    same(cpu.requantize(message, 1, geometry, fp8, int8), reference.requantize(message, 1, geometry, fp8, int8))
    mains = [values(64, 2), values(128, 3)]
    total = reference.reduce(message, 1, mains, geometry, fp8).view(2, -1)
    same(cpu.reduce(message, 1, mains, geometry, fp8), total.view(-1))
    cpu.accumulate(message, 1, mains, geometry, fp8)
    same(mains[0], total[:, :32].reshape(-1))
    same(mains[1], total[:, 32:].reshape(-1))
    message = cpu.quantize([x.half()], geometry, int8)
    same(message, reference.quantize([x.half()], geometry, int8))
    same(
        cpu.dequantize(message, geometry, int8, torch.float16),
        reference.dequantize(message, geometry, int8, torch.float16),
    )
    ours, theirs = x.half(), x.half()
    delta = cpu.quantize_delta(x * 1.1, ours, geometry, int8)
    cpu.apply_delta(ours, delta, geometry, int8)
    reference.apply_delta(theirs, reference.quantize_delta(x * 1.1, theirs, geometry, int8), geometry, int8)
    same(ours, theirs)


def test_empty_geometries() -> None:
    code = Code("int8")
    for geometry in (Geometry.of_rows(2, ()), Geometry.of_rows(2, (0,)), Geometry.of_rows(0, (256,))):
        message = cpu.quantize([torch.empty(0)], geometry, code)
        assert message.numel() == 0
        assert cpu.dequantize(message, geometry, code, torch.float32).numel() == 0
        assert cpu.reduce(message, 3, (), geometry, code).numel() == 0
        assert cpu.requantize(message, 3, geometry, code, code).numel() == 0
    assert cpu.quantize([], Geometry(2, (), False), code).numel() == 0


GEOMETRY, CODE = Geometry.of_rows(2, (256, 512)), Code("int8")
X, MESSAGE = torch.zeros(1536), torch.zeros(2 * (272 + 528), dtype=torch.uint8)
MAINS = [torch.zeros(512), torch.zeros(1024)]
HALVES, STRIDED = [main.half() for main in MAINS], [main.repeat(2)[::2] for main in MAINS]
ODD, SHORT = Geometry.of_rows(1, (100,)), Geometry(1, (Piece(256, 10, ((2, 9),)),), False)
LONG, WHOLE = Geometry(1, (Piece(256, 300, ((0, 300),)),), False), whole((1536,), 1, 256)
WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, r"2 tensors: valid: 1", lambda: cpu.quantize([X, X], GEOMETRY, CODE)),
    (ValueError, r"xs\[0\] has 1535 elements, .*: valid: 1536", lambda: cpu.quantize([X[1:]], GEOMETRY, CODE)),
    (TypeError, r"xs\[0\] is torch.int64: valid: a floating", lambda: cpu.quantize([X.long()], GEOMETRY, CODE)),
    (ValueError, r"xs\[0\] is on meta: valid: cpu", lambda: cpu.quantize([X.to("meta")], GEOMETRY, CODE)),
    (ValueError, r"parameter 0 has 100 values .* blocks of 256", lambda: cpu.quantize([X[:100]], ODD, CODE)),
    (ValueError, r"holds 9 values from 2 on: valid: up to 256 of its 10", lambda: cpu.quantize([X[:10]], SHORT, CODE)),
    (ValueError, r"row 0 of parameter 0 holds 300 values", lambda: cpu.quantize([X[:300]], LONG, CODE)),
    (TypeError, r"message is torch.float32: valid: torch.uint8", lambda: cpu.dequantize(X, GEOMETRY, CODE, X.dtype)),
    (ValueError, r"has 1599 elements.*valid: 1600", lambda: cpu.dequantize(MESSAGE[1:], GEOMETRY, CODE, X.dtype)),
    (ValueError, r"message has 1600 elements.* valid: 3200", lambda: cpu.reduce(MESSAGE, 2, (), GEOMETRY, CODE)),
    (ValueError, r"parts=0: valid: 1 or more", lambda: cpu.reduce(MESSAGE, 0, (), GEOMETRY, CODE)),
    (ValueError, r"1 mains: valid: 2", lambda: cpu.reduce(MESSAGE, 1, MAINS[:1], GEOMETRY, CODE)),
    (TypeError, r"mains\[0\] is torch.float16: valid", lambda: cpu.reduce(MESSAGE, 1, HALVES, GEOMETRY, CODE)),
    (ValueError, r"0 mains: valid: 2", lambda: cpu.accumulate(MESSAGE, 1, (), GEOMETRY, CODE)),
    (ValueError, r"mains\[0\] has strides", lambda: cpu.accumulate(MESSAGE, 1, STRIDED, GEOMETRY, CODE)),
    (TypeError, r"x is torch.float16: valid: torch.float32", lambda: cpu.quantize_delta(X.half(), X, GEOMETRY, CODE)),
    (ValueError, r"apply_delta with a geometry of whole", lambda: cpu.apply_delta(X, MESSAGE, WHOLE, CODE)),
]


@pytest.mark.parametrize(
    ("kind", "message", "call"), WRONG, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
@pytest.mark.parametrize("compiled", [True, False])
def test_errors_name_the_argument_its_value_and_the_valid_ones(
    kind: type[Exception], message: str, call: Callable[[], Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(cpu, "_library", [None])
    with pytest.raises(kind, match=message):
        call()


def test_threads_may_call_at_once() -> None:
    code, geometry = Code("int4"), Geometry.of_rows(1, (1 << 18,))
    inputs = [values(geometry.size, seed) for seed in range(4)]
    expected = [reference.quantize([x], geometry, code) for x in inputs]
    found: list[Tensor | None] = [None] * 4

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = cpu.quantize([inputs[index]], geometry, code)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        same(ours, theirs)


# ---- building


@pytest.fixture
def built() -> Path:
    """The library of this machine; to be asked for before `unbuilt`."""
    return cpu_build.build()


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a process that has not loaded the library yet."""
    monkeypatch.setattr(cpu, "_library", [])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "zcompile"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("broken", ["missing", "failing", "not a library"])
def test_without_a_compiler_the_reference_works_and_one_warning_says_so(
    broken: str, unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = {
        "missing": "/nowhere/c++",
        "failing": script(tmp_path / "failing", "echo 'sorry, no vectors' >&2; exit 1"),
        "not a library": script(tmp_path / "empty", "exit 0"),
    }[broken]
    monkeypatch.setenv("CXX", command)
    said = {
        "missing": "no C\\+\\+ compiler: CXX=/nowhere/c\\+\\+",
        "failing": "failing cannot compile cpu.cpp and lossless.cpp: sorry, no vectors",
        "not a library": "cpu-[0-9a-f]+.so",
    }[broken]
    geometry, x = Geometry.of_rows(3, (64, 256)), values(960, 2)
    for code in (Code("int8", 32), Code("int4", 64, "fp32", "stochastic")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compare(x, code, geometry)
        if code.kind == "int8":
            assert [w.category for w in caught] == [RuntimeWarning]
            with pytest.warns(RuntimeWarning, match=said):
                warnings.warn(caught[0].message, stacklevel=1)
        else:
            assert not caught
    mains = [torch.zeros(192), torch.zeros(768)]
    message = cpu.quantize([x], geometry, Code("int8", 32))
    cpu.accumulate(message, 1, mains, geometry, Code("int8", 32))
    same(
        torch.cat([main.view(3, -1) for main in mains], 1).view(-1),
        reference.reduce(message, 1, (), geometry, Code("int8", 32)),
    )


def test_the_first_of_the_usual_compilers_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"g\+\+, c\+\+ and clang\+\+ not found"):
        cpu_build.build()
    script(tmp_path / "clang++", "")
    assert cpu_build._compiler() == [str(tmp_path / "clang++")]
    script(tmp_path / "g++", "")
    assert cpu_build._compiler() == [str(tmp_path / "g++")]
    monkeypatch.setenv("CXX", f"{tmp_path / 'clang++'} -stdlib=libc++")
    assert cpu_build._compiler() == [str(tmp_path / "clang++"), "-stdlib=libc++"]


def test_a_compiler_that_does_not_know_march_native_is_asked_again(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = 'case "$*" in *=native*) exit 1;; *--version*) exit 0;; esac\nfor last; do :; done; echo built > "$last"'
    monkeypatch.setenv("CXX", script(tmp_path / "plain", text))
    target = cpu_build.build()
    assert target.read_text() == "built\n" and target.parent == unbuilt


def test_the_key_changes_with_the_compiler_and_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, new = (script(tmp_path / name, f"echo {name}") for name in ("old", "new"))
    keys = [cpu_build._key([old]), cpu_build._key([new]), cpu_build._key([old, "-m32"])]
    for at, source in enumerate(cpu_build.SOURCES):
        other = tmp_path / source.name
        other.write_text(source.read_text() + "\n")
        with monkeypatch.context() as patch:
            patch.setattr(cpu_build, "SOURCES", (*cpu_build.SOURCES[:at], other, *cpu_build.SOURCES[at + 1 :]))
            keys.append(cpu_build._key([old]))
    monkeypatch.setattr(cpu_build, "_cpu", lambda: ["another model"])
    keys.append(cpu_build._key([old]))
    assert len(set(keys)) == 6


def test_the_cache_is_private_where_inductor_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(cpu_build.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cpu_build._folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    assert cpu_build._folder() == folder
    folder.chmod(0o777)  # others may have put a library there
    other = cpu_build._folder()
    assert other != folder
    shutil.rmtree(other)


def build_and_use(results: Any) -> None:
    cpu._library.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = cpu.quantize([torch.ones(256)], Geometry.of_rows(1, (256,)), Code("int8"))
    results.put(int(message.sum()))


def test_processes_that_start_together_build_once(
    built: Path, unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Eight ranks on one machine: one compiles, the rest wait and load what it made."""
    log = tmp_path / "log"
    text = (
        'case "$*" in *--version*) exit 0;; esac\n'
        f'for last; do :; done; echo build >> {log}; sleep 0.5; cp {built} "$last"'
    )
    monkeypatch.setenv("CXX", script(tmp_path / "slow", text))
    context = multiprocessing.get_context("fork")  # torch is there already
    results = context.SimpleQueue()
    processes = [context.Process(target=build_and_use, args=(results,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [results.get() for _ in processes] == [127 * 256 + 0x3C + 0x01] * 4  # codes of 127, and 1 / 127 in bf16
    assert log.read_text().split() == ["build"]
    assert sorted(path.suffix for path in unbuilt.iterdir()) == [".lock", ".so"]


def test_a_build_that_never_ends_is_not_waited_for(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = tmp_path / "built.so"
    shutil.copy(cpu_build.SOURCES[0], built)
    text = f'case "$*" in *--version*) exit 0;; esac\nfor last; do :; done; cp {built} "$last"'
    monkeypatch.setenv("CXX", script(tmp_path / "copy", text))
    monkeypatch.setattr(cpu_build, "PATIENCE", 0.2)
    unbuilt.mkdir()
    lock = unbuilt / f"cpu-{cpu_build._key(cpu_build._compiler())}.lock"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cpu_build.build().exists()


# ---- the benchmark


def test_the_benchmark_measures_each_way_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    kernel_bench.add_arguments(parser)
    file = tmp_path / "found.json"
    options = ["--elements", "8192", "--repeats", "2", "--no-inductor", "--json", str(file)]
    assert kernel_bench.command(parser.parse_args(options)) == 0
    found = json.loads(file.read_text())
    assert found["cpu"]["compiled"] and found["cpu"]["call_microseconds"] > 0
    rows = found["cpu"]["results"]
    assert len(rows) == 2 * 7 and {row["code"].split("/")[0] for row in rows} == {"int8", "int4"}
    for row in rows:
        assert set(row["ways"]) == {"copy", "clone", "zcompile", "eager"}
        assert row["ways"]["copy"]["of_copy"] == {"min": 1.0, "median": 1.0, "max": 1.0, "best_of_both": 1.0}
        for way in row["ways"].values():
            assert 0 < way["gb_per_s"]["min"] <= way["gb_per_s"]["median"] <= way["gb_per_s"]["max"]
    said = capsys.readouterr().out
    assert "gathered layer" in said and ("GPU: skipped" in said or found["gpu"]["results"])
    assert kernel_bench.command(parser.parse_args(["--elements", "100"])) == 2
    assert "--elements 100: valid: multiples of 256" in capsys.readouterr().out


def test_the_benchmark_fails_on_a_kernel_that_differs() -> None:
    broken = types.SimpleNamespace(**{name: getattr(cpu, name) for name in ("quantize", "reduce", "requantize")})
    broken.quantize_delta, broken.apply_delta = cpu.quantize_delta, cpu.apply_delta
    broken.dequantize = lambda *arguments: cpu.dequantize(*arguments) + 1
    device = torch.device("cpu")
    listed = kernel_operations.operations("int4", 512, device, broken, inductor=False)  # type: ignore[arg-type]
    assert [operation.name for operation in listed if not operation.check()] == ["dequantise"]
    with pytest.raises(RuntimeError, match="dequantise, int4/256/bf16/nearest: the kernels and the reference differ"):
        kernel_bench.measure(listed[1], 1, device)
