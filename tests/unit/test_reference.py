"""zcompile.reference: the order of its sums, its casts and its one division, on numbers whose sum depends on them."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

from zcompile import Plan, Topology
from zcompile.reference import Order, Reference
from zcompile.resolved import ResolvedPlan

SGD = functools.partial(torch.optim.SGD, lr=1.0)


def resolve(topology: str | Topology, plan: str | Plan, compute: str = "float32") -> ResolvedPlan:
    return Plan.parse(plan).resolve(Topology.parse(topology), compute)


def order(topology: str, plan: str | Plan, rows: int = 64, compute: str = "float32") -> Order:
    return Order.of(resolve(topology, plan, compute), "weight", (rows, 1), compute)


def numbers(world: int) -> list[Tensor]:
    """One value per rank: powers of ten and sevenths, so that every other order of adding gives other bits somewhere."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2000, generator=generator) * 10 ** (rank % 4) / 7 for rank in range(world)]


def add(*terms: Tensor) -> Tensor:
    return functools.reduce(lambda left, right: left + right, terms)


def test_sums_go_fastest_level_first_in_coordinate_order() -> None:
    g = numbers(8)
    mean = order("2x2x2", "zero3").to_o(order("2x2x2", "zero3").to_g(g))
    by_hand = add(add(g[0], g[1]) + add(g[2], g[3]), add(g[4], g[5]) + add(g[6], g[7])) / 8
    assert torch.equal(mean, by_hand)
    by_nodes = order("4x2", "zero3")
    assert torch.equal(by_nodes.to_o(by_nodes.to_g(g)), (add(*g[:4]) + add(*g[4:])) / 8)


@pytest.mark.parametrize("topology", ["8", "2x4", "4x2", "2x2x2"])
def test_another_order_gives_other_bits(topology: str) -> None:
    """Else the matrix could not tell a wrong order from the right one."""
    g = numbers(8)
    right = order(topology, "zero3")
    expected = right.to_o(right.to_g(g))
    assert not torch.equal(expected, right.to_o(right.to_g(g[1:] + g[:1])))
    for other in {"8", "2x4", "4x2", "2x2x2"} - {topology}:
        wrong = order(other, "zero3")
        assert not torch.equal(expected, wrong.to_o(wrong.to_g(g))), other


def test_where_g_cuts_the_hops_in_two_matters_only_when_accumulating() -> None:
    first, second = numbers(8), numbers(9)[1:]
    plans = ("ddp", "zero_topo", "zero3")  # G is whole, node, world
    once, twice = [], []
    for plan in plans:
        at = order("2x2x2", plan)
        once.append(at.to_o(at.to_g(first)))
        twice.append(at.to_o([a + b for a, b in zip(at.to_g(first), at.to_g(second), strict=True)]))
    assert all(torch.equal(once[0], other) for other in once)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(twice, 2))


def test_levels_of_size_1_leave_no_trace() -> None:
    everything = {t: "bf16" for t in ("gather", "reduce", "sync", "refresh", "back")}
    for plan in ("hsdp", "zero_topo"):
        assert order("2x1x4", Plan.preset(plan, **everything)).reduce == ((2, "bf16"),)
    assert order("1x1x1", Plan.preset("zero3", **everything)) == order("1", "ddp")
    alone = order("1x1x1", "zero3")
    assert torch.equal(alone.to_o(alone.to_g(numbers(1))), numbers(1)[0])


def test_each_hop_casts_to_its_wire_and_sums_in_fp32() -> None:
    g = numbers(4)
    at = order("2x2", Plan("node", "node", "world", reduce={"node": "bf16"}, sync="bf16"))

    def wire(x: Tensor) -> Tensor:
        return x.bfloat16().float()

    pairs = [wire(g[0]) + wire(g[1]), wire(g[2]) + wire(g[3])]
    assert all(torch.equal(found, pair) for found, pair in zip(at.to_g(g), pairs, strict=True))
    assert torch.equal(at.to_o(pairs), (wire(pairs[0]) + wire(pairs[1])) / 4)


def test_the_way_back_is_cast_before_the_division() -> None:
    g = numbers(4)
    at = order("2x2", Plan("node", "node", "node", back="bf16"))
    total = (g[0] + g[1]) + (g[2] + g[3])
    assert torch.equal(at.to_o(at.to_g(g)), total.bfloat16().float() / 4)
    assert order("2x2", Plan("node", "node", "world", back="bf16")).back == ()


def test_weights_pass_the_casts_of_refresh_and_gather() -> None:
    master = numbers(1)[0]
    assert torch.equal(order("2x2", "zero3").to_weight(master), master)
    narrow = order("2x2", Plan("node", "node", "world", refresh="bf16"))
    assert torch.equal(narrow.to_weight(master), master.bfloat16().float())
    whole = order("2x2", Plan("whole", "node", "world", gather="bf16", refresh="fp32"))
    assert torch.equal(whole.to_weight(master), master), "nothing is gathered from whole"
    assert order("2x2", "zero3", compute="bfloat16").to_weight(master).dtype == torch.bfloat16


def test_a_parameter_of_another_dtype_than_the_rest_sends_its_own() -> None:
    """fp32 adapters in a bf16 model: native formats are theirs."""
    at = Order.of(resolve("2x2", "zero_topo", "bfloat16"), "adapter", (64, 1), "float32")
    assert at.weight == () and torch.equal(at.to_weight(numbers(1)[0]), numbers(1)[0])


def test_small_parameters_are_capped() -> None:
    assert order("2x2x2", "zero3", rows=3).reduce == ((2, "fp32"),)
    assert order("2x2x2", "zero3", rows=1).reduce == ()


class Twice(nn.Module):
    """A weight read twice, one that is frozen, one that only some ranks use."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Parameter(torch.randn(8, 3))
        self.frozen = nn.Parameter(torch.randn(8, 3), requires_grad=False)
        self.some = nn.Parameter(torch.randn(8))
        self.never = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, use: bool) -> Tensor:
        h = torch.tanh(self.twice @ x) + (self.twice * self.frozen) @ x
        return (h * self.some if use else h).sum()


def test_a_step_is_the_mean_over_ranks_of_the_sum_over_micro_batches() -> None:
    torch.manual_seed(0)
    model = Twice()
    batches = [[(torch.randn(3), rank == 1) for _ in range(3)] for rank in range(4)]
    reference = Reference(model, resolve("2x2", "zero_topo"), lambda ps: SGD([p for p in ps if p.requires_grad]))
    losses = reference.step(batches)
    dense = copy.deepcopy(model)
    for rank, k in itertools.product(range(4), range(3)):
        loss = dense(*batches[rank][k])
        assert torch.equal(loss.detach(), losses[rank, k])
        (loss / 4).backward()
    for name, parameter in dense.named_parameters():
        grad = reference.masters[name].grad
        if parameter.grad is None:
            assert grad is None and torch.equal(reference.masters[name], parameter), name
        else:
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-6)
            assert torch.equal(reference.masters[name], parameter.detach() - grad), name
    assert all(p.grad is None for p in model.parameters()), "the model it was given is left alone"


def test_ranks_sit_where_the_topology_puts_them() -> None:
    plain = Topology.parse("2x2")
    moved = Topology(plain.levels, plain.device, order=(0, 2, 1, 3))

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2000))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).sum()

    g = numbers(4)
    for topology, first, second in ((plain, (0, 1), (2, 3)), (moved, (0, 2), (1, 3))):
        reference = Reference(Scale(), resolve(topology, "zero3"), SGD)
        reference.step([[(x,)] for x in g])
        expected = (add(*(g[i] for i in first)) + add(*(g[i] for i in second))) / 4
        assert torch.equal(-reference.masters["weight"].detach(), expected)
