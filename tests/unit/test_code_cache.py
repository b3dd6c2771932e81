"""Which errors are taken for those of the cache: a library in it that cannot be loaded, and not one of the code generator's own."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from zcompile import code_cache


class Wrapped(RuntimeError):
    """As Inductor's own error, which holds what a backend raised."""

    def __init__(self, inner: BaseException) -> None:
        super().__init__(str(inner))
        self.inner_exception = inner


def extension(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "cut", path, loader=importlib.machinery.ExtensionFileLoader("cut", str(path))
    )
    assert spec is not None
    importlib.util.module_from_spec(spec)


def library(path: Path) -> None:
    ctypes.CDLL(str(path))


def no_compiler(path: Path) -> None:
    os.execv(path / "no-compiler", ["no-compiler"])


def generating(path: Path) -> None:
    raise ValueError("no such lowering")


@pytest.mark.parametrize(
    ("load", "again"), [(extension, True), (library, True), (no_compiler, False), (generating, False)]
)
def test_a_library_that_was_cut_short_is_made_again(
    load: Callable[[Path], None],
    again: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """F6: by whoever was killed while it wrote; there is no entry of the graph, so Inductor counts a miss."""
    monkeypatch.setenv(code_cache.FOLDER, str(tmp_path))
    misses, tries = [0], [0]
    monkeypatch.setattr(code_cache, "code_cache_misses", lambda: misses[0])
    (tmp_path / "cut.so").write_bytes(b"")

    def make() -> str:
        misses[0] += 1
        tries[0] += 1
        if tries[0] == 1:
            try:
                load(tmp_path / "cut.so")
            except Exception as error:
                raise Wrapped(error) from error
        return "made"

    if again:
        assert code_cache.loaded_or_made(make) == "made" and tries == [2]
        assert "has an entry that cannot be loaded" in capfd.readouterr().err
        assert os.environ[code_cache.FOLDER] != str(tmp_path)
    else:
        with pytest.raises(Wrapped):
            code_cache.loaded_or_made(make)
        assert tries == [1] and os.environ[code_cache.FOLDER] == str(tmp_path)
