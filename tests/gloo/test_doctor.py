"""`zcompile doctor` in a job: all ranks look, communicators are tested one by one, every rank ends with the same code (F32)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faulty import Rank, chosen, fault, jobs

from zcompile import _torch_compat as compat
from zcompile.cli import main
from zcompile.doctor import communicators

KINDS = ["node.weights", "node.grads", "cluster.weights", "cluster.grads", "world.agreement"]


def doctor(rank: int, folder: str, what: str = "", topology: str = "2x2", timeout: str = "20") -> None:
    new_group, pattern = compat.new_group, communicators._pattern

    def late(ranks: list[int], **settings: Any) -> Any:
        if settings["description"] == "zc.cluster.weights":
            fault()
            time.sleep(1.5 * float(timeout))
        return new_group(ranks, **settings)

    def flipped(of: int, device: torch.device) -> torch.Tensor:
        out = pattern(of, device)
        if of == 3:
            fault()
        return out.neg() if of == 3 else out

    if rank == 3 and what == "late":
        compat.new_group = late  # type: ignore[assignment]
    if rank == 3 and what == "flipped":
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


def unwritable(rank: int, folder: str, option: str) -> None:
    sys.exit(main(["doctor", "--topology", "2", option, f"{folder}/no/such/file", "--timeout", "20"]))


def unmet(rank: int, folder: str) -> None:
    """Two of three come."""
    arguments = ["doctor", "--topology", "3", "--json", f"{folder}/result.json", "--timeout", "1"]
    if rank < 2:
        sys.exit(main(arguments))


CASES: dict[str, tuple[Any, ...]] = {
    "late": (doctor, 4, "late", "2x2", "4"),
    "flipped": (doctor, 4, "flipped", "2x2", "6"),
    "unmet": (unmet, 3),
    "well": (doctor, 4),
    "--record": (unwritable, 2, "--record"),
    "--json": (unwritable, 2, "--json"),
    "another topology": (doctor, 4, "", "3x2"),
}
"""name -> function, ranks, arguments after the folder; those that wait longest first"""


@dataclass(frozen=True)
class End:
    """How a case's job ended, and the folder that it wrote to."""

    ranks: list[Rank]
    folder: Path

    @property
    def codes(self) -> list[int | None]:
        return [rank.code for rank in self.ranks]

    @property
    def findings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / "result.json").read_text())["findings"]
        return found


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], End]]:
    """`job(case)`: waits for the job's end. All of them begin here."""
    with jobs() as made:
        wanted = chosen(request, "case")
        folders = {case: tmp_path_factory.mktemp("job") for case in CASES if case in wanted}
        found = {}
        for case, folder in folders.items():
            function, world, *arguments = CASES[case]
            found[case] = made.start(function, world, str(folder), *arguments)
        yield lambda case: End(found[case].result(), folders[case])


def cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names)


@pytest.mark.slow
@cases("well")
def test_a_job_of_four_ranks(job: Callable[[str], End], case: str) -> None:
    end = job(case)
    assert end.codes == [0] * 4, end
    tested = {f["check"]: f for f in end.findings if f["check"].startswith("communicator ")}
    assert list(tested) == [f"communicator {kind}" for kind in KINDS]
    assert all(f["status"] == "ok" and "MB/s gathered" in f["seen"] for f in tested.values()), tested
    assert sum("core binding" in rank.output for rank in end.ranks) == 1, "one rank prints"
    assert main(["doctor", "--recording", str(end.folder / "job.json")]) == 0


@cases("--record", "--json")
def test_a_file_that_cannot_be_written_ends_all_ranks_at_once(job: Callable[[str], End], case: str) -> None:
    end = job(case)
    assert end.codes == [2, 2], end
    first, second = end.ranks
    assert f"{end.folder}/no/such/file" in first.output and "Traceback" not in first.output + second.output, end
    assert max(rank.seconds for rank in end.ranks) < 60, "nobody waits for the code of a rank that is gone"


@cases("unmet")
def test_where_the_ranks_do_not_meet_rank_0_writes_the_result(job: Callable[[str], End], case: str) -> None:
    end = job(case)
    assert end.codes == [1, 1, 0], end
    assert all("rendezvous" in rank.output for rank in end.ranks[:2])
    (finding,) = end.findings
    assert finding["check"] == "rendezvous" and finding["seen"].startswith("rank 0: "), finding


def bad(end: End) -> dict[str, Any]:
    """The one bad finding of a job whose ranks all ended with 1; what comes after it was not reached."""
    assert end.codes == [1] * 4, end
    found = [f for f in end.findings if f["status"] == "bad"]
    assert len(found) == 1, found
    tested = [f for f in end.findings if f["check"].startswith("communicator ")]
    after = [f for f in tested if KINDS.index(f["check"].split()[1]) > KINDS.index(found[0]["check"].split()[1])]
    assert after and all(f["seen"] == f"not reached: {found[0]['check']} failed" for f in after), tested
    return found[0]


@pytest.mark.slow
@cases("late")
def test_f32_a_communicator_that_never_becomes_ready_is_named_with_its_level_and_members(
    job: Callable[[str], End], case: str
) -> None:
    found = bad(job(case))
    assert found["check"] == "communicator cluster.weights" and found["seen"].startswith(
        "level cluster, ranks [1, 3]: "
    ), found
    assert "was not ready within 4 s" in found["seen"] and "look at ranks [1, 3]" in found["advice"]


@pytest.mark.slow
@cases("flipped")
def test_f32_a_communicator_that_changes_data_is_named_with_the_rank(job: Callable[[str], End], case: str) -> None:
    found = bad(job(case))
    assert found["check"] == "communicator node.weights", found
    assert "ranks [2, 3]: other bytes arrived than rank 3 sent" in found["seen"], found


@pytest.mark.slow
@cases("another topology")
def test_a_topology_that_does_not_fit(job: Callable[[str], End], case: str) -> None:
    end = job(case)
    assert end.codes == [1] * 4, end
    seen = {f["check"]: f["seen"] for f in end.findings if f["status"] == "bad"}
    assert "topology 3x2 has 6 ranks, the job has 4" in seen["communicators"], seen
