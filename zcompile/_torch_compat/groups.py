"""Private names of torch.distributed: process groups, stores, functional collectives, memory that ranks share."""

from __future__ import annotations

import inspect
import warnings
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
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import (
    allow_inflight_collective_as_graph_input_ctx,
)  # read from torch 2.13
from torch.distributed.checkpoint._traverse import set_element  # read from torch 2.13

__all__ = ["HashStore", "PrefixStore", "Store", "TCPStore", "set_element"]


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
