"""The front end: reading `module.weight` inside a forward yields the whole weight.

Each module that owns parameters gets a subclass of its class with one property per parameter. Outside a forward the property is the
master DTensor; inside, `zcompile::gather` when Dynamo traces, the same transfer at once when nothing does; and so it is where activation
checkpointing runs a part of the forward again inside the backward. Subclasses are made once
per (class, parameter names), never per instance, or equal blocks would compile once each.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zcompile._torch_compat import keep_out_of_graphs, never_compile_alone, outer_backend, wrap_local
from zcompile.eager import read, read_again
from zcompile.engine import READING, Engine, recomputing
from zcompile.ops import ACCUMULATE, NONE
from zcompile.params import Slot, wrap_plain

_NO_COPY = (
    "zcompile: a wrapped model cannot be {}: its masters live on all ranks. Use zcompile.full_state_dict(model) or model.state_dict(); "
    "for an EMA keep {{name: p.detach().clone() for name, p in model.named_parameters()}}."
)


def _weight(name: str) -> property:
    def get(self: Any) -> Tensor:
        slot: Slot = self._zc_slots[name]
        if READING.engine != slot.engine:
            call = None if torch.compiler.is_compiling() else recomputing(slot)
            return self._parameters[name] if call is None else read_again(slot, call)
        if torch.compiler.is_compiling():
            leaf = slot.token if READING.phase == ACCUMULATE else slot.leaf
            states = slot.states if READING.phase != NONE else []
            return torch.ops.zcompile.gather(leaf, slot.unit.copy, slot.main, states, slot.text, READING.phase)
        return read(slot)

    return property(never_compile_alone(get))


def _forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward under a code object of ours: a frame at which Dynamo starts, even if the class is one of torch's own."""

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    return forward


def _flat_weights(self: nn.RNNBase) -> list[Tensor]:
    """RNNs keep a list of their parameters made at construction: read them anew."""
    return [getattr(self, name) for name in self._flat_weights_names]


@functools.cache
def _subclass(cls: Any, names: tuple[str, ...], root: bool) -> type[nn.Module]:
    body: dict[str, Any] = {name: _weight(name) for name in names}
    body.update(__qualname__=cls.__qualname__, __module__=cls.__module__, __doc__=cls.__doc__)
    if issubclass(cls, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, lambda self, value: None)
    if root:
        body["forward"] = _forward(cls.forward)
    bases: tuple[type, ...] = (Root, cls) if root else (cls,)
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, bases, body)


class Root:
    """What the wrapped model itself can do beside being a module."""

    _zc_engine: Engine

    @property
    def zero(self) -> Engine:
        """The engine: plan, units, traffic."""
        return self._zc_engine

    @keep_out_of_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Only what is called `forward` here may be seen by Dynamo: the rest keeps itself out."""
        engine = self._zc_engine
        if READING.engine == engine.key:  # a forward that calls the model again reads the same weights
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        outer = outer_backend()
        forward = engine.compiled
        if forward is None or getattr(outer, "is_hierarchical_zero", False):
            forward = super().__call__  # type: ignore[misc]
        if engine.cast_inputs is not None:
            args, kwargs = _cast((args, kwargs), engine.cast_inputs)
        token = engine.begin(eager=engine.compiled is None and outer is None)
        try:
            output = forward(*args, **kwargs)
        except BaseException as error:
            engine.broke_off(token, error)
            raise
        return engine.end(token, output)

    def set_requires_gradient_sync(self, value: bool) -> None:
        """Whether the backward of the forwards from now on is a synchronising one.

        With False gradients are still reduced up to the plan's gradient level and added up there; only the hops beyond are saved
        for the last micro-batch. (FSDP2's False stops all communication and keeps whole gradients.)
        """
        if not isinstance(value, bool):
            raise TypeError(f"set_requires_gradient_sync({value!r}): must be True or False")
        self._zc_engine.synchronising = value

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards inside accumulate; their backwards may run outside: the phase is fixed at forward."""
        engine = self._zc_engine
        before, engine.synchronising = engine.synchronising, False
        try:
            yield
        finally:
            engine.synchronising = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As nn.Module's, and forgets what micro-batches under `no_sync` have added up."""
        super().zero_grad(set_to_none)  # type: ignore[misc]
        self._zc_engine.drop_accumulated()

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError(_NO_COPY.format("deep-copied"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(_NO_COPY.format("pickled"))


def whole_call(model: nn.Module) -> Callable[..., Any]:
    """The function that a model which compiles itself compiles: hooks and forward, in a code object of its own, so that the limits
    and caches that Dynamo keeps per code object are this model's alone."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(model, *args, **kwargs)

    # Which sizes have changed, and are dynamic from then on, Dynamo remembers by the code's file, line and name.
    code = call.__code__.replace(co_name=f"call_{engine_of(model, 'whole_call').key}")
    return types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)


@torch.compiler.disable
def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def install(model: nn.Module, engine: Engine) -> None:
    """Swap the classes of `model` and its modules in place, and let `load_state_dict` take plain tensors."""
    by_module: dict[nn.Module, dict[str, Slot]] = {}
    for slot in engine.slots:
        for module, attribute in slot.owners:
            by_module.setdefault(module, {})[attribute] = slot
    for module, slots in by_module.items():
        object.__setattr__(module, "_zc_slots", slots)
        if module is not model:
            module.__class__ = _subclass(cast(Any, type(module)), tuple(slots), False)
        module.register_load_state_dict_pre_hook(functools.partial(_accept_plain, engine))
        module.register_state_dict_post_hook(_count_writes)
    object.__setattr__(model, "_zc_engine", engine)
    model.__class__ = _subclass(cast(Any, type(model)), tuple(by_module.get(model, {})), True)


def _count_writes(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """After a module's `state_dict`: what is written into it counts as written to the masters (dcp.load fills it in place).

    `param.detach()`, which torch puts there, has a local tensor with a version counter of its own (measured on 2.13).
    """
    slots: dict[str, Slot] = vars(module)["_zc_slots"]
    for attribute, slot in slots.items():
        value = state.get(prefix + attribute)
        if isinstance(value, DTensor) and not isinstance(value, nn.Parameter):
            state[prefix + attribute] = wrap_local(slot.shard, slot.master)


def _accept_plain(engine: Engine, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a module loads: plain tensors become the shards that this rank owns. No communication."""
    slots: dict[str, Slot] = vars(module)["_zc_slots"]
    for attribute, slot in slots.items():
        value = state.get(prefix + attribute)
        if (
            isinstance(value, Tensor)
            and type(value) in (Tensor, nn.Parameter)
            and tuple(value.shape) == slot.spec.shape
        ):
            state[prefix + attribute] = wrap_plain(slot, value.detach(), engine.coordinates)


def unwrapped(model: Any) -> Any:
    """The model itself, without what torch.compile put around it."""
    return getattr(model, "_orig_mod", model)


def engine_of(model: Any, caller: str) -> Engine:
    inner = unwrapped(model)
    if not isinstance(inner, Root):
        raise TypeError(f"zcompile.{caller}: {type(model).__name__} was not wrapped by hierarchical_zero")
    return inner.zero
