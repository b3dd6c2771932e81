"""`zcompile bytes`: what each option changes in the ledger, by hand; the peers' collectives, by hand; the report and the exit code."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from zcompile import Plan, Rule, cli, compare_bytes, compare_fsdp, compare_report, hierarchical_zero
from zcompile.compare_bytes import measure
from zcompile.groups import _COLLECTIVES, CountingGroup
from zcompile.shapes import Shape
from zcompile.topology import Topology
from zcompile.traffic import COLUMNS

ENDS = Shape(layers=0, hidden=32, heads=4, vocabulary=48, sequence=8)
"""Embedding, norm and head: what stays native beside a matrix, in few messages."""
BLOCK = replace(ENDS, layers=1)
PAPER = {"gather": "int8/32", "reduce": "int4/32"}
EIGHT = Topology.parse("2x2x2")

# head.weight is 48 rows of 32: a shard is 48 / 8 = 6 rows, 192 values. On 2x2x2 a rank receives 8 / 1 - 8 / 2 = 4 records over the
# pair, 2 over the node, 1 over the cluster. Its record is codes, scales, and zeros up to a multiple of 16 bytes:
BF16, FP32 = 2 * 192, 4 * 192
INT8 = 192 + 6 * 2 + 4  # 6 blocks of 32, scales of bf16: 204 -> 208
INT8_64 = 192 + 3 * 2 + 10  # 198 -> 208
INT8_FP32 = 192 + 6 * 4 + 8  # 216 -> 224
INT4 = 96 + 6 * 2 + 4  # 108 -> 112
INT4_64 = 96 + 3 * 2 + 10  # 102 -> 112
INT4_FP32 = 96 + 6 * 4 + 8  # 120 -> 128


def head(gather: int, reduce: int, refresh: int, micro: int = 1) -> dict[tuple[str, str], int]:
    """Bytes of head.weight under zero_topo (W pair, G node, O cluster) from the records of each transfer. A forward gathers it and its
    backward gathers it again; a refresh goes over the cluster, then the node; micro-batches cross G once."""
    return {
        ("pair", "gather"): micro * 2 * 4 * gather,
        ("pair", "reduce"): micro * 4 * reduce,
        ("node", "reduce"): micro * 2 * reduce,
        ("cluster", "sync"): reduce,
        ("cluster", "refresh"): refresh,
        ("node", "refresh"): 2 * refresh,
    }


OPTIONS: dict[str, tuple[dict[str, Any], int, dict[tuple[str, str], int]]] = {
    "native": ({}, 1, head(BF16, FP32, BF16)),
    "reduce in bf16": ({"reduce": "bf16"}, 1, head(BF16, BF16, BF16)),
    "gather in int8, refresh follows": ({"gather": "int8/32"}, 1, head(INT8, FP32, INT8)),
    "reduce in int4, sync follows": ({"reduce": "int4/32"}, 1, head(BF16, INT4, BF16)),
    "both, two micro-batches": (PAPER, 2, head(INT8, INT4, INT8, 2)),
    "refresh by int4 deltas": ({**PAPER, "refresh": "int4-delta/32"}, 1, head(INT8, INT4, INT4)),
    "refresh by int8 deltas": ({**PAPER, "refresh": "int8-delta/32"}, 1, head(INT8, INT4, INT8)),
    "blocks of 64": ({"gather": "int8/64", "reduce": "int4/64"}, 1, head(INT8_64, INT4_64, INT8_64)),
    "scales in fp32": ({"gather": "int8/32/fp32", "reduce": "int4/32/fp32"}, 1, head(INT8_FP32, INT4_FP32, INT8_FP32)),
    "a block that no shard fills": ({"gather": "int8/256", "reduce": "int4/256"}, 1, head(BF16, FP32, BF16)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_the_ledger_as_documented(ranks: Any, name: str) -> None:
    options, micro, expected = OPTIONS[name]
    found = ranks(8).run(measure, ENDS, "2x2x2", Plan.preset("zero_topo", **options), micro)
    for mine in found:
        assert not mine["faults"], "the columns are equal, and equal to the sum over the parameters"
        assert mine["parameters"]["head.weight"] == expected
        assert mine["levels"] == found[0]["levels"]
        assert ("head.weight" in mine["quantised"]) == (expected != OPTIONS["native"][2] and name != "reduce in bf16")
        native = {"embed.weight", "norm.weight", "norm.bias"}
        assert not native & set(mine["quantised"]), "unless a rule says otherwise"


def test_a_rule_quantises_the_embedding_too(ranks: Any) -> None:
    """embed.weight has the shape of head.weight; its backward does not need it, so one step gathers it once."""
    rule = Rule("embed.weight", gather="int8/32", reduce="int4/32")
    plan = Plan.preset("zero_topo", **PAPER, rules=(rule,))
    once = head(INT8, INT4, INT8) | {("pair", "gather"): 4 * INT8}
    for mine in ranks(8).run(measure, BLOCK, "2x2x2", plan):
        assert not mine["faults"] and mine["parameters"]["embed.weight"] == once


def dtypes(rank: int, options: dict[str, Any]) -> dict[str, set[str]]:
    """transfer -> dtypes of the tensors that the process groups were given in two steps."""
    seen: dict[str, set[str]] = {}
    names = [name for _, methods in _COLLECTIVES.values() for name in methods]
    plain = {name: getattr(CountingGroup, name) for name in names if name in vars(CountingGroup)}

    def watched(method: Any) -> Any:
        def collective(self: CountingGroup, *arguments: Any, **keywords: Any) -> Any:
            for tensor in torch.utils._pytree.tree_leaves(arguments):
                if isinstance(tensor, Tensor):
                    seen.setdefault(self.transfer, set()).add(str(tensor.dtype).removeprefix("torch."))
            return method(self, *arguments, **keywords)

        return collective

    whole = Rule("*norm*", weights="whole", gradients="whole", optimizer="whole")  # so that there is a way back
    plan = Plan.preset("zero_topo", **options, rules=(whole,))
    for name, method in plain.items():
        setattr(CountingGroup, name, watched(method))
    try:
        model: Any = hierarchical_zero(
            compare_fsdp.decoder(ENDS), topology="2x2x2", plan=plan, compute_dtype=torch.bfloat16, compile=False
        )
        for step in range(2):
            model(compare_fsdp.batch(ENDS, step, rank, 0)).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
    finally:
        for name, method in plain.items():
            setattr(CountingGroup, name, method)
    return seen


def test_dtypes_of_what_the_process_groups_are_given(ranks: Any) -> None:
    """Messages of codes are bytes. What stays native beside them: embedding and norm (with its way back)."""
    native = ranks(8).run(dtypes, {})[0]
    weights, gradients = ("gather", "refresh"), ("reduce", "sync", "back")
    assert native == {**{t: {"bfloat16"} for t in weights}, **{t: {"float32"} for t in gradients}}
    small = ranks(8).run(dtypes, {"reduce": "bf16", "back": "bf16"})[0]
    assert all(found == {"bfloat16"} for found in small.values())
    paper = ranks(8).run(dtypes, PAPER)[0]
    assert paper == {
        "gather": {"uint8", "bfloat16"}, "refresh": {"uint8", "bfloat16"}, "reduce": {"uint8", "float32"},
        "sync": {"uint8", "float32"}, "back": {"float32"},
    }  # fmt: skip


# The peers.

IN_BLOCK = 4 * 32 + (96 * 32 + 96) + (32 * 32 + 32) + (128 * 32 + 128) + (32 * 128 + 32)
"""Two norms, qkv, proj, up, down. All rows (and those of embedding, last norm and head) are multiples of 8: nothing is padded."""
AT_ENDS = 48 * 32 + 2 * 32 + 48 * 32


@pytest.fixture(scope="module")
def flat(ranks: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ranks(8).run(compare_fsdp.peer, BLOCK, "2x2x2", False)
    return found


def test_fsdp2_receives_what_a_flat_ring_must(flat: Any) -> None:
    n = IN_BLOCK + AT_ENDS
    scattered = 2 * n * 7 // 8  # bf16; 7 of 8 shards come from others
    gathered = 2 * scattered  # forward and backward
    expected = {("shard", "all_gather"): (4, gathered), ("shard", "reduce_scatter"): (2, scattered)}
    for mine in flat:
        assert mine["collectives"] == expected, "one message for the block, one for the root"
    report = compare_fsdp.attribute(EIGHT, flat)
    both = gathered + scattered
    # Rank 0 receives from rank 7, and 4 from 3: across nodes. 2 and 6: across pairs of one node. The odd ones: in their pair.
    sums = {level: row["sum"] for level, row in report["levels"].items()}
    assert sums == {"pair": 4 * both, "node": 2 * both, "cluster": 2 * both}
    assert report["levels"]["cluster"]["most_on_one_rank"] == both
    assert report["collectives"]["all_gather over shard"] == {"calls": 4, "received_by_rank": [gathered] * 8}


def test_hsdp_all_reduces_once_for_two_micro_batches(ranks: Any) -> None:
    n = IN_BLOCK + AT_ENDS
    found = ranks(8).run(compare_fsdp.peer, BLOCK, "2x2x2", True, 2)
    gathered, scattered = 2 * 2 * (2 * n * 3 // 4), 2 * (2 * n * 3 // 4)  # two micro-batches, four shards in the node
    reduced = 2 * (2 * n // 4) // 2  # a fourth, in bf16: half of it to sum, half of it back
    for mine in found:
        assert mine["collectives"] == {
            ("shard", "all_gather"): (8, gathered), ("shard", "reduce_scatter"): (4, scattered),
            ("replicate", "all_reduce"): (2, reduced),
        }  # fmt: skip
    inside = gathered + scattered
    sums = {level: row["sum"] for level, row in compare_fsdp.attribute(EIGHT, found)["levels"].items()}
    assert sums == {"pair": 4 * inside, "node": 4 * inside, "cluster": 8 * reduced}


def test_rings_and_groups_of_the_peers() -> None:
    half = ["cluster", "pair", "node", "pair"]
    assert compare_fsdp.ring_levels(EIGHT, range(8)) == half + half
    assert compare_fsdp.ring_levels(EIGHT, [1, 5]) == ["cluster", "cluster"]
    assert compare_fsdp.ring_levels(EIGHT, [3]) == [""]
    assert compare_fsdp.members(EIGHT, 5, False) == {"shard": list(range(8))}
    assert compare_fsdp.members(EIGHT, 5, True) == {"replicate": [1, 5], "shard": [4, 5, 6, 7]}
    assert compare_fsdp.members(Topology.parse("8"), 5, True) == {"replicate": [5], "shard": list(range(8))}, "one node"


# The report.

FEW = {
    compare_report.BASE: Plan.preset("zero_topo", reduce="bf16"),
    compare_report.PAPER: Plan.preset("zero_topo", **PAPER),
    "paper, int4-delta": Plan.preset("zero_topo", **PAPER, refresh="int4-delta/32"),
    "zero3": Plan.preset("zero3"),
    "zero3, all bf16": Plan.preset("zero3", reduce="bf16"),
}


class _Borrowed:
    """The session's pool, which a command may not close; what the peer received is known already."""

    def __init__(self, pool: Any, flat: Any) -> None:
        self._pool, self._flat = pool, flat

    def run(self, function: Any, *arguments: Any, **limits: Any) -> Any:
        return self._flat if function is compare_fsdp.peer else self._pool.run(function, *arguments, **limits)

    def close(self) -> None:
        pass


def test_the_command_reports_ratios_targets_and_faults(
    ranks: Any, flat: Any, monkeypatch: Any, tmp_path: Any, capsys: Any
) -> None:
    monkeypatch.setattr(compare_bytes, "PLANS", FEW)
    monkeypatch.setattr(compare_bytes, "PEERS", {"FSDP2, all bf16": False})
    monkeypatch.setattr(compare_bytes, "SHAPES", {"tiny": ENDS})
    monkeypatch.setattr(compare_bytes, "Pool", lambda world: _Borrowed(ranks(world), flat))
    arguments = argparse.Namespace(model="tiny", topology="2x2x2", micro_batches=1, json=str(tmp_path / "found.json"))
    assert compare_bytes.command(arguments) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"] and found["parameters"] == AT_ENDS and found["quantised_parameters"] == 48 * 32, "the head alone"
    checks = {check["name"]: check for check in found["checks"]}
    part = "of the quantised parameters / zero_topo, all bf16"
    assert checks[f"paper: gathers {part}"]["value"] == INT8 / BF16 and not checks[f"paper: gathers {part}"]["pass"]
    assert checks[f"paper: reductions {part}"]["value"] == INT4 / BF16
    assert checks[f"paper, int4-delta: refresh {part}"]["value"] == INT4 / BF16
    missed = checks["paper: cluster, whole model / zero3, all bf16"]
    rows = found["rows"]
    cluster = {name: sum(t["counted"] for t in row["levels"]["cluster"].values()) for name, row in rows.items()}
    assert (
        missed["value"] == cluster["paper"] / cluster["zero3, all bf16"] > missed["target"] and missed["pass"] is False
    )
    assert "misses by" in missed["note"] and "stay native" in missed["note"]
    assert all(row["sum_over_ranks"]["cluster"] == 8 * cluster[name] for name, row in rows.items())
    assert found["peers"] == {"FSDP2, all bf16": compare_fsdp.attribute(EIGHT, flat)}
    assert "flat ring in rank order" in capsys.readouterr().out

    rows["paper"]["faults"] = ["rank 3: gather over pair: 1, 1, 2"]
    monkeypatch.setattr(compare_bytes, "compare", lambda *a, **k: {**found, "ok": False})
    assert compare_bytes.command(arguments) == 1
    assert "rank 3: gather over pair" in capsys.readouterr().out


def test_a_column_that_differs_is_a_fault() -> None:
    levels = {"pair": {"gather": dict.fromkeys(COLUMNS, 8), "reduce": dict.fromkeys(COLUMNS, 0)}}
    assert not compare_bytes._faults(levels, {"a": {("pair", "gather"): 5}, "b": {("pair", "gather"): 3}})
    assert "gather over pair" in compare_bytes._faults(levels, {"a": {("pair", "gather"): 5}})[0]
    levels["pair"]["gather"]["counted"] = 9
    assert compare_bytes._faults(levels, {"a": {("pair", "gather"): 8}})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "gpt-5"), "'gpt-5': valid: gpt-21m, tiny"),
        (("--micro-batches", "0"), "--micro-batches 0: must be a number from 1"),
        (("--topology", "2x"), "unknown topology '2x'"),
        (("--topology", "frontier:48"), "has 384 ranks"),
        (("--topology", "2x2x1"), "more than one over the last level"),
        (("--topology", "1"), "valid: 2 to 16 ranks"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], said: str, capsys: Any) -> None:
    assert cli.main(["bytes", *arguments]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
