"""What the doctor looks at: what each rank says of itself and of its host. Collected in a job, or read back from a file.

A recording is plain JSON, so that a job on a machine that one cannot reach can be judged where one sits, and that recorded jobs are
tests: `zcompile doctor --record FILE` writes it, `zcompile doctor --recording FILE` reads it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zcompile.discovery import gcd_pairs

_WANTED = re.compile(
    r"^(NCCL|RCCL|FI|HSA|MIOPEN|ROCR|HIP|CUDA|GPU|SLURM|TORCH|PYTORCH|GLOO|TRITON|OMP|LMOD|CXI|MPICH|AWS_OFI|ZCOMPILE)_"
    r"|^(LD_LIBRARY_PATH|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|MASTER_PORT)$"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY|JWT", re.IGNORECASE)
_PLUGINS = ("librccl-net*.so*", "libnccl-net*.so*")


@dataclass(frozen=True)
class Seat:
    """One rank: where it runs and what it may use. `cpus` as in taskset, "1-7,65-71"; `pci` of its device, "" without one."""

    rank: int
    host: str
    local_rank: int
    cpus: str
    pci: str = ""
    visible: int = 0


@dataclass(frozen=True)
class Host:
    """One node: network interfaces, table of MI250X pairs, network plugins found, file systems of the caches ("lustre", ...; where a
    variable is not set, of the folder that is taken instead), cores (0: not known), version of the first plugin ("": it does not say)."""

    interfaces: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    plugins: tuple[str, ...] = ()
    filesystems: dict[str, str] = field(default_factory=dict)
    cores: int = 0
    plugin_version: str = ""


@dataclass(frozen=True)
class Recording:
    """A job. `env` is that of rank 0, `differing` names variables that are not the same on all ranks beside those that cannot be."""

    seats: tuple[Seat, ...]
    hosts: dict[str, Host]
    env: dict[str, str]
    versions: dict[str, str]
    differing: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def multi_node(self) -> bool:
        return len({seat.host for seat in self.seats}) > 1

    @property
    def slingshot(self) -> bool:
        """Whether the nodes have HPE's network: its interfaces are called hsn0, hsn1, ..."""
        return any(name.startswith("hsn") for host in self.hosts.values() for name in host.interfaces)

    @property
    def amd(self) -> bool:
        return bool(self.versions.get("hip")) or any(host.pairs for host in self.hosts.values())

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["seats"] = [[s.rank, s.host, s.local_rank, s.cpus, s.pci, s.visible] for s in self.seats]
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Recording:
        hosts = {
            name: Host(
                tuple(host.get("interfaces", ())), tuple((a, b) for a, b in host.get("pairs", ())),
                tuple(host.get("plugins", ())), dict(host.get("filesystems", {})), int(host.get("cores", 0)),
                str(host.get("plugin_version", "")),
            )
            for name, host in found["hosts"].items()
        }  # fmt: skip
        seats = tuple(Seat(*seat) for seat in found["seats"])
        return cls(
            seats,
            hosts,
            dict(found["env"]),
            dict(found["versions"]),
            dict(found.get("differing", {})),
            found.get("note", ""),
        )

    @classmethod
    def read(cls, path: str | Path) -> Recording:
        """ValueError if the file is no recording."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no recording of a job: {type(error).__name__}: {error}") from None


def look(rank: int, local_rank: int) -> dict[str, Any]:
    """What this process says: {"seat", "host", "env", "versions"}, for `assemble`."""
    import torch

    pci, visible = "", 0
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        properties: Any = torch.cuda.get_device_properties(local_rank % visible)
        pci = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    env = {name: value for name, value in os.environ.items() if _WANTED.search(name) and not _SECRET.search(name)}
    plugins = _plugins(env)
    host = Host(
        tuple(sorted(_interfaces())),
        tuple(gcd_pairs() or ()),
        tuple(plugins),
        _filesystems(env),
        os.cpu_count() or 0,
        _plugin_version(Path(plugins[0])) if plugins else "",
    )
    seat = Seat(rank, socket.gethostname(), local_rank, shown(os.sched_getaffinity(0)), pci, visible)
    return {"seat": asdict(seat), "host": asdict(host), "env": env, "versions": _versions()}


def assemble(looks: list[dict[str, Any]]) -> Recording:
    """One recording from what all ranks said, in rank order."""
    env = looks[0]["env"]
    differing = {}
    for name in sorted({name for one in looks for name in one["env"]}):
        values = {one["env"].get(name, "(unset)") for one in looks}
        if len(values) > 1 and not _OWN.search(name):
            differing[name] = ", ".join(sorted(values)[:4])
    for name in sorted({name for one in looks for name in one["versions"]}):
        values = {one["versions"].get(name, "(none)") for one in looks}
        if len(values) > 1:
            differing[f"version of {name}"] = ", ".join(sorted(values)[:4])
    hosts = {one["seat"]["host"]: Recording.from_json({"seats": [], "hosts": {"": one["host"]}, "env": {}, "versions": {}}).hosts[""]
             for one in looks}  # fmt: skip
    return Recording(tuple(Seat(**one["seat"]) for one in looks), hosts, env, looks[0]["versions"], differing)


_OWN = re.compile(
    r"RANK$|^SLURM_|VISIBLE_DEVICES|^GPU_DEVICE_ORDINAL|^TORCHELASTIC_|^MIOPEN_|^TRITON_CACHE|^TORCHINDUCTOR_CACHE"
)
"""Variables that are each rank's or each node's own."""


def cores(text: str) -> set[int]:
    """ "1-7,65" -> {1, ..., 7, 65}."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def shown(found: set[int]) -> str:
    """The inverse of `cores`."""
    runs: list[list[int]] = []
    for core in sorted(found):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


def _interfaces() -> list[str]:
    folder = Path("/sys/class/net")
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _plugins(env: Mapping[str, str]) -> list[str]:
    folders = [Path(folder) for folder in env.get("LD_LIBRARY_PATH", "").split(":") if folder]
    named = [path for path in (Path(env.get("NCCL_NET_PLUGIN", "")),) if path.is_absolute() and path.exists()]
    return [str(path) for path in named] + [
        str(p) for folder in folders for pattern in _PLUGINS for p in folder.glob(pattern)
    ]


def _plugin_version(library: Path) -> str:
    """ "1.19.2": what aws-ofi-nccl logs when it begins is a text in its file; "" if there is none such."""
    try:
        found = re.search(rb"aws-ofi-[nr]ccl v?(\d+(?:\.\d+)+)", library.read_bytes())
    except OSError:
        return ""
    return found[1].decode() if found else ""


def _filesystems(env: Mapping[str, str]) -> dict[str, str]:
    """Variable that names a cache's folder -> type of the file system there, or, if it is not set, where the cache is then."""
    mounts = []
    try:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            mounts.append((mount, kind))
    except OSError:
        return {}
    found = {}
    for name, default in CACHES.items():
        folder = os.path.abspath(os.path.expanduser(env.get(name) or default))
        inside = [(m, kind) for m, kind in mounts if folder.startswith(m.rstrip("/") + "/") or m == "/"]
        found[name] = max(inside, key=lambda item: len(item[0]), default=("", ""))[1]
    return found


CACHES = {
    "MIOPEN_USER_DB_PATH": "~/.config/miopen",
    "MIOPEN_CUSTOM_CACHE_DIR": "~/.cache/miopen",
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), "torchinductor"),
    "TRITON_CACHE_DIR": "~/.triton/cache",
}
"""Variable -> the folder that is taken where it is not set."""


def _versions() -> dict[str, str]:
    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "hip": torch.version.hip or "",
    }
    found["cuda"] = torch.version.cuda or ""
    for package in ("triton", "pytorch-triton-rocm", "zcompile"):
        try:
            found["triton" if "triton" in package else package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["rccl" if torch.version.hip else "nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found
