"""Plans, presets, wire formats, rules, and how they resolve on a topology (F29: nothing unknown is taken)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zcompile.plan as plan_module
from zcompile.machines import LADDER
from zcompile.plan import PRESETS, TRANSFERS, Plan, Rule, WireFormat
from zcompile.topology import Level, Topology

EIGHT = Topology.parse("2x2x2")
PLACES = ("whole", *LADDER[:-1], "world")


def names(formats: tuple[WireFormat, ...]) -> list[str]:
    return [wire.name for wire in formats]


# Wire formats.


def test_native_formats() -> None:
    fp32, bf16 = WireFormat.parse("fp32"), WireFormat.parse("bf16")
    assert (fp32.bits, fp32.bytes(3), fp32.torch_name) == (32, 12, "float32")
    assert (bf16.bits, bf16.bytes(3), bf16.torch_name) == (16, 6, "bfloat16")
    assert WireFormat.parse(bf16) is bf16
    native = WireFormat.parse("native")
    assert (
        native.resolved("bfloat16") == bf16 and native.resolved("float32") == fp32 and fp32.resolved("bfloat16") == fp32
    )
    with pytest.raises(ValueError, match="no dtype of its own"):
        native.bytes(1)


def test_quantised_formats() -> None:
    int8, int4 = WireFormat.parse("int8"), WireFormat.parse("int4-delta/64/fp32/stochastic")
    assert (int8.bits, int8.block, int8.scale, int8.rounding, int8.delta) == (8, 256, "bf16", "nearest", False)
    assert (int4.bits, int4.block, int4.scale, int4.rounding, int4.delta) == (4, 64, "fp32", "stochastic", True)
    assert (int8.short, int4.short) == ("int8/256", "int4-delta/64/fp32/stochastic")
    assert WireFormat.parse("int4/stochastic/fp32/64") == WireFormat.parse("int4/64/fp32/stochastic") == int4.whole
    for wire in (int8, int4, WireFormat.parse("fp8").resolved("bfloat16", "gfx942")):
        assert WireFormat.parse(wire.text) == wire, "text is what parse reads"
        assert wire.torch_name == "uint8"
    assert int8.bytes(512) == 512 + 2 * 2 + 12, "codes, two scales, zeros up to 16 bytes"
    assert int4.bytes(512) == 256 + 8 * 4
    assert int8.resolved("bfloat16", "gfx90a") is int8


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("int8/100", "unknown option '100'; valid: a block of 32, 64, .*, a scale of bf16, fp32, a rounding of nearest, stochastic"),
        ("int4/fp16", "unknown option 'fp16'"),
        ("int4/64/64", "names its block twice"),
        ("bf16/64", "block, scale and rounding belong to int8, int4 and fp8"),
        ("fp8/stochastic", "rounds to nearest only"),
        ("bf16-delta", "unknown wire format"),
    ],
)  # fmt: skip
def test_f29_options_of_a_format_are_checked(value: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        Plan(refresh=value)
    assert f"refresh={value!r}" in str(error.value)


def test_f23_fp8_is_refused_where_the_chip_has_none_and_int8_is_offered() -> None:
    plan = Plan.preset("zero_topo", gather="fp8")
    for text, chip in (("frontier:2", "gfx90a"), ("lumi:2", "gfx90a")):
        with pytest.raises(ValueError, match=f"'fp8': the chip '{chip}' has no fp8 in hardware .*use int8"):
            plan.resolve(Topology.parse(text), "bfloat16")
    with pytest.raises(ValueError, match="has no fp8 in hardware"):
        plan.resolve(EIGHT, "bfloat16")
    with pytest.raises(ValueError, match="has no fp8 in hardware"):
        Plan(rules=(Rule("*.w", reduce="fp8"),)).resolve(EIGHT, "bfloat16")


def test_requirement_23_each_chip_has_its_own_fp8() -> None:
    plan = Plan.preset("zero_topo", gather="fp8")
    for text, code in (("mi300x:2", "e4m3fnuz"), ("dgx-h100:2", "e4m3fn")):
        assert {wire.code.kind for wire in plan.resolve(Topology.parse(text), "bfloat16").formats("gather")} == {code}
    assert plan.resolve(EIGHT, "bfloat16", chip="gfx950").formats("gather")[0].code.kind == "e4m3fn"


def test_the_papers_formats() -> None:
    plan = Plan.preset("zero_topo", wire="paper").resolve(EIGHT, "bfloat16")
    assert {t: plan.formats(t)[0].short for t in TRANSFERS} == {
        "gather": "int8/256", "refresh": "int8/256", "reduce": "int4/128", "sync": "int4/128", "back": "fp32",
    }  # fmt: skip
    mixed = Plan.preset("zero_topo", wire="paper", gather="bf16", refresh="int4-delta").resolve(EIGHT, "bfloat16")
    assert [mixed.formats(t)[0].short for t in TRANSFERS[:4]] == ["bf16", "int4/128", "int4/128", "int4-delta/256"]


def test_embeddings_norms_and_vectors_keep_native_formats_unless_a_rule_names_them() -> None:
    rules = (Rule("embed.*", gather="int8", reduce={"pair": "int4"}), Rule("*.head.weight", weights="whole"))
    plan = Plan.preset("zero_topo", wire="paper", rules=rules).resolve(EIGHT, "bfloat16")

    def short(name: str, shape: tuple[int, ...], kind: str) -> list[str]:
        wires = plan.wires(name, shape, kind=kind)
        return [getattr(wires, t)[0].short for t in ("gather", "reduce", "sync", "refresh")]

    assert short("up.weight", (64, 256), "matrix") == ["int8/256", "int4/128", "int4/128", "int8/256"]
    for kind, shape in (("embedding", (64, 256)), ("norm", (64, 256)), ("vector", (9999,))):
        assert short("other", shape, kind) == ["bf16", "fp32", "fp32", "bf16"]
        assert plan.wires("other", shape, kind=kind).block == 1
    assert short("embed.weight", (64, 256), "embedding")[:2] == ["int8/256", "int4/256"]
    assert plan.wires("embed.weight", (64, 256), kind="embedding").reduce[1].short == "fp32"
    assert short("a.head.weight", (64, 256), "matrix")[0] == "int8/256", "a rule that gives no format keeps the plan's"
    assert short("tiny.weight", (64, 31), "matrix") == ["bf16", "int4/128", "int4/128", "bf16"], (
        "its shards fill no block of 256"
    )
    assert short("tiny.weight", (64, 7), "matrix") == ["bf16", "fp32", "fp32", "bf16"], "its shards fill no block"
    assert short("just.weight", (64, 32), "matrix")[0] == "int8/256"


@pytest.mark.parametrize("value", ["int3", "fp16", "float32", "FP32", "", 8])
def test_f29_unknown_formats_name_field_value_and_choices(value: Any) -> None:
    for build, field in (
        (lambda: WireFormat.parse(value, "gather"), "gather"),
        (lambda: Plan(gather=value), "gather"),
        (lambda: Plan(back={"node": value}), r"back\['node'\]"),
        (lambda: Plan(rules=(Rule("x", sync=value),)), "rule 'x': sync"),
    ):
        with pytest.raises(ValueError, match=rf"{field}={value!r}.*native, fp32, bf16"):
            build()


def test_f29_a_format_cannot_be_forged() -> None:
    for build, said in (
        (lambda: WireFormat("fp32", 16), "belong to int8"),
        (lambda: WireFormat("int8", 100), "block=100: valid: 32"),
        (lambda: WireFormat("fp9"), "'fp9'"),
        (lambda: WireFormat("bf16", delta=True), "delta=True is for int8, int4"),
    ):
        with pytest.raises(ValueError, match=said):
            build()


def test_formats_of_each_transfer_and_their_defaults() -> None:
    plain = Plan().resolve(EIGHT, "bfloat16")
    assert {t: names(plain.formats(t)) for t in TRANSFERS} == {
        "gather": ["bf16"] * 3,
        "refresh": ["bf16"] * 3,
        "reduce": ["fp32"] * 3,
        "sync": ["fp32"] * 3,
        "back": ["fp32"] * 3,
    }
    assert names(Plan().resolve(EIGHT, "float32").formats("gather")) == ["fp32"] * 3
    assert names(Plan(reduce="native").resolve(EIGHT, "bfloat16").formats("reduce")) == ["bf16"] * 3


def test_sync_follows_reduce_and_refresh_follows_gather_level_by_level() -> None:
    mixed = Plan(gather={"pair": "fp32"}, reduce={"node": "bf16"}, sync={"cluster": "bf16"}).resolve(EIGHT, "bfloat16")
    assert names(mixed.formats("gather")) == names(mixed.formats("refresh")) == ["fp32", "bf16", "bf16"]
    assert names(mixed.formats("reduce")) == ["fp32", "bf16", "fp32"]
    assert names(mixed.formats("sync")) == ["fp32", "bf16", "bf16"]
    assert names(mixed.formats("back")) == ["fp32"] * 3
    with pytest.raises(ValueError, match="unknown transfer 'scatter'; valid: gather, reduce, sync, refresh, back"):
        mixed.formats("scatter")


def test_a_format_for_a_level_that_is_absent_is_said_to_be_unused_and_one_for_no_level_is_refused() -> None:
    plan = Plan(gather={"pair": "fp32", "cluster": "fp32"})
    resolved = plan.resolve(Topology.parse("4x2"), "bfloat16")
    assert names(resolved.formats("gather")) == ["bf16", "fp32"]
    assert "(unused: no level `pair`)" in resolved.describe()
    with pytest.raises(ValueError, match=r"gather names the unknown level 'pear'; valid: pair, node, cluster"):
        Plan(gather={"pear": "fp32"}).resolve(EIGHT, "bfloat16")
    for mapping in ({"world": "fp32"}, {"": "fp32"}, {}):
        with pytest.raises(ValueError, match="gather"):
            Plan(gather=mapping)


# Plans.


def test_a_plan_is_hashable_and_compares_by_value() -> None:
    a = Plan(gather={"pair": "bf16", "node": "fp32"}, rules=[Rule("*.bias", weights="whole")])  # type: ignore[arg-type]
    b = Plan(gather={"node": "fp32", "pair": WireFormat.parse("bf16")}, rules=(Rule("*.bias", weights="whole"),))
    assert a == b and hash(a) == hash(b) and replace(a) == a and a != replace(a, bucket_bytes=1)


def test_messages_are_as_large_as_the_machine_wants_or_as_the_plan_says() -> None:
    near, far = Topology.parse("2x2x2"), Topology.parse("frontier:48")
    assert Plan().resolve(near, "bfloat16").bucket < Plan().resolve(far, "bfloat16").bucket
    assert Plan(bucket_bytes=7).resolve(far, "bfloat16").bucket == 7
    assert f"bucket:    {Plan().resolve(far, 'bfloat16').bucket} bytes" in Plan().resolve(far, "bfloat16").describe()


def test_presets_are_the_placements_of_the_design() -> None:
    assert {preset: tuple(Plan.preset(preset).placements().values()) for preset in PRESETS} == {
        "ddp": ("whole", "whole", "whole"),
        "zero1": ("whole", "whole", "world"),
        "zero2": ("whole", "world", "world"),
        "zero3": ("world", "world", "world"),
        "fsdp": ("world", "world", "world"),
        "hsdp": ("node", "node", "node"),
        "mics": ("node", "node", "node"),
        "zeropp": ("node", "world", "world"),
        "zero_topo": ("pair", "node", "world"),
    }
    assert Plan.parse("hsdp").name == "hsdp" and Plan.parse("zero_topo") == replace(Plan(), name="zero_topo")
    assert Plan.preset("zero_topo", reduce="bf16").name == "zero_topo"
    assert Plan.preset("zero_topo", weights="node").name == "custom"
    assert Plan.parse(Plan()) == Plan()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            lambda: Plan.parse("zero4"),
            r"unknown plan 'zero4' \(did you mean 'zero\d'\?\); valid: ddp, zero1, .*zero_topo",
        ),
        (lambda: Plan.parse("auto"), "chosen for a model.*valid here: ddp"),
        (lambda: Plan.parse(3), "plan 3: valid"),  # type: ignore[arg-type]
        (
            lambda: Plan.preset("zero3", gathr="bf16"),
            r"option 'gathr' \(did you mean 'gather'\?\); valid: weights, .*wire",
        ),
        (lambda: Plan(wire="thin"), "wire='thin': unknown; valid: paper"),
        (lambda: Plan(gather="int8-delta"), "gather='int8-delta/256': a delta is a format of the refresh"),
        (lambda: Rule("x", sync="int4-delta"), "rule 'x': sync='int4-delta/256': a delta is a format of the refresh"),
        (
            lambda: Plan(refresh={"cluster": "int4-delta"}).resolve(EIGHT, "float32"),
            "refresh .pair fp32, node fp32, cluster int4-delta/256.: a delta goes on over all levels",
        ),
        (lambda: Plan(full_refresh_every=-1), "full_refresh_every=-1"),
        (lambda: Plan(error_feedback=1), "error_feedback=1: must be None, or a number from 0"),
        (lambda: Plan(error_feedback=True), "error_feedback=True"),
        (lambda: Plan(weights="site"), "weights='site': state is not sharded over sites"),
        (lambda: Plan(optimizer=None), "optimizer=None: must be a placement, one of whole, pair, .*world"),  # type: ignore[arg-type]
        (lambda: Plan(weights="node", gradients="pair"), "weights='node' is wider than gradients='pair'.*whole < pair"),
        (lambda: Plan(weights="world", gradients="rack", optimizer="node"), "weights='world' is wider than optimizer"),
        (lambda: Plan(bucket_bytes=0), "bucket_bytes=0"),
        (lambda: Plan(bucket_bytes=True), "bucket_bytes=True"),
        (lambda: Plan(rules=Rule()), "rules="),  # type: ignore[arg-type]
        (lambda: Plan(rules=("*.bias",)), "is no Rule"),  # type: ignore[arg-type]
        (lambda: Plan(rules=(Rule("*.w", weights="world"),)), r"rule '\*.w': weights='world' is wider than gradients"),
        (lambda: Plan(name=""), "name=''"),
        (lambda: Rule(""), "match=''"),
        (lambda: Rule(max_elements=-1), "max_elements=-1"),
        (lambda: Rule("x", optimizer="site"), "rule 'x': optimizer='site'"),
        (lambda: Plan().resolve(EIGHT, "float16"), "compute dtype 'float16': valid: float32, bfloat16"),
        (lambda: Plan(weights="pear").resolve(EIGHT, "bfloat16"), "unknown level 'pear' in topology 2x2x2; valid"),
    ],
)
def test_f29_what_cannot_be_honoured_is_refused(build, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        build()
    with pytest.raises(TypeError):
        Plan(gathr="bf16")  # type: ignore[call-arg]


@given(st.sampled_from(PLACES), st.sampled_from(PLACES), st.sampled_from(PLACES))
def test_exactly_the_ordered_placements_are_plans(w: str, g: str, o: str) -> None:
    if PLACES.index(w) <= PLACES.index(g) <= PLACES.index(o):
        for text in ("8", "4x2", "2x2x2", "2x1x3x2"):
            resolved = Plan(w, g, o).resolve(Topology.parse(text), "float32")
            assert resolved.weights <= resolved.gradients <= resolved.optimizer <= resolved.topology.world
    else:
        with pytest.raises(ValueError, match="is wider than"):
            Plan(w, g, o)


def test_order_of_custom_levels_is_checked_on_the_topology() -> None:
    racks = Topology((Level("board", 2, 2e9, 0), Level("rack", 3, 1e9, 0)))
    assert Plan("board", "rack", "world").resolve(racks, "float32").placement("w", 9, 81, 2) == (1, 2, 2)
    with pytest.raises(ValueError, match=r"plan on topology 2x3-board_rack: weights='rack' is wider"):
        Plan("rack", "board", "world").resolve(racks, "float32")
    with pytest.raises(ValueError, match=r"rule '\*' on topology .*: weights='rack' is wider"):
        Plan("board", "board", "world", rules=(Rule(weights="rack"),)).resolve(racks, "float32")


# Resolved placements.


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, (0, 0, 0)), (1, (0, 0, 0)), (2, (1, 1, 1)), (3, (1, 1, 1)), (4, (1, 2, 2)), (7, (1, 2, 2)), (8, (1, 2, 3))],
)
def test_placements_are_capped_by_rows(rows: int, expected: tuple[int, int, int]) -> None:
    resolved = Plan().resolve(EIGHT, "bfloat16")
    assert resolved.placement("w", rows, rows * 4, 2) == expected
    assert resolved.placement("w", rows, 0, 2) == (0, 0, 0)
    assert resolved.placement("scalar", 8, 1, 0) == (0, 0, 0)


@given(
    st.sampled_from(sorted(PRESETS)),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 300),
    st.integers(0, 3),
)
def test_every_shard_of_every_placement_has_a_row(preset: str, sizes: list[int], rows: int, dim: int) -> None:
    topology = Topology.parse("x".join(map(str, sizes)))
    resolved = Plan.preset(preset).resolve(topology, "float32")
    w, g, o = resolved.placement("w", rows, rows * 3, dim)
    assert 0 <= w <= g <= o <= topology.world
    assert topology.extents[o] <= max(rows, 1)
    full = (resolved.weights, resolved.gradients, resolved.optimizer)
    if dim and rows > 1:
        assert o == full[2] or topology.extents[o + 1] > rows, "capped no further than needed"
    if dim and rows >= topology.world_size and rows > 1:
        assert (w, g, o) == full


def test_f17_levels_of_size_one_keep_their_place() -> None:
    ones = Plan().resolve(Topology.parse("1x1x1"), "float32")
    assert ones.placement("w", 5, 5, 1) == (1, 2, 3)
    assert ones.placement("w", 1, 5, 2) == (0, 0, 0), "one row stays whole, though it would fill an extent of 1"
    assert Plan().resolve(Topology.parse("frontier:1"), "bfloat16").placement("w", 8, 64, 2) == (1, 2, 3)


def test_placements_are_whole_and_world_on_every_topology() -> None:
    sites = Topology((Level("node", 4, 2e9, 0), Level("cluster", 2, 1e9, 0), Level("site", 2, 1e8, 0)))
    assert Plan.preset("zero3").resolve(sites, "float32").placement("w", 99, 99, 1) == (2, 2, 2)
    assert Plan.preset("ddp").resolve(sites, "float32").placement("w", 99, 99, 1) == (0, 0, 0)


def test_the_first_rule_that_matches_wins() -> None:
    rules = (
        Rule("*.keep.weight"),
        Rule("*.norm.*", weights="whole", gradients="whole"),
        Rule(max_elements=64, weights="whole"),
        Rule("head.*", weights="node"),
    )
    resolved = Plan(rules=rules).resolve(EIGHT, "bfloat16")
    assert resolved.placement("a.keep.weight", 8, 16, 2) == (1, 2, 3)
    assert resolved.placement("a.norm.weight", 512, 512, 1) == (0, 0, 3)
    assert resolved.placement("head.bias", 64, 64, 1) == (0, 2, 3)
    assert resolved.placement("head.bias", 65, 65, 1) == (2, 2, 3)
    assert resolved.placement("body.weight", 65, 65, 1) == (1, 2, 3)
    assert resolved.placement("Head.bias", 65, 65, 1) == (1, 2, 3), "names are case-sensitive on every system"
    assert resolved.placement("body.norm.weight", 2, 2, 1) == (0, 0, 1), "rules first, then the cap"


# Key and description.


def test_key_changes_with_every_field() -> None:
    base = Plan.preset("zero_topo")
    fields: dict[str, Any] = {
        "weights": "whole",
        "gradients": "world",
        "optimizer": "cluster",
        "gather": "bf16",
        "reduce": "bf16",
        "sync": "fp32",
        "refresh": "native",
        "back": {"pair": "fp32"},
        "full_refresh_every": 3,
        "error_feedback": 0.5,
        "peer_gather": True,
        "rules": (Rule(),),
        "bucket_bytes": 1,
        "name": "other",
    }
    keys = [base.resolve(EIGHT, "bfloat16").key, base.resolve(EIGHT, "float32").key]
    keys += [replace(base, **{field: value}).resolve(EIGHT, "bfloat16").key for field, value in fields.items()]
    slower = tuple(replace(level, bandwidth=level.bandwidth / 2) for level in EIGHT.levels)
    for topology in (
        Topology.parse("2x2x3"),
        replace(EIGHT, order=(1, 0, *range(2, 8))),
        replace(EIGHT, levels=slower),
        replace(EIGHT, device=replace(EIGHT.device, memory=1.0)),
    ):
        keys.append(base.resolve(topology, "bfloat16").key)
    assert len(set(keys)) == len(keys) == 2 + len(fields) + 4
    assert base.resolve(EIGHT, "bfloat16").key == keys[0]
    assert set(fields) == {name for name in Plan.__dataclass_fields__ if name not in ("_", "wire")}, (
        "a field has no case"
    )


def elsewhere(program: str) -> str:
    """What a program prints in a fresh process that sees the folder of zcompile's modules, but runs no __init__.py."""
    stub = (
        "import sys, types; package = sys.modules['zcompile'] = types.ModuleType('zcompile');"
        "package.__path__ = [sys.argv[1]];"
    )
    command = [sys.executable, "-c", stub + program, str(Path(plan_module.__file__).parent)]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_key_is_the_same_in_another_process() -> None:
    other = elsewhere(
        "from zcompile.plan import *; from zcompile.topology import *;"
        "print(Plan(gather={'pair': 'bf16', 'node': 'fp32'}).resolve(Topology.parse('2x2x2'), 'bfloat16').key)"
    )
    assert other == Plan(gather={"node": "fp32", "pair": "bf16"}).resolve(EIGHT, "bfloat16").key


def test_plan_and_topology_import_no_torch() -> None:
    assert elsewhere("import zcompile.plan; print('torch' in sys.modules, 'zcompile.topology' in sys.modules)") == (
        "False True"
    )


def test_describe_says_what_each_placement_became() -> None:
    plan = Plan.preset("zero_topo", gather={"node": "fp32"}, rules=(Rule("*.bias", max_elements=9, weights="whole"),))
    lines = plan.resolve(Topology.parse("4x2"), "bfloat16").describe().splitlines()
    assert lines[0] == "plan zero_topo on 4x2 (node 4 cluster 2; 8 ranks), compute bfloat16"
    assert lines[1].split() == ["weights:", "pair", "->", "node", "(no", "level", "`pair`", "in", "4x2)"]
    assert lines[2].split() == ["gradients:", "node"]
    assert lines[3].split() == ["optimizer:", "world", "(8", "ranks,", "up", "to", "cluster)"]
    assert lines[4].strip() == "rule *.bias up to 9 elements: weights whole"
    assert lines[5].split() == ["gather:", "node", "fp32,", "cluster", "bf16"]
    assert lines[6].split() == ["reduce:", "fp32"]
