"""`hierarchical_zero`: wrap a model, or decorate its class."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zcompile import feedback, optimizers, traffic
from zcompile.backend import hierarchical_zero_backend
from zcompile.engine import Engine
from zcompile.front import Root, install, whole_call
from zcompile.launcher import init_from_launcher, topology_of_job
from zcompile.options import Options
from zcompile.params import named_owners
from zcompile.plan import Auto, Plan, ResolvedPlan
from zcompile.runtime import Runtime
from zcompile.topology import Topology

if TYPE_CHECKING:
    from zcompile.debug.explain import Explanation

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound=type[nn.Module])
FLOATS = (torch.float32, torch.bfloat16)
_REPLACED: dict[str, Any] = {}


@contextlib.contextmanager
def replacing(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `settings` stand in the place of what is said to `hierarchical_zero`: so a script is dumped for another machine."""
    before = dict(_REPLACED)
    _REPLACED.update(settings)
    try:
        yield
    finally:
        _REPLACED.clear()
        _REPLACED.update(before)


@overload
def hierarchical_zero(module_or_class: C, **settings: Any) -> C: ...
@overload
def hierarchical_zero(module_or_class: M, **settings: Any) -> M: ...
@overload
def hierarchical_zero(module_or_class: None = None, **settings: Any) -> Callable[[C], C]: ...


def hierarchical_zero(module_or_class: Any = None, *, topology: Topology | str | None = None, plan: Plan | Auto | str = "zero_topo",
                      compute_dtype: torch.dtype | None = None, compile: bool = True, example: Any = None,
                      **options: Any) -> Any:  # fmt: skip
    """Shard a model over the levels of the machine and compile its forward and backward with the transfers in the graph.

    As a decorator on an nn.Module class (bare or with arguments) every instance is wrapped when it has been constructed; called with
    an instance it wraps that one in place and returns it. The ordinary loop stays: any element-wise optimizer over
    `model.parameters()`, made afterwards; `loss.backward()`; `opt.step()`. Gradients are averaged over the ranks.

    Args:
        topology: a Topology, "frontier", "frontier:48", "2x2x2", ...; None: found from the launcher.
        plan: a Plan, the name of a preset, or "auto" (an Auto says more): the planner chooses placements, buckets and overlap, and of
            formats native ones unless others are allowed.
        compute_dtype: dtype in which weights are gathered and inputs are cast (torch.float32 or torch.bfloat16); None: the model's own.
        compile: False leaves the forward to eager torch, or to `torch.compile(model, backend="hierarchical_zero")`.
        example: for plan="auto": inputs of one micro-batch (a tensor, or a tuple of what the forward takes), run once on fake tensors to
            see what the model computes and keeps; without it the planner has the parameters' shapes alone.
        options: see zcompile.options.Options.

    Raises:
        ValueError, TypeError: bad settings, named with the valid ones, before anything is launched.
        AgreementError: the ranks were given different settings or models.
    """
    if _REPLACED:
        own = ("topology", "plan", "compute_dtype")
        given: tuple[Any, ...] = (topology, plan, compute_dtype)
        topology, plan, compute_dtype = (_REPLACED.get(name, value) for name, value in zip(own, given, strict=True))
        options |= {name: value for name, value in _REPLACED.items() if name not in own}
    parsed = Options.parse(options)
    wanted = plan if isinstance(plan, Auto) else Auto() if plan == "auto" else Plan.parse(plan)
    if example is not None and not isinstance(wanted, Auto):
        raise ValueError(f"example=... is for plan='auto': the plan {getattr(wanted, 'name', plan)!r} needs none")
    if isinstance(topology, str):
        _check_topology_text(topology)
    if compute_dtype is not None and compute_dtype not in FLOATS:
        raise ValueError(
            f"compute_dtype={compute_dtype!r}: valid are torch.float32, torch.bfloat16 and None (the model's own)"
        )

    def wrap(module: nn.Module) -> nn.Module:
        return _wrap(module, topology, wanted, compute_dtype, compile, parsed, example, "overlap" in options)

    if module_or_class is None:
        return lambda cls: _decorate(cls, wrap)
    if isinstance(module_or_class, type):
        return _decorate(module_or_class, wrap)
    return wrap(module_or_class)


def _check_topology_text(text: str) -> None:
    """Texts that stand for themselves are checked at once; a bare machine name needs the number of ranks."""
    if "x" in text and text[0].isdigit():
        Topology.parse(text)


def _decorate(cls: Any, wrap: Callable[[nn.Module], nn.Module]) -> Any:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"hierarchical_zero decorates nn.Module classes, not {cls!r}")

    class Constructing(type(cls)):  # type: ignore[misc]
        def __call__(klass, *args: Any, **kwargs: Any) -> Any:
            module = super().__call__(*args, **kwargs)
            return module if isinstance(module, Root) else wrap(module)

    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return Constructing(cls.__name__, (cls,), names)


def _wrap(model: nn.Module, topology: Topology | str | None, plan: Plan | Auto, compute_dtype: torch.dtype | None, compile: bool,
          options: Options, example: Any, keeps_overlap: bool) -> nn.Module:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"hierarchical_zero wraps an nn.Module, not {type(model).__name__}")
    compute = _check_model(model, compute_dtype)
    device = next(model.parameters()).device
    init_from_launcher(device)
    world = dist.get_world_size()
    found = topology_of_job(topology, device, world)
    found.check_world(world)
    if found.world != len(found.levels):
        raise ValueError(
            f"topology {found.key}: levels beyond the world (`site`) need an outer strategy, which this version has not"
        )
    options.dumping_ranks(world)
    runtime = Runtime.get(found, timeout=options.timeout)
    if isinstance(plan, Auto):
        from zcompile.planner.auto import choose

        plan, overlap, said = choose(model, plan, found, compute, example)
        options = options if keeps_overlap else replace(options, overlap=overlap)
        if runtime.rank == 0:
            print(f"zcompile: {said}", file=sys.stderr, flush=True)
    main = str(compute_dtype or next(iter(compute.values()))).removeprefix("torch.")
    resolved = plan.resolve(found, main, _chip(device))
    _agree(runtime, model, resolved, compute, options)
    if device.type != "meta":
        _same_start(runtime, model, options)
    _say_what_moved(runtime, resolved)
    engine = Engine(model, resolved, runtime, compute, compute_dtype, options)
    install(model, engine)
    optimizers.guard()
    if compile:
        engine.compiled = torch.compile(
            whole_call(model), backend=hierarchical_zero_backend, fullgraph=options.fullgraph, dynamic=options.dynamic
        )
    return model


def _chip(device: torch.device) -> str:
    """The architecture of the device as compilers call it ("gfx90a", "sm_90"); "" where the topology has to say."""
    if device.type != "cuda":
        return ""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def _say_what_moved(runtime: Runtime, plan: ResolvedPlan) -> None:
    """A level that the topology lacks was replaced by the next slower one: print the resolved plan, once."""
    names = ("whole", "world", *runtime.topology.names)
    if runtime.rank == 0 and any(place not in names for place in plan.plan.placements().values()):
        print(f"zcompile: {plan.describe()}", file=sys.stderr, flush=True)


def _check_model(model: nn.Module, compute_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """name -> dtype in which a forward sees each parameter; refuses what cannot be wrapped."""
    if isinstance(model, Root):
        raise ValueError("hierarchical_zero: this model is wrapped already")
    for child in model.modules():
        if isinstance(child, Root):
            raise ValueError(
                f"hierarchical_zero: the submodule {type(child).__name__} is wrapped already; wrap the outermost model only"
            )
    compute: dict[str, torch.dtype] = {}
    for parameter, owners in named_owners(model).items():
        name = owners[0][0]
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"parameter {name!r} is a DTensor already (FSDP2 or tensor parallel?): wrap the plain model"
            )
        if parameter.dtype not in FLOATS:
            raise ValueError(
                f"parameter {name!r} has dtype {parameter.dtype}; masters are made from torch.float32 or torch.bfloat16"
            )
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is lazy: run one forward of the plain model first")
        compute[name] = compute_dtype or parameter.dtype
    if not compute:
        raise ValueError(f"hierarchical_zero: {type(model).__name__} has no parameters to shard")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"hierarchical_zero: the parameters are on several devices ({', '.join(sorted(map(str, devices)))}); move the model to one"
        )
    optimizers.refuse_earlier(model)
    return compute


def _agree(runtime: Runtime, model: nn.Module, plan: Any, compute: dict[str, torch.dtype], options: Options) -> None:
    from zcompile import __version__

    runtime.agreement.compare("settings of hierarchical_zero", {
        "zcompile": __version__, "torch": torch.__version__, "plan": plan.describe().splitlines(), "plan key": plan.key,
        "options": {
            "codegen": options.codegen, "checks": options.checks, "sync_init": options.sync_init, "overlap": options.overlap,
            "memory": options.memory,
        },
        "parameters": [
            [names[0][0], list(p.shape), str(compute[names[0][0]]), p.requires_grad] for p, names in named_owners(model).items()
        ],
    })  # fmt: skip


def _same_start(runtime: Runtime, model: nn.Module, options: Options) -> None:
    """Ranks that start from different weights would train a model that nobody initialised."""
    if runtime.topology.world_size == 1:
        return
    if options.sync_init:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        return
    sums = [(names[0][0], int(_bits(p).sum())) for p, names in named_owners(model).items()]
    words = [total % (1 << 62) for _, total in sums]
    rows = runtime.agreement.exchange(words)
    for rank, row in enumerate(rows):
        for (name, _), mine, theirs in zip(sums, rows[0], row, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"hierarchical_zero: parameter {name!r} starts from other values on rank {rank} than on rank 0. Seed every rank "
                    "equally before building the model, or pass sync_init=True to take rank 0's."
                )


def _bits(tensor: Tensor) -> Tensor:
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.int32 if plain.dtype == torch.float32 else torch.int16).to(torch.int64)


def engine_of(model: Any, caller: str) -> Engine:
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, Root):
        raise TypeError(f"zcompile.{caller}: {type(model).__name__} was not wrapped by hierarchical_zero")
    return inner.zero


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Plain tensors, names and shapes as the plain model's, fp32 as the masters; copies, on every rank. Every rank calls it."""
    engine = engine_of(model, "full_state_dict")
    slots = {name: slot for slot in engine.slots for name in slot.names}
    wholes: dict[str, Tensor] = {}
    out: dict[str, Any] = {}
    for name, value in getattr(model, "_orig_mod", model).state_dict().items():
        if isinstance(value, DTensor) and name in slots:
            slot = slots[name]
            if slot.name not in wholes:
                wholes[slot.name] = engine.whole_master(slot)
            out[name] = wholes[slot.name]
        elif isinstance(value, Tensor):
            out[name] = (value.full_tensor() if isinstance(value, DTensor) else value.detach()).clone()
        else:
            out[name] = value
    return out


def ledger(model: nn.Module) -> dict[str, Any]:
    """Bytes one rank received in the last step: {"levels": {level: {transfer: {"predicted", "compiled", "counted"}}}, ...}.

    "schedule" says what the schedule expects of each graph, by the machine's data: its seconds, and those of it that are exposed waiting,
    by level; zcompile.overlap measures the same in a profiler's trace.

    Transfers are gather, reduce, sync and refresh (and barrier, with peer gathers); a step ends with a synchronising backward. The three
    columns come from the closed forms, from the collective nodes of the graphs that ran, and from the process groups; they are equal, or
    something is wrong.
    """
    return traffic.report(engine_of(model, "ledger"))


def explain(model: nn.Module, rows: int = 20, sort: str = "exposed") -> Explanation:
    """What the compiler did to a wrapped model that has run: programs, ledger, timeline, and why hops are waited for.

    Printed it is tables; in a notebook it is the page that a dump has as report.html (with bokeh: the extra `report`).

    Args:
        rows: parameters and hops that are printed; sort: order of the parameters, one of "exposed", "bytes", "name".

    Raises:
        TypeError: the model was not wrapped by hierarchical_zero.
        ValueError: another order; nothing was compiled so far.
    """
    from zcompile.debug.explain import Explanation

    steps = engine_of(model, "explain").steps
    return Explanation([steps[number] for number in sorted(steps)], rows, sort)


def feedback_state(model: nn.Module) -> dict[str, dict[str, DTensor]]:
    """The state of the error feedback, for torch.distributed.checkpoint: put it beside the model's under a name of its own. {} without.

    {topology key: {"parameter.reduce" or "parameter.sync": DTensor [ranks, elements] fp32}}; the tensors are the state itself.
    """
    return feedback.feedback_state(model, engine_of(model, "feedback_state"))


def load_feedback_state(model: nn.Module, checkpoint: str | os.PathLike[str], prefix: str = "feedback") -> bool:
    """Bring back what `feedback_state` saved under `prefix` in a checkpoint folder; every rank calls it.

    Returns:
        False if the checkpoint holds none for this topology and plan (it was saved on another world, say): the state then begins at
        zero, and rank 0 says so.
    """
    return feedback.load(model, engine_of(model, "load_feedback_state"), checkpoint, prefix)


def mark_written(model: nn.Module) -> None:
    """Announce a write to the masters that torch does not count (through `p.data`): the next forward refreshes every copy."""
    engine_of(model, "mark_written").mark_written()
