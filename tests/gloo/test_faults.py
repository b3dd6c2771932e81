"""One rank dies, stops, fails or stays behind: the others end in time, and one report says who, where and why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.faulty import Rank, chosen, fault, jobs
from support.marks import TWO
from support.patches import replaced
from support.spawn import Pool, RanksFailed
from torch import nn

from zcompile import full_state_dict, hierarchical_zero, save
from zcompile.faults import flight

LIMIT = 8.0
"""Seconds that a rank waits for another in these jobs."""
SOON = LIMIT + 30
LINES = Path(__file__).read_text().splitlines()


@dataclass(frozen=True)
class Case:
    """A job of four ranks.

    Attributes:
        what, transfer, odd: how rank `odd` fails, and as it launches which transfer, or ("save") as it writes a checkpoint.
        mode: "eager" or "graph".
        swallow: the program goes on after an error of a forward or a backward.
        saves: whether a checkpoint is written after each step, by "ours" or by "torch"'s own call.
    """

    what: str
    transfer: str
    odd: int = 3
    mode: str = "eager"
    swallow: bool = False
    saves: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.what, self.transfer, self.saves)))


@dataclass(frozen=True)
class End:
    """How a case's job ended, and the folder of its checkpoints."""

    ranks: list[Rank]
    folder: Path


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], End]]:
    """`job(case)`: waits for the job's end. All of them begin here, those first that wait longest."""
    with jobs() as made:
        folders = {case: tmp_path_factory.mktemp("job") for case in chosen(request, "case")}
        in_order = sorted(folders, key=lambda case: not (case.swallow or case.what in ("spin", "stop")))
        found = {case: made.start(train, 4, astuple(case), str(folders[case])) for case in in_order}
        yield lambda case: End(found[case].result(), folders[case])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.tanh(self.first(x)))  # both are read here
        return y.square().mean()


def _raise() -> None:
    raise ValueError("sample 17 is no number")  # raised here


FAULTS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "memory": lambda: torch.empty(1 << 60),
    "spin": lambda: time.sleep(10_000),  # spins here
    "leave": lambda: sys.exit(0),
    "nothing": lambda: None,
}


def line(mark: str) -> str:
    """Where this file has that comment."""
    return f"test_faults.py:{next(n for n, text in enumerate(LINES, 1) if text.endswith('# ' + mark))}"


def train(rank: int, fields: list[Any], folder: str) -> None:
    """Steps of a small model; in the second one a rank fails as the case with these fields says."""
    case = Case(*fields)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"eager": {"compile": False}, "graph": {"codegen": False}}[case.mode]
    model: Any = hierarchical_zero(Model(), topology="2x2", plan="zero_topo", timeout=LIMIT, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = 0

    def fail(called: str) -> None:
        if (
            called == case.transfer
            and step == 1
            and rank == case.odd
            and threading.current_thread() is threading.main_thread()
        ):
            fault()
            FAULTS[case.what]()

    def launch(start: Any, group: Any, *rest: Any) -> Any:
        fail(group.transfer)
        return launched(start, group, *rest)

    launched, flight.Flight.launch = flight.Flight.launch, launch  # type: ignore[method-assign,assignment]
    written = dcp.FileSystemWriter.write_data
    dcp.FileSystemWriter.write_data = lambda *args: (fail("save"), written(*args))[1]  # type: ignore[method-assign]
    for step in range(3):
        try:
            loss = model(torch.ones(4, 24) * (rank + 1))
            loss.backward()
        except ValueError:
            if not case.swallow:
                raise
            continue
        optimizer.step()
        optimizer.zero_grad()
        if case.saves and step == 0:
            torch.save(full_state_dict(model), f"{folder}/expected-{rank}")
        if case.saves == "ours" and step < 2:
            save(model, optimizer, f"{folder}/{step}")
        if case.saves == "torch" and step < 2:
            dcp.save(model.state_dict(), checkpoint_id=f"{folder}/{step}")
    print("trained", flush=True)


def missed(report: str, case: Case) -> str:
    """The transfer in which the report misses the rank: the case's, as soon as its partner in the node has come there. The one in the other
    node may be ahead of that partner, and then it is the next sync."""
    where = re.search(r"  missed in  (\w+) all_[a-z_]+ over (\w+), number ", report)
    assert where is not None and LEVEL.get(where[1]) == where[2], report
    partner = re.search(rf"ranks? [^:\n]*{case.odd ^ 1}[^:\n]*: waiting in (\w+) ", report)
    ahead = case.transfer != "sync" and not (partner and partner[1] == case.transfer)
    assert where[1] == case.transfer or (ahead and where[1] == "sync"), report
    return where[1]


LEVEL = {"gather": "node", "reduce": "node", "sync": "cluster"}


def report_of(ranks: list[Rank]) -> str:
    """The one report in all that the ranks printed."""
    everything = "".join(rank.output for rank in ranks)
    assert everything.count("\n  missed in  ") == 1, everything
    start = everything.rindex("zcompile: rank", 0, everything.index("\n  missed in  "))
    return everything[start : everything.index("Traceback", start) if "Traceback" in everything[start:] else None]


def ended(ranks: list[Rank], odd: int, error: str = "FaultError NoAnswer") -> str:
    """All but the faulty rank ended by themselves, in time, with an error; returns the report."""
    for rank, end in enumerate(ranks):
        if rank != odd:
            assert end.code not in (0, None) and end.seconds < SOON, (rank, end)
            assert any(name in end.output for name in error.split()), end.output
    return report_of(ranks)


SAID = {
    "kill": "rank 3 died",
    "stop": "rank 3 does not answer",
    "raise": f"rank 3 raised ValueError: sample 17 is no number at {line('raised here')}",
    "memory": "rank 3 raised RuntimeError: [enforce fail at alloc_cpu.cpp",
}
QUICK = Case("kill", "reduce")


def cases(*made: Case) -> pytest.MarkDecorator:
    """All but one are for the slow tests."""
    marked = [pytest.param(case, marks=() if case == QUICK else pytest.mark.slow, id=str(case)) for case in made]
    return pytest.mark.parametrize("case", marked)


@cases(*(Case(what, transfer) for what in ("kill", "stop", "raise") for transfer in LEVEL), Case("memory", "reduce"))
def test_f12_f13_f14_a_rank_fails_in_a_transfer(job: Callable[[Case], End], case: Case) -> None:
    """Rank, op, level, parameter and source line are named, and the first error comes first. One of memory is raised as others are."""
    ranks = job(case).ranks
    report = ended(ranks, 3)
    assert report.startswith(f"zcompile: {SAID[case.what]}"), report
    where = report.splitlines()[1]
    assert f"of {'first' if missed(report, case) == 'gather' else 'second'}." in where, report
    assert f"({line('both are read here')})" in where, report
    assert ranks[3].code == {"kill": -9, "stop": None}.get(case.what, ranks[3].code), ranks[3]


@cases(Case("nothing", "reduce"))
def test_f12_needs_a_fault(job: Callable[[Case], End], case: Case) -> None:
    ranks = job(case).ranks
    assert [rank.code for rank in ranks] == [0] * 4, ranks
    assert all(rank.output.endswith("trained\n") for rank in ranks)


@cases(Case("kill", "reduce", mode="graph"), Case("stop", "gather", mode="graph"))
def test_f12_f13_in_compiled_graphs(job: Callable[[Case], End], case: Case) -> None:
    report = ended(job(case).ranks, 3)
    assert report.startswith(f"zcompile: {SAID[case.what]}"), report
    stage = "forward" if missed(report, case) == "gather" else "backward"
    assert f"({line('both are read here')}), in graph 0 {stage}" in report, report
    assert "of {first,second}." in report, report


HOLDER = {
    "kill": "rank 0 is gone, and with it the job's store, which it holds",
    "stop": "rank 0 does not answer, and with it the job's store, which it holds",
    "raise": "rank 0 raised ValueError: sample 17 is no number",
    "leave": "rank 0 ended while others still waited",
}


@cases(*(Case(what, "reduce", odd=0) for what in HOLDER))
def test_f12_f13_f14_the_rank_that_holds_the_store(job: Callable[[Case], End], case: Case) -> None:
    report = ended(job(case).ranks, 0)
    assert report.startswith(f"zcompile: {HOLDER[case.what]}"), report
    missed(report, case)


@cases(Case("spin", "reduce"))
def test_a_rank_that_is_stuck_in_other_code_is_named_and_ended(job: Callable[[Case], End], case: Case) -> None:
    ranks = job(case).ranks
    report = ended(ranks, 3)
    assert report.startswith(f"zcompile: rank 3 is in no collective: Python is at {line('spins here')}"), report
    assert ranks[3].code == 1 and ranks[3].seconds < SOON, "it would sleep for hours"
    assert "zcompile: rank 3 is ended, 12 s after the verdict" in ranks[3].output


@cases(Case("raise", "gather", swallow=True))
def test_a_rank_that_goes_on_after_an_error_is_named_with_the_error(job: Callable[[Case], End], case: Case) -> None:
    """It catches what its own forward raised, while the others wait for it there: they would wait for ever."""
    report = ended(job(case).ranks, 9)
    assert report.startswith("zcompile: rank 3 went on after ValueError: sample 17 is no number"), report


@cases(*(Case(what, "save", saves=by) for what in ("kill", "stop") for by in ("ours", "torch")))
def test_f12_f13_during_a_save(job: Callable[[Case], End], case: Case) -> None:
    """By zcompile.save and by torch's own call, whose collectives are torch's. The checkpoint before it loads."""
    end, ours = job(case), case.saves == "ours"
    report = ended(end.ranks, 3, "CheckpointError" if ours else "RuntimeError")
    assert report.startswith(f"zcompile: {SAID[case.what]}"), report
    where = f"`writing {end.folder}/1`" if ours else "a collective that is not zcompile's, at test_faults.py:"
    assert where in report, report
    state = Model().state_dict()
    dcp.load({"model": state} if ours else state, checkpoint_id=end.folder / "0")
    expected = torch.load(end.folder / "expected-0")
    assert set(state) == set(expected) and all(torch.equal(state[name], value) for name, value in expected.items())


@cases(Case("memory", "reduce", mode="graph"))
def test_f37_a_rank_out_of_memory_says_by_whom_it_is_taken(job: Callable[[Case], End], case: Case) -> None:
    report = ended(job(case).ranks, 3)
    held, peak, process = (part.split("memory     ")[1] for part in report.splitlines() if part.startswith("  memory"))
    assert held.startswith("held: master 1.59 kB, copy 3.18 kB"), report
    assert (
        peak.startswith("at most, in graph 0 backward: gathers 1.54 kB, grads 6.37 kB") and "quant buffers" in peak
    ), report
    assert process.endswith("resident at its peak"), report


# -- F33 ---------------------------------------------------------------------------------------------------------------------------


def flipped(rank: int, checks: Any, where: str, mode: str) -> str:
    """Two steps in which one bit changes at rank 2: of what rank 3 sent it, or of a compute copy between the steps."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings: dict[str, Any] = {"eager": {"compile": False}, "graph": {"codegen": False}}[mode]
    model: Any = hierarchical_zero(Model(), topology="2x2", plan="zero_topo", checks=checks, timeout=20.0, **settings)
    wait = flight.Flight._wait

    def flip(self: flight.Flight) -> None:
        wait(self)
        if rank == 2 and where == "message" and (self._site.level, self._site.transfer) == ("node", "gather"):
            self._work._result.view(2, -1)[1].view(torch.int32)[0] ^= 1 << 30

    with replaced(flight.Flight, "_wait", flip):
        for _ in range(2):
            model(torch.ones(4, 24) * (rank + 1)).backward()
            if rank == 2 and where == "copy":
                model.zero.units[0].copy.view(torch.int32)[5] ^= 1 << 20
    return "trained"


@pytest.fixture(scope="module")
def four() -> Iterator[Pool]:
    made = Pool(4)
    yield made
    made.close()


@TWO
def test_f33_checksums_find_the_rank_of_a_flipped_bit(four: Pool, mode: str) -> None:
    with pytest.raises(RanksFailed) as caught:
        four.run(flipped, "checksums", "copy", mode)
    failures = caught.value.failures
    assert (
        "rank 2: the compute copy of " in failures[2].message
        and "bits changed in this rank's memory" in failures[2].message
    )
    assert all("rank 2 refused this forward" in failures[other].message for other in (0, 1, 3)), failures
    with pytest.raises(RanksFailed) as caught:
        four.run(flipped, "checksums", "message", mode, grace=0.1)
    failure = caught.value.failures[2]
    assert failure.type == "ChecksumError", failure
    assert "what rank 3 sent is not what rank 2 received in gather all_gather over node, number " in failure.message, (
        failure
    )
    assert "first" in failure.message and line("both are read here") in failure.message, failure


def test_f33_without_the_option_nobody_looks(four: Pool) -> None:
    assert four.run(flipped, False, "copy", "eager") == ["trained"] * 4
    assert four.run(flipped, "checksums", "nowhere", "eager") == ["trained"] * 4


# -- under torchrun ----------------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, torch
from zcompile import hierarchical_zero, save
torch.manual_seed(0)
model = hierarchical_zero(torch.nn.Linear(8, 8), topology="2", plan="zero_topo", timeout=20.0, compile=False)
rank = int(os.environ["RANK"])
for step in range(3):
    loss = model(torch.ones(2, 8)).square().mean()
    if step == 1 and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()
"""


@pytest.mark.slow
def test_under_torchrun_what_is_known_at_once_is_said_at_once(tmp_path: Path) -> None:
    """The agent ends the other ranks a moment after one has died."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "script.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode, done.stderr
    said = "rank 1 lost the connection to rank 0 in reduce all_to_all over cluster, number 2, of bias"
    assert f"zcompile: {said}" in done.stderr or "zcompile: rank 0 died" in done.stderr, done.stderr
    assert "of bias" in done.stderr and "over cluster, number 2" in done.stderr and "(script.py:8)" in done.stderr, (
        done.stderr
    )
