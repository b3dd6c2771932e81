"""Wire formats: what travels in a hop. Never the compute dtype by accident."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zcompile.machines import RESERVED

_BITS = {"native": 0, "fp32": 32, "bf16": 16}
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
_LATER = ("int8", "int4")

COMPUTE_FORMATS = {"float32": "fp32", "bfloat16": "bf16"}
"""Compute dtypes (torch's names) and the wire format that "native" stands for with each."""


@dataclass(frozen=True)
class WireFormat:
    """A wire format: its name, bits per value, and values per quantisation block (0: none).

    "native" stands for the compute dtype (bits 0 until `resolved`). Make one with `WireFormat.parse`.
    Raises ValueError naming the value and the valid ones.
    """

    name: str
    bits: int
    block: int = 0

    def __post_init__(self) -> None:
        _check(self.name, "wire format")
        if self.bits != _BITS[self.name] or self.block != 0:
            raise ValueError(
                f"wire format {self.name!r}: bits={self.bits!r}, block={self.block!r}; "
                f"valid: bits={_BITS[self.name]}, block=0"
            )

    @classmethod
    def parse(cls, value: str | WireFormat, field: str = "format") -> WireFormat:
        """ "fp32", "bf16", "native", or a WireFormat unchanged. ValueError names `field`, the value, the valid ones."""
        if isinstance(value, WireFormat):
            return value
        _check(value, field)
        return cls(value, _BITS[value])

    def resolved(self, compute: str) -> WireFormat:
        """Itself, or for "native" the format of a compute dtype ("float32" or "bfloat16")."""
        return WireFormat.parse(COMPUTE_FORMATS[compute]) if self.name == "native" else self

    @property
    def torch_name(self) -> str:
        """ "float32" or "bfloat16". ValueError for "native", which names no dtype before `resolved`."""
        if self.name not in _TORCH_NAMES:
            raise ValueError(f"wire format {self.name!r} has no dtype of its own; call resolved(compute) first")
        return _TORCH_NAMES[self.name]

    @property
    def itemsize(self) -> int:
        """Bytes per value. ValueError for "native", as `torch_name`."""
        return self.bits // 8 if self.torch_name else 0


Formats = str | WireFormat | Mapping[str, str | WireFormat] | tuple[tuple[str, WireFormat], ...]
"""What a transfer's field of a Plan takes: one format, or one per level name. Stored: WireFormat or sorted pairs."""


def freeze_formats(field: str, value: object) -> WireFormat | tuple[tuple[str, WireFormat], ...]:
    """The stored, hashable form of a transfer's formats. ValueError names the field, the level and the value."""
    if isinstance(value, (str, WireFormat)):
        return WireFormat.parse(value, field)
    pairs = list(value.items()) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else []
    if not pairs:
        raise ValueError(f"{field}={value!r}: valid: {', '.join(_BITS)}, or a mapping from level name to one of them")
    for level, _ in pairs:
        if not isinstance(level, str) or not level or level in RESERVED:
            raise ValueError(f"{field} names the level {level!r}; valid: level names such as pair, node, cluster")
    return tuple(sorted((level, WireFormat.parse(wire, f"{field}[{level!r}]")) for level, wire in pairs))


def _check(value: object, field: str) -> None:
    if value in _LATER:
        raise ValueError(f"{field}={value!r}: not in this version; valid: {', '.join(_BITS)}")
    if not isinstance(value, str) or value not in _BITS:
        raise ValueError(f"{field}={value!r}: unknown wire format; valid: {', '.join(_BITS)}")
