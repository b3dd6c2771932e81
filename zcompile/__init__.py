"""zcompile: a torch.compile backend for hierarchical ZeRO."""

__version__ = "0.1.0"

from zcompile.api import (
    clip_grad_norm_,
    coverage,
    explain,
    export,
    feedback_state,
    full_state_dict,
    ledger,
    load,
    load_feedback_state,
    load_pretrained,
    mark_written,
    precision,
    save,
)
from zcompile.deferred import deferred_init
from zcompile.faults.checksums import ChecksumError
from zcompile.faults.verdict import FaultError
from zcompile.plan import Auto, Plan, Rule
from zcompile.storage import CheckpointError, latest_checkpoint
from zcompile.topology import Level, Topology
from zcompile.wire import WireFormat
from zcompile.wrap import hierarchical_zero

__all__ = [
    "Auto",
    "CheckpointError",
    "ChecksumError",
    "FaultError",
    "Level",
    "Plan",
    "Rule",
    "Topology",
    "WireFormat",
    "clip_grad_norm_",
    "coverage",
    "deferred_init",
    "explain",
    "export",
    "feedback_state",
    "full_state_dict",
    "hierarchical_zero",
    "latest_checkpoint",
    "ledger",
    "load",
    "load_feedback_state",
    "load_pretrained",
    "mark_written",
    "precision",
    "save",
]
