"""Meta start: a model that is too large for one process is built without memory, and gets its values parameter by parameter.

    with zcompile.deferred_init():
        model = GPT(config)                  # shapes only; what the constructor does to tensors is written down
    model = hierarchical_zero(model, ...)    # done here, one whole tensor at a time, of which each rank keeps its shard

Note [Replay]: the same operations run in the same order from the same random state, on whole tensors, on every rank: so the weights are
those of the plain constructor to the bit, whatever the mesh. A tensor is given up when the last operation that touches it has run, or when
the next one writes all of it anew (a constructor's own `normal_` over a Linear's default), so that a few parameters live at once. Operands
are written down as stretches of storages, not as objects: what views, Parameters and tied weights share needs no care.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from zcompile._torch_compat import init_call, storage_key

_RECORDED: Any = WeakTensorKeyDictionary()
"""parameter or buffer -> the recording in which it was made"""
_OVERWRITES = {
    "normal_",
    "uniform_",
    "zero_",
    "fill_",
    "random_",
    "exponential_",
    "log_normal_",
    "cauchy_",
    "geometric_",
    "copy_",
}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_GIVEN = (torch.tensor, torch.as_tensor, torch.asarray)


class Part(NamedTuple):
    """A tensor: a stretch of the storage numbered `storage`."""

    storage: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass
class _Call:
    function: Callable[..., Any]
    arguments: Any
    """(args, kwargs), with Parts for tensors on the meta device."""
    outputs: list[Part]
    reads: set[int]
    writes: set[int]
    """Storages that it makes or writes to."""
    overwrites: set[int]
    """Storages of which nothing is left that was there before."""


@dataclass
class Recording:
    """Operations on tensors that have no values yet, and the random states from which they start."""

    calls: list[_Call] = field(default_factory=list)
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    """By address, kept so that no other gets the same; on the meta device they take no memory."""
    peak: int = 0
    """Bytes of whole tensors that were alive at once in the last replay."""
    random: dict[str, Tensor] = field(default_factory=lambda: _random_states())

    def part(self, tensor: Tensor) -> Part:
        storage = tensor.untyped_storage()
        self.storages[storage_key(storage)] = storage
        return Part(storage_key(storage), tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def note(self, function: Any, args: Any, kwargs: Any, outputs: Any, writes: list[Tensor], whole: bool) -> None:
        """Write a call down. `whole`: it fills what it writes to, reading nothing of it."""
        out = [self.part(t) for t in tree_flatten(outputs)[0] if _empty(t)]
        reads = {self.part(t).storage for t in tree_flatten((args, kwargs))[0] if _empty(t)}
        written = {self.part(t).storage for t in writes if _empty(t)} | {
            part.storage for part in out if part.storage not in reads
        }
        if not written:
            return  # a view, or what tells of a tensor
        arguments = tree_map_only(Tensor, lambda t: self.part(t) if _empty(t) else t, (args, kwargs))
        covered = {
            self.part(t).storage for t in writes if _empty(t) and t.numel() * t.itemsize == t.untyped_storage().nbytes()
        }
        others = [self.part(t).storage for t in tree_flatten((args, kwargs))[0] if _empty(t)]
        overwrites = {storage for storage in covered if whole and others.count(storage) == 1}
        self.calls.append(_Call(function, arguments, out, reads, written, overwrites | (written - reads)))

    def written(self) -> set[int]:
        return {storage for call in self.calls for storage in call.writes}

    def replay(
        self, device: torch.device, take: Callable[[int, torch.UntypedStorage], None], wanted: set[int], exact: bool
    ) -> None:
        """Run everything, and hand each storage in `wanted` to `take` when it has all its values.

        Args:
            exact: run what makes tensors that are not wanted too: it draws random numbers before those that are.
        """
        needed, calls = set(wanted), []
        for call in reversed(self.calls):
            if exact or call.writes & needed:
                needed |= call.reads
                calls.append(call)
        calls.reverse()
        touches: dict[int, list[int]] = {}
        for number, call in enumerate(calls):
            for storage in call.reads | call.writes:
                touches.setdefault(storage, []).append(number)
        live: dict[int, torch.UntypedStorage] = {}
        self.peak = 0
        for call in calls:
            self._run(call, device, live)
            self.peak = max(self.peak, sum(storage.nbytes() for storage in live.values()))
            for storage in call.reads | call.writes:
                touches[storage].pop(0)
                if not touches[storage]:
                    if storage in wanted:
                        take(storage, live[storage])
                    live.pop(storage, None)
                elif storage in calls[touches[storage][0]].overwrites:
                    live.pop(storage, None)

    def _run(self, call: _Call, device: torch.device, live: dict[int, torch.UntypedStorage]) -> None:
        def real(value: Any) -> Any:
            if isinstance(value, torch.device) and value.type == "meta":
                return device
            if not isinstance(value, Part):
                return value
            if value.storage not in live:
                if value.storage not in call.writes:
                    raise RuntimeError(
                        f"a model's start reads a tensor of shape {tuple(value.shape)} that has no values: it was made on the meta device "
                        "outside of zcompile.deferred_init(), or never filled"
                    )
                live[value.storage] = torch.UntypedStorage(self.storages[value.storage].nbytes(), device=device)
            return tensor_of(value, live[value.storage], device)

        is_part = lambda value: isinstance(value, Part)  # noqa: E731 (a Part is a tuple too)
        args, kwargs = torch.utils._pytree.tree_map(real, call.arguments, is_leaf=is_part)
        with torch.no_grad():
            outputs = [t for t in tree_flatten(call.function(*args, **kwargs))[0] if isinstance(t, Tensor)]
        for part, output in zip(
            call.outputs, outputs, strict=bool(call.outputs)
        ):  # those of nn.init's functions are not noted
            if part.storage in live:
                continue
            same = (output.stride(), output.storage_offset(), output.dtype) == (part.stride, part.offset, part.dtype)
            if not same:  # a device that lays its result out in another way than the meta device says
                new = torch.UntypedStorage(self.storages[part.storage].nbytes(), device=device)
                output = tensor_of(part, new, device).copy_(output)
            live[part.storage] = output.untyped_storage()


def tensor_of(part: Part, storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    found: Tensor = torch.empty(0, dtype=part.dtype, device=device).set_(storage, part.offset, part.shape, part.stride)  # type: ignore[call-overload]
    return found


def _empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher: tensors of given data, and torch.nn.init's functions that compute on values."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _GIVEN and kwargs.get("device") is None:
            given = func(*args, **{**kwargs, "device": "cpu"})
            # Without data there is nothing to write down; and transformers asks torch.tensor([]).device whether values matter.
            return given.to("meta") if given.numel() else given
        if (call := init_call(func)) is not None:
            function, arguments = call
            filled = [value for value in arguments.values() if isinstance(value, Tensor)]
            self.recording.note(function, (), arguments, None, filled, whole=True)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = func._schema
        name = schema.name.split("::")[-1]
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        writes = [
            tensor
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_flatten(given.get(argument.name))[0]
            if isinstance(tensor, Tensor)
        ]
        factory = "dtype" in {argument.name for argument in schema.arguments} and isinstance(out, Tensor)
        if (
            factory
            and kwargs.get("dtype") is None
            and not any(isinstance(value, Tensor) for value in tree_flatten(args)[0])
        ):
            kwargs = {**kwargs, "dtype": out.dtype}  # not what the default is when it is run
        if name not in _EMPTY:
            self.recording.note(func, args, kwargs, out, writes, name in _OVERWRITES)
        return out


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """What happens to tensors on the meta device, inside, is written down."""
    found = Recording()
    with _Functions(found), _Operations(found):
        yield found


@contextlib.contextmanager
def deferred_init() -> Iterator[None]:
    """Build a model on the meta device, remembering what its constructor does to its tensors; `hierarchical_zero` does it later, shard by
    shard, from the random state at the beginning of this block: the weights are those of the plain constructor, to the bit.

    The random state afterwards is the one that the plain constructor would have left, if nothing was drawn in between. A constructor that
    reads values (`.item()`) cannot run on the meta device and raises torch's error.
    """

    def keep(module: nn.Module, name: str, value: Any) -> None:
        if _empty(value) and value not in _RECORDED:
            _RECORDED[value] = found

    hooks = [register_module_parameter_registration_hook(keep), register_module_buffer_registration_hook(keep)]
    try:
        with torch.device("meta"), recording() as found:
            yield
    finally:
        for hook in hooks:
            hook.remove()


# -- starting ------------------------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a tensor of the model hangs."""

    name: str
    module: nn.Module
    attribute: str
    kind: str
    """"parameter", "buffer" or "attribute"."""


class Start:
    """How a model on the meta device gets its values: made before it is sharded, run afterwards.

    Args:
        init: called with the model instead of its own initialisers; None: what `deferred_init` recorded, else the model's `init_weights()`
            (as transformers has it), else every module's `reset_parameters()`, children first.
    """

    def __init__(self, model: nn.Module, init: Callable[[nn.Module], Any] | None) -> None:
        places = _places(model)
        made = {id(r): r for p, t in places if p.kind != "attribute" and (r := _RECORDED.get(t)) is not None}
        if len(made) > 1:
            raise ValueError(
                "hierarchical_zero: parts of the model come from several deferred_init() blocks; build all of it in one"
            )
        self.recorded = next(iter(made.values()), None) if init is None else None
        if self.recorded is None:
            with torch.device("meta"), recording() as found:
                (init or _initialise)(model)
        self.recording = self.recorded or found
        self.parts = [(place, self.recording.part(tensor)) for place, tensor in places]
        written = self.recording.written()
        self.parts = [(p, part) for p, part in self.parts if p.kind != "attribute" or part.storage in written]
        self.missing = [p for p, part in self.parts if part.storage not in written and part.shape.numel()]

    def check(self, given: set[str]) -> None:
        """Raise ValueError if a tensor gets no value and is none of `given`."""
        missing = [place for place in self.missing if place.name not in given]
        if missing:
            first = missing[0]
            more = (
                f" (and {len(missing) - 1} more: {', '.join(p.name for p in missing[1:4])})" if len(missing) > 1 else ""
            )
            raise ValueError(
                f"{first.kind} {first.name!r} of a {type(first.module).__name__} has no initial value{more}: the model was built on the "
                "meta device and this module has no reset_parameters(). Build it under `with zcompile.deferred_init():`, give the class a "
                "reset_parameters(), or pass init=, a function of the model."
            )

    def run(self, device: torch.device, give: Callable[[str, Tensor], None], given: set[str]) -> None:
        """Make every tensor: `give(name, whole)` takes parameters, buffers go to their modules. Parameters `given` are not made."""
        by_storage: dict[int, list[tuple[_Place, Part]]] = {}
        for place, part in self.parts:
            if place.name not in given or place.kind != "parameter":
                by_storage.setdefault(part.storage, []).append((place, part))

        def take(number: int, storage: torch.UntypedStorage) -> None:
            for place, part in by_storage[number]:
                tensor = tensor_of(part, storage, device)
                if place.kind == "parameter":
                    give(place.name, tensor)
                elif place.kind == "buffer":
                    place.module._buffers[place.attribute] = tensor
                else:
                    setattr(place.module, place.attribute, tensor)

        now = _random_states()
        _set_random_states(self.recording.random)
        self.recording.replay(device, take, set(by_storage), exact=not given)
        if given or not all(torch.equal(now[key], state) for key, state in self.recording.random.items()):
            _set_random_states(now)
        for place, part in self.parts:
            if place.kind == "buffer" and _empty(
                place.module._buffers[place.attribute]
            ):  # no elements, or among those given
                place.module._buffers[place.attribute] = torch.zeros(part.shape, dtype=part.dtype, device=device)


def _places(model: nn.Module) -> list[tuple[_Place, Tensor]]:
    """Every tensor of the model that has no values: parameters once, by their first name."""
    found: list[tuple[_Place, Tensor]] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for kind, held in (("parameter", module._parameters), ("buffer", module._buffers), ("attribute", vars(module))):
            for attribute, tensor in held.items():
                if _empty(tensor) and not (kind == "parameter" and id(tensor) in seen):
                    seen.add(id(tensor))
                    found.append((_Place(dot + attribute, module, attribute, kind), tensor))
    return found


def _initialise(model: Any) -> None:
    """The model's own way to give itself values, run on the meta device."""
    for whole in (
        "initialize_weights",
        "init_weights",
    ):  # transformers' init_weights does nothing where the default device is meta
        if callable(getattr(model, whole, None)):
            getattr(model, whole)()
            return

    def reset(module: Any) -> None:
        method = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(method):
            method()

    model.apply(reset)
