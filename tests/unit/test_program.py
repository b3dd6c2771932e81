"""How a compiled graph is called: past autograd's kernels where it holds torch's operations and ours alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from zcompile._torch_compat import FakeTensorMode
from zcompile.passes.nodes import foreign
from zcompile.program import Program


@torch.library.custom_op("zcompile_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


twice.register_fake(torch.empty_like)


def graph(function: Any) -> torch.fx.Graph:
    return make_fx(function)(torch.ones(4)).graph


def test_operations_of_torch_and_ours_are_not_foreign() -> None:
    def function(x: Tensor) -> Tensor:
        sent = torch.ops._c10d_functional.all_gather_into_tensor(x.split(2)[0], 2, "group")
        whole = torch.ops._c10d_functional.wait_tensor(sent)
        message = torch.ops.zcompile_kernels.quantize([whole], "[1,0,[[4,4]]]", "int8/32/bf16/nearest")
        return torch.ops.prims.convert_element_type(message, torch.float32)

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert foreign(graph(function)) == []


def test_custom_operations_and_those_that_take_functions_are() -> None:
    assert [node.target for node in foreign(graph(lambda x: twice(x) + x))] == [torch.ops.zcompile_tests.twice.default]
    branch = graph(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))
    assert [node.target for node in foreign(branch)] == [torch.ops.higher_order.cond]


@pytest.mark.parametrize("direct", [True, False])
def test_a_direct_program_is_dispatched_past_autograd(direct: bool) -> None:
    seen = []

    def code(inputs: list[Any]) -> Any:
        seen.append(torch._C._dispatch_tls_is_dispatch_key_excluded("AutogradFunctionality"))
        return inputs[0] + 1

    class Stub(SimpleNamespace):
        """Which a program may hold weakly."""

    nothing = SimpleNamespace(enter=lambda program: None, program=lambda program: None, compiled=frozenset())
    engine: Any = Stub(course=nothing, traffic=nothing, reads=nothing, runtime=None, running=None)
    program = Program("forward 0", "forward", engine, code, [], {}, {})
    program.direct = direct
    assert program([torch.ones(1)]).item() == 2.0
    assert seen == [direct]
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded("AutogradFunctionality"), "and afterwards it is as before"
