"""Rules for versions: what zcompile supports, what belongs together, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator

from zcompile.doctor.findings import Finding
from zcompile.doctor.recording import Recording

TRITON_OF_TORCH: dict[tuple[int, ...], tuple[int, ...]] = {(2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7)}
"""torch -> the Triton that it was built and tested with, as its wheels ask for it."""
_TORCH_WHEELS = "https://pytorch.org/get-started/previous-versions"


def versions(recording: Recording) -> Iterator[Finding]:
    torch, triton = recording.versions.get("torch", ""), recording.versions.get("triton", "")
    wanted = TRITON_OF_TORCH.get(_short(torch))
    supported = (
        f"{min(TRITON_OF_TORCH)[0]}.{min(TRITON_OF_TORCH)[1]} to {max(TRITON_OF_TORCH)[0]}.{max(TRITON_OF_TORCH)[1]}"
    )
    if wanted is None:
        yield Finding(
            "torch",
            "bad",
            torch or "none",
            supported,
            f"install torch {supported}: zcompile reads names that others lack",
        )
    else:
        yield Finding("torch", "ok", torch, supported)
    if wanted is not None and triton:
        text = ".".join(map(str, wanted))
        fits = _short(triton) == wanted
        advice = "" if fits else f"install triton {text}: Inductor of torch {torch} may not know another one"
        yield Finding("triton", "ok" if fits else "bad", triton, text, advice, _TORCH_WHEELS)
    gpu = any(seat.pci for seat in recording.seats)
    hip, cuda = recording.versions.get("hip", ""), recording.versions.get("cuda", "")
    if recording.amd and not hip:
        advice = "the nodes have AMD GPUs: install torch's ROCm wheels"
        yield Finding(
            "ROCm", "bad", f"torch for {'CUDA ' + cuda if cuda else 'CPUs'}", "torch for ROCm", advice, _TORCH_WHEELS
        )
    elif hip:
        yield Finding("ROCm", "ok", hip)
    elif not gpu:
        yield Finding("ROCm", "skip", "no GPU seen")
    for library in ("rccl", "nccl"):
        if library in recording.versions:
            yield Finding(library.upper(), "ok", recording.versions[library])


def equal(recording: Recording) -> Iterator[Finding]:
    """Variables and versions that differ between ranks."""
    advice = "every rank should be started from one environment: ranks that differ compile other code, or wait for one another"
    for name, values in recording.differing.items():
        status = "bad" if name.startswith("version of") else "warn"
        yield Finding(f"equal: {name}", status, values, "the same on all ranks", advice)
    if not recording.differing and len(recording.seats) > 1:
        yield Finding("equal environments", "ok", f"on {len(recording.seats)} ranks")


def _short(text: str) -> tuple[int, ...]:
    parts = text.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) and len(parts) == 2 else ()
