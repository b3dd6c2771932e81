"""Which topology a job gets: on GPUs in pairs the order of the ranks comes from PCI addresses (the GPU is mocked here)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from zcompile import Topology, launcher

BUSES = (0xC1, 0xC6, 0xC9, 0xCE, 0xD1, 0xD6, 0xD9, 0xDC)
"""PCI buses of the 8 GCDs of a Frontier node; packages are neighbours in this order."""


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    def start(gcd_of_rank: list[int], arch: str = "gfx90a:sramecc+:xnack-") -> None:
        seats = [(f"node{rank // 8}", f"0000:{BUSES[gcd]:02x}:00") for rank, gcd in enumerate(gcd_of_rank)]
        properties = SimpleNamespace(
            gcnArchName=arch, pci_domain_id=0, pci_bus_id=BUSES[gcd_of_rank[0]], pci_device_id=0
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

        def all_gather_object(out: list[Any], value: Any) -> None:
            assert value[1] == f"0000:{BUSES[gcd_of_rank[0]]:02x}:00", "this rank says its own address"
            out[:] = [(host, pci, None) for host, pci in seats]  # and so would the others

        monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
        monkeypatch.setattr(launcher, "gcd_pairs", lambda: None)

    return start


GPU = torch.device("cuda", 0)
CLOSEST = [4, 5, 2, 3, 6, 7, 0, 1]
"""Frontier's --gpu-bind=closest: local rank -> GCD."""
SCATTERED = [0, 2, 4, 6, 1, 3, 5, 7]


def test_pairs_follow_pci_addresses_not_local_ranks(job: Any) -> None:
    job(SCATTERED)
    found = launcher.topology_of_job("frontier", GPU, 8)
    pairs = {tuple(found.group(rank, 1)) for rank in range(8)}
    assert pairs == {(0, 4), (1, 5), (2, 6), (3, 7)}, "ranks on GCDs 2k and 2k+1"
    assert found.levels[0].bandwidth == Topology.parse("frontier:1").levels[0].bandwidth


def test_frontiers_own_binding_keeps_the_order_of_the_ranks(job: Any) -> None:
    job(CLOSEST)
    found = launcher.topology_of_job(None, GPU, 8)
    assert found.names == ("pair", "node", "cluster") and found.order is None


def test_a_machine_that_the_devices_do_not_form_is_refused(job: Any) -> None:
    job(CLOSEST + CLOSEST)
    with pytest.raises(ValueError, match="the devices of this job form 2x4x2"):
        launcher.topology_of_job("2x2x4", GPU, 16)


def test_other_gpus_and_cpus_take_what_was_given(job: Any) -> None:
    job(SCATTERED, arch="gfx942")
    assert launcher.topology_of_job("2x2x2", GPU, 8) == Topology.parse("2x2x2")
    assert launcher.topology_of_job("4x2", torch.device("cpu"), 8) == Topology.parse("4x2")
