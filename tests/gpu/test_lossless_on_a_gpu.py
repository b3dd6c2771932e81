"""The lossless delta on a GPU: the message and the weights of a CPU, and a device that says so where values are not the sender's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.lossless import masters_and_old

from zcompile.kernels import lossless
from zcompile.kernels.code import lossless_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device, and there is none"),
]
SIZES = [5000, 17, 1 << 16]


@pytest.mark.parametrize("far", [0.0, 0.02, 0.5])
def test_the_bytes_and_the_bits_of_a_cpu(far: float) -> None:
    master, old = masters_and_old(SIZES, 0, far)
    master[:3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    found = []
    for device in ("cpu", "cuda"):
        message = torch.empty(sum(map(lossless_bytes, SIZES)), dtype=torch.uint8, device=device)
        parts = list(old.to(device).split(SIZES))
        fits = bool(lossless.encode(master.to(device), parts, message))
        if fits:
            lossless.decode(message, [part.view(1, -1) for part in parts])
        found.append((fits, message.cpu(), torch.cat(parts).cpu().view(torch.int16)))
    assert found[0][0] == found[1][0] == (far < 0.1)
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])


def test_values_that_are_not_the_senders_end_the_process() -> None:
    """A failed assertion of the device leaves no use for its context: in a process of its own."""
    text = """
import torch
from zcompile.kernels import lossless
from zcompile.kernels.code import lossless_bytes
old = torch.zeros(4096, dtype=torch.bfloat16, device="cuda")
message = torch.empty(lossless_bytes(4096), dtype=torch.uint8, device="cuda")
assert bool(lossless.encode(old.float(), [old], message))
lossless.decode(message, [(old + 1).view(1, -1)])
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode and "assert" in done.stderr
