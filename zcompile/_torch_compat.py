"""Every private name of torch that zcompile uses, in one place, each with the version that it was read from.

Nothing else in the package imports a name with a leading underscore from torch. When a torch release moves one of
these, this file is the one to repair; the tests in `tests/gloo/test_runtime.py` fail first.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as _bindings
from torch._C._distributed_c10d import (  # read from torch 2.13
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
    _get_work_registry_size,
    _register_process_group,
    _register_work,
    _resolve_process_group,
    _unregister_process_group,
)
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.callback import callback_handler  # read from torch 2.11, 2.12 and 2.13
from torch._dynamo.decorators import skip, skip_code
from torch._guards import detect_fake_mode  # read from torch 2.11 and 2.13
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state  # read from torch 2.13
from torch._subclasses import FakeTensorMode  # read from torch 2.13
from torch.autograd import profiler
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import (
    allow_inflight_collective_as_graph_input_ctx,
)  # read from torch 2.13
from torch.distributed.checkpoint._traverse import set_element  # read from torch 2.13
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec  # read from torch 2.11 and 2.13
from torch.distributed.tensor._op_schema import OutputSharding  # read from torch 2.11 and 2.13
from torch.utils._python_dispatch import TorchDispatchMode  # read from torch 2.13

__all__ = [
    "DTensorSpec",
    "FakeTensorMode",
    "HashStore",
    "OutputSharding",
    "PrefixStore",
    "Store",
    "TCPStore",
    "TorchDispatchMode",
    "all_gather",
    "allow_inflight_launch",
    "backend_config",
    "clone_store",
    "compiling",
    "default_group",
    "default_store",
    "detect_fake_mode",
    "new_group",
    "number_of_groups",
    "propagate_by",
    "register_group",
    "resolve_group",
    "run_and_save_rng_state",
    "run_with_rng_state",
    "set_element",
    "set_group_timeout",
    "sharding_propagator",
    "unregister_group",
    "unwaited_work",
]


def compiling() -> bool:
    """Whether a thread of this process is compiling: a frame, or a backward whose turn it is."""
    # What a handler registers is taken out again by torch._dynamo.reset; the number of compilations under way is not.
    return bool(callback_handler._CompilationCallbackHandler__pending_callbacks_counter)  # type: ignore[attr-defined]


def register_group(name: str, group: dist.ProcessGroup) -> None:
    """Make `group` reachable from functional collectives under `name`, eager and compiled. The caller keeps `group`
    alive.
    """
    _register_process_group(cast(Any, name), group)


def unregister_group(name: str) -> None:
    """Undo `register_group`. A name that is not registered (torch forgets all of them in `destroy_process_group`) is
    left alone.
    """
    try:
        _resolve_process_group(cast(Any, name))
    except RuntimeError:
        return
    _unregister_process_group(cast(Any, name))


def resolve_group(name: str) -> dist.ProcessGroup:
    """The group registered under `name`; RuntimeError of torch if there is none."""
    return _resolve_process_group(cast(Any, name))


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


def unwaited_work() -> int:
    """Number of functional collectives of this process that nobody has waited for yet."""
    return _get_work_registry_size()


def allow_inflight_launch() -> AbstractContextManager[None]:
    """Inside it, a collective launched with `async_op=True` registers its work, so that `wait_tensor` in a graph waits
    for it.
    """
    return cast("AbstractContextManager[None]", allow_inflight_collective_as_graph_input_ctx())


def default_store() -> Store:
    """The store of the default process group (read from torch 2.13)."""
    return distributed_c10d._get_default_store()


def clone_store(store: Store) -> Store:
    """The same store over a connection of its own: a request that waits does not hold up those of others (2.13: Store.clone)."""
    return cast(Store, cast(Any, store).clone())


def group_by_name(name: str) -> dist.ProcessGroup:
    """The process group that functional collectives know by that name (read from torch 2.13)."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def default_group() -> dist.ProcessGroup:
    """The default process group (read from torch 2.13); ValueError of torch if it is not initialised."""
    return distributed_c10d._get_default_group()


def backend_config() -> str:
    """The default group's backends by device, as text: `cpu:gloo,cuda:nccl` (`_world.pg_backend_config`, read from
    torch 2.13).
    """
    return str(distributed_c10d._world.pg_backend_config[default_group()])


def number_of_groups() -> int:
    """Process groups of this process so far (`_world.pg_names`, read from torch 2.13, which hashes this number into the
    names of new ones).
    """
    return len(distributed_c10d._world.pg_names)


def new_group(ranks: list[int], *, backend: str | None, timeout: float, description: str) -> dist.ProcessGroup:
    """A process group of `ranks` in exactly that order, made by its members alone; `timeout` in seconds.

    ValueError on a rank that is no member.
    """
    if dist.get_rank() not in ranks:
        raise ValueError(f"group of ranks {ranks}: this process has rank {dist.get_rank()} and is not a member")
    ascending = ranks == sorted(ranks)
    if not ascending and not _order_is_an_option():
        return _group_in_order(ranks, backend, timeout, description)
    keywords: dict[str, Any] = {} if ascending else {"sort_ranks": False}
    group = dist.new_group(
        ranks,
        timeout=timedelta(seconds=timeout),
        backend=backend,
        use_local_synchronization=True,
        group_desc=description,
        **keywords,
    )
    return cast(dist.ProcessGroup, group)


def gloo_devices(interfaces: list[str]) -> list[Any]:
    """What connects gloo groups, each a port and a thread: one per interface, or one of the host's name (ProcessGroupGloo.create_device,
    torch 2.11 to 2.13)."""
    gloo: Any = dist.ProcessGroupGloo
    return [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]


def gloo_backend(given: Any, devices: list[Any]) -> Any:
    """What `_new_process_group_helper` makes of a group's options (`_DistributedBackendOptions`) for gloo, over the given devices (read
    from torch 2.11 to 2.13, which take no devices there)."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices, options._threads, options._timeout = devices, 2 * len(devices), given.timeout
    options.global_ranks_in_group, options.group_name = given.global_ranks_in_group, given.group_id
    made = gloo(given.store, given.group_rank, given.group_size, options)
    made._set_sequence_number_for_group()
    return made


def _order_is_an_option() -> bool:
    """Whether `new_group` can be told to keep the order of the ranks (2.12 and 2.13: `sort_ranks`). 2.11 sorts them, and every sharded
    tensor would come back permuted, with no error.
    """
    return "sort_ranks" in inspect.signature(dist.new_group).parameters


def _group_in_order(ranks: list[int], backend: str | None, timeout: float, description: str) -> dist.ProcessGroup:
    """What `new_group` does after it has sorted the ranks, without the sorting: what is below it takes them in any order (read from torch
    2.11 and 2.13, `_new_group_with_tag`). Its barrier, off by default, is left out: zcompile's first collective on a group is one.
    """
    default = default_group()
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        distributed_c10d._get_backend_from_str(backend),
        distributed_c10d._world.pg_map[default][1],
        distributed_c10d._process_group_name(ranks, use_hashed_name=True),
        timeout=timedelta(seconds=timeout),
        device_id=default.bound_device_id,
        group_desc=description,
    )
    distributed_c10d._world.pg_group_ranks[group] = {rank: position for position, rank in enumerate(ranks)}
    return cast(dist.ProcessGroup, group)


def all_gather(output: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """`own` of every rank in group order into `output`, asynchronously; `own` may be this rank's part of it already. By the group's own
    method (its name up to torch 2.12 and from 2.13 on), which asks nothing of the world and passes no dispatcher.
    """
    gather = getattr(group, "all_gather_single", None) or group._allgather_base
    return cast(dist.Work, gather(output, own))


def set_group_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """Time limit of later collectives on `group` (`ProcessGroup.set_timeout`, torch 2.13; older ones keep the limit
    given at creation).
    """
    setter = getattr(group, "set_timeout", None)
    if setter is not None:
        setter(timedelta(seconds=seconds))


def register_future(tensor: Tensor, future: torch.futures.Future[Tensor]) -> None:
    """A later `wait_tensor(tensor)`, eager or compiled, waits for `future` (2.13: the work registry is keyed by storage)."""
    create: Any = getattr(_bindings, "_create_work_from_future")  # noqa: B009 (absent from the stubs)
    _register_work(tensor, create(future))


@skip
def input_sources(gm: Any) -> list[str]:
    """How Dynamo would write each input of its graph, "L['x']"; [] where it does not say (2.13: `_dynamo_source` of a placeholder)."""
    found = [getattr(node, "_dynamo_source", None) for node in gm.graph.nodes if node.op == "placeholder"]
    names = [str(source.name) for source in found if source is not None]
    return names if len(names) == len(found) else []


def outer_backend() -> Any | None:
    """The backend of the torch.compile context in which the caller runs, or None (2.13: eval_frame's callback chain)."""
    callback: Any = get_eval_frame_callback()
    if callback is None or callback is False:
        return None
    while True:
        inner = getattr(callback, "_torchdynamo_orig_backend", None) or getattr(
            callback, "_torchdynamo_orig_callable", None
        )
        if inner is None:
            break
        callback = inner
    return getattr(callback, "compiler_fn", callback)


def many_graphs() -> contextlib.AbstractContextManager[None]:
    """Room for a graph per phase, gradient mode and shape; beyond it an error, never a silent fall-back to eager (2.13: _dynamo.config)."""
    from torch._dynamo import config

    patch: Any = config.patch(recompile_limit=64, accumulated_recompile_limit=1024, fail_on_recompile_limit_hit=True)
    return patch


def in_backward() -> bool:
    """Whether this thread is inside autograd's engine (2.13: torch._C._current_graph_task_id, which torch.utils.checkpoint asks)."""
    return bool(torch._C._current_graph_task_id() != -1)


def keep_out_of_graphs(function: Any) -> Any:
    """Dynamo neither compiles `function`'s frame nor inlines it; what it calls is compiled as usual (2.13: _dynamo.decorators.skip)."""
    return skip(function)


def never_compile_alone(function: Any) -> Any:
    """Dynamo inlines `function` into what it traces, but never starts a graph at it (2.13: eval_frame's skip_code)."""
    skip_code(function.__code__)
    return function


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


# -- Inductor (read in 2.13: torch/_inductor/compile_fx.py, custom_graph_pass.py) ---------------------------------------------------


class GraphPass(CustomGraphPass):
    """A function on a graph module as an Inductor pass; `key` goes into the key of what Inductor caches."""

    def __init__(self, function: Callable[[Any], None], key: str):
        self._function, self._key = function, key

    def __call__(self, graph: torch.fx.Graph) -> None:
        self._function(graph.owning_module)

    def uuid(self) -> Any:
        return self._key


class KeepOrder(getattr(custom_graph_pass, "CustomSchedulerPass", CustomGraphPass)):  # type: ignore[misc]
    """For Inductor's `_pre_fusion_custom_pass`: each launch and wait depends on the one before it, so that no fusion moves them past one
    another. Without it a fused kernel takes the place of its first part, and what its other parts wait for moves up with it.

    2.13: scheduler.py, which does the same for launches alone in `decide_global_ordering_of_comms`. The base class is the one that
    codecache.py asks for before it caches code: 2.13 has one for passes of the scheduler, 2.11 and 2.12 take that of graph passes for both.

    Args:
        beside: custom ops that keep their place among the launches and waits too.
    """

    def __init__(self, *beside: Any) -> None:
        self.beside = beside

    def __call__(self, nodes: list[Any]) -> list[Any]:
        from torch._inductor.dependencies import WeakDep
        from torch._inductor.utils import is_collective, is_wait

        def kept(node: Any) -> bool:
            return is_collective(node) or is_wait(node) or getattr(node, "op_overload", None) in self.beside

        chain = [node for node in nodes if kept(node.node)]
        for before, after in itertools.pairwise(chain):
            earlier, later = next(iter(before.get_buffer_names())), next(iter(after.get_buffer_names()))
            after.add_fake_dep(WeakDep(earlier, mutating_buf=later, is_fake=True))
        if chain:
            chain[0].scheduler.compute_ancestors()  # what fusion asks to avoid cycles
        return nodes

    def uuid(self) -> Any:
        return f"zcompile: launches and waits in order, and {', '.join(map(str, self.beside))}"


def holders(storage: torch.UntypedStorage) -> int:
    """How many tensors and others hold a storage, of which its Python object, the asking one, is one (2.11, 2.13: torch._C)."""
    return torch._C._storage_Use_Count(storage._cdata)  # type: ignore[no-any-return]


def below_autograd() -> AbstractContextManager[Any]:
    """Operations of this thread are dispatched past autograd's kernels, some of which are Python (2.11, 2.13: those of collectives), though
    nothing records. For code that differentiates nothing (2.11, 2.13: torch._C, as torch's own such kernels do it)."""
    guard: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def profiling() -> bool:
    """Whether torch's profiler records (2.13: torch.autograd.profiler keeps the flag for its own fast path)."""
    return bool(getattr(profiler, "_is_profiler_enabled", False))


def symmetric_memory(size: int, device: torch.device, group: dist.ProcessGroup) -> tuple[list[Tensor], list[int]]:
    """Every rank's [size] uint8, readable from here, and where it lies in this device's memory; in the order of the named group
    (2.13: torch.distributed._symmetric_memory). RuntimeError where the devices cannot reach one another.
    """
    from torch.distributed import _symmetric_memory

    buffer = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    buffer.zero_()
    name: Any = group.group_name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases need no enabling, older ones do
        _symmetric_memory.enable_symm_mem_for_group(name)
    handle = _symmetric_memory.rendezvous(buffer, name)
    return [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(handle.world_size)], list(
        handle.buffer_ptrs
    )


def select_decomp_table() -> Mapping[Any, Any]:
    from torch._inductor.decomposition import select_decomp_table as select

    return select()


def compile_fx(
    gm: Any,
    inputs: Sequence[Any],
    half: Callable[..., Any],
    patches: dict[str, Any],
    decompositions: dict[Any, Any] | None,
) -> Any:
    """Inductor's entry: AOTAutograd, joint passes, partition; `half` is called with each half where Inductor's own compiler would be."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx as entry

    known = {
        key: value for key, value in patches.items() if hasattr(config, key)
    }  # a switch it lacks cannot be in the way

    def inner(graph: Any, example_inputs: Any, **details: Any) -> Any:
        return half(graph, example_inputs, **details)

    return entry(gm, inputs, inner_compile=inner, config_patches=known, decompositions=decompositions)


def compile_fx_inner(gm: Any, inputs: Sequence[Any], **details: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx_inner as inner

    return inner(gm, inputs, **details)


@contextlib.contextmanager
def aot_cache_off() -> Iterator[None]:
    """AOTAutograd's cache looks up while compile_fx runs, and saves what it looked up for: off for this compile alone."""
    from torch._functorch import config

    with config.patch(enable_autograd_cache=False):
        yield


@functools.cache
def _without_meta_gradient() -> list[Any]:
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if space != "aten":
            continue
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if op is not None and torch._C.DispatchKey.Meta in op.py_kernels and op._can_decompose():
            found.append(op)
    return found


@contextlib.contextmanager
def meta_gradients() -> Iterator[None]:
    """Gradients of composite ops on the meta device while AOTAutograd traces.

    2.13: its Python dispatcher takes an op with a Meta kernel in Python for one that needs no decomposing, and so passes its autograd by:
    the gradient of `F.cross_entropy` on meta tensors is zero, with a warning. Here such ops decompose first, as on other devices.
    """
    key = torch._C.DispatchKey.AutogradMeta
    changed = [op for op in _without_meta_gradient() if key not in op.py_kernels]
    for op in changed:
        op.py_kernels[key] = op.decompose
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op in changed:
            del op.py_kernels[key]
            op._dispatch_cache.clear()


def boxed(gm: Any) -> Any:
    """The graph itself as the compiled function: called with a list that it empties."""
    from torch._functorch.aot_autograd import make_boxed_func

    return make_boxed_func(gm)


def generated_code(compiled: Any) -> str:
    """The source that Inductor generated or loaded (2.13: CompiledFxGraph.source_code, also on a cache hit).

    Raises:
        RuntimeError: this torch keeps it elsewhere, so that nobody could check the order of its collectives.
    """
    source = getattr(compiled, "source_code", None)
    if not isinstance(source, str) or not source:
        raise RuntimeError(
            f"zcompile: torch {torch.__version__} does not show the generated code of a {type(compiled).__name__}: the order of its "
            "collectives cannot be checked"
        )
    return source


def code_cache_misses() -> int:
    """How many graphs Inductor has generated code for in this process, cache bypasses included (2.13: dynamo's counters)."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return int(found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"])
