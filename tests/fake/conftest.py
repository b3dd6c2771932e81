"""One process of its own for tests on fake process groups: `paper.run(fn)` calls fn(0) in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.spawn import Pool


@pytest.fixture(scope="session")
def paper() -> Iterator[Pool]:
    pool = Pool(1, backend=None)
    yield pool
    pool.close()
