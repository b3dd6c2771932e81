"""`zcompile doctor` on recorded jobs of Frontier and LUMI, and on what is wrong with them, one line at a time (F31, F34, F35)."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zcompile.cli import main
from zcompile.doctor.command import judge, report
from zcompile.doctor.recording import Host, Recording, assemble, cores, look, shown

RECORDINGS = Path(__file__).parent.parent / "recordings"
GOOD = ("frontier-olcf", "lumi-guide")
BAD: dict[str, tuple[set[str], set[str]]] = {
    "frontier-torchrun": (
        {"core binding", "OFI plugin", "torch"},
        {
            "launcher", "FI_MR_CACHE_MONITOR", "NCCL_ALGO", "FI_CXI_RDZV_PROTO", "FI_CXI_RDZV_EAGER_SIZE", "FI_CXI_RDZV_THRESHOLD",
            "FI_CXI_RDZV_GET_MIN", "FI_CXI_DEFAULT_CQ_SIZE", "FI_CXI_DEFAULT_TX_SIZE", "FI_CXI_RX_MATCH_MODE",
            "FI_CXI_DISABLE_HOST_REGISTER", "HSA_FORCE_FINE_GRAIN_PCIE", "TORCH_NCCL_BLOCKING_WAIT", "MIOPEN_USER_DB_PATH",
            "MIOPEN_CUSTOM_CACHE_DIR", "TRITON_CACHE_DIR",
        },
    ),
    "lumi-older-script": (
        {"FI_MR_CACHE_MONITOR"},
        {
            "core binding", "FI_CXI_RDZV_PROTO", "FI_CXI_RDZV_EAGER_SIZE", "FI_CXI_RDZV_THRESHOLD", "FI_CXI_RDZV_GET_MIN",
            "FI_CXI_DEFAULT_CQ_SIZE", "FI_CXI_DEFAULT_TX_SIZE", "FI_CXI_RX_MATCH_MODE", "FI_CXI_DISABLE_HOST_REGISTER",
            "GLOO_SOCKET_IFNAME", "MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR", "OFI plugin's version",
        },
    ),
}  # fmt: skip
"""name -> (what is known to be bad in it, what is against the advice)"""


def recorded(name: str) -> Recording:
    return Recording.read(RECORDINGS / f"{name}.json")


def of(recording: Recording, status: str, declared: str | None = "frontier") -> set[str]:
    return {finding.check for finding in judge(recording, declared) if finding.status == status}


@pytest.mark.parametrize("name", GOOD)
def test_jobs_that_follow_the_advice_pass(name: str) -> None:
    found = judge(recorded(name), "frontier")
    assert {finding.status for finding in found} == {"ok"}, [f for f in found if f.status != "ok"]
    assert len(found) > 25 and report(found)["ok"]


@pytest.mark.parametrize("name", BAD)
def test_recorded_jobs_are_judged_line_by_line(name: str) -> None:
    bad, warn = BAD[name]
    assert (of(recorded(name), "bad"), of(recorded(name), "warn")) == (bad, warn)
    for finding in judge(recorded(name), "frontier"):
        if finding.status in ("bad", "warn"):
            assert finding.advice and finding.seen and finding.right, finding
            assert finding.source.startswith("https://") or finding.check == "torch", finding


def env(**changed: str | None) -> Callable[[Recording], Recording]:
    def change(recording: Recording) -> Recording:
        merged = {**recording.env, **changed}
        return dataclasses.replace(recording, env={k: v for k, v in merged.items() if v is not None})

    return change


def seats(**changed: Any) -> Callable[[Recording], Recording]:
    def change(recording: Recording) -> Recording:
        moved = tuple(dataclasses.replace(seat, **{k: v(seat) for k, v in changed.items()}) for seat in recording.seats)
        return dataclasses.replace(recording, seats=moved)

    return change


def hosts(**changed: Any) -> Callable[[Recording], Recording]:
    def change(recording: Recording) -> Recording:
        first = next(iter(recording.hosts))
        other: Host = dataclasses.replace(recording.hosts[first], **changed)
        return dataclasses.replace(recording, hosts={**recording.hosts, first: other})

    return change


KNOWN_BAD: dict[str, tuple[str, Callable[[Recording], Recording]]] = {
    "memhooks": ("FI_MR_CACHE_MONITOR", env(FI_MR_CACHE_MONITOR="memhooks")),
    "MemHooks": ("FI_MR_CACHE_MONITOR", env(FI_MR_CACHE_MONITOR="MemHooks")),
    "no plugin on one node": ("OFI plugin", hosts(plugins=())),
    "sockets": ("NCCL_NET", env(NCCL_NET="Socket")),
    "another network": ("NCCL_SOCKET_IFNAME", env(NCCL_SOCKET_IFNAME="eth0")),
    "all but the network": ("NCCL_SOCKET_IFNAME", env(NCCL_SOCKET_IFNAME="^hsn0")),
    "no peer links": ("NCCL_P2P_DISABLE", env(NCCL_P2P_DISABLE="1")),
    "no GPU memory on the network": ("NCCL_NET_GDR_LEVEL", env(NCCL_NET_GDR_LEVEL="LOC")),
    "all ranks on one core": ("core binding", seats(cpus=lambda seat: "1")),
    "two cores for eight ranks": ("core binding", seats(cpus=lambda seat: "1-2")),
    "one device for all": ("devices", seats(pci=lambda seat: "0000:c1:00.0")),
    "a rank without a device": ("devices", seats(pci=lambda seat: seat.pci if seat.rank != 5 else "")),
    "half of the packages": (
        "topology",
        lambda r: dataclasses.replace(r, seats=tuple(s for s in r.seats if s.local_rank not in (1, 2))),
    ),
    "unequal nodes": ("topology", lambda r: dataclasses.replace(r, seats=r.seats[:-2])),
    "an old torch": ("torch", lambda r: dataclasses.replace(r, versions={**r.versions, "torch": "2.10.0"})),
    "a Triton of another torch": ("triton", lambda r: dataclasses.replace(r, versions={**r.versions, "triton": "3.4.0"})),
    "a torch for CPUs": ("ROCm", lambda r: dataclasses.replace(r, versions={**r.versions, "hip": ""})),
    "two versions": ("equal: version of torch", lambda r: dataclasses.replace(r, differing={"version of torch": "2.12.0, 2.13.0"})),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_BAD)
def test_f31_each_line_that_is_known_to_be_bad_fails_alone(name: str) -> None:
    check, change = KNOWN_BAD[name]
    found = judge(change(recorded("frontier-olcf")))
    bad = {finding.check for finding in found if finding.status == "bad"}
    assert bad == ({check, "topology"} if check == "devices" else {check})
    assert not report(found)["ok"]


def test_fewer_cores_than_ranks_are_no_fault_of_the_binding() -> None:
    here = seats(cpus=lambda seat: "0-1")(recorded("frontier-olcf"))
    small = {name: dataclasses.replace(host, cores=2) for name, host in here.hosts.items()}
    assert "core binding" in of(here, "bad") and "core binding" in of(dataclasses.replace(here, hosts=small), "warn")


def test_another_topology_than_the_declared_one() -> None:
    assert of(recorded("frontier-olcf"), "bad", "2x2x4") == {"topology"}
    assert of(recorded("frontier-olcf"), "bad", "2x4x2") == set()
    assert of(recorded("frontier-olcf"), "bad", "frontier:3") == {"topology"}


@pytest.mark.parametrize("seed", range(3))
def test_f34_f35_levels_follow_devices_and_hosts_however_ranks_are_placed(seed: int) -> None:
    for name in GOOD:
        recording = recorded(name)
        places = list(recording.seats)
        random.Random(seed).shuffle(places)
        mixed = tuple(
            dataclasses.replace(seat, host=place.host, pci=place.pci, cpus=place.cpus)
            for seat, place in zip(recording.seats, places, strict=True)
        )
        found = judge(dataclasses.replace(recording, seats=mixed), "frontier")
        topology = next(finding for finding in found if finding.check == "topology")
        assert topology.status == "ok" and topology.seen.startswith("2x4x2 (pair, node, cluster), ranks not in"), (
            topology
        )
        assert not [finding for finding in found if finding.status in ("bad", "warn")], found


def test_rules_for_the_network_do_not_ask_where_there_is_none() -> None:
    one = recorded("frontier-torchrun")
    one = dataclasses.replace(one, seats=tuple(seat for seat in one.seats if seat.host == one.seats[0].host))
    assert not {check for check in of(one, "warn") | of(one, "bad") if check.startswith(("FI_", "NCCL", "OFI"))}
    assert {"network variables", "OFI plugin"} <= of(one, "skip")
    ethernet = recorded("frontier-torchrun")
    ethernet = dataclasses.replace(ethernet, hosts={name: Host(("eth0",)) for name in ethernet.hosts})
    assert {"network variables", "OFI plugin"} <= of(ethernet, "skip")


def test_cores() -> None:
    assert cores("1-3,65") == {1, 2, 3, 65} and shown({1, 2, 3, 65}) == "1-3,65" and cores("") == set()


def test_a_recording_survives_its_file_and_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JWT_TOKEN", "hidden")
    monkeypatch.setenv("FI_MR_CACHE_MONITOR", "kdreg2")
    monkeypatch.setenv("HOME_ADDRESS", "hidden")
    first = look(0, 0)
    second = json.loads(json.dumps(first))
    second["seat"].update(rank=1, local_rank=1)
    second["env"] = {**second["env"], "FI_MR_CACHE_MONITOR": "memhooks", "LOCAL_RANK": "1"}
    made = assemble([first, second])
    assert made.env["FI_MR_CACHE_MONITOR"] == "kdreg2" and "hidden" not in json.dumps(made.to_json())
    assert made.differing == {"FI_MR_CACHE_MONITOR": "kdreg2, memhooks"}
    (tmp_path / "job.json").write_text(json.dumps(made.to_json()))
    assert Recording.read(tmp_path / "job.json") == made


def test_the_command_judges_a_recording(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, bad = (str(RECORDINGS / f"{name}.json") for name in ("frontier-olcf", "lumi-older-script"))
    assert main(["doctor", "--recording", good, "--topology", "frontier"]) == 0
    assert "FI_CXI_DISABLE_HOST_REGISTER" in capsys.readouterr().out
    assert main(["doctor", "--recording", bad, "--topology", "frontier", "--json", "-"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert not result["ok"] and result["counts"]["bad"] == 1
    assert result["findings"][0]["check"] == "FI_MR_CACHE_MONITOR" and "memhooks" in err
    (tmp_path / "other.json").write_text("{}")
    for arguments, said in (
        (["--recording", str(tmp_path / "other.json")], "is no recording of a job"),
        (["--recording", str(tmp_path / "none.json")], "No such file"),
        (["--timeout", "0"], "must be a positive number of seconds"),
        (["--recording", good, "--record", "x"], "one reads, the other writes"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert said in capsys.readouterr().err
