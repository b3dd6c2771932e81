"""What a model computes: its operations in order, when each parameter is read and its gradient is there, what is kept for backward.

One forward and backward run on fake tensors, eagerly and without a process group: no memory, no device, seconds for 20 B parameters. What
the model does there (checkpointing of its own included) is what is priced, by the times of zcompile.times; chains of pointwise operations
count as fused, as the code generator makes them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zcompile import times
from zcompile._torch_compat import FakeTensorMode, TorchDispatchMode, storage_key
from zcompile.machines import Device
from zcompile.params import named_owners
from zcompile.shapes import SHAPES, Decoder


class WorkloadError(ValueError):
    """The model cannot be built or run on fake tensors: says why."""


@dataclass
class Op:
    """One operation: FLOPs, bytes that it reads (with the operation that made each value, -1 for none) and writes, dtype of its result,
    elements of parameters that it multiplies with."""

    flops: float
    reads: list[tuple[int, int]]
    writes: int
    dtype: str
    pointwise: bool
    free: bool
    weights: int = 0
    users: list[int] = field(default_factory=list)


@dataclass
class Use:
    """When a parameter is needed, as numbers of operations; -1: never. `gradient`: the operation after which its gradient is whole.
    `product`: whether matrix products and the like read it; a lookup is none."""

    name: str
    forward: int = -1
    backward: int = -1
    gradient: int = -1
    product: bool = False


@dataclass
class Workload:
    """A micro-batch of a model on one device, unsharded.

    Attributes:
        name: of the model.
        module: on the meta device.
        compute: parameter -> dtype in which it is gathered.
        ops: forward and backward, in order; `split` is the first of the backward.
        uses: parameter -> when it is needed.
        live: bytes that are alive after each operation, parameters and their gradients left out.
        tokens: of the micro-batch; 0 where it has none.
        inputs: what it was run on: see `of_module`.
    """

    name: str
    module: nn.Module
    compute: dict[str, torch.dtype]
    ops: list[Op]
    split: int
    uses: dict[str, Use]
    live: list[int]
    tokens: int = 0
    inputs: Any = None

    def example(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Example inputs (args, kwargs) on the meta device."""
        with torch.device("meta"):
            args, keywords = self.inputs() if callable(self.inputs) else (tuple(self.inputs), {})
        return tuple(_meta(value) for value in args), {key: _meta(value) for key, value in keywords.items()}

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def flops(self) -> float:
        """Of forward and backward, recomputation included."""
        return sum(op.flops for op in self.ops)

    @property
    def activations(self) -> int:
        """Bytes kept from forward for backward."""
        return self.live[self.split - 1] if self.split else 0

    @property
    def peak(self) -> int:
        """Most bytes alive at once."""
        return max(self.live, default=0)

    def seconds(self, device: Device) -> list[float]:
        """Of each operation on a device."""

        def inside(number: int) -> bool:
            op = self.ops[number]
            return op.pointwise and bool(op.users) and all(self.ops[user].pointwise for user in op.users)

        hidden = [inside(number) for number in range(len(self.ops))]
        found = []
        for number, op in enumerate(self.ops):
            moved = sum(size for size, maker in op.reads if maker < 0 or not hidden[maker])
            moved += 0 if hidden[number] else op.writes
            found.append(0.0 if op.free else times.roofline(device, op.flops, moved, op.dtype))
        return found

    def clock(self, device: Device) -> list[float]:
        """Seconds at which each operation begins, and at the end that at which the last is over; computing alone."""
        if device not in self._clocks:
            self._clocks[device] = list(accumulate(self.seconds(device), initial=0.0))
        return self._clocks[device]

    @cached_property
    def _clocks(self) -> dict[Device, list[float]]:
        return {}


def of_module(
    name: str,
    module: nn.Module,
    inputs: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]] | Sequence[Any],
    compute_dtype: torch.dtype | None = None,
) -> Workload:
    """Run `module` on fake tensors, forward and backward.

    Args:
        module: its parameters may be on the meta device; nothing of it is changed.
        inputs: example inputs of one micro-batch (their values do not matter, tensors are faked), or a function that makes (args, kwargs)
            in a fake mode.
        compute_dtype: of the weights and of floating inputs; None: the parameters' own.

    Raises:
        WorkloadError: the model does not run on fake tensors (it looks at values, say), or has no loss to differentiate.
    """
    owners = named_owners(module)
    names = {parameter: found[0][0] for parameter, found in owners.items()}
    compute = {name: compute_dtype or parameter.dtype for parameter, name in names.items()}
    try:
        with FakeTensorMode():
            args, keywords = _example(inputs, compute_dtype)
            fakes = {
                names[parameter]: nn.Parameter(
                    torch.empty(parameter.shape, dtype=compute[names[parameter]]), requires_grad=parameter.requires_grad
                )
                for parameter in owners
            }
            recorder = _Recorder(fakes)
            with _swapped(module, owners, fakes, compute_dtype, recorder), recorder:
                loss = _loss(module(*args, **keywords))
                recorder.begin_backward()
                loss.backward()
    except WorkloadError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise WorkloadError(
            f"model {name!r} does not run on fake tensors, which the planner needs to see what it computes: "
            f"{type(error).__name__}: {text[0] if text else ''}"
        ) from error
    tokens = times.tokens_in((args, keywords))
    return Workload(name, module, compute, recorder.ops, recorder.split, recorder.uses, recorder.live, tokens, inputs)


@contextlib.contextmanager
def _swapped(
    module: nn.Module, owners: Any, fakes: Mapping[str, nn.Parameter], dtype: torch.dtype | None, recorder: _Recorder
) -> Iterator[None]:
    """Fake parameters and buffers in their places for a while: of the backward too, in which checkpointed parts run again."""
    put: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for found in owners.values():
            for _, owner, attribute in found:
                put.append((owner._parameters, attribute, owner._parameters[attribute]))
                owner._parameters[attribute] = fakes[found[0][0]]
        for owner in module.modules():
            for attribute, buffer in owner._buffers.items():
                if buffer is not None:
                    kind = dtype if dtype and buffer.is_floating_point() else buffer.dtype
                    put.append((owner._buffers, attribute, buffer))
                    owner._buffers[attribute] = torch.empty(buffer.shape, dtype=kind)
        recorder.ignore(place[attribute] for place, attribute, _ in put)
        yield
    finally:
        for place, attribute, value in put:
            place[attribute] = value


def _example(inputs: Any, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    args, keywords = inputs() if callable(inputs) else (tuple(inputs), {})

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        kind = dtype if dtype and value.is_floating_point() else value.dtype
        return torch.empty(value.shape, dtype=kind)

    return tuple(fake(value) for value in args), {key: fake(value) for key, value in keywords.items()}


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _loss(output: Any) -> Tensor:
    """What a training loop would differentiate: `.loss`, else the first scalar, else the sum of the first floating tensor."""
    found = getattr(output, "loss", None)
    values = [found] if isinstance(found, Tensor) else list(output.values()) if isinstance(output, dict) else output
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    tensors = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    if not tensors:
        raise WorkloadError("the model's output has no tensor that requires a gradient: there is nothing to train")
    return next((value for value in tensors if value.dim() == 0), tensors[0].sum())


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        self.ops: list[Op] = []
        self.live: list[int] = []
        self.split = 0
        self.uses = {name: Use(name) for name in parameters}
        self._maker: dict[int, int] = {}
        self._names = {storage_key(parameter): name for name, parameter in parameters.items()}
        self._known: set[int] = set()
        self._bytes = 0
        self._backward = False
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient_of(name))

    def ignore(self, values: Any) -> None:
        """Storages that are not counted as alive: parameters and buffers."""
        self._known.update(storage_key(value) for value in values)

    def begin_backward(self) -> None:
        self.split, self._backward = len(self.ops), True

    def _gradient_of(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self.uses[name].gradient = len(self.ops) - 1
            parameter.grad = None  # reduced, and gone

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "namespace", "") == "prim":
            return out
        number = len(self.ops)
        inputs = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        outputs = [v for v in torch.utils._pytree.tree_leaves(out) if isinstance(v, Tensor)]
        product, weights = times.is_product(func), 0
        for value in inputs:
            weights += self._needed(value, number, product)
            maker = self._maker.get(id(value), -1)
            if maker >= 0:
                self.ops[maker].users.append(number)
        reads = {id(v): (times.value_bytes(v), self._maker.get(id(v), -1)) for v in inputs}
        count = times.flops(func, args, kwargs, out)
        self.ops.append(
            Op(count, list(reads.values()), times.value_bytes(outputs), times.value_dtype(outputs), times.is_pointwise(func),
               times.is_free(func), weights)
        )  # fmt: skip
        for value in outputs:
            self._maker[id(value)] = number
            self._alive(value)
        self.live.append(self._bytes)
        return out

    def _needed(self, value: Tensor, number: int, product: bool) -> int:
        """Notes that an operation reads a parameter, if it is one; returns how many of its elements a product does."""
        name = self._names.get(storage_key(value))
        if name is None:
            return 0
        use = self.uses[name]
        use.product |= product
        if self._backward:
            use.backward = number if use.backward < 0 else use.backward
        else:
            use.forward = number if use.forward < 0 else use.forward
        return value.numel() if product else 0

    def _alive(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage_key(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._bytes += size

        def gone() -> None:
            self._bytes -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


MODELS = "a named shape, the folder or file of a transformers config, or file.py:function that returns (module, inputs)"


def of_text(
    text: str,
    sequence: int | None = None,
    micro_batch: int = 1,
    compute_dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
) -> Workload:
    """The workload of a model that is named.

    Args:
        text: see MODELS.
        sequence: tokens per sample (None: the model's own).
        recompute: activations of each block are computed again in backward; for a module of your own, do that in it.

    Raises:
        WorkloadError: an unknown model, a sequence that it has not, or what `of_module` raises.
    """
    if micro_batch < 1:
        raise WorkloadError(f"micro-batch {micro_batch}: must be a number of samples from 1")
    if ".py:" in text:
        return _of_file(text, compute_dtype)
    if text in SHAPES:
        shape = SHAPES[text]
        length = sequence or shape.sequence
        if not 1 <= length <= shape.sequence:
            raise WorkloadError(f"sequence {length}: {text} has 1 to {shape.sequence} tokens")
        with torch.device("meta"):
            module: nn.Module = Decoder(shape, recompute)

        def tokens() -> Any:
            return (torch.zeros(micro_batch, length + 1, dtype=torch.int64),), {}

        found = of_module(text, module, tokens, compute_dtype)
        found.tokens = micro_batch * length
        return found
    if Path(text).exists():
        return _of_config(text, sequence, micro_batch, compute_dtype, recompute)
    raise WorkloadError(f"model {text!r}: known shapes are {', '.join(SHAPES)}; else {MODELS}")


def _of_file(text: str, compute_dtype: torch.dtype) -> Workload:
    from zcompile.bench.systems import load

    make = load("model", text)
    try:
        with torch.device("meta"):
            module, inputs = make()
    except Exception as error:
        raise WorkloadError(
            f"model {text!r}: {type(error).__name__}: {error}; it must return (module, inputs)"
        ) from error
    return of_module(text, module, inputs, compute_dtype)


def _of_config(text: str, sequence: int | None, micro_batch: int, dtype: torch.dtype, recompute: bool) -> Workload:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise WorkloadError(
            f"model {text!r}: a transformers config needs transformers: pip install transformers"
        ) from None
    try:
        config: Any = AutoConfig.from_pretrained(text)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
        if recompute:
            module.gradient_checkpointing_enable({"use_reentrant": False})
        module.train()
    except Exception as error:
        raise WorkloadError(f"model {text!r}: {type(error).__name__}: {error}") from error
    length = sequence or getattr(config, "max_position_embeddings", 0) or 0
    if length < 1:
        raise WorkloadError(f"model {text!r}: its config has no max_position_embeddings; give --seq")

    def inputs() -> Any:
        ids = torch.zeros(micro_batch, length, dtype=torch.int64)
        return (), {"input_ids": ids, "labels": ids, "use_cache": False}

    return of_module(text, module, inputs, dtype)
