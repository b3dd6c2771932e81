"""The systems that `zcompile bench` trains with: torch's own, DeepSpeed's where it is installed, and plans of zcompile.

A system is a function (model, Setting) -> Trainer. Peers are set up at their best: bf16 on the wire where their name says so, gathers
prefetched and asynchronous, and a reduce-scatter that moves the bytes of a reduce-scatter (gloo's moves an all-reduce's).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zcompile.options import Options
from zcompile.plan import PRESETS, Plan, paper_rule
from zcompile.topology import Topology


@dataclass(frozen=True)
class Setting:
    """What a system is told: the levels of the machine, the learning rate, sequences per rank and step."""

    topology: Topology
    learning_rate: float
    batch: int
    device: torch.device
    tokens: int = 0
    """Of a rank's batch, about; 0: unknown."""

    @property
    def per_node(self) -> int:
        return self.topology.world_size // self.topology.sizes[-1]


@dataclass
class Trainer:
    """step(tokens) -> loss: one optimizer step. finish(): waits for what of it is still under way. `ours`: hops leave spans in a trace."""

    step: Callable[[Tensor], Tensor]
    finish: Callable[[], None] = lambda: None
    model: Any = None
    ours: bool = False


System = Callable[[nn.Module, Setting], Trainer]


def _adamw(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.01, fused=True)


def _ordinary(model: Any, optimizer: torch.optim.Optimizer) -> Trainer:
    """The ordinary loop."""

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Trainer(step, model=model)


def ddp(model: nn.Module, setting: Setting, bf16: bool = False) -> Trainer:
    """DistributedDataParallel; bf16: gradients travel in bf16."""
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if bf16:
        # torch's own bf16 hook asks for NCCL. No annotations: DDP refuses those that are text, as all are in this module.
        def halve(_, bucket):  # type: ignore[no-untyped-def]
            wire = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
            future = dist.all_reduce(wire, async_op=True).get_future()
            return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))

        wrapped.register_comm_hook(None, halve)
    return _ordinary(wrapped, _adamw(wrapped, setting))


class RingReduceScatter:
    """For `set_custom_reduce_scatter`: partial sums go round a ring, so that gloo moves what a reduce-scatter should."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        n, rank = group.size(), group.rank()
        chunks = input_tensor.view(n, -1)
        part, received = chunks[rank - 1].clone(), torch.empty_like(chunks[0])
        for k in range(n - 1):
            sent = dist.isend(part, group=group, group_dst=(rank + 1) % n)
            arriving = dist.irecv(received, group=group, group_src=(rank - 1) % n)
            assert sent is not None and arriving is not None
            arriving.wait()
            sent.wait()
            part, received = received.add_(chunks[(rank - 2 - k) % n]), part
        output_tensor.copy_(part.view_as(output_tensor))
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(n)


def fsdp2(model: nn.Module, setting: Setting, hybrid: bool = False, tuned: bool = False, bf16: bool = False) -> Trainer:
    """`fully_shard` on each block and the root; hybrid: within the node, replicas across nodes.

    tuned: prefetched, asynchronous gathers and `RingReduceScatter` on CPUs; on GPUs torch's own are the tuned ones.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    world, inside = setting.topology.world_size, setting.per_node
    kind = setting.device.type
    mesh = (
        init_device_mesh(kind, (world // inside, inside), mesh_dim_names=("replicate", "shard"))
        if hybrid
        else init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    )
    dtype = torch.bfloat16 if bf16 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    blocks: Any = model.blocks
    root: Any = model
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    if tuned and kind == "cpu":
        for module, ahead in zip((model, *blocks), blocks, strict=False):
            module.set_modules_to_forward_prefetch([ahead])
        root._set_unshard_async_op(True)
        for module in (model, *blocks):
            module.set_custom_reduce_scatter(RingReduceScatter())
    return _ordinary(model, _adamw(model, setting))


def deepspeed_zero(model: nn.Module, setting: Setting, deepcompile: bool = False, **zero: Any) -> Trainer:
    """DeepSpeed's stage 3 with more of its options (hpZ, qwZ, qgZ), or through DeepCompile. The limits are scaled down to prefetch about a
    block.

    Raises:
        RuntimeError: says why it cannot be had here.
    """
    try:
        import deepspeed  # type: ignore[import-not-found]
    except ImportError as error:
        raise RuntimeError(f"DeepSpeed is not installed here: {error}") from None
    if deepcompile:
        _check_deepcompile(setting.device)
    zero = {key: setting.per_node if value == "node" else value for key, value in zero.items()}
    largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)  # type: ignore[union-attr]
    configuration = {
        "train_micro_batch_size_per_gpu": setting.batch,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # its default is 1.0; the other systems do not clip
        **({"compile": {"deepcompile": True}} if deepcompile else {}),
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 2048, "stage3_max_live_parameters": 3 * largest,
            "stage3_prefetch_bucket_size": largest, **zero,
        },
    }  # fmt: skip
    if zero:
        deepspeed.zero.Init(module=model, config_dict_or_path=configuration)
    engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model, setting), config=configuration)
    if deepcompile:
        engine.compile()

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = engine(tokens)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Trainer(step, model=engine)


def _check_deepcompile(device: torch.device) -> None:
    """RuntimeError if DeepCompile would not compile here, which it says in a log only, and goes on without it."""
    try:
        from deepspeed.compile.util import is_deepcompile_supported  # type: ignore[import-not-found]
    except ImportError as error:
        raise RuntimeError(f"this DeepSpeed has no DeepCompile: {error}") from None
    if device.type != "cuda":
        raise RuntimeError(f"DeepCompile needs CUDA; this rank trains on {device.type}")
    if not is_deepcompile_supported():
        raise RuntimeError(f"this DeepSpeed's DeepCompile does not support torch {torch.__version__} on this device")


def ours(
    model: nn.Module,
    setting: Setting,
    plan: Plan,
    compute: torch.dtype,
    options: dict[str, Any],
    embeddings: bool = False,
) -> Trainer:
    """zcompile with a plan; embeddings: they too travel as wire="paper" has it."""
    from zcompile.wrap import hierarchical_zero

    if embeddings:
        named = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        rules = tuple(paper_rule(f"{name}.weight") for name in named)
        plan = replace(plan, rules=(*rules, *plan.rules))
    wrapped = hierarchical_zero(
        model, topology=setting.topology, plan=plan, compute_dtype=compute, **{"tokens": setting.tokens, **options}
    )
    return replace(_ordinary(wrapped, _adamw(wrapped, setting)), ours=True)


PEERS: dict[str, System] = {
    "ddp": ddp,
    "ddp-bf16": functools.partial(ddp, bf16=True),
    "fsdp2": fsdp2,
    "fsdp2-bf16": functools.partial(fsdp2, bf16=True),
    "fsdp2-tuned-bf16": functools.partial(fsdp2, tuned=True, bf16=True),
    "hsdp": functools.partial(fsdp2, hybrid=True),
    "hsdp-bf16": functools.partial(fsdp2, hybrid=True, bf16=True),
    "hsdp-tuned-bf16": functools.partial(fsdp2, hybrid=True, tuned=True, bf16=True),
    "deepspeed-zero3": deepspeed_zero,
    "deepspeed-hpz": functools.partial(deepspeed_zero, zero_hpz_partition_size="node"),
    "deepspeed-deepcompile": functools.partial(deepspeed_zero, deepcompile=True),
    "deepspeed-zeropp": functools.partial(
        deepspeed_zero, zero_hpz_partition_size="node", zero_quantized_weights=True, zero_quantized_gradients=True
    ),
}

_DELTA = "zc:zero_topo,wire=paper,refresh=int4-delta,embeddings=1,overlap=2,peer_gather=True"
OURS = {
    "zc-bf16": "zc:zero_topo,reduce=bf16,overlap=4,peer_gather=True",
    "zc-lossless": "zc:zero_topo,reduce=bf16,refresh=lossless-delta,overlap=4,peer_gather=True",
    "zc-paper": "zc:zero_topo,wire=paper,overlap=2,peer_gather=True",
    "zc-delta": _DELTA,
    "zc-delta-keep": f"{_DELTA},keep=64000000",
}
"""Short names of plans that are often compared."""

DEFAULT = ("ddp-bf16", "fsdp2-tuned-bf16", "hsdp-tuned-bf16", "zc-bf16", "zc-lossless", "zc-delta")


def parse(name: str) -> System:
    """The system of that name: one of PEERS or OURS; `zc:PRESET,option=value,...` with the fields of Plan, of Options, `compute=` and
    `embeddings=1` (their formats like those of matrices under wire="paper"); or `label=file.py:function`, a system of your own.

    Raises:
        ValueError: names what is wrong and the valid choices.
    """
    if name in PEERS:
        return PEERS[name]
    text = OURS.get(name, name)
    if text.startswith("zc:"):
        return _parse_ours(text)
    if ".py:" in text:
        own: System = load("system", text)
        return own
    valid = ", ".join((*PEERS, *OURS))
    raise ValueError(f"system {name!r}: valid: {valid}; zc:PRESET,option=value,...; label=file.py:function")


def _parse_ours(text: str) -> System:
    preset, *rest = text.removeprefix("zc:").split(",")
    given: dict[str, Any] = {}
    for part in rest:
        key, mark, value = part.partition("=")
        if not mark:
            raise ValueError(f"system {text!r}: {part!r} must be option=value")
        given[key] = _value(value)
    compute = str(given.pop("compute", "bf16"))
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if compute not in dtypes:
        raise ValueError(f"system {text!r}: compute={compute!r}; valid: {', '.join(dtypes)}")
    embeddings = bool(given.pop("embeddings", False))
    known = {field.name for field in fields(Options)}
    options = {key: given.pop(key) for key in list(given) if key in known}
    Options.parse(options)
    if preset not in PRESETS:
        raise ValueError(f"system {text!r}: preset {preset!r}; valid: {', '.join(PRESETS)}")
    plan = Plan.preset(preset, **given)
    return functools.partial(ours, plan=plan, compute=dtypes[compute], options=options, embeddings=embeddings)


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def load(what: str, text: str) -> Any:
    """The function of `file.py:function` or `label=file.py:function`. ValueError says what (a system, a model) cannot be had, and why."""
    path, _, function = text.split("=", 1)[-1].rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{what} {text!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look their module up
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{what} {text!r}: {path} has no function {function!r}; it has: {', '.join(names)}")
    return found


def label(name: str) -> str:
    """What a report calls it."""
    return name.split("=", 1)[0] if ".py:" in name and "=" in name else name
