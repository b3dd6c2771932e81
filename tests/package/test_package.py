"""What is installed, under which names, and what a run leaves on the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("passes", "kernels")
NOT_OURS = (
    "import importlib.util, pathlib\n"
    "for name in ('passes', 'kernels'):\n"
    "    spec = importlib.util.find_spec(name)\n"
    "    places = [] if spec is None else list(spec.submodule_search_locations or [spec.origin])\n"
    "    assert not any(pathlib.Path(p).resolve().is_relative_to({root!r}) for p in places), (name, places)\n"
)


def python(code: str, *, cwd: Path, executable: str = sys.executable, **environment: str) -> str:
    """Output of `code` in a process of its own, without what pytest put on the module path."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [executable, "-c", code], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*arguments: str, executable: str = sys.executable) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
    command = [sys.executable, "-m", "pip", "--python", executable, "install", *quiet, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def sources(root: Path) -> Counter[str]:
    """Python files that an installation should hold, by the path they are installed at. A new folder under zcompile/
    has to be added to `packages` in pyproject.toml: this is what notices."""
    found = []
    for folder, folders, files in os.walk(root / "zcompile"):  # does not follow the links
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [str(Path(folder, name).relative_to(root)) for name in files if name.endswith(".py")]
    for name in LINKED:
        found += [f"zcompile/{path.relative_to(root)}" for path in (root / name).rglob("*.py")]
    return Counter(found)


def python_files(names: Iterable[str]) -> Counter[str]:
    return Counter(name for name in names if name.endswith(".py"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work tree as a fresh clone has it: setuptools writes beside what it builds."""
    copy = tmp_path_factory.mktemp("clone") / "zcompile"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    return copy


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the unpacked sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_transformers_imports_from_the_repository_root() -> None:
    code = NOT_OURS.format(root=str(ROOT)) + "import transformers.integrations.hub_kernels\n"
    python(code, cwd=ROOT, PYTHONSAFEPATH="1", HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("name", LINKED)
def test_links_of_the_work_tree_are_relative(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: a source distribution holds no links")
    assert os.readlink(ROOT / "zcompile" / name) == f"../{name}"


def test_ruff_sees_each_file_once() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.split()
    files = [Path(name).resolve() for name in listed]
    assert len(files) == len(set(files))
    assert set((ROOT / "passes").glob("*.py")) | {ROOT / "zcompile" / "plan.py"} <= set(files)


def test_installed_backend_is_found_by_name() -> None:
    try:
        distribution("zcompile")
    except PackageNotFoundError:
        pytest.skip("zcompile is not installed in this environment")
    code = (
        "import torch._dynamo.backends.registry as r, zcompile.backend as b\n"
        "for name in ('hierarchical_zero', 'zcompile'):\n"
        "    assert r.lookup_backend(name) is b.hierarchical_zero_backend, name\n"
    )
    python(code, cwd=Path("/"), PYTHONSAFEPATH="1")


def test_make_keeps_caches_in_the_tree() -> None:
    """The variables that `make` exports send every compile cache to build/, and keep the repository off the path."""
    listed = subprocess.run(
        ["make", "--silent", "--eval", "show: ; @env", "show"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    variables = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    assert variables["PYTHONSAFEPATH"] == "1"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HYPOTHESIS_STORAGE_DIRECTORY", "HF_HOME"):
        assert Path(variables[name]).is_relative_to(ROOT / "build"), name


@pytest.mark.slow
def test_compiling_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    code = "import torch, zcompile\nprint(torch.compile(lambda x: x.sin() + 1)(torch.zeros(8)).sum().item())"
    caches = {name: str(cache) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    assert python(code, cwd=tmp_path, HOME=str(home), PYTHONPATH=str(ROOT), **caches).strip() == "8.0"
    assert list(home.rglob("*")) == []
    assert any(cache.rglob("*"))


@pytest.mark.slow
def test_sdist_holds_sources_once(tree: Path, built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive.getmembers() if "/" in member.name}
    assert not any(member.issym() or member.islnk() for member in members.values())
    expected = {str(p.relative_to(tree)) for name in ("zcompile", *LINKED) for p in (tree / name).glob("*.py")}
    assert expected <= set(members)
    assert not [name for name in members if name.startswith(tuple(f"zcompile/{linked}/" for linked in LINKED))]
    assert {"LICENSE", "README.md", "Makefile", "examples/train_gpt.py", "tests/package/test_package.py"} <= set(
        members
    )


@pytest.mark.slow
def test_wheel_from_sdist_holds_each_module_once(tree: Path, built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    assert python_files(names) == sources(tree)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"zcompile"}
    assert {"zcompile/py.typed", "zcompile/debug/web/page.html", "zcompile/debug/web/main.js"} <= set(names)


@pytest.mark.slow
def test_wheel_from_sdist_imports_and_trains(built: tuple[Path, Path], tmp_path: Path) -> None:
    pip("--target", str(tmp_path), str(built[1]))
    code = NOT_OURS.format(root=str(tmp_path)) + (
        "import zcompile, zcompile.passes, zcompile.kernels, zcompile.backend, zcompile.cli\n"
        "import torch._dynamo.backends.registry as registry\n"
        f"for module in (zcompile, zcompile.passes, zcompile.kernels):\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__\n"
        "found = registry.lookup_backend('hierarchical_zero')\n"
        "assert found is zcompile.backend.hierarchical_zero_backend\n"
        "import torch\n"
        "model = zcompile.hierarchical_zero(torch.nn.Linear(4, 3), topology='1x1x1', codegen=False)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.01)\n"
        "losses = []\n"
        "for _ in range(3):\n"
        "    loss = model(torch.ones(2, 4)).square().sum()\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "    losses.append(loss.item())\n"
        "assert losses[2] < losses[1] < losses[0], losses\n"
        "assert [p.stage for p in model.zero.programs] == ['forward', 'backward']\n"
    )
    python(code, cwd=tmp_path.parent, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")


@pytest.mark.slow
def test_editable_install_serves_the_work_tree(tree: Path, tmp_path: Path) -> None:
    """In an environment of its own, which sees this one's packages by a path file, but not its editable zcompile."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=120)
    executable = str(tmp_path / "venv" / "bin" / "python")
    here, there = (
        subprocess.run(
            [run, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for run in (sys.executable, executable)
    )
    Path(there, "others.pth").write_text(here + "\n")
    pip("--no-build-isolation", "--editable", str(tree), executable=executable)
    code = NOT_OURS.format(root=str(tree)) + (
        "import zcompile, zcompile.passes, zcompile.kernels, pathlib\n"
        f"tree = pathlib.Path({str(tree)!r}).resolve()\n"
        "assert pathlib.Path(zcompile.__file__).resolve().parent == tree / 'zcompile'\n"
        "assert pathlib.Path(zcompile.passes.__file__).resolve().parent == tree / 'passes'\n"
        "assert pathlib.Path(zcompile.kernels.__file__).resolve().parent == tree / 'kernels'\n"
    )
    python(code, cwd=tree, executable=executable, PYTHONSAFEPATH="1")
