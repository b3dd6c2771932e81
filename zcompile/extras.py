"""What a user hands over with a checkpoint (`extra`, `own`), so that it comes back equal.

torch.distributed.checkpoint takes nested mappings apart into entries named by their path: keys become text, and a mapping without entries
leaves no trace ({30: 1}, the milestones of a scheduler, would be {"30": 1} after a load). So the values go in as one entry,

    {"(values)": (everything but tensors,), "(tensors)": {"0": tensor, ...}}

a tuple, which is not taken apart, with the number of a tensor (a scalar tensor: nothing else there is one) in the place of each; and the
tensors as entries of their own, sharded where they are DTensors. Nothing of it is a pickle of more than plain data: see Note [Pickles]
in zcompile.storage.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

VALUES, TENSORS = "(values)", "(tensors)"


def pack(argument: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint holds of `given`: a copy but for its tensors. {} if there is nothing.

    Raises:
        TypeError: `argument` and the key of what could not be loaded again without unpickling objects.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}={given!r}: must be a dict")
    tensors: dict[str, Tensor] = {}

    def number(tensor: Tensor) -> Tensor:
        if argument == "own" and isinstance(tensor, DTensor):
            raise TypeError("a DTensor belongs to all ranks: give it as extra")
        tensors[str(len(tensors))] = tensor
        return torch.tensor(len(tensors) - 1)

    values = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise TypeError(f"{argument}: the key {key!r} must be text")
        try:
            values[key] = _copied(_each(value, number))
        except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
            raise TypeError(
                f"{argument}[{key!r}] is a {type(value).__name__} that a checkpoint does not hold: give numbers, text, containers and "
                f"tensors ({str(error).splitlines()[0]})"
            ) from error
    return {VALUES: (values,), TENSORS: tensors} if values else {}


def unpack(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `pack` was given, of what a checkpoint has: entries that zcompile.save has not packed stay as they are nested."""
    if VALUES not in found:
        return dict(found)
    (values,) = found[VALUES]
    tensors = found.get(TENSORS, {})
    out: dict[str, Any] = _each(values, lambda number: tensors[str(int(number))])
    return out


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with `change` done to each tensor in it; other containers than these hold none."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _each(each, change)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(_each(each, change) for each in value)
    return value


def _copied(value: Any) -> Any:
    """The value as it will be loaded."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def digests(given: Mapping[str, Any] | None) -> list[int]:
    """Two words for each key, in order: of the key, and of what it holds. Equal on two ranks that were given the same; of a DTensor only
    shape and dtype count."""
    return [word for key in sorted(given or {}) for word in (_word(key), _word(_text((given or {})[key])))]


def differing(given: Mapping[str, Any] | None, rows: list[list[int]]) -> list[str]:
    """Keys of rank 0's `given` that some rank has not, or has otherwise.

    Args:
        rows: every rank's `digests`.
    """
    held = [dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
    return [
        key for key in sorted(given or {}) if any(other.get(_word(key)) != held[0].get(_word(key)) for other in held)
    ]


def _word(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def _text(value: Any) -> str:
    """Equal for equal values, whatever order a set or the hashes of this process have."""
    if isinstance(value, DTensor):
        return f"DTensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1)
        data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} {sorted((_text(key), _text(each)) for key, each in value.items())}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} {[_text(each) for each in value]}"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__} {sorted(map(_text, value))}"
    return f"{type(value).__name__} {value!r}"
