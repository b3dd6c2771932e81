"""Makes `tests/support` importable as `support`, and hands out ranks that live as long as the test session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Inductor tries in each process by compiling and loading whether the vectors that the processor says it has can be used: a second each.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # before torch is imported, which is when it is read
# torch keeps the Python stacks of a process's last 2,000 collectives, and with them the code on these, its graphs and their models: of some
# hundred tests in ranks that live as long as the session.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")

from support.spawn import Pool

# How long an example takes says something of the machine, which others may use too, and nothing of the code.
hypothesis.settings.register_profile("zcompile", deadline=None)
hypothesis.settings.load_profile("zcompile")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """`ranks(4)`: a pool of 4 gloo ranks, shared by all tests that ask for 4."""
    pools: dict[int, Pool] = {}

    def pool(world: int) -> Pool:
        return pools.setdefault(world, Pool(world))

    yield pool
    for made in pools.values():
        made.close()
