"""The model beside published numbers, and what calibration writes."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from zcompile import calibrate
from zcompile.bench.network import Shaped
from zcompile.calibrate import _merged, machine
from zcompile.cli import main
from zcompile.machines import Machine
from zcompile.reproduce import collectives, paper, zeropp
from zcompile.reproduce.flat import Flat
from zcompile.reproduce.local import _swapped
from zcompile.reproduce.report import Report
from zcompile.times import hop_seconds
from zcompile.topology import Topology


def test_a_ring_s_closed_form() -> None:
    flat = Flat(inside=100.0, between=50.0, step=1.0, overhead=3.0, per_node=4)
    assert flat.gather(400.0, 4) == 3 + 3 * 1 + 300 / 100, "in a node"
    assert flat.gather(800.0, 8) == 3 + 7 * 1 + 700 / 50, "through the cards"
    assert flat.reduce(800.0, 8) == 2 * flat.gather(800.0, 8) and flat.gather(800.0, 1) == 0
    assert flat.bus(8e9, 8) == pytest.approx(50.0, rel=1e-3)


def test_what_is_predicted_of_lumi_s_collectives_is_held_but_for_the_links_own_rate() -> None:
    report = collectives.run()
    missed = [what for what, _, _, held in report.checks if not held]
    assert missed == ["all-reduce, 8 GCDs, 128 MiB, bus GB/s, from the links"], (
        "which is why rings in a node are a measured constant"
    )
    assert {row[4] for row in report.rows} == {"constant", "predicted"}


def test_zero_plus_plus_on_v100_is_held() -> None:
    report = zeropp.run()
    assert report.held and len(report.rows) == 24
    assert not zeropp.run(overlap=True).held, "hiding transfers entirely is not what was published"


def test_a_cell_by_hand() -> None:
    found = zeropp.cell("18B", 1, 2048)
    forward, backward = found.compute()
    assert backward == 3 * forward and forward == pytest.approx(2 * found.psi * 2048 / 62.5e12)
    serial, hidden = found.seconds(False, False), found.seconds(False, True)
    assert serial[0] == pytest.approx(forward + found.transfers(False)[0]) and hidden[0] == max(
        forward, found.transfers(False)[0]
    )


def test_the_base_paper_s_ratios_are_missed_and_the_report_says_so() -> None:
    report = paper.run()
    held = {what: ok for what, _, _, ok in report.checks}
    assert held == {"ZeRO++ / ZeRO-3": False, "three levels / ZeRO-3": False, "efficiency": True}
    assert any("Why it misses" in note for note in report.notes)
    found = report.data["ratios"]
    assert 1 < found["ZeRO++"] < 1.405 and found["ZeRO++"] < found["three levels"] < 2.398


def test_what_rings_would_have_to_be_gives_the_ratio() -> None:
    base = paper.Choice()
    for system in ("ZeRO++", "three levels"):
        factor = paper.needed(base, system)
        assert 0 < factor < 1
        assert paper.ratios(paper.replace(base, flat=factor))[system] == pytest.approx(
            paper.PUBLISHED[system], rel=1e-3
        )


def test_the_model_s_size_and_flops_are_the_published_shape_s() -> None:
    assert paper.parameters() == pytest.approx(20.55e9, rel=1e-3)
    assert paper.flops(paper.Choice()) == pytest.approx(349e12, rel=0.01) and paper.flops(
        paper.Choice(recompute=False)
    ) == pytest.approx(261e12, rel=0.01)


def measured(topology: Topology) -> dict[str, object]:
    products = [(2.0 * n**3, rate) for n, rate in ((32, 1e9), (128, 4e9), (512, 8e9))]
    rows = [(2**12, 1e-4), (2**18, 1e-4 + 2**18 / 5e7), (2**22, 1e-4 + 2**22 / 1e8)]
    return {
        "products": {"bfloat16": products, "float32": products}, "memory_bandwidth": 5e9, "overhead": 1e-6,
        "levels": {level.name: rows for level in topology.levels if level.size > 1},
    }  # fmt: skip


def test_a_calibrated_machine_gives_back_what_was_measured(tmp_path: Path) -> None:
    topology, shaped = Topology.parse("2x2x2"), Shaped((2, 2, 2), 400, 100)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine(measured(topology), topology, "measured by a test", 1e9, shaped)))
    made = Topology.parse(f"{path}:2")
    assert made.sizes == (2, 2, 2) and made.names == topology.names and made.levels[2].via == ("node",)
    for level in made.levels:
        assert hop_seconds(level, 2**22) == pytest.approx(1e-4 + 2**22 / 1e8)
        assert hop_seconds(level, 2**18) == pytest.approx(1e-4 + 2**18 / 5e7, rel=0.02)
    assert made.device.flops("bfloat16") == 8e9 and made.device.efficiency[0][1] == pytest.approx(1 / 8)
    assert [level.burst for level in made.levels] == [0, 2**18 / 2, 2**18 / 4], "a bucket, of the ranks behind a link"
    sources = Machine.read(path).sources
    assert {source for where, source in sources.items() if "burst" not in where} == {"measured by a test"}
    assert "token buckets" in sources["between.burst"]
    path.write_text(json.dumps(machine(measured(topology), topology, "measured by a test", 1e9)))
    assert [(level.burst, level.via) for level in Topology.parse(f"{path}:2").levels] == [(0, ())] * 3, (
        "over no such network"
    )


def test_a_network_s_bursts_are_those_of_its_limited_links() -> None:
    assert Shaped((2, 4, 2), 0, 100).bursts == {"cluster": 2**18 / 8}
    assert Shaped((4, 2, 2), 100, 0).bursts == {"node": 2**18 / 4}


def test_a_hop_takes_what_the_slowest_rank_does_whichever_rank_that_is() -> None:
    """Three ranks share a link and are served one after another, in each repetition in another order."""

    def rank(number: int) -> dict[str, object]:
        gather = [1.0 + (number + repetition) % 3 for repetition in range(3)]
        exchange = [0.5, 0.5, 9.0]
        return {
            "products": {},
            "memory_bandwidth": 1.0,
            "overhead": 1.0,
            "levels": {"node": [(64, [gather, exchange])]},
        }

    assert _merged([rank(number) for number in range(3)])["levels"] == {"node": [(64, 3.0)]}


def test_how_far_apart_ranks_leave_a_barrier_is_no_hop_s_latency() -> None:
    """A millisecond each; the first one after a barrier waits for the rank that left it last."""
    now, left = [0.0], [False]

    def hop() -> None:
        now[0] += 0.021 if left[0] else 0.001
        left[0] = False

    def barrier() -> None:
        left[0] = True

    with mock.patch.object(calibrate.time, "perf_counter", lambda: now[0]), mock.patch.object(dist, "barrier", barrier):
        assert calibrate._row(hop, 1, torch.device("cpu")) == pytest.approx(0.021)
        assert calibrate._row(hop, 100, torch.device("cpu")) == pytest.approx(0.0012)


def test_an_order_of_presets_counts_what_is_no_tie() -> None:
    times = {"a": 1.0, "b": 1.02, "c": 2.0}
    order = ["a", "b", "c"]
    assert (
        not _swapped("b", "a", order, times)
        and _swapped("c", "a", order, times)
        and not _swapped("a", "c", order, times)
    )


def test_reports() -> None:
    report = Report("title", ["a", "b"], [["x", 1.23456]])
    report.check("close", 0.05, 0.1)
    assert report.held and "| x | 1.235 |" in report.markdown()
    report.check("far", 0.2, 0.1)
    assert not report.held and "**missed**: far: 20.0 % (bound 10 %)" in report.markdown()


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zeropp.json"
    assert main(["reproduce", "zeropp", "--json", str(out), "--markdown", str(tmp_path / "t.md")]) == 0
    assert json.loads(out.read_text())["held"] and (tmp_path / "t.md").read_text().startswith("| cards")
    assert main(["reproduce", "paper"]) == 1 and "MISSED" in capsys.readouterr().out
    assert main(["reproduce", "reach", "--model", "gpt-5"]) == 2
    for arguments, says in (
        (["--topology", "2x2", "--mbit", "1,1"], "three levels"),
        (["--out", "x.txt"], "ends in .json"),
        (["--topology", "8x16"], "up to 64"),
    ):
        assert main(["calibrate", *arguments]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_calibrating_over_loopback(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    assert main(["calibrate", "--topology", "2x2x1", "--out", str(path)]) == 0
    made = Topology.parse(f"{path}:1")
    assert made.world_size == 4 and made.device.flops("float32") > 1e8
    assert "zcompile calibrate --topology 2x2x1" in Machine.read(path).sources["between.latency"]
