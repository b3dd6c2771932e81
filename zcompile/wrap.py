"""`hierarchical_zero`: wrap a model, or decorate its class."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zcompile import code_cache, elementwise, gradients, locally, optimizers, pretrained
from zcompile.backend import hierarchical_zero_backend
from zcompile.deferred import Start, deferred_init
from zcompile.engine import Engine
from zcompile.faults.checksums import checksum
from zcompile.front import Root, install, whole_call
from zcompile.launcher import init_from_launcher, topology_of_job
from zcompile.options import Options
from zcompile.params import named_owners
from zcompile.plan import Auto, Plan
from zcompile.resolved import ResolvedPlan
from zcompile.runtime import Runtime
from zcompile.storage import folder_of, together
from zcompile.topology import Topology

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
                      compute_dtype: torch.dtype | None = None, compile: bool = True, device: torch.device | str | None = None,
                      init: Callable[[nn.Module], Any] | None = None, pretrained: str | os.PathLike[str] | None = None, example: Any = None,
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
        device: where a model that was built on the meta device gets its memory, shard by shard; None: the GPU if there is one, else the
            CPU. "meta" leaves it without memory, to be traced on paper.
        init: called with a model on the meta device to give it its values, in place of what `deferred_init` recorded or of its own
            `init_weights()` or `reset_parameters()`.
        pretrained: folder of safetensors files, as transformers saves them; each rank reads the rows that it owns.
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
        with torch.device("cpu"):  # a decorated class may be called where the default device is another
            beginning = Beginning(device, init, pretrained)
            return _wrap(
                module, topology, wanted, compute_dtype, compile, parsed, beginning, example, frozenset(options)
            )

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
            meta = torch.get_default_device().type == "meta"
            with deferred_init() if meta else contextlib.nullcontext():
                module = super().__call__(*args, **kwargs)
            return module if isinstance(module, Root) else wrap(module)

    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return Constructing(cls.__name__, (cls,), names)


class Beginning(NamedTuple):
    """Where the weights come from, beside the model itself: arguments of hierarchical_zero."""

    device: torch.device | str | None
    init: Callable[[nn.Module], Any] | None
    pretrained: str | os.PathLike[str] | None


def _wrap(model: nn.Module, topology: Topology | str | None, plan: Plan | Auto, compute_dtype: torch.dtype | None, compile: bool,
          options: Options, beginning: Beginning, example: Any, asked: frozenset[str]) -> nn.Module:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"hierarchical_zero wraps an nn.Module, not {type(model).__name__}")
    compute = _check_model(model, compute_dtype)
    device, start = _start(model, beginning)
    init_from_launcher(device, timeout=options.timeout)
    world = dist.get_world_size()
    found = topology_of_job(topology, device, world)
    found.check_world(world)
    if found.world != len(found.levels):
        raise ValueError(
            f"topology {found.key}: levels beyond the world (`site`) need an outer strategy, which this version has not"
        )
    options.dumping_ranks(world)
    runtime = Runtime.get(found, timeout=options.timeout, collective_timeout=options.timeout)
    if isinstance(plan, Auto):
        from zcompile.planner.auto import choose

        plan, chosen, said = choose(model, plan, found, compute, example)
        options = options.merged({name: value for name, value in chosen.items() if name not in asked})
        if runtime.rank == 0:
            print(f"zcompile: {said}", file=sys.stderr, flush=True)
    main = str(compute_dtype or next(iter(compute.values()))).removeprefix("torch.")
    resolved = plan.resolve(found, main, _chip(device))
    begins = {"compile": compile, "device": device.type, "pretrained": beginning.pretrained is not None}
    _agree(runtime, model, resolved, compute, options, begins)
    source = None if beginning.pretrained is None else folder_of(beginning.pretrained)
    files: pretrained.Files | None = None
    if source is not None:
        files = together(runtime, lambda: pretrained.Files(model, source), f"{source} cannot be loaded")
    given = files.given(model) if files else set()
    if start is not None:
        start.check(given)
    elif device.type != "meta" and files is None:
        _same_start(runtime, list(_sums(model, options)))
    _say_what_moved(runtime, resolved)
    engine = Engine(model, resolved, runtime, compute, compute_dtype, options, device)
    if start is not None:
        _materialise(engine, start, given)
    install(model, engine)
    if files is not None:
        together(engine.runtime, lambda: pretrained.load(model, engine, files), f"{files.folder} cannot be loaded")
    optimizers.guard()
    elementwise.shortcut()
    locally.shortcut()
    code_cache.keep_writable()
    gradients.guard()
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


def _agree(runtime: Runtime, model: nn.Module, plan: Any, compute: dict[str, torch.dtype], options: Options,
           begins: dict[str, Any]) -> None:  # fmt: skip
    """AgreementError unless all ranks were given the same; where a rank dumps is its own."""
    from zcompile import __version__

    runtime.agreement.compare("settings of hierarchical_zero", {
        "zcompile": __version__, "torch": torch.__version__, "plan": plan.describe().splitlines(), "plan key": plan.key,
        "options": begins | {name: value for name, value in asdict(options).items() if name not in ("dump", "dump_ranks")},
        "parameters": [
            [names[0][0], list(p.shape), str(compute[names[0][0]]), p.requires_grad] for p, names in named_owners(model).items()
        ],
    })  # fmt: skip


def _start(model: nn.Module, beginning: Beginning) -> tuple[torch.device, Start | None]:
    """The device of the masters; and how a model on the meta device gets its values, unless it stays there."""
    found = next(model.parameters()).device
    asked = None if beginning.device is None else torch.device(beginning.device)
    if found.type != "meta":
        if asked is not None and asked != found:
            raise ValueError(
                f"device={str(asked)!r}: the model is on {found}; move it there before wrapping (device= is for the meta device)"
            )
        if beginning.init is not None:
            raise ValueError("init=: the model has its values already (init= is for a model on the meta device)")
        lost = next((name for name, buffer in model.named_buffers() if buffer.is_meta), None)
        if lost is not None:
            raise ValueError(
                f"buffer {lost!r} is on the meta device, the parameters are on {found}: build all of the model on one"
            )
        return found, None
    if asked is not None and asked.type == "meta":
        return asked, None
    on_gpu = torch.cuda.is_available()
    device = asked or (torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))
    return device, Start(model, beginning.init)


def _materialise(engine: Engine, start: Start, given: set[str]) -> None:
    """Give the masters their values, one whole parameter at a time; all ranks make the same."""
    slots = {slot.name: slot for slot in engine.slots}
    alone = engine.runtime.topology.world_size == 1
    sums: list[tuple[str, int]] = []

    def give(name: str, whole: Tensor) -> None:
        if engine.options.sync_init and not alone:
            dist.broadcast(whole, 0)
        with torch.no_grad():
            slots[name].shard.copy_(slots[name].own_rows(whole, engine.coordinates))
        sums.append((name, int(checksum(whole))))

    start.run(engine.device, give, given)
    engine.start_peak = start.recording.peak
    if not engine.options.sync_init:
        _same_start(engine.runtime, sums)


def _sums(model: nn.Module, options: Options) -> Iterator[tuple[str, int]]:
    """(name, checksum) of every parameter, after rank 0's was taken if that is asked for."""
    for parameter, names in named_owners(model).items():
        if options.sync_init and dist.get_world_size() > 1:
            dist.broadcast(parameter.data, 0)
        yield names[0][0], int(checksum(parameter))


def _same_start(runtime: Runtime, sums: Sequence[tuple[str, int]]) -> None:
    """Ranks that start from different weights would train a model that nobody initialised."""
    if runtime.topology.world_size == 1:
        return
    rows = runtime.agreement.exchange([total % (1 << 62) for _, total in sums])
    for rank, row in enumerate(rows):
        for (name, _), mine, theirs in zip(sums, rows[0], row, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"hierarchical_zero: parameter {name!r} starts from other values on rank {rank} than on rank 0. Seed every rank "
                    "equally before building the model, or pass sync_init=True to take rank 0's."
                )
