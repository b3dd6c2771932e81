"""How much of a safetensors file is read."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Counting:
    """A safetensors file that counts the elements that are read from it."""

    def __init__(self, file: Any, read: list[int]) -> None:
        self.file, self.read = file, read

    def __enter__(self) -> Counting:
        self.inner = self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.file.__exit__(*error)

    def keys(self) -> Any:
        return self.inner.keys()

    def get_slice(self, name: str) -> Any:
        whole, read = self.inner.get_slice(name), self.read

        class Slice:
            get_shape = whole.get_shape

            def __getitem__(self, rows: Any) -> Tensor:
                part: Tensor = whole[rows]
                read.append(part.numel())
                return part

        return Slice()

    def get_tensor(self, name: str) -> Tensor:
        part: Tensor = self.inner.get_tensor(name)
        self.read.append(part.numel())
        return part
