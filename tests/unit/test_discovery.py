"""Topology.detect on recorded and simulated jobs (F34 rank-to-GCD maps, F35 node lists that are not contiguous)."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcompile import discovery
from zcompile.topology import Topology

# GCD 0..7 by PCI bus, as hello_jobstep and gpu_check print them on Frontier, LUMI and Setonix nodes.
BUSES = [f"0000:{bus}:00.0" for bus in ("c1", "c6", "c9", "ce", "d1", "d6", "d9", "dc")]
PAIRS = [(BUSES[2 * i], BUSES[2 * i + 1]) for i in range(4)]
# Local rank -> GCD. Frontier with --gpu-bind=closest (cores 1-7 are near GCD 4), LUMI with its CPU masks.
FRONTIER = [4, 5, 2, 3, 6, 7, 0, 1]
LUMI = [0, 1, 2, 3, 4, 5, 6, 7]
QUADS = {frozenset(pair) for pair in ((0, 1), (2, 3), (4, 5), (6, 7))}
EVEN_ODD = {frozenset((0, 2, 4, 6)), frozenset((1, 3, 5, 7))}

Seat = tuple[str, str | None]


def detect_all(seats: list[Seat], **options: Any) -> list[Topology]:
    """`Topology.detect` on every rank of a job whose rank r sits at seats[r] = (host, PCI address or None)."""
    said: list[Any] = []

    def record(seat: Any) -> list[Any]:
        said.append(seat)
        raise KeyError  # what it says is known; the answer of all comes in the second round

    for host, pci in seats:
        with pytest.raises(KeyError):
            Topology.detect({}, gather=record, pci=pci, host=host, **options)
    answers: list[Callable[[Any], list[Any]]] = [lambda _: list(said)] * len(seats)
    return [
        Topology.detect({}, len(seats), gather=answer, pci=pci, host=host, **options)
        for (host, pci), answer in zip(seats, answers, strict=True)
    ]


def detect(seats: list[Seat], **options: Any) -> Topology:
    first, *others = detect_all(seats, **options)
    assert all(other == first for other in others), "all ranks must find the same topology"
    return first


def groups(topology: Topology, level: int) -> set[tuple[int, ...]]:
    return {tuple(topology.group(rank, level)) for rank in range(topology.world_size)}


def block(nodes: int, gcds: list[int]) -> list[Seat]:
    return [(f"node{n:04}", BUSES[g]) for n in range(nodes) for g in gcds]


@pytest.mark.parametrize("gcds", [FRONTIER, LUMI, [7, 0, 5, 2, 1, 6, 3, 4]], ids=["frontier", "lumi", "shuffled"])
def test_f34_the_same_hierarchy_of_gcds_for_every_rank_map(gcds: list[int]) -> None:
    seats = block(2, gcds)
    topology = detect(seats)
    assert topology.names == ("pair", "node", "cluster") and topology.sizes == (2, 4, 2)
    assert topology.device.name == "MI250X GCD"

    def gcd(rank: int) -> int:
        return gcds[rank % 8]

    assert {frozenset(map(gcd, group)) for group in groups(topology, 1)} == QUADS
    assert {frozenset(map(gcd, group)) for group in groups(topology, 2)} == EVEN_ODD
    for level in (1, 2):
        assert all(len({seats[rank][0] for rank in group}) == 1 for group in groups(topology, level))
    for group in groups(topology, 3):
        assert len({gcd(rank) for rank in group}) == 1 and len({seats[rank][0] for rank in group}) == 2
    assert all(gcd(rank) % 2 == topology.coordinates(rank)[0] for rank in range(16))


def test_f34_recorded_maps_keep_ranks_in_order_so_groups_are_ascending() -> None:
    assert detect(block(2, FRONTIER)).order is None
    assert detect(block(2, LUMI)).order is None


@given(st.permutations(range(8)))
def test_f34_a_table_of_pairs_agrees_with_pci_order(gcds: list[int]) -> None:
    seats = block(1, gcds)
    assert detect(seats) == detect(seats, pairs=PAIRS)


@given(st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_f35_node_groups_follow_real_hosts_for_any_placement(per_node: int, nodes: int, rng: random.Random) -> None:
    hosts = [f"frontier{n:05}" for n in rng.sample(range(10_000), nodes)]  # excluded nodes: names have holes
    seats: list[Seat] = [(host, None) for host in hosts for _ in range(per_node)]
    rng.shuffle(seats)
    topology = detect(seats)
    assert topology.names == ("node", "cluster") and topology.sizes == (per_node, nodes)
    for group in groups(topology, 1):
        assert len({seats[rank][0] for rank in group}) == 1
        assert list(group) == sorted(group)
    for group in groups(topology, 2):
        assert len({seats[rank][0] for rank in group}) == nodes


def test_f35_cyclic_placement() -> None:
    topology = detect([(("b", "a")[rank % 2], None) for rank in range(8)])
    assert topology.order == (0, 2, 4, 6, 1, 3, 5, 7)
    assert groups(topology, 1) == {(0, 2, 4, 6), (1, 3, 5, 7)}
    contiguous = detect([(("b", "a")[rank // 4], None) for rank in range(8)])
    assert contiguous.order is None and contiguous.key == "4x2"


def test_f35_cyclic_placement_with_gcds() -> None:
    seats: list[Seat] = [(f"node{rank % 2}", BUSES[FRONTIER[rank // 2]]) for rank in range(16)]
    topology = detect(seats)
    assert groups(topology, 1) == {(r, r + 2) for r in (0, 1, 4, 5, 8, 9, 12, 13)}
    assert all(FRONTIER[rank // 2] % 2 == topology.coordinates(rank)[0] for rank in range(16))


def test_unequal_ranks_per_host_names_hosts_and_counts() -> None:
    with pytest.raises(ValueError, match=r"n2: 1.*but 2 on n0"):
        detect_all([("n0", None), ("n0", None), ("n1", None), ("n1", None), ("n2", None)])


def test_part_of_a_node() -> None:
    one_package: list[Seat] = [("n0", BUSES[5]), ("n0", BUSES[4])]
    with pytest.raises(ValueError, match=r"host n0 runs 2 ranks.*all 8 GCDs"):
        detect_all(one_package)
    found = detect(one_package, pairs=PAIRS)
    assert found.sizes == (2, 1, 1) and found.group(0, 1) == [1, 0]
    apart = detect([("n0", BUSES[0]), ("n0", BUSES[2])], pairs=PAIRS)
    assert apart.names == ("node", "cluster") and apart.sizes == (2, 1), "neighbours in PCI order, yet no pair"
    with pytest.raises(ValueError, match=r"0000:c9:00 on n0"):
        detect_all([("n0", BUSES[0]), ("n0", BUSES[1]), ("n0", BUSES[2])], pairs=PAIRS)
    assert detect([("n0", BUSES[0]), ("n1", BUSES[0])]).sizes == (1, 2)


def test_addresses_that_cannot_be_right() -> None:
    with pytest.raises(ValueError, match="ranks 0 and 1 on host n0 use the same device 0000:c1:00"):
        detect_all([("n0", "0000:c1:00.0"), ("n0", "C1:00")])
    with pytest.raises(ValueError, match=r"ranks \[1\] gave no PCI address"):
        detect_all([("n0", BUSES[0]), ("n0", None)])
    with pytest.raises(ValueError, match="PCI address 'c1'"):
        Topology.detect({}, gather=lambda seat: [seat], pci="c1")
    with pytest.raises(ValueError, match="0000:aa:00 is in none of the pairs"):
        Topology.detect({}, gather=lambda seat: [seat], pci="aa:00", pairs=PAIRS)
    with pytest.raises(ValueError, match="without `gather`"):
        Topology.detect({}, pci=BUSES[0])
    with pytest.raises(ValueError, match="world_size is 2, but 1 ranks"):
        Topology.detect({}, 2, gather=lambda seat: [seat])


def test_pci_addresses_are_compared_as_numbers() -> None:
    assert discovery.normal_pci("00000000:C1:00.0") == discovery.normal_pci("c1:00") == "0000:c1:00"
    assert discovery.normal_pci("1:2:3") == "0001:02:03" > discovery.normal_pci("0:ff:0")


def test_the_host_is_this_machine_unless_told() -> None:
    said: list[Any] = []

    def gather(seat: Any) -> list[Any]:
        said.append(seat)
        return [seat]

    Topology.detect({}, gather=gather)
    assert said[0][0] == socket.gethostname()


def test_gcd_pairs_reads_the_kernel_list(tmp_path: Path) -> None:
    assert discovery.gcd_pairs(tmp_path) is None
    others = [("0000:00:01.0", "0x1022", "0x1480"), ("0000:c0:00.0", "0x1002", "0x14cd")]
    gcds = [(bus, "0x1002", "0x7408") for bus in BUSES]
    for name, vendor, device in [*gcds[::-1], *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "device").write_text(device + "\n")
    (tmp_path / "0000:ff:00.0").mkdir()  # no files: skipped
    assert discovery.gcd_pairs(tmp_path) == [tuple(map(discovery.normal_pci, pair)) for pair in PAIRS]
    (tmp_path / BUSES[0] / "device").write_text("0x740f\n")
    assert discovery.gcd_pairs(tmp_path) is None


# Launcher variables alone.


def test_torchrun_variables() -> None:
    env = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4", "RANK": "6", "GROUP_RANK": "1", "LOCAL_RANK": "2"}
    topology = Topology.detect(env)
    assert topology.names == ("node", "cluster") and topology.sizes == (4, 4) and topology.order is None
    assert Topology.detect({**env, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "1"}) == topology, (
        "torchrun inside srun"
    )
    with pytest.raises(ValueError, match=r"RANK=6, GROUP_RANK=3, LOCAL_RANK=2: .*not a contiguous placement.*gather"):
        Topology.detect({**env, "GROUP_RANK": "3"})
    with pytest.raises(ValueError, match=r"WORLD_SIZE=16 .* the job has 8"):
        Topology.detect(env, world_size=8)
    with pytest.raises(ValueError, match=r"16 ranks \(WORLD_SIZE\) with 3 per node: valid world sizes are 15, 18"):
        Topology.detect({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "3"})
    with pytest.raises(ValueError, match="WORLD_SIZE='many'"):
        Topology.detect({**env, "WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_NTASKS": "32", "SLURM_TASKS_PER_NODE": "8(x4)"},
        {"SLURM_NTASKS": "32", "SLURM_TASKS_PER_NODE": "8(x2),8,8"},
        {"SLURM_NTASKS": "32", "SLURM_NTASKS_PER_NODE": "8"},
        {"SLURM_NTASKS": "32", "SLURM_NNODES": "4"},
        {"SLURM_NTASKS": "64", "SLURM_TASKS_PER_NODE": "64", "SLURM_STEP_NUM_TASKS": "32"}
        | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)"},
        {"SLURM_NTASKS": "32", "SLURM_TASKS_PER_NODE": "8(x4)", "WORLD_SIZE": "32"},
    ],
)
def test_slurm_variables(env: dict[str, str]) -> None:
    topology = Topology.detect({**env, "SLURM_PROCID": "17", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"}, world_size=32)
    assert topology.sizes == (8, 4) and topology.order is None


def test_slurm_variables_that_are_refused() -> None:
    env = {"SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)"}
    cyclic = {"SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
    with pytest.raises(ValueError, match=r"SLURM_PROCID=1, SLURM_NODEID=1, SLURM_LOCALID=0.*not a contiguous"):
        Topology.detect({**env, **cyclic})
    with pytest.raises(ValueError, match=r"node 2: 4.*but 8 on node 0.*SLURM_TASKS_PER_NODE=8\(x2\),4"):
        Topology.detect({"SLURM_NTASKS": "20", "SLURM_TASKS_PER_NODE": "8(x2),4"})
    with pytest.raises(ValueError, match=r"'8\(4\)' is not of the form"):
        Topology.detect({**env, "SLURM_TASKS_PER_NODE": "8(4)"})
    with pytest.raises(ValueError, match="not how many per node"):
        Topology.detect({"SLURM_NTASKS": "16"})


def test_without_variables_all_ranks_share_one_node() -> None:
    assert Topology.detect({}).sizes == (1, 1)
    assert Topology.detect({}, world_size=4).sizes == (4, 1)
    assert Topology.detect({"WORLD_SIZE": "4", "RANK": "1"}).sizes == (4, 1)


def test_parse_of_none_detects(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Topology.parse(None, world_size=4).sizes == (4, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Topology.parse(None).sizes == (4, 2)
