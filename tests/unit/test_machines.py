"""Machines are data: every constant has a source, and a file that is not right says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zcompile.machines import DATA, MACHINES, Level, Machine, MachineError
from zcompile.topology import Topology


@pytest.mark.parametrize("name", MACHINES)
def test_every_constant_of_a_known_machine_has_a_source(name: str) -> None:
    machine = MACHINES[name]
    for where in (
        "between.bandwidth",
        "between.latency",
        "device.memory",
        "device.memory_bandwidth",
        "device.efficiency",
    ):
        assert len(machine.sources[where]) > 5
    assert {f"device.peak_flops.{dtype}" for dtype, _ in machine.device.peak_flops} <= set(machine.sources)
    assert machine.note


def test_the_known_files_are_the_known_machines() -> None:
    assert {path.stem for path in DATA.glob("*.json")} == set(MACHINES)


def test_frontier_s_cluster_level_is_a_dragonfly_group_and_the_system() -> None:
    found = Topology.parse("frontier:64x147")
    assert found.names == ("pair", "node", "group", "system") and found.world_size == 75_264
    group, system = found.levels[2:]
    assert system.bandwidth < group.bandwidth and system.via == ("group",)
    across, inside = Topology.parse("frontier:9408").levels[-1], Topology.parse("frontier:128").levels[-1]
    assert across.bandwidth == system.bandwidth and inside.bandwidth == group.bandwidth, (
        "one level at the rate of what it crosses"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("frontier:256x2", "at most 128"),
        ("dgx-h100:4x2", "not known to have groups"),
        ("frontier:0x2", "no number of nodes"),
    ],
)
def test_groups_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Topology.parse(text)


def test_a_machine_s_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text((DATA / "mi300x.json").read_text())
    assert Topology.parse(f"{path}:3") == Topology.parse("mi300x:3") == Topology.parse(str(path), world_size=24)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["between"].update(latency=3e-6), r'between.latency must be \{"value"'),
        (lambda d: d["between"]["bandwidth"].update(source=""), "between.bandwidth must be"),
        (lambda d: d.pop("device"), "'device' is missing"),
        (lambda d: d["between"]["bandwidth"].update(value=-1.0), "bandwidth -1.0 B/s"),
        (lambda d: d["inside"][0].update(color={"value": 1, "source": "x"}), "color"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, change: Any, says: str) -> None:
    data = json.loads((DATA / "mi300x.json").read_text())
    change(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(MachineError, match=says):
        Machine.read(path)
    with pytest.raises(ValueError, match=r"bad\.json"):
        Topology.parse(f"{path}:2")


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file"):
        Machine.read(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("nothing")
    with pytest.raises(MachineError, match=r"text\.json"):
        Machine.read(tmp_path / "text.json")


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": "spiral"},
        {"overhead": -1.0},
        {"burst": -1.0},
        {"curve": ((1e3, 0.0),)},
        {"curve": ((1e3, 0.5), (1e2, 0.6))},
    ],
)
def test_levels_say_what_is_wrong(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Level("node", 2, 1e9, 1e-6, **bad)
