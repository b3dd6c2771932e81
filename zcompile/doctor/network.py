"""Rules for the network of nodes with HPE Slingshot: RCCL, its OFI plugin, libfabric's cxi provider.

Each rule is a line of a table: the variable, what is right, what is known to be bad, why, and who says so. They apply to jobs of
several Slingshot nodes; elsewhere they are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zcompile.doctor.findings import HPE_CCL, LUMI_AI, NCCL, OLCF_PYTORCH, TORCH_NCCL, Finding
from zcompile.doctor.recording import CACHES, Host, Recording


@dataclass(frozen=True)
class Variable:
    """An environment variable. Values are compared without regard to case.

    Attributes:
        right: values that are right; the first one is the advice. () where it should not be set.
        bad: values that are known to fail, or to be slow by a large factor.
        unset: the status where it is not set ("ok" where that is as good).
    """

    name: str
    right: tuple[str, ...]
    why: str
    source: str
    bad: tuple[str, ...] = ()
    unset: str = "warn"
    amd: bool = False

    def check(self, recording: Recording) -> Finding:
        value = recording.env.get(self.name)
        right = " or ".join(self.right) or "not set"
        if value is None:
            status = self.unset if self.right else "ok"
            seen = "not set"
        else:
            status, seen = ("bad" if value.lower() in self.bad else "ok" if self._fits(value) else "warn"), value
        advice = "" if status == "ok" else f"{self._do()}: {self.why}"
        return Finding(self.name, status, seen, right, advice, self.source)

    def _fits(self, value: str) -> bool:
        return value.lower() in tuple(text.lower() for text in self.right)

    def _do(self) -> str:
        return f"export {self.name}={self.right[0]}" if self.right else f"unset {self.name}"


VARIABLES = (
    Variable("FI_MR_CACHE_MONITOR", ("kdreg2", "userfaultfd"),
             "memhooks, which libfabric may take by itself, is known to hang RCCL's jobs; a monitor in the kernel does not",
             OLCF_PYTORCH, bad=("memhooks",)),
    Variable("NCCL_NET_GDR_LEVEL", ("PHB", "3"), "the network reads and writes GPU memory directly", OLCF_PYTORCH, bad=("0", "loc")),
    Variable("NCCL_CROSS_NIC", ("1", "2"), "rings may use another NIC on the next node", OLCF_PYTORCH),
    Variable("NCCL_NET", ("AWS Libfabric", "ofi"), "sockets carry a fraction of what the plugin does", NCCL, bad=("socket",), unset="ok"),
    Variable("NCCL_P2P_DISABLE", ("0",), "with 1 the GCDs of a node do not use their links", NCCL, bad=("1",), unset="ok"),
    Variable("NCCL_ALGO", (), "RCCL's tuner knows the sizes; one algorithm for all of them is slow for many", OLCF_PYTORCH),
    Variable("FI_CXI_RDZV_PROTO", ("alt_read",), "rendezvous without the get that runs out of resources; needs "
             "srun --network=disable_rdzv_get", HPE_CCL),
    Variable("FI_CXI_RDZV_EAGER_SIZE", ("0",), "with alt_read", HPE_CCL),
    Variable("FI_CXI_RDZV_THRESHOLD", ("0",), "with alt_read", HPE_CCL),
    Variable("FI_CXI_RDZV_GET_MIN", ("0",), "with alt_read", HPE_CCL),
    Variable("FI_CXI_DEFAULT_CQ_SIZE", ("131072",), "completion queues overflow at scale", HPE_CCL),
    Variable("FI_CXI_DEFAULT_TX_SIZE", ("2048",), "transmit queues are too short at scale", HPE_CCL),
    Variable("FI_CXI_RX_MATCH_MODE", ("hybrid", "software"), "matching entries of the NIC run out, then the job dies", HPE_CCL),
    Variable("FI_CXI_DISABLE_HOST_REGISTER", ("1",), "registration of host memory with the GPU driver can deadlock", HPE_CCL),
    Variable("HSA_FORCE_FINE_GRAIN_PCIE", ("1",), "peer writes of the GCDs need it", OLCF_PYTORCH, amd=True),
    Variable("TORCH_NCCL_BLOCKING_WAIT", ("0",), "the host would stand still in each wait, and nothing is hidden", TORCH_NCCL, unset="ok"),
)  # fmt: skip


def variables(recording: Recording) -> Iterator[Finding]:
    """The table above, on several Slingshot nodes."""
    if not (recording.multi_node and recording.slingshot):
        why = "one node" if not recording.multi_node else "no Slingshot interfaces (hsn0, ...) seen"
        yield Finding("network variables", "skip", why)
        return
    for variable in VARIABLES:
        if not variable.amd or recording.amd:
            yield variable.check(recording)


def interfaces(recording: Recording) -> Iterator[Finding]:
    """RCCL's and gloo's bootstrap must take the high-speed network's interfaces."""
    if not (recording.multi_node and recording.slingshot):
        return
    have = {name for host in recording.hosts.values() for name in host.interfaces}
    for name, right in (("NCCL_SOCKET_IFNAME", "hsn0,hsn1,hsn2,hsn3"), ("GLOO_SOCKET_IFNAME", "hsn0")):
        value = recording.env.get(name)
        advice = f"export {name}={right} (hsn0 alone if jobs hang at their start): other networks are slow, or do not join the nodes"
        if value is None:
            yield Finding(name, "warn", "not set", right, advice, OLCF_PYTORCH)
            continue
        named = [part.lstrip("=^") for part in value.split(",")]
        fits = all(
            any(i.startswith(part) for i in have if i.startswith("hsn")) for part in named
        ) and not value.startswith("^")
        yield Finding(name, "ok" if fits else "bad", value, right, "" if fits else advice, OLCF_PYTORCH)


OLDEST_PLUGIN = (1, 19)
"""aws-ofi-nccl: OLCF's page builds 1.19.2."""


def plugin(recording: Recording) -> Iterator[Finding]:
    """aws-ofi-nccl (aws-ofi-rccl): without it RCCL takes TCP sockets between nodes."""
    if not (recording.multi_node and recording.slingshot):
        yield Finding("OFI plugin", "skip", "not several Slingshot nodes")
        return
    without = sorted(name for name, host in recording.hosts.items() if not host.plugins)
    right = "librccl-net.so or libnccl-net.so on LD_LIBRARY_PATH"
    newest = "load the module rccl-net-plugin (Frontier), or build aws-ofi-nccl 1.19 or newer against this ROCm"
    if without:
        advice = f"{newest} and put its lib folder on LD_LIBRARY_PATH: RCCL uses TCP sockets else"
        yield Finding("OFI plugin", "bad", f"none on {', '.join(without[:4])}", right, advice, OLCF_PYTORCH)
        return
    yield Finding("OFI plugin", "ok", next(iter(recording.hosts.values())).plugins[0], right, "", OLCF_PYTORCH)
    check, wanted = "OFI plugin's version", f"{OLDEST_PLUGIN[0]}.{OLDEST_PLUGIN[1]} or newer"
    said = sorted({host.plugin_version for host in recording.hosts.values()})
    if not all(said):
        yield Finding(check, "skip", "its file does not say", wanted, "", OLCF_PYTORCH)
    elif all(tuple(int(part) for part in text.split(".")) >= OLDEST_PLUGIN for text in said):
        yield Finding(check, "ok", ", ".join(said), wanted, "", OLCF_PYTORCH)
    else:
        yield Finding(
            check, "warn", ", ".join(said), wanted, f"{newest}: it is what is maintained for Slingshot", OLCF_PYTORCH
        )


def rendezvous(recording: Recording) -> Iterator[Finding]:
    """FI_CXI_RDZV_PROTO=alt_read and Slurm's --network=disable_rdzv_get go together."""
    if not (recording.multi_node and recording.slingshot and "SLURM_JOB_ID" in recording.env):
        return
    network = recording.env.get("SLURM_NETWORK", recording.env.get("SLURM_STEP_NETWORK", ""))
    if (recording.env.get("FI_CXI_RDZV_PROTO") == "alt_read") == ("disable_rdzv_get" in network):
        yield Finding("srun --network", "ok", network or "not set", "disable_rdzv_get with alt_read", "", HPE_CCL)
    else:
        advice = "give srun --network=disable_rdzv_get and export FI_CXI_RDZV_PROTO=alt_read, both or neither"
        yield Finding("srun --network", "warn", network or "not set", "disable_rdzv_get with alt_read", advice, HPE_CCL)


_SHARED = ("lustre", "gpfs", "nfs", "nfs4", "beegfs", "panfs")
_MIOPEN = ("MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR")


def caches(recording: Recording) -> Iterator[Finding]:
    """Compile caches belong on the node: parallel file systems lack the locking, and thousands of ranks open thousands of small files.
    MIOpen's are under the home folder unless a variable says otherwise; so are those of Triton kernels that run before Inductor's.
    """
    host = next(iter(recording.hosts.values()), Host())
    gpus = any(seat.pci for seat in recording.seats)
    for name, default in CACHES.items():
        value, kind = recording.env.get(name), host.filesystems.get(name, "")
        needed = recording.amd if name in _MIOPEN else gpus if name.startswith("TRITON") else True
        advice = f"export {name}=/tmp/$USER-$SLURM_JOB_ID (or a local disk): "
        right, source = "a folder of the node's own", OLCF_PYTORCH if name in _MIOPEN else LUMI_AI
        if kind in _SHARED and (value is not None or needed):
            seen = f"not set: {default} on {kind}" if value is None else f"{value} on {kind}"
            wrong = f"{advice}{kind} lacks the locking and is slow for small files"
            yield Finding(name, "warn", seen, right, wrong, source if value is None else LUMI_AI)
        elif value is None and name in _MIOPEN and needed and recording.multi_node and not kind:
            advice += "the home folder, which MIOpen takes else, is one for all nodes and lacks the locking"
            yield Finding(name, "warn", f"not set: {default}", right, advice, source)
