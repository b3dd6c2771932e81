"""zcompile: a torch.compile backend for hierarchical ZeRO."""

__version__ = "0.1.0"

from zcompile.api import (
    clip_grad_norm_,
    coverage,
    feedback_state,
    full_state_dict,
    hierarchical_zero,
    ledger,
    load_feedback_state,
    mark_written,
    precision,
)
from zcompile.faults.checksums import ChecksumError
from zcompile.faults.verdict import FaultError
from zcompile.plan import Plan, Rule
from zcompile.topology import Level, Topology
from zcompile.wire import WireFormat

__all__ = [
    "ChecksumError",
    "FaultError",
    "Level",
    "Plan",
    "Rule",
    "Topology",
    "WireFormat",
    "clip_grad_norm_",
    "coverage",
    "feedback_state",
    "full_state_dict",
    "hierarchical_zero",
    "ledger",
    "load_feedback_state",
    "mark_written",
    "precision",
]
