"""Closed forms of the plan algebra: bytes per level and transfer, model-state bytes. Pure; the only place that states them.

A transfer passes its levels one hop each. With P padded elements in the whole parameter, b bytes each on the wire, one rank receives

    b P (1 / E_(j-1) - 1 / E_j)        in the hop over level j

whichever transfer it is (gathers receive the other ranks' pieces, reductions the other ranks' versions of its own piece).

    gather   j = w .. 1      reduce   j = 1 .. g      sync   j = g+1 .. m, and back m .. o+1      refresh   j = o .. w+1

Quantised, b P is the sum of the records (codes, scales, padding to 16 bytes: docs/wire-format.md) of all rows: E_o shards in a gather
or refresh, E_m pieces in a reduction or its way back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import sympy

from zcompile.layout import Layout, ParamSpec
from zcompile.wire import WireFormat

LEDGER_TRANSFERS = ("gather", "reduce", "sync", "refresh")

Bytes = dict[tuple[str, str], int]
"""(level name, transfer) -> bytes that one rank receives."""

P, B, INNER, OUTER = sympy.symbols("P b E_{j-1} E_j", positive=True, integer=True)
HOP = B * P * (1 / INNER - 1 / OUTER)
"""The closed form above, for printing (`zcompile plan --explain`) and for checking the integer arithmetic below against."""

E_W, E_G, E_O = sympy.symbols("E_W E_G E_O", positive=True, integer=True)
STATE = {
    "master": 4 * P / E_O,
    "copy": B * P / E_W,
    "main": 4 * P / E_G,
    "gradient": 4 * P / E_O,
    "moments": 8 * P / E_O,
}
"""Model-state bytes on one rank of P parameters whose copies are stored with b bytes each: `main` while micro-batches add up, the copy
where it is not the master itself. `state_bytes` has the padding and the scales too."""

RECEIVED, BANDWIDTH, FRACTION, LATENCY, OVERHEAD, MESSAGES = sympy.symbols("R beta c alpha o n", positive=True)
HOP_SECONDS = OVERHEAD + MESSAGES * LATENCY + RECEIVED / (BANDWIDTH * FRACTION)
"""Of one hop in which a rank receives R bytes: call overhead o, n messages one after another of latency alpha, bandwidth beta, of which
messages of R / n bytes reach the part c. zcompile.times.hop_seconds is this with a level's numbers."""

FLOPS, RATE, MOVED, MEMORY = sympy.symbols("F rho M mu", positive=True)
OPERATION_SECONDS = sympy.Max(FLOPS / RATE, MOVED / MEMORY)
"""Roofline of one operation: F FLOPs at the rate rho that the device reaches for so many, M bytes at the memory's bandwidth mu."""

COMPUTE, LANE = sympy.symbols("C L_j", positive=True)
STEP_BOUND = sympy.Max(COMPUTE, LANE)
"""No step is shorter than its computing, nor than the hops of its busiest level take."""


def hop_bytes(layout: Layout, level: int, wire: WireFormat, transfer: str) -> int:
    """Bytes one rank receives in the hop over `level` (1..m): HOP with b P the bytes of all rows; exact, since E_m divides them."""
    inner, outer = layout.extents[level - 1], layout.extents[level]
    if transfer in ("gather", "refresh"):
        return wire.bytes(layout.shard) * (layout.shards // inner - layout.shards // outer)
    world = layout.extents[-1]
    return wire.bytes(layout.piece) * (world // inner - world // outer)


def overhead_bytes(layout: Layout, level: int, wire: WireFormat, transfer: str) -> tuple[int, int]:
    """The parts of `hop_bytes` that are padding and that are scales: rows of their own in the ledger.

    Padding is that of the values, on average over the ranks (rounded down), and that of the records.
    """
    total = hop_bytes(layout, level, wire, transfer)
    padded = layout.shards * layout.shard
    width = layout.shard if transfer in ("gather", "refresh") else layout.piece
    if not total or not padded:
        return 0, 0
    rows = total // wire.bytes(width)
    values = rows * (wire.code.code_bytes(width) if wire.quantized else wire.bytes(width))
    scales = rows * wire.code.scale_bytes(width) if wire.quantized else 0
    return total - values - scales + values * (padded - layout.numel) // padded, scales


def transfer_levels(spec: ParamSpec, transfer: str) -> Iterable[tuple[int, WireFormat, str]]:
    """(level, wire format, "gather", "reduce", "sync" or "back") of each hop of `transfer`, in the order they run."""
    m = len(spec.sizes)
    parse = WireFormat.parse
    if transfer == "gather":
        if not spec.in_place:
            yield from ((j, parse(spec.gather[j - 1]), transfer) for j in range(spec.w, 0, -1))
    elif transfer == "reduce":
        yield from ((j, parse(spec.reduce[j - 1]), transfer) for j in range(1, spec.g + 1))
    elif transfer == "sync":
        yield from ((j, parse(spec.sync[j - 1]), transfer) for j in range(spec.g + 1, m + 1))
        yield from ((j, parse(spec.back[j - 1]), "back") for j in range(m, spec.o, -1))
    elif transfer == "refresh":
        yield from ((j, parse(spec.refresh[j - 1]), transfer) for j in range(spec.o, spec.w, -1))
    else:
        raise ValueError(f"transfer {transfer!r}: one of {', '.join(LEDGER_TRANSFERS)}")


def transfer_bytes(spec: ParamSpec, transfer: str) -> Bytes:
    """Bytes one rank receives for one `transfer` of one parameter, by level. A delta refresh: see `full_refresh_bytes`."""
    return _sum(spec, transfer, transfer_levels(spec, transfer))


def refresh_hops(specs: Iterable[ParamSpec]) -> tuple[tuple[str, int], ...]:
    """The hops that refresh the copies of one unit, in their order: level, bytes that one rank receives."""
    found: dict[str, int] = {}
    for spec in specs:
        for (level, _), amount in transfer_bytes(spec, "refresh").items():
            found[level] = found.get(level, 0) + amount
    return tuple(found.items())


def full_refresh_bytes(spec: ParamSpec) -> Bytes:
    """The same of a refresh that sends the weights themselves where others send deltas: in the compute dtype."""
    native = WireFormat.parse("native").resolved(spec.compute)
    hops = transfer_levels(spec, "refresh")
    return _sum(spec, "refresh", ((j, native if wire.delta else wire, transfer) for j, wire, transfer in hops))


def _sum(spec: ParamSpec, transfer: str, hops: Iterable[tuple[int, WireFormat, str]]) -> Bytes:
    out: Bytes = {}
    for level, wire, kind in hops:
        amount = hop_bytes(spec.layout, level, wire, kind)
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
        copies: parameter name -> 1 if its compute copy is one of its own, 0 where it is the master itself.
        accumulating: whether micro-batches are being added up (main grads are alive).

    Returns:
        master: 4 P / E_o; copy: b P / E_w as it is stored; image: b P / E_w in the compute dtype beside a copy of codes that deltas
        refresh; main: 4 P / E_g; gradient: 4 P / E_o; moments: 8 P / E_o (AdamW's two, fp32); feedback: 4 P / E_(j-1) before the first
        quantised hop j of the reduce, and of the sync.
    """
    out = dict.fromkeys(("master", "copy", "image", "main", "gradient", "moments", "feedback"), 0)
    for spec in specs:
        layout = spec.layout
        out["master"] += 4 * layout.shard
        out["copy"] += copies.get(spec.name, 0) * spec.held * spec.stored.bytes(layout.shard)
        if spec.imaged and spec.stored.quantized:
            out["image"] += WireFormat.parse("native").resolved(spec.compute).bytes(spec.held * layout.shard)
        out["main"] += 4 * layout.width(spec.g) if accumulating else 0
        out["gradient"] += 4 * layout.shard
        out["moments"] += 8 * layout.shard
        out["feedback"] += 4 * sum(spec.feedback_widths().values())
    return out


def step_state(specs: Iterable[ParamSpec], trained: Collection[str], accumulating: bool) -> dict[str, int]:
    """`state_bytes` of a step in which the parameters `trained` (names) are: the others have no gradients, no moments and no feedback."""
    both: dict[bool, list[ParamSpec]] = {True: [], False: []}
    copies = {}
    for spec in specs:
        both[spec.name in trained].append(spec)
        copies[spec.name] = int(spec.has_copy)
    total = state_bytes(both[True], copies, accumulating)
    for key, amount in state_bytes(both[False], copies, False).items():
        total[key] += amount if key in ("master", "copy", "image") else 0
    return total
