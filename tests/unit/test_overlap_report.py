"""Hidden and exposed time, read from spans: what counts as which."""

from __future__ import annotations

import pytest
import torch

from zcompile.overlap import WAIT, from_events, measured


def test_a_hop_is_exposed_while_it_is_waited_for_and_hidden_before() -> None:
    found = from_events(
        [
            ("zc launch node gather 0", 1, 0.0, 0.1),
            (WAIT, 1, 3.0, 4.0),
            ("zc wait node gather 0", 1, 3.1, 4.0),
            ("zc launch cluster sync 1", 1, 1.0, 1.1),
            (WAIT, 1, 5.0, 5.5),
            ("zc wait cluster sync 1", 1, 5.0, 5.5),
            ("mm", 1, 0.2, 3.0),
        ]
    )
    node, cluster = found.level("node"), found.level("cluster")
    assert (node.hops, node.under_way, node.exposed) == (1, 4.0, pytest.approx(0.9))
    assert (cluster.under_way, cluster.hidden) == (4.5, 4.0)
    assert found.refresh_exposed == 0 and found.matched == pytest.approx(1.4 / 1.5)


def test_a_wait_without_a_hop_is_one_for_a_copy_and_a_refreshs_own_waits_are_no_graphs() -> None:
    found = from_events(
        [
            (WAIT, 1, 0.0, 2.0),
            (WAIT, 7, 0.0, 1.5),
            ("zc wait cluster refresh 3", 7, 0.0, 1.5),
        ]
    )
    assert found.refresh_exposed == 2.0 and found.lanes["cluster", "refresh"].exposed == 1.5
    assert found.level("cluster").exposed == 0.0, "the forward did not wait for that"
    assert found.matched == 1.0


def test_concurrent_hops_of_a_level_keep_it_busy_once() -> None:
    hops = [("gather", 0, 0.0, 4.0), ("gather", 1, 1.0, 5.0), ("reduce", 2, 4.5, 6.0), ("sync", 3, 8.0, 9.0)]
    events = [(f"zc launch node {transfer} {n}", 1, begin, begin) for transfer, n, begin, _ in hops]
    events += [(f"zc wait node {transfer} {n}", 1, end - 0.5, end) for transfer, n, _, end in hops]
    found = from_events(events)
    node = found.level("node")
    assert (node.under_way, node.busy, node.exposed, node.hidden) == (10.5, 7.0, 2.0, 8.5)
    assert found.lanes["node", "gather"].busy == 5.0, "a lane of its own"
    assert found.as_dict()["levels"]["node"]["busy"] == 7.0


def test_waits_where_no_hop_leaves_one_are_nobodys() -> None:
    """NCCL: the host launches and waits for nothing, and the graph's waits tell nothing of hops."""
    found = from_events([("zc launch node gather 0", 1, 0.0, 0.1), (WAIT, 1, 1.0, 2.0), (WAIT, 1, 3.0, 4.0)])
    assert (found.matched, found.refresh_exposed, found.waits, found.known) == (0.0, 0.0, 2.0, False)
    assert from_events([]).known and from_events([]).matched == 1.0


def test_a_trace_without_waits_says_nothing() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).sum()
    found = measured(profile)
    assert found.lanes == {} and found.waits == 0.0
    assert found.as_dict()["lanes"] == {}
