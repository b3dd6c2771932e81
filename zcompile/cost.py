"""Closed forms of the plan algebra: bytes per level and transfer, model-state bytes. Pure; the only place that states them.

A transfer passes its levels one hop each. With P padded elements in the whole parameter, b bytes each on the wire, one rank receives

    b P (1 / E_(j-1) - 1 / E_j)        in the hop over level j

whichever transfer it is (gathers receive the other ranks' pieces, reductions the other ranks' versions of its own piece).

    gather   j = w .. 1      reduce   j = 1 .. g      sync   j = g+1 .. m, and back m .. o+1      refresh   j = o .. w+1
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from zcompile.layout import Layout, ParamSpec

ITEMSIZE: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
LEDGER_TRANSFERS = ("gather", "reduce", "sync", "refresh")

Bytes = dict[tuple[str, str], int]
"""(level name, transfer) -> bytes that one rank receives."""

P, B, INNER, OUTER = sympy.symbols("P b E_{j-1} E_j", positive=True, integer=True)
HOP = B * P * (1 / INNER - 1 / OUTER)
"""The closed form above, for printing (`zcompile plan --explain`) and for checking the integer arithmetic below against."""


def hop_bytes(layout: Layout, level: int, itemsize: int) -> int:
    """Bytes one rank receives in the hop over `level` (1..m): HOP with P the padded elements; exact, since P is a multiple of E_m."""
    padded = layout.shards * layout.shard
    inner, outer = layout.extents[level - 1], layout.extents[level]
    return itemsize * (padded // inner - padded // outer)


def padding_bytes(layout: Layout, level: int, itemsize: int) -> int:
    """The part of `hop_bytes` that is padding, on average over the ranks (rounded down): a row of its own in the ledger."""
    padded = layout.shards * layout.shard
    return hop_bytes(layout, level, itemsize) * (padded - layout.numel) // padded if padded else 0


def transfer_levels(spec: ParamSpec, transfer: str) -> Iterable[tuple[int, str]]:
    """(level, wire dtype name) of each hop of `transfer`, in the order they run; the way back of a sync included."""
    m = len(spec.sizes)
    if transfer == "gather":
        yield from ((j, spec.gather[j - 1]) for j in range(spec.w, 0, -1))
    elif transfer == "reduce":
        yield from ((j, spec.reduce[j - 1]) for j in range(1, spec.g + 1))
    elif transfer == "sync":
        yield from ((j, spec.sync[j - 1]) for j in range(spec.g + 1, m + 1))
        yield from ((j, spec.back[j - 1]) for j in range(m, spec.o, -1))
    else:
        raise ValueError(
            f"transfer {transfer!r}: one of gather, reduce, sync (a refresh belongs to a unit: refresh_bytes)"
        )


def transfer_bytes(spec: ParamSpec, transfer: str) -> Bytes:
    """Bytes one rank receives for one `transfer` (gather, reduce or sync) of one parameter, by level."""
    return _sum(spec, transfer, transfer_levels(spec, transfer))


def refresh_bytes(spec: ParamSpec, wires: tuple[str, ...]) -> Bytes:
    """Bytes one rank receives for one refresh of one parameter; `wires` is the dtype name per level."""
    return _sum(spec, "refresh", ((j, wires[j - 1]) for j in range(spec.o, spec.w, -1)))


def _sum(spec: ParamSpec, transfer: str, hops: Iterable[tuple[int, str]]) -> Bytes:
    out: Bytes = {}
    for level, wire in hops:
        amount = hop_bytes(spec.layout, level, ITEMSIZE[wire])
        if amount:
            key = (spec.levels[level - 1], transfer)
            out[key] = out.get(key, 0) + amount
    return out


def add(total: Bytes, more: Bytes) -> None:
    """total += more."""
    for key, amount in more.items():
        total[key] = total.get(key, 0) + amount


def state_bytes(specs: Iterable[ParamSpec], copies: Mapping[str, int], accumulating: bool) -> dict[str, int]:
    """Model-state bytes on one rank in closed form.

    Args:
        copies: parameter name -> bytes per element of its compute copy, 0 where the copy is the master itself.
        accumulating: whether micro-batches are being added up (main grads are alive).

    Returns:
        master: 4 P / E_o; copy: b P / E_w; main: 4 P / E_g; gradient: 4 P / E_o; moments: 8 P / E_o (AdamW's two, fp32).
    """
    out = dict.fromkeys(("master", "copy", "main", "gradient", "moments"), 0)
    for spec in specs:
        layout = spec.layout
        out["master"] += 4 * layout.shard
        out["copy"] += copies.get(spec.name, 0) * layout.width(spec.w)
        out["main"] += 4 * layout.width(spec.g) if accumulating else 0
        out["gradient"] += 4 * layout.shard
        out["moments"] += 8 * layout.shard
    return out
