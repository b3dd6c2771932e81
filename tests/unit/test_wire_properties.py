"""Properties of the quantised wire format over random shapes, spans, blocks, dtypes and data: docs/wire-format.md, restated here.

`check` reads a message with numpy from the description of its bytes alone; it shares no code with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zcompile.kernels import cpu, reference
from zcompile.kernels.code import Code
from zcompile.kernels.geometry import Geometry, Piece

DTYPES = (torch.float32, torch.bfloat16)
SPECIAL = (
    0.0, -0.0, math.nan, math.inf, -math.inf, 2.0**-149, -(2.0**-130), 2.0**-81, 2.0**-80, 1.0, -1.0, 0.5, 127.0, 63.5,
    3.3895313892515355e38, -3.4028234663852886e38, 1e-30,
)  # fmt: skip
TOP = {"int8": 127, "int4": 7}

quick = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.data_too_large]
)


# ---- the check


@dataclass
class Record:
    """One parameter of one row, as its bytes say. codes: [blocks, block]; scales: [blocks] in float64; padding: bytes."""

    codes: np.ndarray
    scales: np.ndarray
    padding: np.ndarray

    @property
    def values(self) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            return (self.codes.astype(np.float32) * self.scales[:, None].astype(np.float32)).astype(np.float64)


def records(message: np.ndarray, geometry: Geometry, code: Code) -> list[list[Record]]:
    """Row by row, parameter by parameter."""
    found, at = [], 0
    for _ in range(geometry.rows):
        row = []
        for piece in geometry.pieces:
            blocks, begin = piece.n // code.block, at
            size = piece.n if code.kind == "int8" else piece.n // 2
            raw = message[at : at + size].reshape(blocks, -1)
            codes = (
                raw.view(np.int8)
                if code.kind == "int8"
                else np.concatenate((raw & 15, raw >> 4), 1).astype(np.int8) - 8
            )
            at += size
            width = 2 if code.scale == "bf16" else 4
            scales = message[at : at + blocks * width].copy()
            wide = (scales.view("<u2").astype("<u4") << 16) if width == 2 else scales.view("<u4")
            at += blocks * width
            end = begin + -(-(at - begin) // 16) * 16
            row.append(Record(codes, wide.view("<f4").astype(np.float64), message[at:end]))
            at = end
        found.append(row)
    assert at == len(message), f"the message has {len(message)} bytes, the geometry {at}"
    return found


def check(x: np.ndarray, record: Record, code: Code) -> None:
    """Invariant 10 for the values [blocks, block] of one record; AssertionError says which block and value breaks it."""
    top = TOP[code.kind]
    assert np.abs(record.codes).max(initial=0) <= top, "a code that is never sent"
    assert not record.padding.any(), "padding that is not zeros"
    bound = (0.5 if code.rounding == "nearest" else 1.0) + top * 2.0**-22
    for index, (values, scale, codes, seen) in enumerate(
        zip(x, record.scales, record.codes, record.values, strict=True)
    ):
        if not np.isfinite(values).all():
            assert np.isnan(scale) and np.isnan(seen).all() and not codes.any(), (
                f"block {index} hides what is not finite"
            )
            continue
        amax = np.abs(values).max()
        if amax < 2.0**-80:
            assert scale == 0 and not codes.any(), f"block {index} is to be zeros"
            continue
        precision = 2.0**-8 if code.scale == "bf16" else 2.0**-24
        assert abs(scale - amax / top) <= amax / top * precision * 1.000001, (
            f"block {index}: scale {scale}, amax {amax}"
        )
        assert not codes[values == 0].any(), f"block {index}: a zero that does not stay zero"
        with np.errstate(invalid="ignore"):
            error = np.abs(codes * scale - values)
        worst = error.argmax()
        assert error[worst] <= bound * scale, f"block {index}, value {worst}: off by {error[worst] / scale} scales"


def rows_of(xs: Sequence[Tensor], geometry: Geometry) -> list[list[np.ndarray]]:
    """The values [n] of each record, with zeros where a row has fewer, in float64."""
    found = []
    for row in range(geometry.rows):
        line = []
        for index, piece in enumerate(geometry.pieces):
            if geometry.flat:
                begin = row * geometry.width + geometry.starts[index]
                line.append(xs[0][begin : begin + piece.n].double().numpy())
            else:
                start, valid = piece.span(row)
                line.append(np.pad(xs[index][start : start + valid].double().numpy(), (0, piece.n - valid)))
        found.append(line)
    return found


def check_message(message: Tensor, xs: Sequence[Tensor], geometry: Geometry, code: Code) -> None:
    for line, row in zip(rows_of(xs, geometry), records(message.numpy(), geometry, code), strict=True):
        for values, record in zip(line, row, strict=True):
            check(values.reshape(-1, code.block), record, code)


# ---- what is drawn

codes = st.builds(
    Code,
    st.sampled_from(("int8", "int4")),
    st.sampled_from((32, 64, 256, 1024, 2048)),
    st.sampled_from(("bf16", "fp32")),
    st.sampled_from(("nearest", "stochastic")),
)


@st.composite
def flats(draw: st.DrawFn, block: int) -> Geometry:
    return Geometry.of_rows(
        draw(st.integers(1, 4)), tuple(draw(st.lists(st.integers(1, 3).map(block.__mul__), min_size=1, max_size=4)))
    )


@st.composite
def wholes(draw: st.DrawFn, block: int) -> Geometry:
    """Shards of parameters of any size, or any spans of them."""
    rows, pieces = draw(st.integers(1, 4)), []
    for _ in range(draw(st.integers(1, 4))):
        n = block * draw(st.integers(1, 2))
        if draw(st.booleans()):
            numel = draw(st.integers(1, rows * n))
            spans = [(r * n, min(max(numel - r * n, 0), n)) for r in range(rows)]
        else:
            numel = draw(st.integers(1, 3 * n))
            spans = []
            for _ in range(rows):
                valid = draw(st.integers(0, min(n, numel)))
                spans.append((draw(st.integers(0, numel - valid)), valid))
        pieces.append(Piece(n, numel, tuple(spans)))
    return Geometry(rows, tuple(pieces), False)


@st.composite
def tensors(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    """Numbers of one magnitude or of many, and a few special ones at random places."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(size, generator=generator)
    low = draw(st.integers(-90, 100))
    spread = draw(st.sampled_from((0, 0, 3, 20)))
    x *= torch.exp2(low + torch.randint(0, spread + 1, (size,), generator=generator).float())
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        x[draw(st.integers(0, size - 1))] = value
    if draw(st.booleans()):  # a block or more of one value
        begin = draw(st.integers(0, size - 1))
        x[begin : begin + draw(st.integers(1, 5000))] = draw(st.sampled_from(SPECIAL))
    return x.to(dtype)


@dataclass
class Case:
    code: Code
    geometry: Geometry
    xs: list[Tensor]


@st.composite
def cases(draw: st.DrawFn, flat: bool | None = None) -> Case:
    code = draw(codes)
    if draw(st.booleans()) if flat is None else flat:
        geometry = draw(flats(code.block))
        sizes = [geometry.size]
    else:
        geometry = draw(wholes(code.block))
        sizes = [piece.numel for piece in geometry.pieces]
    dtype = draw(st.sampled_from(DTYPES))
    return Case(code, geometry, [draw(tensors(size, dtype)) for size in sizes])


def same(ours: Tensor, theirs: Tensor) -> None:
    """Bit for bit, but for the payloads of NaNs."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    bits = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    assert torch.equal(ours.view(bits)[~nan], theirs.view(bits)[~nan])


# ---- the properties


@quick
@given(cases())
def test_invariant_10_error_within_half_a_scale_zeros_stay_and_bad_blocks_are_nan(case: Case) -> None:
    check_message(cpu.quantize(case.xs, case.geometry, case.code), case.xs, case.geometry, case.code)


@quick
@given(cases(), st.sampled_from(DTYPES))
def test_cpu_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    code, geometry = case.code, case.geometry
    message = cpu.quantize(case.xs, geometry, code)
    assert torch.equal(message, reference.quantize(case.xs, geometry, code))
    ours, theirs = (module.dequantize(message, geometry, code, dtype) for module in (cpu, reference))
    covered = torch.zeros(geometry.size, dtype=torch.bool)
    for index, piece in enumerate(geometry.pieces):
        for row in range(geometry.rows):
            start, valid = piece.span(row)
            begin = row * geometry.width + geometry.starts[index] if geometry.flat else geometry.starts[index] + start
            covered[begin : begin + valid] = True
    same(ours[covered], theirs[covered])


@quick
@given(st.data(), cases(flat=True), st.integers(1, 9), st.booleans())
def test_cpu_sums_equal_the_reference(data: st.DataObject, case: Case, parts: int, adding: bool) -> None:
    code, geometry = case.code, case.geometry
    drawn = [
        cpu.quantize([data.draw(tensors(geometry.size, torch.float32))], geometry, code) for _ in range(min(parts, 3))
    ]
    message = torch.cat([drawn[part % len(drawn)] for part in range(parts)])
    sizes = [geometry.rows * piece.n for piece in geometry.pieces] if adding else []
    mains = [data.draw(tensors(size, torch.float32)) for size in sizes]
    total = reference.reduce(message, parts, mains, geometry, code)
    same(cpu.reduce(message, parts, mains, geometry, code), total)
    into = Code(data.draw(st.sampled_from(("int8", "int4"))), data.draw(st.sampled_from((32, code.block))))
    theirs = reference.requantize(message, parts, geometry, code, into)
    assert torch.equal(cpu.requantize(message, parts, geometry, code, into), theirs)
    if adding:
        cpu.accumulate(message, parts, mains, geometry, code)
        columns = total.view(geometry.rows, -1).split([piece.n for piece in geometry.pieces], dim=1)
        for main, column in zip(mains, columns, strict=True):
            same(main, column.reshape(-1))


@quick
@given(st.data(), cases(flat=True), st.sampled_from(DTYPES))
def test_cpu_deltas_equal_the_reference(data: st.DataObject, case: Case, dtype: torch.dtype) -> None:
    code, geometry, x = case.code, case.geometry, case.xs[0].float()
    image = (
        (x + data.draw(tensors(geometry.size, torch.float32))).to(dtype) if data.draw(st.booleans()) else x.to(dtype)
    )
    message = cpu.quantize_delta(x, image, geometry, code)
    assert torch.equal(message, reference.quantize_delta(x, image, geometry, code))
    check_message(message, [x - image.float()], geometry, code)
    ours, theirs = image.clone(), image.clone()
    cpu.apply_delta(ours, message, geometry, code)
    reference.apply_delta(theirs, message, geometry, code)
    same(ours, theirs)


@quick
@given(st.data(), cases(flat=False))
def test_tails_never_leak(data: st.DataObject, case: Case) -> None:
    """What lies outside the spans changes no byte; what the padding of a message says changes no value."""
    code, geometry = case.code, case.geometry
    message = cpu.quantize(case.xs, geometry, code)
    poisoned = []
    for piece, x in zip(geometry.pieces, case.xs, strict=True):
        outside = torch.ones(piece.numel, dtype=torch.bool)
        for start, valid in piece.spans:
            outside[start : start + valid] = False
        poisoned.append(torch.where(outside, data.draw(st.sampled_from((math.nan, 3e38, 1.0))), x).to(x.dtype))
    assert torch.equal(message, cpu.quantize(poisoned, geometry, code))

    spoiled, at = message.clone(), geometry.records(code)
    for row in range(geometry.rows):
        for index, piece in enumerate(geometry.pieces):
            begin = row * at[-1] + at[index]
            spoiled[
                begin + code.code_bytes(piece.n) + code.scale_bytes(piece.n) : begin + at[index + 1] - at[index]
            ] = 255
            first = -(-piece.span(row)[1] // code.block)  # the first block without a value
            spoiled[begin + code.code_bytes(first * code.block) : begin + code.code_bytes(piece.n)] = 255
    values, others = (cpu.dequantize(m, geometry, code, torch.float32) for m in (message, spoiled))
    for piece, begin in zip(geometry.pieces, geometry.starts, strict=False):
        for start, valid in piece.spans:
            span = slice(begin + start, begin + start + valid)
            same(values[span], others[span])


# ---- the check itself


def drop_scale(message: Tensor, code: Code, n: int) -> None:
    """As if the second block's scale had not been sent: the rest move up."""
    begin, end = code.code_bytes(n), code.code_bytes(n) + code.scale_bytes(n)
    width = code.scale_bytes(code.block)
    message[begin + width : end - width] = message[begin + 2 * width : end].clone()
    message[end - width : end] = 0


def shift_nibble(message: Tensor, code: Code, n: int) -> None:
    """Codes half a byte late."""
    raw = message[: code.code_bytes(n)]
    raw.copy_(raw << 4 | raw.roll(1) >> 4)


def swap_halves(message: Tensor, code: Code, n: int) -> None:
    """The high nibble first, or neighbouring codes exchanged."""
    raw = message[: code.code_bytes(n)]
    raw.copy_(raw << 4 | raw >> 4 if code.kind == "int4" else raw.view(-1, 2).flip(1).reshape(-1))


def one_code(message: Tensor, code: Code, n: int) -> None:
    """One code off by one; whichever way, that is more than half a scale."""
    message[3] += 1 if message[3] & 15 < 15 else -1


def dirty_padding(message: Tensor, code: Code, n: int) -> None:
    message[-1] = 1


@pytest.mark.parametrize("corrupt", [drop_scale, shift_nibble, swap_halves, one_code, dirty_padding])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("scale", ["bf16", "fp32"])
def test_the_check_fails_on_corrupted_messages(
    corrupt: Callable[[Tensor, Code, int], None], kind: str, scale: str
) -> None:
    code, n = Code(kind, 64, scale), 64 * 5
    geometry = Geometry.of_rows(1, (n,))
    x = torch.randn(n, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 6).repeat_interleave(64)
    message = cpu.quantize([x], geometry, code)
    check_message(message, [x], geometry, code)
    corrupt(message, code, n)
    with pytest.raises(AssertionError):
        check_message(message, [x], geometry, code)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_check_fails_on_a_hidden_nan(bad: float) -> None:
    code, geometry = Code("int8", 64), Geometry.of_rows(1, (64,))
    x = torch.ones(64)
    message = cpu.quantize([x], geometry, code)
    x[5] = bad
    with pytest.raises(AssertionError, match="hides"):
        check_message(message, [x], geometry, code)


@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
def test_a_message_byte_by_byte(module: ModuleType) -> None:
    """Two rows of one int4 record: -7 .. 7 around a scale of 1, half-block packing, bf16 scale, zeros to 32 bytes."""
    code, geometry = Code("int4", 32), Geometry.of_rows(2, (32,))
    row = torch.tensor([(i % 15) - 7.0 for i in range(16)] + [7.0 - (i % 15) for i in range(16)])
    expected = [(i % 15 + 1) | (15 - i % 15) << 4 for i in range(16)] + [0x80, 0x3F] + [0] * 14
    message = module.quantize([torch.cat((row, 2 * row))], geometry, code)
    assert message.tolist() == expected + expected[:16] + [0x00, 0x40] + [0] * 14
    code, geometry = Code("int8", 32, "fp32"), Geometry.of_rows(1, (32,))
    message = module.quantize([torch.cat((row[:16] / 7 * 127, -row[:16] / 7 * 127)) * 0.5], geometry, code)
    codes = [round((i % 15 - 7) / 7 * 127) for i in range(16)]
    assert message.view(torch.int8).tolist() == [*codes, *(-c for c in codes), 0, 0, 0, 0x3F, *[0] * 12]
