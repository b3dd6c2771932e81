"""`zcompile doctor` in a job: all ranks look, communicators are tested one by one, every rank ends with the same code (F32)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faulty import Jobs, jobs

from zcompile import _torch_compat as compat
from zcompile.cli import main
from zcompile.doctor import communicators

KINDS = ["node.weights", "node.grads", "cluster.weights", "cluster.grads", "world.agreement"]


@pytest.fixture(scope="module")
def job() -> Iterator[Jobs]:
    with jobs() as made:
        yield made


def doctor(rank: int, folder: str, fault: str = "", topology: str = "2x2", timeout: str = "20") -> None:
    new_group, pattern = compat.new_group, communicators._pattern

    def late(ranks: list[int], **settings: Any) -> Any:
        if settings["description"] == "zc.cluster.weights":
            time.sleep(10)
        return new_group(ranks, **settings)

    def flipped(of: int, device: torch.device) -> torch.Tensor:
        out = pattern(of, device)
        return out.neg() if of == 3 else out

    if rank == 3 and fault == "late":
        compat.new_group = late  # type: ignore[assignment]
    if rank == 3 and fault == "flipped":
        communicators._pattern = flipped
    arguments = [
        "--topology",
        topology,
        "--json",
        f"{folder}/result.json",
        "--record",
        f"{folder}/job.json",
        "--timeout",
        timeout,
    ]
    sys.exit(main(["doctor", *arguments]))


def test_a_job_of_four_ranks(job: Jobs, tmp_path: Path) -> None:
    ranks = job.run(doctor, 4, str(tmp_path))
    assert [rank.code for rank in ranks] == [0] * 4, ranks
    result = json.loads((tmp_path / "result.json").read_text())
    tested = {f["check"]: f for f in result["findings"] if f["check"].startswith("communicator ")}
    assert list(tested) == [f"communicator {kind}" for kind in KINDS]
    assert all(f["status"] == "ok" and "MB/s gathered" in f["seen"] for f in tested.values()), tested
    assert sum("core binding" in rank.output for rank in ranks) == 1, "one rank prints"
    assert main(["doctor", "--recording", str(tmp_path / "job.json")]) == 0


def unwritable(rank: int, folder: str, option: str) -> None:
    sys.exit(main(["doctor", "--topology", "2", option, f"{folder}/no/such/file", "--timeout", "20"]))


@pytest.mark.parametrize("option", ["--record", "--json"])
def test_a_file_that_cannot_be_written_ends_all_ranks_at_once(job: Jobs, tmp_path: Path, option: str) -> None:
    ranks = job.run(unwritable, 2, str(tmp_path), option)
    assert [rank.code for rank in ranks] == [2, 2], ranks
    assert f"{tmp_path}/no/such/file" in ranks[0].output and "Traceback" not in ranks[0].output + ranks[1].output, ranks
    assert max(rank.seconds for rank in ranks) < 60, "nobody waits for the code of a rank that is gone"


def unmet(rank: int, folder: str) -> None:
    """Two of three come."""
    arguments = ["doctor", "--topology", "3", "--json", f"{folder}/result.json", "--timeout", "1"]
    if rank < 2:
        sys.exit(main(arguments))


def test_where_the_ranks_do_not_meet_rank_0_writes_the_result(job: Jobs, tmp_path: Path) -> None:
    ranks = job.run(unmet, 3, str(tmp_path))
    assert [rank.code for rank in ranks] == [1, 1, 0], ranks
    assert all("rendezvous" in rank.output for rank in ranks[:2])
    (finding,) = json.loads((tmp_path / "result.json").read_text())["findings"]
    assert finding["check"] == "rendezvous" and finding["seen"].startswith("rank 0: "), finding


def failed(job: Jobs, folder: Path, *fault: str) -> dict[str, Any]:
    ranks = job.run(doctor, 4, str(folder), *fault)
    assert [rank.code for rank in ranks] == [1] * 4, ranks
    result = json.loads((folder / "result.json").read_text())
    bad = [f for f in result["findings"] if f["status"] == "bad"]
    assert len(bad) == 1, bad
    tested = [f for f in result["findings"] if f["check"].startswith("communicator ")]
    after = [f for f in tested if KINDS.index(f["check"].split()[1]) > KINDS.index(bad[0]["check"].split()[1])]
    assert after and all(f["seen"] == f"not reached: {bad[0]['check']} failed" for f in after), tested
    return bad[0]


@pytest.mark.slow
def test_f32_a_communicator_that_never_becomes_ready_is_named_with_its_level_and_members(
    job: Jobs, tmp_path: Path
) -> None:
    found = failed(job, tmp_path, "late", "2x2", "6")
    assert found["check"] == "communicator cluster.weights" and found["seen"].startswith(
        "level cluster, ranks [1, 3]: "
    ), found
    assert "was not ready within 6 s" in found["seen"] and "look at ranks [1, 3]" in found["advice"]


@pytest.mark.slow
def test_f32_a_communicator_that_changes_data_is_named_with_the_rank(job: Jobs, tmp_path: Path) -> None:
    found = failed(job, tmp_path, "flipped")
    assert found["check"] == "communicator node.weights", found
    assert "ranks [2, 3]: other bytes arrived than rank 3 sent" in found["seen"], found


@pytest.mark.slow
def test_a_rank_that_does_not_come_and_a_topology_that_does_not_fit(job: Jobs, tmp_path: Path) -> None:
    ranks = job.run(doctor, 4, str(tmp_path), "", "3x2")
    assert [rank.code for rank in ranks] == [1] * 4, ranks
    bad = {
        f["check"]: f["seen"]
        for f in json.loads((tmp_path / "result.json").read_text())["findings"]
        if f["status"] == "bad"
    }
    assert "topology 3x2 has 6 ranks, the job has 4" in bad["communicators"], bad
