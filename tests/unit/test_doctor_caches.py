"""What the doctor says of the network plugin's version, and of caches where no variable says where they lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from zcompile.doctor.command import judge
from zcompile.doctor.findings import Finding
from zcompile.doctor.recording import CACHES, Recording, _plugin_version, look

GOOD = Path(__file__).parent.parent / "recordings" / "frontier-olcf.json"


def changed(unset: tuple[str, ...] = (), **host: Any) -> Recording:
    """Frontier as its makers advise, but for this."""
    recording = Recording.read(GOOD)
    return dataclasses.replace(
        recording,
        env={name: value for name, value in recording.env.items() if name not in unset},
        hosts={name: dataclasses.replace(found, **host) for name, found in recording.hosts.items()},
    )


def against_advice(recording: Recording) -> list[Finding]:
    return [finding for finding in judge(recording, "frontier") if finding.status not in ("ok", "skip")]


@pytest.mark.parametrize(
    ("said", "status"), [("1.19.0", "ok"), ("2.0", "ok"), ("1.18.9", "warn"), ("1.4.0", "warn"), ("", "skip")]
)
def test_the_plugins_version(said: str, status: str) -> None:
    found = judge(changed(plugin_version=said), "frontier")
    (line,) = (finding for finding in found if finding.check == "OFI plugin's version")
    assert line.status == status and (said in line.seen) and ("1.19" in line.right)
    assert bool(line.advice) is (status == "warn")
    assert not [finding for finding in found if finding.status == "bad"], "an old one is slow or lacks mends, and works"


def test_one_node_with_an_older_plugin_than_the_others() -> None:
    recording = changed()
    first = next(iter(recording.hosts))
    hosts = {**recording.hosts, first: dataclasses.replace(recording.hosts[first], plugin_version="1.9.1")}
    (line,) = against_advice(dataclasses.replace(recording, hosts=hosts))
    assert line.check == "OFI plugin's version" and line.seen == "1.19.2, 1.9.1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\0NET/OFI Initializing aws-ofi-nccl 1.19.2\0", "1.19.2"),
        (b"\0aws-ofi-rccl 1.4\0", "1.4"),
        (b"aws-ofi-nccl GitHub", ""),
    ],
)
def test_the_version_is_read_off_the_library(tmp_path: Path, monkeypatch: Any, text: bytes, said: str) -> None:
    library = tmp_path / "librccl-net.so"
    library.write_bytes(b"\x7fELF" + bytes(1000) + text + bytes(1000))
    assert _plugin_version(library) == said and _plugin_version(tmp_path / "none.so") == ""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.delenv("NCCL_NET_PLUGIN", raising=False)
    seen = look(0, 0)["host"]
    assert seen["plugins"] == (str(library),) and seen["plugin_version"] == said


@pytest.mark.parametrize("name", ["MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_cache_that_no_variable_keeps_off_a_shared_home(name: str) -> None:
    assert against_advice(changed()) == []
    (line,) = against_advice(changed((name,), filesystems={name: "nfs"}))
    assert line.check == name and line.status == "warn" and f"export {name}=" in line.advice
    assert line.seen == f"not set: {CACHES[name]} on nfs"
    assert against_advice(changed((name,), filesystems={name: "xfs"})) == [], "a home of the node's own is as good"
    # Where nobody looked at the file system: MIOpen's have to be set by both sites' guides, Triton's is no fault by itself.
    unknown = against_advice(changed((name,), filesystems={}))
    assert [found.check for found in unknown] == ([name] if name.startswith("MIOPEN") else [])


def test_miopens_caches_are_asked_of_amd_nodes_alone() -> None:
    recording = changed(("MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR"), filesystems={}, pairs=())
    recording = dataclasses.replace(recording, versions={**recording.versions, "hip": "", "cuda": "13.0"})
    assert not [finding for finding in judge(recording) if finding.check.startswith("MIOPEN")]


def test_the_look_finds_the_file_system_of_every_cache(monkeypatch: Any) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/nowhere")
    found = look(0, 0)["host"]["filesystems"]
    assert set(found) == set(CACHES) and found["TRITON_CACHE_DIR"] == "proc" and found["MIOPEN_USER_DB_PATH"] != "proc"
