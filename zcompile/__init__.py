"""zcompile: a torch.compile backend for hierarchical ZeRO."""

__version__ = "0.1.0"

from zcompile.api import (
    explain,
    feedback_state,
    full_state_dict,
    hierarchical_zero,
    ledger,
    load_feedback_state,
    mark_written,
)
from zcompile.plan import Auto, Plan, Rule
from zcompile.topology import Level, Topology
from zcompile.wire import WireFormat

__all__ = [
    "Auto",
    "Level",
    "Plan",
    "Rule",
    "Topology",
    "WireFormat",
    "explain",
    "feedback_state",
    "full_state_dict",
    "hierarchical_zero",
    "ledger",
    "load_feedback_state",
    "mark_written",
]
