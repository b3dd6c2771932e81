"""Which tensor of a checkpoint is which part of a parameter: against transformers' own operations on whole tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from zcompile.converted import Source, _joined


class Opened:
    """Like a safetensors file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get_slice(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def rule(patterns: list[str], operations: list[Any]) -> Any:
    from transformers.core_model_loading import WeightConverter

    return WeightConverter(source_patterns=patterns, target_patterns="fused", operations=operations)


def cases() -> dict[str, tuple[list[Any], dict[str, list[tuple[int, ...]]]]]:
    """name -> (operations, pattern -> shapes of the tensors that match it)"""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    return {
        "stack": ([MergeModulelist(dim=0)], {"e.*.a": [(3, 4)] * 12}),
        "stack of pairs": ([MergeModulelist(dim=0), Concatenate(dim=1)], {"e.*.a": [(3, 4)] * 12, "e.*.b": [(2, 4)] * 12}),
        "stack of pairs by columns": (
            [MergeModulelist(dim=0), Concatenate(dim=2)],
            {"e.*.a": [(3, 4)] * 5, "e.*.b": [(3, 1)] * 5},
        ),
        "stack of vectors": ([MergeModulelist(dim=0), Concatenate(dim=1)], {"e.*.a": [(3,)] * 3, "e.*.b": [(2,)] * 3}),
        "rows": ([Concatenate(dim=0)], {"q": [(4, 3)], "k": [(2, 3)], "v": [(1, 3)]}),
        "columns": ([Concatenate(dim=1)], {"q": [(5, 3)], "k": [(5, 2)]}),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(cases()))
def test_rows_of_parts_are_rows_of_what_transformers_makes(name: str) -> None:
    operations, shapes = cases()[name]
    made = rule(list(shapes), operations)
    tensors = {
        pattern.replace("*", str(number)): torch.randn(shape)
        for pattern, all_of in shapes.items()
        for number, shape in enumerate(all_of)
    }
    columns = {p: [p.replace("*", str(n)) for n in range(len(all_of))] for p, all_of in shapes.items()}
    given: Any = {p: [tensors[n] for n in names] for p, names in columns.items()}
    for operation in operations:
        given = operation.convert(copy.copy(given), source_patterns=made.source_patterns, target_patterns=["fused"])
    expected = given["fused"]
    # in any order, as files have them
    source = _joined(made, {p: sorted(names, reverse=True) for p, names in columns.items()})
    assert not source.misfit
    shape, parts = source.placed({n: tuple(t.shape) for n, t in tensors.items()})
    assert shape == tuple(expected.shape) and sorted(part.name for part in parts) == sorted(tensors)
    for start in range(len(expected)):
        for rows in range(len(expected) - start + 1):
            into = torch.full((rows, *expected.shape[1:]), torch.nan)
            for part in parts:
                part.read(Opened(tensors), start, into)
            assert torch.equal(into, expected[start : start + rows])


def test_one_tensor_alone_is_the_parameter() -> None:
    for value in (torch.tensor(3.0), torch.randn(5), torch.randn(4, 2, 3)):
        shape, (part,) = Source((("a",),)).placed({"a": tuple(value.shape)})
        assert shape == tuple(value.shape)
        into = torch.empty_like(value[1:3] if value.dim() else value)
        part.read(Opened({"a": value}), 1, into)
        assert torch.equal(into, value[1:3] if value.dim() else value)


def test_operations_that_move_values_are_told() -> None:
    from transformers.core_model_loading import Transpose

    source = _joined(rule(["e.*.a"], [Transpose(0, 1)]), {"e.*.a": ["e.0.a"]})
    assert "Transpose" in source.misfit and "e.0.a" in source.misfit and source.names == ["e.0.a"]
