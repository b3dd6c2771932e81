"""Private names of torch.compile: Dynamo, AOTAutograd, and Inductor (read in 2.13: torch/_inductor/compile_fx.py, custom_graph_pass.py)."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.callback import callback_handler  # read from torch 2.11, 2.12 and 2.13
from torch._dynamo.decorators import skip, skip_code
from torch._guards import detect_fake_mode  # read from torch 2.11 and 2.13
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state  # read from torch 2.13

__all__ = ["detect_fake_mode", "run_and_save_rng_state", "run_with_rng_state"]


def compiling() -> bool:
    """Whether a thread of this process is compiling: a frame, or a backward whose turn it is."""
    # What a handler registers is taken out again by torch._dynamo.reset; the number of compilations under way is not.
    return bool(callback_handler._CompilationCallbackHandler__pending_callbacks_counter)  # type: ignore[attr-defined]


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


def keep_out_of_graphs(function: Any) -> Any:
    """Dynamo neither compiles `function`'s frame nor inlines it; what it calls is compiled as usual (2.13: _dynamo.decorators.skip)."""
    return skip(function)


def never_compile_alone(function: Any) -> Any:
    """Dynamo inlines `function` into what it traces, but never starts a graph at it (2.13: eval_frame's skip_code)."""
    skip_code(function.__code__)
    return function


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
