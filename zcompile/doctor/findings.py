"""What comes of a look at a job."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

STATUSES = ("bad", "warn", "ok", "skip")
"""bad: known to fail or to be slow by a large factor, the command's exit code is 1; warn: against the advice; skip: not looked at."""

OLCF_PYTORCH = "https://docs.olcf.ornl.gov/software/analytics/pytorch_frontier.html"
OLCF_FRONTIER = "https://docs.olcf.ornl.gov/systems/frontier_user_guide.html"
HPE_CCL = "https://github.com/HewlettPackard/shs-ccl-docs"
LUMI_AI = "https://github.com/Lumi-supercomputer/LUMI-AI-Guide"
NCCL = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
TORCH_NCCL = "https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        check: what was looked at: a variable, or a rule's name.
        seen, right: what is there, and what should be.
        advice: what to do and why; "" where all is well.
        source: where the advice comes from.
    """

    check: str
    status: str
    seen: str
    right: str = ""
    advice: str = ""
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
