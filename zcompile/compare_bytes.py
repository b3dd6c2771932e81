"""`zcompile bytes`: what one optimizer step receives over each level, native and quantised, beside torch's FSDP2 and HSDP.

A GPT of 21 M parameters takes two steps on real gloo processes under each plan; the figures are the ledger's of the second step
(the first one fills the copies, so its refresh is a full one). Samples are short: bytes of weights and gradients do not depend on them.

A row is consistent if on every rank the ledger's columns are equal, and equal to the closed forms of all parameters added up. That
makes the closed forms of some parameters, such as those that are quantised, parts of a counted total. Targets are judged and reported;
the exit code is about consistency alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import nn

from zcompile import compare_report, cost
from zcompile.api import ledger
from zcompile.cli import write_json
from zcompile.compare_fsdp import attribute, batch, decoder, peer
from zcompile.compare_report import BASE, PAPER
from zcompile.layout import ParamSpec
from zcompile.plan import Plan, paper_rule
from zcompile.ranks import Pool, RanksFailed
from zcompile.shapes import SHAPES, Shape
from zcompile.topology import Topology
from zcompile.traffic import COLUMNS
from zcompile.wire import WireFormat
from zcompile.wrap import hierarchical_zero

MODELS = ("gpt-21m", "tiny")
MOST_RANKS = 16
EMBEDDING = (paper_rule("embed.weight"),)

PLANS = {
    "zero_topo": Plan.preset("zero_topo"),
    BASE: Plan.preset("zero_topo", reduce="bf16"),
    "all bf16, lossless delta": Plan.preset("zero_topo", reduce="bf16", refresh="lossless-delta"),
    PAPER: Plan.preset("zero_topo", wire="paper"),
    "paper, int8-delta": Plan.preset("zero_topo", wire="paper", refresh="int8-delta"),
    "paper, int4-delta": Plan.preset("zero_topo", wire="paper", refresh="int4-delta"),
    "paper, embedding too": Plan.preset("zero_topo", wire="paper", rules=EMBEDDING),
    "int4-delta, embedding too": Plan.preset("zero_topo", wire="paper", refresh="int4-delta", rules=EMBEDDING),
    "zero3": Plan.preset("zero3"),
    "zero3, all bf16": Plan.preset("zero3", reduce="bf16"),
    "hsdp": Plan.preset("hsdp"),
    "hsdp, all bf16": Plan.preset("hsdp", reduce="bf16", back="bf16"),
    "zeropp": Plan.preset("zeropp"),
}
PEERS = {"FSDP2, all bf16": False, "HSDP of FSDP2, all bf16": True}
"""name -> whether each node holds a whole copy"""


def measure(rank: int, shape: Shape, topology: str, plan: Plan, micro_batches: int = 1, dtype: torch.dtype = torch.bfloat16,
            make: Callable[[Shape], nn.Module] = decoder) -> dict[str, Any]:  # fmt: skip
    """Two eager steps on this rank; the ledger of the second one, whole and by parameter.

    Returns:
        "levels": as `zcompile.ledger` has it; "parameters": name -> (level, transfer) -> bytes, the closed forms of what ran;
        "elements": name -> elements; "quantised": names of what is gathered or reduced in codes; "faults": contradictions, as text.
    """
    begin = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # says how the plan resolved; so does the report
        model: Any = hierarchical_zero(make(shape), topology=topology, plan=plan, compute_dtype=dtype, compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    specs = {slot.name: slot.spec for slot in model.zero.slots}
    parameters = _record(model.zero.traffic, specs)
    for step in range(2):
        for found in parameters.values():
            found.clear()
        for k in range(micro_batches):
            model.set_requires_gradient_sync(k == micro_batches - 1)
            (model(batch(shape, step, rank, k)) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    levels = ledger(model)["levels"]
    del model, optimizer
    gc.collect()
    return {
        "levels": levels,
        "parameters": parameters,
        "elements": {name: spec.layout.numel for name, spec in specs.items()},
        "quantised": [name for name, spec in specs.items() if _quantised(spec)],
        "faults": _faults(levels, parameters),
        "seconds": time.perf_counter() - begin,
    }


def _record(traffic: Any, specs: Mapping[str, ParamSpec]) -> dict[str, cost.Bytes]:
    """Closed forms by parameter of every transfer that is booked from now on: this instance's two bookings are wrapped."""
    seen: dict[str, cost.Bytes] = {name: {} for name in specs}
    op, refreshed = traffic.op, traffic.refreshed

    def record_op(transfer: str, spec: ParamSpec) -> None:
        cost.add(seen[spec.name], cost.transfer_bytes(spec, transfer))
        op(transfer, spec)

    def record_refreshed(units: Collection[Any], full: Collection[Any]) -> None:
        for unit in units:
            for spec in unit.specs:
                amount = cost.full_refresh_bytes(spec) if unit in full else cost.transfer_bytes(spec, "refresh")
                cost.add(seen[spec.name], amount)
        refreshed(units, full)

    traffic.op, traffic.refreshed = record_op, record_refreshed
    return seen


def _quantised(spec: ParamSpec) -> bool:
    return any(WireFormat.parse(text).quantized for text in (*spec.gather, *spec.reduce))


def _faults(levels: Mapping[str, Any], parameters: Mapping[str, cost.Bytes]) -> list[str]:
    total: cost.Bytes = {}
    for found in parameters.values():
        cost.add(total, found)
    out = []
    for level, transfers in levels.items():
        for transfer, row in transfers.items():
            closed = total.get((level, transfer), 0)
            if {row[column] for column in COLUMNS} != {closed}:
                out.append(f"{transfer} over {level}: {row}, closed forms of the parameters that ran: {closed}")
    return out


def compare(pool: Any, shape: Shape, topology: str, micro_batches: int = 1, plans: Mapping[str, Plan] = PLANS,
            peers: Mapping[str, bool] = PEERS, done: Callable[[str], None] = lambda name: None) -> dict[str, Any]:  # fmt: skip
    """Every plan and every peer, one after the other, on a pool of ranks -> the report. `done` is called with each name.

    Args:
        pool: has `run(function, *arguments, timeout=)` as zcompile.ranks.Pool.
        plans: BASE and PAPER, of zcompile.compare_report, are among them: the others are compared with these.
    """
    levels = Topology.parse(topology)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, plan in plans.items():
        found[name] = pool.run(measure, shape, topology, plan, micro_batches, timeout=900.0)
        done(name)
    beside = {}
    for name, hybrid in peers.items():
        beside[name] = attribute(levels, pool.run(peer, shape, topology, hybrid, micro_batches, timeout=900.0))
        done(name)
    elements, quantised = found[PAPER][0]["elements"], found[PAPER][0]["quantised"]
    rows = {name: _row(plans[name], levels, ranks, quantised) for name, ranks in found.items()}
    result = {
        "ok": not any(row["faults"] for row in rows.values()),
        "shape": asdict(shape),
        "parameters": sum(elements.values()),
        "quantised_parameters": sum(elements[name] for name in quantised),
        "topology": levels.key,
        "ranks": levels.world_size,
        "levels": list(levels.names),
        "micro_batches": micro_batches,
        "compute": "bfloat16",
        "torch": torch.__version__,
        "rows": rows,
        "peers": beside,
    }
    result["checks"] = compare_report.checks(result)
    return result


def _row(plan: Plan, topology: Topology, ranks: Sequence[dict[str, Any]], quantised: Sequence[str]) -> dict[str, Any]:
    """One row of the report, from what `measure` returned on every rank."""
    first, resolved = ranks[0], plan.resolve(topology, "bfloat16")
    faults = [f"rank {rank}: {text}" for rank, mine in enumerate(ranks) for text in mine["faults"]]
    others = [rank for rank, mine in enumerate(ranks) if mine["levels"] != first["levels"]]
    faults += [f"rank {rank} received other amounts than rank 0" for rank in others]
    part: dict[str, dict[str, int]] = {level: dict.fromkeys(cost.LEDGER_TRANSFERS, 0) for level in topology.names}
    for name in quantised:
        for (level, transfer), amount in first["parameters"][name].items():
            part[level][transfer] += amount
    return {
        "placements": plan.placements(),
        "formats": {t: [wire.short for wire in resolved.formats(t)] for t in cost.LEDGER_TRANSFERS},
        "quantised_parameters": sum(first["elements"][name] for name in first["quantised"]),
        "levels": first["levels"],
        "levels_of_quantised_parameters": part,
        "sum_over_ranks": {
            level: sum(row["counted"] for mine in ranks for row in mine["levels"][level].values())
            for level in topology.names
        },
        "faults": faults,
        "seconds": max(mine["seconds"] for mine in ranks),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODELS[0], help=f"one of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument(
        "--topology", default="2x2x2", help=f"sizes of at most {MOST_RANKS} ranks, fastest first (default: %(default)s)"
    )
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the result there as JSON; - for standard output")


def refusal(arguments: argparse.Namespace) -> str:
    """What is wrong with the arguments; "" if nothing is."""
    if arguments.model not in MODELS:
        return f"model {arguments.model!r}: valid: {', '.join(MODELS)}"
    if arguments.micro_batches < 1:
        return f"--micro-batches {arguments.micro_batches}: must be a number from 1"
    try:
        topology = Topology.parse(arguments.topology)
        for plan in PLANS.values():
            plan.resolve(topology, "bfloat16")
    except ValueError as error:
        return str(error)
    if not 2 <= topology.world_size <= MOST_RANKS or topology.sizes[-1] == 1:
        return (
            f"topology {topology.key} has {topology.world_size} ranks, {topology.sizes[-1]} of them over its last level: a process is "
            f"started for each; valid: 2 to {MOST_RANKS} ranks, and more than one over the last level"
        )
    return ""


def command(arguments: argparse.Namespace) -> int:
    """0: every row is consistent; 1: one is not, or a rank failed; 2: bad arguments."""
    errors = Console(stderr=True, soft_wrap=True)
    why = refusal(arguments)
    if why:
        errors.print(f"zcompile bytes: {why}", style="red", markup=False)
        return 2
    begin, total, count = time.monotonic(), len(PLANS) + len(PEERS), 0
    pool = Pool(Topology.parse(arguments.topology).world_size)

    def done(name: str) -> None:
        nonlocal count
        count += 1
        errors.print(f"{count} of {total}: {name}, {time.monotonic() - begin:.0f} s", style="dim", markup=False)

    try:
        result = compare(
            pool, SHAPES[arguments.model], arguments.topology, arguments.micro_batches, PLANS, PEERS, done=done
        )
    except RanksFailed as error:
        errors.print(f"zcompile bytes: {error}", style="red", markup=False)
        return 1
    finally:
        pool.close()
    result = {"model": arguments.model, "seconds": round(time.monotonic() - begin, 1), **result}
    compare_report.show(result, Console(stderr=arguments.json == "-", width=compare_report.WIDTH))
    write_json(result, arguments.json)
    return 0 if result["ok"] else 1
