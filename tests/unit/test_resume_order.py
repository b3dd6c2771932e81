"""Copies that others read in memory, made from a checkpoint: between meetings of all ranks, at which a GPU has done what it was asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zcompile import resume

WRITE = ["spread", "copy", "spread", "copy"]


@pytest.mark.parametrize(
    ("device", "peer_level", "expected"),
    [
        ("cuda", 1, ["synchronize", "meet", *WRITE, "synchronize", "meet"]),
        ("cpu", 1, ["meet", *WRITE, "meet"]),
        ("cuda", 0, WRITE),
    ],
)
def test_nobody_writes_while_others_read_or_reads_before_all_have_written(
    device: str, peer_level: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    units = [
        SimpleNamespace(image=torch.zeros(1), first=SimpleNamespace(peer_level=peer_level), version=(1,)) for _ in "ab"
    ]
    agreement = SimpleNamespace(exchange=lambda words, step: seen.append("meet"))
    engine: Any = SimpleNamespace(
        device=torch.device(device), runtime=SimpleNamespace(agreement=agreement), units=units
    )
    monkeypatch.setattr(resume, "spread_image", lambda unit: seen.append("spread"))
    monkeypatch.setattr(resume, "copy_from_image", lambda unit: seen.append("copy"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("synchronize"))
    standing = SimpleNamespace(to_local=lambda: torch.zeros(2, 3, dtype=torch.int64))
    resume.take_images(engine, {"key": {"standing": standing}})
    assert seen == expected
    assert [unit.seen for unit in units] == [(1,), (1,)]
    seen.clear()
    resume.take_images(engine, {})
    assert seen == [], "another plan's checkpoint: a refresh makes the copies, with barriers of its own"
