"""Every kernel variant under Triton's own interpreter, in a process of its own: it must be asked for before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from zcompile.kernels.catalogue import catalogue

SCRIPT = """
import sys
from zcompile.kernels import gpu
from zcompile.kernels.catalogue import catalogue
begin, *seeds = map(int, sys.argv[1:])
for variant in catalogue()[begin::2]:
    for seed in seeds:
        case = variant.make("", seed=seed)
        gpu.run(case.call)
        print(f"{variant.name}|{seed}|{case.wrong()}")
"""


def interpreted(*seeds: int, script: str = SCRIPT) -> dict[tuple[str, int], str]:
    """(variant, seed) -> what differs from the reference, "" if nothing does. Two processes, each with half of the variants."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    halves = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(begin), *map(str, seeds)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for begin in (0, 1)
    ]  # fmt: skip
    lines = []
    try:
        for half in halves:
            shown, error = half.communicate(timeout=600)
            assert half.returncode == 0, error
            lines += [line.split("|", 2) for line in shown.splitlines()]
    finally:
        for half in halves:
            half.kill()
            half.wait()
    return {(name, int(seed)): wrong for name, seed, wrong in lines}


@pytest.mark.slow
def test_every_variant_equals_the_reference() -> None:
    found = interpreted(1)
    assert set(found) == {(variant.name, 1) for variant in catalogue()}
    assert not {key: wrong for key, wrong in found.items() if wrong}


def test_a_few_equal_the_reference_and_a_changed_scale_does_not() -> None:
    few = SCRIPT.replace(
        "in catalogue()", "in [v for v in catalogue() if v.name in ('quantize bf16 int8', 'dequantize bf16 int4')]"
    )
    assert few != SCRIPT
    broken = "\n        if seed == 4:\n            case.wanted[0][0][:64] += 1"
    found = interpreted(3, 4, script=few.replace("gpu.run(case.call)", f"gpu.run(case.call){broken}"))
    assert len(found) == 4
    assert all("differ" in wrong if seed == 4 else not wrong for (_, seed), wrong in found.items())
