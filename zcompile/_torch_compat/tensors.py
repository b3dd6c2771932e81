"""Private names of torch about tensors: DTensor's dispatch, storages, dispatch modes, what autograd and the profiler are at."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode  # read from torch 2.13
from torch.autograd import profiler
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec  # read from torch 2.11 and 2.13
from torch.distributed.tensor._op_schema import OutputSharding  # read from torch 2.11 and 2.13
from torch.utils._python_dispatch import TorchDispatchMode  # read from torch 2.13

__all__ = ["DTensorSpec", "FakeTensorMode", "OutputSharding", "TorchDispatchMode"]


def sharding_propagator() -> Any:
    """What finds the placements of an operation over DTensors in this process: by `propagate_op_sharding_non_cached` for what it has not
    met. Read from torch 2.11 and 2.13."""
    return DTensor._op_dispatcher.sharding_propagator


def propagate_by(function: Callable[[Any], Any]) -> None:
    """From now on DTensor asks `function(schema)` for the placements of what it has not met, instead of `propagate_op_sharding_non_cached`.

    An operation whose key C++ cannot compute comes by a cache in Python, which holds the method that it was made with: made anew here
    (2.11: those over lists, which 2.13 has a key for; read from 2.11 and 2.13, `_sharding_prop.py` and `_dispatch.py`).
    """
    propagator = sharding_propagator()
    propagator.propagate_op_sharding_non_cached = function
    propagator.propagate_op_sharding = type(propagator.propagate_op_sharding)(function)


def handle_by(op: Any, function: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]) -> None:
    """From now on DTensor asks `function(op, args, kwargs)` to run `op`. Read from 2.11 and 2.13: `_dispatch.py`, which has such functions
    of its own."""
    DTensor._op_dispatcher._custom_op_handlers.setdefault(op, cast(Any, function))


def by_dtensor(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run `op`, which `handle_by` has another way for, as if it had none."""
    handlers = DTensor._op_dispatcher._custom_op_handlers
    function = handlers.pop(op)
    try:
        return op(*args, **kwargs)
    finally:
        handlers[op] = function


def wrap_local(local: Tensor, like: Any) -> DTensor:
    """A DTensor with the placements of `like` over `local`, without autograd (2.13: DTensor.__new__(local, spec, requires_grad=))."""
    return DTensor(local, like._spec, requires_grad=False)


def local_tensor(value: DTensor) -> Tensor:
    """What this rank holds of it: the tensor itself, without autograd and the calls of `to_local` (2.11, 2.13)."""
    return value._local_tensor


def init_call(function: Any) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """(function of torch.nn.init, its arguments) if a torch function mode sees `function` as its question whether a tensor is on the meta
    device, upon which it does nothing there (2.13: trunc_normal_, orthogonal_, dirac_ and sparse_ compute on values); else None.

    To be called by the mode's `__torch_function__` itself.
    """
    if getattr(function, "__self__", None) is not Tensor.is_meta:
        return None
    frame = sys._getframe(2)
    if frame.f_globals is not vars(torch.nn.init):
        return None
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return getattr(torch.nn.init, code.co_name), {name: frame.f_locals[name] for name in names}


def storage_key(of: Tensor | torch.UntypedStorage) -> int:
    """Equal for what lies in one storage, while somebody holds that (2.11, 2.13: `_cdata` of a storage)."""
    storage = of if isinstance(of, torch.UntypedStorage) else of.untyped_storage()
    return storage._cdata


def holders(storage: torch.UntypedStorage) -> int:
    """How many tensors and others hold a storage, of which its Python object, the asking one, is one (2.11, 2.13: torch._C)."""
    return torch._C._storage_Use_Count(storage._cdata)  # type: ignore[no-any-return]


def below_autograd() -> AbstractContextManager[Any]:
    """Operations of this thread are dispatched past autograd's kernels, some of which are Python (2.11, 2.13: those of collectives), though
    nothing records. For code that differentiates nothing (2.11, 2.13: torch._C, as torch's own such kernels do it)."""
    guard: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def in_backward() -> bool:
    """Whether this thread is inside autograd's engine (2.13: torch._C._current_graph_task_id, which torch.utils.checkpoint asks)."""
    return bool(torch._C._current_graph_task_id() != -1)


def profiling() -> bool:
    """Whether torch's profiler records (2.13: torch.autograd.profiler keeps the flag for its own fast path)."""
    return bool(getattr(profiler, "_is_profiler_enabled", False))
