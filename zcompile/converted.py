"""Checkpoints of transformers whose tensors are not the model's own: renamed, or several of them side by side and one upon another.

A mixture of experts has a tensor for each expert and projection on disk, and one for all of them in the module. transformers keeps the
rules (transformers.conversion_mapping) and applies them to whole tensors; here they say which file's tensor is which part of a
parameter, so that a rank reads the parts, or the rows of them, that it owns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]


class Misfit(ValueError):
    """Tensors that do not make the parameter; the text says why."""


@dataclass(frozen=True)
class Part:
    """One tensor of the files and what it is of a parameter: by itself, element `index` of a stack on dim 0 (None: there is no stack),
    and in that from `offset` on, along `dim`, `size` long. Without a stack and alone it is all of it.
    """

    name: str
    index: int | None = None
    dim: int = 0
    offset: int = 0
    size: int = -1

    def read(self, found: Any, start: int, into: Tensor) -> None:
        """Copy what of it is in the rows from `start` on of the parameter, which `into` [rows, ...] is to have.

        Args:
            found: the opened safetensors file.
        """
        if self.index is not None:
            if start <= self.index < start + len(into):
                row = into[self.index - start]
                (row if self.size < 0 else row.narrow(self.dim, self.offset, self.size)).copy_(
                    found.get_tensor(self.name)
                )
        elif not into.dim():
            into.copy_(found.get_tensor(self.name))
        elif self.size < 0:
            into.copy_(found.get_slice(self.name)[start : start + len(into)])
        elif self.dim:
            into.narrow(self.dim, self.offset, self.size).copy_(found.get_slice(self.name)[start : start + len(into)])
        else:
            begin, end = max(start, self.offset), min(start + len(into), self.offset + self.size)
            if begin < end:
                part = found.get_slice(self.name)[begin - self.offset : end - self.offset]
                into.narrow(0, begin - start, end - begin).copy_(part)


@dataclass(frozen=True)
class Source:
    """What makes one parameter: rows of tensors side by side along `dim`, one row for each element of a stack, or one row alone.

    Attributes:
        misfit: why it cannot be read straight into shards; "" if it can.
    """

    rows: tuple[tuple[str, ...], ...]
    stacked: bool = False
    dim: int = 0
    misfit: str = ""

    @property
    def names(self) -> list[str]:
        return [name for row in self.rows for name in row]

    def placed(self, shapes: Mapping[str, Shape]) -> tuple[Shape, list[Part]]:
        """The shape that they make together, and where each of them is in it.

        Raises:
            Misfit: they do not fit beside one another.
        """
        parts: list[Part] = []
        made: Shape | None = None
        for index, row in enumerate(self.rows):
            shape, offset = list(shapes[row[0]]), 0
            for name in row:
                size = shapes[name][self.dim] if len(row) > 1 and self.dim < len(shape) else -1
                rest = [*shapes[name]]
                if len(row) > 1 and self.dim < len(shape):
                    rest[self.dim] = shape[self.dim]
                if rest != shape:
                    raise Misfit(f"{name!r} of shape {shapes[name]} does not fit beside {row[0]!r}, {tuple(shape)}")
                parts.append(Part(name, index if self.stacked else None, self.dim, offset, size))
                offset += size
            if len(row) > 1:
                shape[self.dim] = offset
            if made is not None and tuple(shape) != made:
                raise Misfit(f"{row[0]!r} and what is beside it has shape {tuple(shape)}, element 0 has {made}")
            made = tuple(shape)
        assert made is not None
        return ((len(self.rows), *made) if self.stacked else made), parts


def sources(model: nn.Module, names: Iterable[str], ours: set[str]) -> tuple[dict[str, Source], list[str]]:
    """What of the files makes which parameter or buffer of `model`, and which of `names` make none.

    Args:
        ours: the names that the model has. Files may have been saved from the bare model, without its head, or the other way round.
    """
    prefix = getattr(model, "base_model_prefix", "")
    renamings, converters = _rules(model)
    found: dict[str, Source] = {}
    unknown: list[str] = []
    joined: dict[str, tuple[Any, dict[str, list[str]]]] = {}

    def own(name: str) -> str | None:
        return next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in ours), None)

    for name in names:
        renamed = name
        for rule in renamings:
            renamed, _ = rule.rename_source_key(renamed)
        for rule in converters:
            target, pattern = rule.rename_source_key(renamed)
            if pattern is not None:
                at = own(target)
                if at is not None:
                    joined.setdefault(at, (rule, {}))[1].setdefault(pattern, []).append(name)
                break
        else:
            at = own(renamed) or own(name)
            if at is not None:
                found.setdefault(at, Source(((name,),)))
        if at is None:
            unknown.append(name)
    for at, (rule, columns) in joined.items():
        found.setdefault(at, _joined(rule, columns))
    return found, unknown


def _rules(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' (renamings, converters) for a model of its; none for others, and before transformers 5."""
    if not hasattr(model, "config") or not any(c.__module__.startswith("transformers.") for c in type(model).__mro__):
        return [], []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    rules: list[Any] = list(get_model_conversion_mapping(model))  # type: ignore[arg-type]
    return [r for r in rules if isinstance(r, WeightRenaming)], [r for r in rules if isinstance(r, WeightConverter)]


def _joined(rule: Any, columns: Mapping[str, Sequence[str]]) -> Source:
    """By the rule's operations: [MergeModulelist(0)], [Concatenate(d)], or the first and then the second (d >= 1)."""
    kinds = [type(operation).__name__ for operation in rule.operations]
    dims = [getattr(operation, "dim", 0) for operation in rule.operations]
    lists = [sorted(columns[p], key=_natural) for p in rule.source_patterns if p in columns]
    whole = len(lists) == len(rule.source_patterns) and len(rule.target_patterns) == 1
    if kinds == ["MergeModulelist"] and dims == [0] and whole and len(lists) == 1:
        return Source(tuple((name,) for name in lists[0]), stacked=True)
    if kinds == ["MergeModulelist", "Concatenate"] and dims[0] == 0 and dims[1] >= 1 and whole:
        if len({len(names) for names in lists}) == 1:
            return Source(tuple(zip(*lists, strict=True)), stacked=True, dim=dims[1] - 1)
        counts = ", ".join(f"{len(names)} like {names[0]}" for names in lists)
        return Source(tuple((name,) for names in lists for name in names), misfit=f"there are {counts}")
    if kinds == ["Concatenate"] and dims[0] >= 0 and whole and all(len(names) == 1 for names in lists):
        return Source((tuple(names[0] for names in lists),), dim=dims[0])
    told = " and ".join(repr(operation) for operation in rule.operations)
    missing = [pattern for pattern in rule.source_patterns if pattern not in columns]
    reason = f"there is none of {', '.join(missing)}" if missing else f"transformers applies {told} to"
    reason += "" if missing else f" {', '.join(name for names in lists for name in names[:1])}, ..."
    return Source(tuple((name,) for names in lists for name in names), misfit=reason)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """experts.2 before experts.10, as transformers sorts them."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
