"""Cases of a parametrised test that the quick suite leaves out."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One case, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


TWO = pytest.mark.parametrize("mode", ["eager", slow("graph")])
"""In eager torch and through the passes: a compile takes each rank a second or more."""
