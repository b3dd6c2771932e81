"""The lossless delta: native bits, whatever they are; the C++ and the torch operations write one message; what cannot be sent is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lossless import masters_and_old
from support.patches import replaced
from torch import Tensor

from zcompile import Plan, Rule
from zcompile.kernels import cpu, lossless
from zcompile.kernels.code import lossless_bytes, lossless_room
from zcompile.planner.search import formats
from zcompile.reference import Order
from zcompile.topology import Topology
from zcompile.wire import WireFormat

MESH = Topology.parse("2x2x2")
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def values(sizes: list[int], seed: int, far: float) -> tuple[Tensor, list[Tensor]]:
    """(masters side by side, what the others have): near one another, but for a share of `far`, and special values."""
    master, old = masters_and_old(sizes, seed, far)
    for place, (new, before) in enumerate(zip(SPECIAL, (1.0, -1.0, *SPECIAL[:7]), strict=True)):
        if place < lossless_room(sizes[0]):
            master[place], old[place] = new, before
    return master, list(old.split(sizes))


def plainly(message: Tensor, values: list[Tensor]) -> None:
    """`decode` where there is no compiler: by torch operations."""
    with replaced(cpu, "library", lambda: None):
        lossless.decode(message, values)


def message(sizes: list[int]) -> Tensor:
    return torch.full((sum(map(lossless_bytes, sizes)),), 0xAB, dtype=torch.uint8)


SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 2**31), st.sampled_from([0.0, 0.01, 0.05, 0.5]), st.integers(1, 3))
def test_what_arrives_are_the_bits_of_a_cast(sizes: list[int], seed: int, far: float, rows: int) -> None:
    rows_of = [values(sizes, seed + row, far) for row in range(rows)]
    sent, plain = [message(sizes) for _ in range(rows)], [message(sizes) for _ in range(rows)]
    for (master, old), mine, other in zip(rows_of, sent, plain, strict=True):
        fits = lossless.encode(master, old, mine)
        assert fits == bool(lossless._encode(master, old, other))
        assert torch.equal(mine, other), "the library and the torch operations write the same bytes"
        if not fits:
            return
    for how in (lossless.decode, plainly):
        # Columns of a wider tensor, as those of a copy are.
        wide = [torch.stack(parts).repeat(1, 2) for parts in zip(*(old for _, old in rows_of), strict=True)]
        found = [part[:, :n] for part, n in zip(wide, sizes, strict=True)]
        how(torch.cat(sent), found)
        for row, (master, old) in enumerate(rows_of):
            for part, want in zip(found, master.split(sizes), strict=True):
                cast = torch.where(want.isnan(), torch.tensor(0x7FC0, dtype=torch.int16), bits(want.bfloat16()))
                assert torch.equal(bits(part[row]), cast)
            assert all(torch.equal(bits(w[row, n:]), bits(o)) for w, o, n in zip(wide, old, sizes, strict=True)), (
                "written outside"
            )


def test_the_compiled_kernels_are_what_was_tested() -> None:
    assert cpu.available()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1024, 1030, 5000])
@pytest.mark.parametrize("beyond", [0, 1])
def test_a_record_has_room_for_one_exception_in_sixteen_values(n: int, beyond: int) -> None:
    old = torch.zeros(n, dtype=torch.bfloat16)
    master = torch.zeros(n)
    places = torch.randperm(n, generator=torch.Generator().manual_seed(n))[: lossless_room(n) + beyond]
    master[places] = torch.randn(len(places)) + 3
    into = message([n])
    fits = len(places) <= lossless_room(n)
    assert lossless.encode(master, [old], into) is fits
    assert bool(lossless._encode(master, [old], message([n]))) is fits
    for how in (lossless.decode, plainly):
        found = old.clone().view(1, n)
        if fits:
            how(into, [found])
            assert torch.equal(bits(found[0]), bits(master.bfloat16()))
        else:
            with pytest.raises(lossless.Changed):  # it was not to be sent
                how(into, [found])


@pytest.mark.parametrize("step", [127, 128, -127, -128, 300, -300])
def test_steps_from_128_on_are_exceptions(step: int) -> None:
    old = torch.full((32,), 0x3F80, dtype=torch.int16)
    new = old.clone()
    new[:2] += step
    into = message([32])
    assert lossless.encode(new.view(torch.bfloat16).float(), [old.view(torch.bfloat16)], into)
    codes = into[16:48].view(torch.int8)
    assert codes[:2].tolist() == [step if abs(step) < 128 else lossless.ESCAPE] * 2 and not codes[2:].any()


def test_values_that_are_not_the_senders_are_an_error() -> None:
    sizes = [300, 40, 2000]
    master, old = values(sizes, 0, 0.01)
    into = message(sizes)
    assert lossless.encode(master, old, into)
    for how in (lossless.decode, plainly):
        for index in range(len(sizes)):
            found = [part.clone().view(1, -1) for part in old]
            found[index][0, -1] = 7.0
            with pytest.raises(lossless.Changed) as raised:
                how(into, found)
            assert raised.value.parameter == index


def test_arguments_that_cannot_be() -> None:
    master, old = torch.zeros(64), [torch.zeros(64, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match=r"master is torch.float64"):
        lossless.encode(master.double(), old, message([64]))
    with pytest.raises(ValueError, match=r"valid: torch.uint8, 96 elements"):
        lossless.encode(master, old, message([65]))
    with pytest.raises(ValueError, match=r"old\[0\] is torch.float16"):
        lossless.encode(master, [old[0].half()], message([64]))
    with pytest.raises(ValueError, match=r"values\[0\] .* strides \(128, 2\)"):
        lossless.decode(message([64]), [torch.zeros(1, 128, dtype=torch.bfloat16)[:, ::2]])


# ---- as a wire format


def test_its_bytes() -> None:
    wire = WireFormat.parse("lossless-delta")
    assert (wire.text, wire.short, wire.torch_name, wire.bits, wire.quantized) == (
        "lossless-delta",
        "lossless-delta",
        "uint8",
        8,
        False,
    )
    assert wire.bytes(1 << 16) == 16 + (1 << 16) + (1 << 13)
    assert wire.bytes(17) == 16 + 32 + 16 == lossless_bytes(17)


WRONG: list[tuple[Any, str]] = [
    (lambda: WireFormat.parse("lossless"), "'lossless': unknown wire format; valid: native, .*lossless-delta"),
    (lambda: WireFormat("lossless"), "'lossless': it is one of deltas"),
    (lambda: WireFormat.parse("lossless-delta/64"), "block, scale and rounding belong to"),
    (lambda: Plan(gather="lossless-delta"), "gather='lossless-delta': a delta is a format of the refresh"),
    (lambda: Plan.preset("zero_topo", refresh="lossless-delta").resolve(MESH, "float32"), "bfloat16.*float32; valid: native"),
    (lambda: Plan.preset("zero_topo", refresh="lossless-delta", gather="int8").resolve(MESH, "bfloat16"), "with gather='int8/256'"),
    (lambda: Plan.preset("zero_topo", refresh="lossless-delta", gather="fp32").resolve(MESH, "bfloat16"), "with gather='fp32'"),
    (
        lambda: Plan.preset("zero_topo", refresh={"node": "lossless-delta"}).resolve(MESH, "bfloat16"),
        "a delta goes on over all levels",
    ),
    (
        lambda: Plan.preset("zero_topo", refresh="lossless-delta", rules=(Rule("head.*", gather="int8"),)).resolve(MESH, "bfloat16"),
        "rule 'head.*': refresh='lossless-delta' with gather='int8/256'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), WRONG)
def test_where_it_cannot_be(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_what_it_is_for() -> None:
    plan = Plan.preset("zero_topo", refresh="lossless-delta", rules=(Rule("own.*", refresh="lossless-delta"),))
    resolved = plan.resolve(MESH, "bfloat16")

    def refresh(name: str, shape: tuple[int, ...], kind: str = "matrix", compute: str = "bfloat16") -> str:
        (found,) = set(resolved.wires(name, shape, compute, kind).refresh)
        return found.text

    assert refresh("up.weight", (256, 32)) == "lossless-delta", "1024 values of a shard"
    assert refresh("up.weight", (248, 32)) == "bf16"
    assert refresh("embed.weight", (256, 32), "embedding") == "lossless-delta"
    assert refresh("norm.weight", (1 << 16,), "norm") == refresh("bias", (1 << 16,), "vector") == "bf16"
    assert refresh("own.bias", (64,), "vector") == "lossless-delta", "a rule names it"
    assert refresh("router.weight", (256, 32), compute="float32") == "fp32", "one parameter of another dtype"
    assert "refresh:   lossless-delta" in resolved.describe()
    with pytest.raises(ValueError, match=r"rule 'own\.\*', which is the first to match 'own\.weight': .*float32; valid: native"):
        refresh("own.weight", (256, 32), compute="float32")


def test_the_reference_takes_it_for_native() -> None:
    native, delta = (
        Plan.preset("zero_topo", **given).resolve(MESH, "bfloat16") for given in ({}, {"refresh": "lossless-delta"})
    )
    orders = [Order.of(plan, "up.weight", (256, 64), "bfloat16") for plan in (native, delta)]
    assert orders[0] == orders[1] and not orders[0].delta


def test_the_planner_may_be_allowed_it() -> None:
    found = formats(("int8", "lossless-delta"))
    assert {"refresh": "lossless-delta"} in found and {"gather": "int8", "refresh": "lossless-delta"} not in found
