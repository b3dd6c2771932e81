"""The lossless delta's Triton kernels, interpreted by Triton and as machine code of AMD's GPUs: bytes and bits as on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from amdgcn.launch import launch
from support.lossless import masters_and_old
from torch import Tensor

from zcompile.kernels import lossless, triton_lossless
from zcompile.kernels.aot import Compiled, compile_kernel
from zcompile.kernels.code import lossless_bytes

TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8"}
CASES = {"one": ([3000], 0.02), "several": ([1, 5000, 17, 2048], 0.02), "none moved far": ([2100], 0.0), "no room": ([2500], 0.5)}


def values(sizes: list[int], seed: int, far: float) -> tuple[Tensor, list[Tensor]]:
    """(masters side by side, what the others have)."""
    master, old = masters_and_old(sizes, seed, far)
    master[0], master[-1] = float("nan") if far else 0.5, -0.0
    old[0] = master[0]
    return master, list(old.split(sizes))


def compare(sizes: list[int], far: float, rows: int = 2) -> str:
    """What differs from the torch operations; "" if nothing does."""
    sent, before, fits = [], [], True
    for row in range(rows):
        master, old = values(sizes, row, far)
        mine, theirs = (torch.full((sum(map(lossless_bytes, sizes)),), 0xAB, dtype=torch.uint8) for _ in range(2))
        fit = bool(triton_lossless.encode(master, old, mine))
        if fit != bool(lossless._encode(master, old, theirs)) or not torch.equal(mine, theirs):
            return f"the message of row {row} differs"
        sent.append(mine)
        before.append(old)
        fits &= fit
    found, wanted = ([torch.stack(parts) for parts in zip(*before, strict=True)] for _ in range(2))
    message = torch.cat(sent)
    right = [bool(same) for same in triton_lossless.decode(message, found)]
    if right != [bool(same) for same in lossless._decode(message, wanted)] or all(right) != fits:
        return f"which parameters are right differs: {right}"
    if fits and not all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found, wanted, strict=True)):
        return "values differ"
    other = [torch.stack(parts) for parts in zip(*before, strict=True)]
    other[-1][1, 0] = 5.0
    return "" if not bool(triton_lossless.decode(message, other)[-1]) else "values that are not the sender's are taken for right"


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
from test_lossless_triton import CASES, compare
for name, case in CASES.items():
    print(f"{name}|{compare(*case)}")
"""


def test_under_the_interpreter() -> None:
    """In a process of its own: it must be asked for before Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    tests = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-c", SCRIPT, tests, os.path.dirname(__file__)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert dict(line.split("|") for line in done.stdout.splitlines()) == dict.fromkeys(CASES, "")


@cache
def compiled(kernel: Any, arch: str) -> Compiled:
    names = [name for name in kernel.arg_names if name != "BLOCK"]
    pointers = {"master": "*fp32", "old": "*i16", "values": "*i16", "message": "*i8", "counts": "*i32", "sums": "*i32", "ends": "*i32"}
    signature = {name: pointers.get(name, "i32") for name in names}
    constants = {"BLOCK": triton_lossless.BLOCK}
    return compile_kernel(kernel, signature, constants, arch, warps=triton_lossless.WARPS, stages=1)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("arch", ["gfx90a", pytest.param("gfx942", marks=SLOW), pytest.param("gfx950", marks=SLOW)])
@pytest.mark.parametrize("name", CASES)
def test_as_machine_code(monkeypatch: pytest.MonkeyPatch, name: str, arch: str) -> None:
    def run(kernel: Any, grid: tuple[int, ...], **arguments: Tensor | int) -> None:
        code = compiled(kernel, arch)
        for key, value in arguments.items():
            assert not isinstance(value, Tensor) or code.signature[key] == TYPES[value.dtype]
        launch(code, grid, [arguments[key] for key in code.signature])

    monkeypatch.setattr(triton_lossless, "run", run)
    assert compare(*CASES[name]) == ""


@pytest.mark.parametrize("arch", ["gfx90a", "sm_90"])
def test_it_compiles_without_spilling(arch: str) -> None:
    for kernel in (
        triton_lossless.encode_kernel,
        triton_lossless.exceptions_kernel,
        triton_lossless.look_kernel,
        triton_lossless.decode_kernel,
    ):
        facts = compiled(kernel, arch).facts()
        assert not facts.spills and not facts.scratch, kernel.__name__
