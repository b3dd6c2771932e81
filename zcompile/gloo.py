"""gloo groups whose connections one thread of a process serves.

torch gives each of its gloo groups a port and a thread of its own, which looks at its connections a hundred times a second for as long as
the group lives. A rank of three levels has eight such groups (docs/bench.md says what their threads cost). The groups that zcompile makes
share one port and one thread; a message is sent by whoever launches it, as before.

torch's own functions do not let a gloo group be told so: hence a backend under a name of its own, of torch's class.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch.distributed as dist

from zcompile import _torch_compat as compat

NAME = "zcompile_gloo"
"""Of the backend, as torch says it of a group."""

_devices: dict[str, list[Any]] = {}
"""What a group is connected through, by the interfaces that the environment names."""


def shared(backend: str | None) -> str | None:
    """`backend` ("gloo", "cpu:gloo,cuda:nccl"; None: the default group's) as a group of zcompile's has it: with NAME for torch's gloo."""
    text = backend or compat.backend_config()
    found = re.sub(r"\bgloo\b", NAME, text)
    if found == text:
        return backend
    if NAME.upper() not in vars(dist.Backend):
        devices = list(dist.Backend.backend_capability["gloo"])
        dist.Backend.register_backend(NAME, _make, extended_api=True, devices=devices)
    return found


def _make(given: Any, _: Any) -> Any:
    """The backend of one group. `given`: torch's DistributedBackendOptions."""
    return compat.gloo_backend(given, _connected_through())


def _connected_through() -> list[Any]:
    """As torch chooses it for a group: one device per interface of GLOO_SOCKET_IFNAME, or the one of the host's name."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if names not in _devices:
        _devices[names] = compat.gloo_devices([name for name in names.split(",") if name])
    return _devices[names]
