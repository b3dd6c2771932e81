"""The shared library of the CPU kernels: `cpu.cpp` and `lossless.cpp` as the machine's C++ compiler makes it, once, kept in a cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.cpp", "lossless.cpp"))
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared",
    "-ffp-contract=off",  # a fused multiply-add rounds once where the reference rounds twice
    "-fno-math-errno", "-fno-trapping-math",  # nobody reads errno or the exception flags; no value changes
)  # fmt: skip
NATIVE = ("-march=native", "-mcpu=native", "")
"""Tried in this order: which of them a compiler knows depends on the architecture."""
PATIENCE = 300.0
"""Seconds that a process waits for another one's build before it builds for itself. A build takes a few, on an idle machine."""


def build() -> Path:
    """The shared library, from the cache or built now. Several processes may call this at once: one builds, the others wait for it.

    Raises:
        RuntimeError: no compiler, or one that fails, with what it said.
        OSError: no folder to write to.
    """
    compiler = _compiler()
    folder = _folder()
    target = folder / f"cpu-{_key(compiler)}.so"
    if target.exists():
        return target
    with _turn(target.with_suffix(".lock")):
        if not target.exists():
            _compile(compiler, target)
    return target


def _compiler() -> list[str]:
    """The command that Inductor would use too: CXX, or the first of the usual names."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["c++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise RuntimeError(f"no C++ compiler: {f'CXX={asked[0]}' if asked else 'g++, c++ and clang++'} not found on PATH")


def _folder() -> Path:
    """Where the library is kept; it is code that will run, so a folder in a place that all may write to must be ours."""
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(given) / "zcompile"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()) / f"zcompile_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="zcompile_"))
    return folder


def _key(compiler: Sequence[str]) -> str:
    """Hash of all that the bytes of the library depend on: -march=native is another thing on another CPU."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = [*(source.read_text() for source in SOURCES), *FLAGS, *NATIVE, *compiler, version, platform.machine(), *_cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu() -> list[str]:
    """Model and features of the first CPU, as Linux prints them; none elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return []
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return [line for line in first.splitlines() if line.split("\t")[0].strip(" :") in names]


def _compile(compiler: Sequence[str], target: Path) -> None:
    """Compile to a name of its own, then rename: nobody ever loads half a file."""
    said = ""
    for native in NATIVE:
        handle, name = tempfile.mkstemp(prefix=target.stem, suffix=".tmp", dir=target.parent)
        os.close(handle)
        try:
            command = [*compiler, *FLAGS, *([native] if native else []), *map(str, SOURCES), "-o", name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
            if done.returncode == 0:
                os.chmod(name, 0o700)
                os.replace(name, target)
                return
            said = done.stderr.strip() or said
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    raise RuntimeError(f"{shlex.join(compiler)} cannot compile {' and '.join(source.name for source in SOURCES)}: {said[:500]}")


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process at a time; after PATIENCE, or where files cannot be locked, go on regardless (the rename is atomic)."""
    with open(path, "w") as file:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the kernel if its holder dies
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
