"""Would the tests notice a wrong kernel? Instructions of the compiled text are deleted one by one, and the cases are run.

At least nine in ten deletions change a result. Those that do not are listed by what they are, each with the reason why nothing can be seen;
an instruction that survives for no listed reason fails the test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from amdgcn import mutate
from support.faulty import chosen
from support.kernel_runs import arguments, compiled
from support.spawn import side_by_side

from zcompile.kernels.catalogue import (
    Case,
    delta_case,
    dequantize_case,
    flat,
    quantize_case,
    reduce_case,
    requantize_case,
)
from zcompile.kernels.code import Code

ARCH, SEEDS = "gfx90a", (0, 1, 2, 3)
INT8, INT4 = Code("int8"), Code("int4")
ROWS = flat(256, rows=1)

REASONS = {
    r"v_(fmac|fma|mul|div_fixup)_f32": "a step of the division's refinement, whose correction is below a rounding for these quotients",
    r"v_mov_b32_e32 v\d+, 0x7f000000": "stands in for the absmax of a block that gets no codes: what is computed of it is masked",
    r"v_bfrev_b32_e32 v\d+, 1": "-0, to which a masked sum is set: no lane of a whole block is masked",
    r"v_and_b32_e32 v\d+, 0x7fffffff": "an absolute value of what is not negative in these blocks",
    r"v_cmp_gt_i64_e(32|64) (vcc|s\[\d+:\d+\]), s\[\d+:\d+\], v\[\d+:\d+\]": (
        "a mask at the end of a tile: a row is whole blocks here, so what stood in its place has the same lanes"
    ),
    r"v_or_b32_e32 v\d+, 0x88": "the offset of nibbles that the comparison after it overwrites",
    r"[sv]_and_b32(_e32)? [sv]\d+, (0xffff, v|s)\d+(, 0xffff)?": "cuts an address to the 48 bits of a descriptor: no buffer lies above",
    r"[sv]_mov_b32(_e32)? [sv]\d+, (0x27000|s\d+)": "the flags of a buffer descriptor, which the interpreter checks by its own bounds",
    r"v_(ashrrev_i32_e32 v\d+, 31|add_u32_e32 v\d+, 0), v\d+": "the upper half of a small index, or an addition of zero",
    r"s_addc_u32": "the carry into an address whose lower half does not overflow for the first part",
    r"(s_and_b64|s_mov_b64|s_and_saveexec_b64|v_readfirstlane_b32|v_cmp_eq_u64_e64)": (
        "the loop over the lanes' descriptors: all lanes have one, so it runs once whatever its masks say"
    ),
}
"""The text of a surviving instruction, by pattern -> why it is equivalent, or equivalent on what the cases can hold."""


@dataclass(frozen=True)
class Kernel:
    """What is mutated. every: one instruction in so many. seeds: of the cases beside SEEDS, for what few blocks have (a largest value of
    either sign at every place)."""

    make: Callable[[int], Case]
    every: int = 1
    seeds: tuple[int, ...] = ()


KERNELS = {
    "dequantize int8": Kernel(lambda seed: dequantize_case(INT8, ROWS, torch.bfloat16, ARCH, seed=seed)),
    "quantize int8": Kernel(lambda seed: quantize_case(INT8, ROWS, torch.bfloat16, ARCH, seed=seed), 2),
    "quantize delta int4": Kernel(lambda seed: delta_case(INT4, ROWS, torch.bfloat16, ARCH, seed=seed), 3),
    "accumulate int4": Kernel(lambda seed: reduce_case(INT4, ROWS, ARCH, parts=2, into_mains=True, seed=seed), 3),
    "requantize int8 to int4": Kernel(lambda seed: requantize_case(INT8, INT4, ROWS, ARCH, parts=2, seed=seed), 3),
    "requantize int4": Kernel(
        lambda seed: requantize_case(INT4, INT4, ROWS, ARCH, parts=2, seed=seed), 3, tuple(range(20, 60))
    ),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(KERNELS)[1:]]


def mutated(name: str) -> mutate.Report:
    kernel = KERNELS[name]
    call = kernel.make(0).call
    cases = [
        mutate.Case(f"seed {seed}", call.grid, lambda seed=seed: arguments(kernel.make(seed)), seed)
        for seed in (*SEEDS, *kernel.seeds)
    ]
    return mutate.delete_each(compiled(call, ARCH), cases, every=kernel.every)


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> dict[str, mutate.Report]:
    return side_by_side(mutated, chosen(request, "name"))


@pytest.mark.parametrize("name", [next(iter(KERNELS)), *SLOW])
def test_nine_in_ten_deletions_are_noticed(reports: dict[str, mutate.Report], name: str) -> None:
    report = reports[name]
    lines = [f"{survivor} - {reason(survivor.text)}" for survivor in report.survivors]
    print(f"{name}: {report.rate:.1%} of {report.tried} noticed", *lines, sep="\n")
    assert report.tried > 60 and report.rate >= 0.9, "\n".join(lines)
    assert not [survivor for survivor in report.survivors if not reason(survivor.text)], "\n".join(lines)


def reason(text: str) -> str:
    """Why the deletion of an instruction cannot be seen, "" if it should be."""
    return next((why for pattern, why in REASONS.items() if re.match(pattern, text)), "")
