"""Wire formats: what travels in a hop. Never the compute dtype by accident. docs/wire-format.md says what the bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

from zcompile.kernels.code import BLOCKS, ROUNDINGS, SCALES, Code, lossless_bytes
from zcompile.machines import FP8_CHIPS, RESERVED

_BITS = {"native": 0, "fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "fp8": 8, "lossless": 8}
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
_DELTAS = ("int8", "int4", "lossless")
_PLAIN = tuple(name for name in _BITS if name != "lossless")
_VALID = (
    f"{', '.join(_PLAIN)} (int8, int4 and fp8 with options after slashes, as in int8/128/fp32; "
    f"a refresh also {', '.join(f'{name}-delta' for name in _DELTAS)})"
)

COMPUTE_FORMATS = {"float32": "fp32", "bfloat16": "bf16"}
"""Compute dtypes (torch's names) and the wire format that "native" stands for with each."""


@dataclass(frozen=True)
class WireFormat:
    """A wire format. Make one with `WireFormat.parse`.

    name: native (the compute dtype, until `resolved`), fp32, bf16, int8, int4, fp8, lossless (as a delta only, of bf16 values).
    block, scale, rounding: of the quantised ones, see docs/wire-format.md: values per scale, the scale's dtype, how codes are rounded.
    delta: the message holds what the weights have changed by; a format of the refresh alone.
    fp8: which of the two fp8 codes it is, once `resolved` for a chip.
    Raises ValueError naming the field, its value and the valid ones.
    """

    name: str
    block: int = 0
    scale: str = ""
    rounding: str = ""
    delta: bool = False
    fp8: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _BITS:
            raise ValueError(f"wire format={self.name!r}: unknown wire format; valid: {_VALID}")
        if self.delta and self.name not in _DELTAS:
            raise ValueError(f"wire format {self.name}: delta=True is for {', '.join(_DELTAS)}")
        if self.lossless and not self.delta:
            raise ValueError("wire format 'lossless': it is one of deltas; valid: lossless-delta")
        if not self.quantized:
            if self.block or self.scale or self.rounding:
                raise ValueError(f"wire format {self.name!r}: block, scale and rounding belong to int8, int4 and fp8")
            return
        code = Code(self._kind, self.block or 256, self.scale or "bf16", self.rounding or "nearest")
        for field in ("block", "scale", "rounding"):
            object.__setattr__(self, field, getattr(code, field))

    @classmethod
    def parse(cls, value: str | WireFormat, field: str = "format") -> WireFormat:
        """A name with its options, "int4-delta/128/fp32/stochastic" (in any order after the name), or a WireFormat unchanged.
        ValueError names `field`, the value, the valid ones."""
        if isinstance(value, WireFormat):
            return value
        if not isinstance(value, str):
            raise ValueError(f"{field}={value!r}: unknown wire format; valid: {_VALID}")
        return _parse(value, field)

    @property
    def bits(self) -> int:
        """Bits per value, scales aside; 0 for native before `resolved`."""
        return _BITS[self.name]

    @property
    def quantized(self) -> bool:
        return self.name in ("int8", "int4", "fp8")

    @property
    def lossless(self) -> bool:
        """Native bits in fewer bytes: zcompile.kernels.lossless."""
        return self.name == "lossless"

    @property
    def _kind(self) -> str:
        """Kind of its codes; the two fp8 kinds take equally many bytes, so before `resolved` either will do."""
        return self.fp8 or ("e4m3fn" if self.name == "fp8" else self.name)

    @cached_property
    def code(self) -> Code:
        """How blocks become codes. ValueError for formats that have none, and for fp8 before `resolved`."""
        if not self.quantized or (self.name == "fp8" and not self.fp8):
            raise ValueError(
                f"wire format {self.name!r} has no code; a quantised one has, fp8 once it is resolved for a chip"
            )
        return Code(self._kind, self.block, self.scale, self.rounding)

    def resolved(self, compute: str, chip: str = "") -> WireFormat:
        """Itself; for "native" the format of a compute dtype ("float32" or "bfloat16"), for fp8 the code that the chip has in hardware.

        ValueError for fp8 on a chip that has none, and for a lossless delta of what is not bf16.
        """
        if self.name == "native":
            return WireFormat.parse(COMPUTE_FORMATS[compute])
        if self.lossless and compute != "bfloat16":
            raise ValueError(
                f"wire format 'lossless-delta': it has codes for bfloat16, and weights are computed with in {compute}; valid: native"
            )
        if self.name != "fp8" or self.fp8:
            return self
        found = next((code for prefix, code in FP8_CHIPS.items() if chip.startswith(prefix)), None)
        if found is None:
            raise ValueError(
                f"wire format 'fp8': the chip {chip or 'of this topology'!r} has no fp8 in hardware (only {', '.join(FP8_CHIPS)} have); "
                "use int8, which is as small"
            )
        return replace(self, fp8=found)

    @property
    def whole(self) -> WireFormat:
        """Itself without `delta`: what the code alone says."""
        return replace(self, delta=False) if self.delta else self

    @cached_property
    def text(self) -> str:
        """What `parse` reads, with every option: "bf16", "int8/256/bf16/nearest", "int4-delta/256/bf16/nearest"."""
        if not self.quantized:
            return self.name + "-delta" * self.delta
        kind = f"fp8:{self.fp8}" if self.fp8 else self.name
        return f"{kind}{'-delta' * self.delta}/{self.block}/{self.scale}/{self.rounding}"

    @property
    def short(self) -> str:
        """For people: the name and what differs from the defaults, the block always: "int8/256", "int4-delta/256"."""
        parts = [self.name + "-delta" * self.delta]
        if self.quantized:
            parts += (
                [str(self.block)]
                + [self.scale] * (self.scale != "bf16")
                + [self.rounding] * (self.rounding != "nearest")
            )
        return "/".join(parts)

    @property
    def torch_name(self) -> str:
        """ "float32" or "bfloat16"; "uint8" for those of codes. ValueError for "native", which names no dtype before `resolved`."""
        if self.quantized or self.lossless:
            return "uint8"
        if self.name not in _TORCH_NAMES:
            raise ValueError(f"wire format {self.name!r} has no dtype of its own; call resolved(compute) first")
        return _TORCH_NAMES[self.name]

    def bytes(self, n: int) -> int:
        """Bytes of n values of one parameter in a message: of its record, if it has one (quantised: n is a multiple of the block)."""
        if self.quantized:
            return Code(self._kind, self.block, self.scale).record_bytes(n)
        if self.lossless:
            return lossless_bytes(n)
        return n * self.bits // 8 if self.torch_name else 0


@cache
def _parse(text: str, field: str) -> WireFormat:
    head, *options = text.split("/")
    name, fp8 = (head.split(":")[0], head.split(":")[1]) if head.startswith("fp8:") else (head, "")
    delta = name.endswith("-delta")
    name = name.removesuffix("-delta")
    if name not in _BITS or (delta and name not in _DELTAS) or (name == "lossless" and not delta):
        raise ValueError(f"{field}={text!r}: unknown wire format; valid: {_VALID}")
    given: dict[str, object] = {}
    for option in options:
        if option.isdigit() and int(option) in BLOCKS:
            key, value = "block", int(option)
        elif option in SCALES:
            key, value = "scale", option  # type: ignore[assignment]
        elif option in ROUNDINGS:
            key, value = "rounding", option  # type: ignore[assignment]
        else:
            raise ValueError(
                f"{field}={text!r}: unknown option {option!r}; valid: a block of {', '.join(map(str, BLOCKS))}, "
                f"a scale of {', '.join(SCALES)}, a rounding of {', '.join(ROUNDINGS)}"
            )
        if key in given:
            raise ValueError(f"{field}={text!r}: names its {key} twice")
        given[key] = value
    try:
        return WireFormat(name, delta=delta, fp8=fp8, **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{field}={text!r}: {error}") from None


Formats = str | WireFormat | Mapping[str, str | WireFormat] | tuple[tuple[str, WireFormat], ...]
"""What a transfer's field of a Plan takes: one format, or one per level name. Stored: WireFormat or sorted pairs."""


def freeze_formats(field: str, value: object) -> WireFormat | tuple[tuple[str, WireFormat], ...]:
    """The stored, hashable form of a transfer's formats. ValueError names the field, the level and the value."""
    if isinstance(value, (str, WireFormat)):
        return _for(field, WireFormat.parse(value, field))
    pairs = list(value.items()) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else []
    if not pairs:
        raise ValueError(f"{field}={value!r}: valid: {_VALID}, or a mapping from level name to one of them")
    for level, _ in pairs:
        if not isinstance(level, str) or not level or level in RESERVED:
            raise ValueError(f"{field} names the level {level!r}; valid: level names such as pair, node, cluster")
    named = ((level, f"{field}[{level!r}]", wire) for level, wire in pairs)
    return tuple(sorted((level, _for(where, WireFormat.parse(wire, where))) for level, where, wire in named))


def _for(field: str, wire: WireFormat) -> WireFormat:
    if wire.delta and field.split("[")[0].split()[-1] != "refresh":
        raise ValueError(f"{field}={wire.short!r}: a delta is a format of the refresh; valid here: {', '.join(_PLAIN)}")
    return wire
