"""The planner: every plan of the space that a user allows, pruned by memory and by a bound, ranked by simulated time. Pure.

    placements     all W <= G <= O over the levels of the machine
    formats        native, and those that are allowed; none is chosen silently
    buckets        what a message aims at
    overlap        buckets under way

First every pair of placements and formats gets closed forms: model state, and for each lane the seconds that its hops take. A plan whose
state does not fit is out. A step cannot be shorter than its busiest lane, computing included: plans are simulated in the order of that
bound, and those whose bound is above the best time that was found are not. The result is a function of workload, topology and request
alone: the same on every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zcompile.plan import ALLOWED, PRESETS, WIRES, Plan
from zcompile.planner.skeleton import Piece, Skeleton, numel, pieces
from zcompile.planner.step import ADAMW_BYTES, Result, of_skeleton, play
from zcompile.planner.workload import Workload
from zcompile.resolved import ResolvedPlan
from zcompile.simulator import Noise
from zcompile.times import hop_seconds
from zcompile.topology import Topology

PAPER = ("int8", "int4")
_REDUCTIONS = {"bf16": "bf16", "int8": "int8", "int4": WIRES["paper"]["reduce"]}
"""Allowed name -> format. int4 has the blocks that wire="paper" gives it: larger ones cost loss (docs/convergence.md)."""
BUCKETS = (25 * 2**20, 100 * 2**20, 400 * 2**20)
OVERLAPS = (1, 2, 4)
MOST_SIMULATED = 12
_TRANSFERS = (("gather", False), ("gather", True), ("reduce", True), ("sync", True), ("refresh", False))
"""Transfer, and whether it belongs to backward."""
RESERVE = 0.04
"""Part of a device's memory that plans leave alone: what the runtime, the communicators and fragmentation take. An assumption."""


class NothingFits(ValueError):
    """No plan fits the memory: says which needs least, and by how much it misses."""


@dataclass(frozen=True)
class Request:
    """What the planner is asked.

    Attributes:
        micro_batches: K, per step.
        memory: bytes of a device; 0: the device's, less RESERVE.
        allowed: formats beyond native ones that plans may use, of ALLOWED.
        overlaps, buckets: to try, buckets beside those that the levels want.
        noise: jitter and stragglers.
    """

    micro_batches: int = 1
    memory: int = 0
    allowed: tuple[str, ...] = ()
    overlaps: tuple[int, ...] = OVERLAPS
    buckets: tuple[int, ...] = BUCKETS
    noise: Noise = field(default_factory=Noise)

    def __post_init__(self) -> None:
        for name in self.allowed:
            if name not in ALLOWED:
                raise ValueError(f"allowed format {name!r}: valid: {', '.join(ALLOWED)}")
        if self.micro_batches < 1:
            raise ValueError(f"micro-batches {self.micro_batches}: must be a number from 1")
        if self.memory < 0:
            raise ValueError(f"memory {self.memory}: must be a number of bytes from 1, or 0 for the device's")

    def limit(self, topology: Topology) -> float:
        return self.memory or topology.device.memory * (1 - RESERVE)


@dataclass
class Candidate:
    """One plan, what closed forms say of it, and what its simulation said.

    Attributes:
        state: model-state bytes by kind. floor: bytes that it needs at least, activations included.
        lanes: seconds that each level's hops take, and "compute".
        verdict: why it is not the best; "" for the best.
    """

    plan: Plan
    overlap: int
    state: dict[str, int]
    floor: int
    lanes: dict[str, float]
    result: Result | None = None
    verdict: str = ""

    @property
    def bound(self) -> float:
        """No step is shorter."""
        return max(self.lanes.values())

    @property
    def label(self) -> str:
        return describe(self.plan, self.overlap)

    def as_dict(self) -> dict[str, Any]:
        return {
            "plan": {
                "name": self.plan.name, "weights": self.plan.weights, "gradients": self.plan.gradients,
                "optimizer": self.plan.optimizer, "formats": formats_of(self.plan), "bucket_bytes": self.plan.bucket_bytes,
            },
            "overlap": self.overlap, "state_bytes": self.state, "floor_bytes": self.floor, "lane_seconds": self.lanes,
            "bound_seconds": self.bound, "verdict": self.verdict, **(self.result.as_dict() if self.result else {}),
        }  # fmt: skip


@dataclass
class Answer:
    """best: the plan to take. ranked: all that were simulated, fastest first. presets: by name. considered: how many plans there were."""

    best: Candidate
    ranked: list[Candidate]
    presets: dict[str, Candidate]
    considered: int
    pruned: dict[str, int]


def formats_of(plan: Plan) -> dict[str, str]:
    """Formats of a plan that are not the transfers' defaults, in their short names."""
    plain, found = Plan(), {}
    for transfer in ("gather", "reduce", "sync", "refresh", "back"):
        value: Any = getattr(plan, transfer)
        if value is not None and value != getattr(plain, transfer):
            found[transfer] = value.short if hasattr(value, "short") else str(value)
    return found


def describe(plan: Plan, overlap: int) -> str:
    """A line: placements, formats, bucket, overlap."""
    formats = " ".join(f"{transfer}={wire}" for transfer, wire in formats_of(plan).items())
    places = f"{plan.weights}/{plan.gradients}/{plan.optimizer}"
    bucket = f" {plan.bucket_bytes // 2**20} MiB" if plan.bucket_bytes else ""
    return f"{places} {formats or 'native'}{bucket} overlap {overlap}"


def placements(topology: Topology) -> list[tuple[str, str, str]]:
    """All W <= G <= O by name; levels of one rank, which change nothing, are left out."""
    names = ["whole"]
    for level in topology.levels[: topology.world]:
        if level.size > 1:
            names.append(level.name)
    if len(names) > 1:
        names[-1] = "world"
    return [
        (names[w], names[g], names[o])
        for w, g, o in itertools.product(range(len(names)), repeat=3)
        if w <= g <= o
    ]  # fmt: skip


def formats(allowed: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of allowed formats, as fields of Plan; native first."""
    gathers = ["", *(["int8"] if "int8" in allowed else [])]
    reductions = ["", *(wire for name, wire in _REDUCTIONS.items() if name in allowed)]
    refreshes = ["", *(name for name in ALLOWED if name.endswith("-delta") and name in allowed)]
    found = []
    for gather, reduce, refresh in itertools.product(gathers, reductions, refreshes):
        if gather and refresh == "lossless-delta":  # which goes on from native values
            continue
        fields = {"gather": gather, "reduce": reduce, "refresh": refresh}
        found.append({transfer: wire for transfer, wire in fields.items() if wire})
    return found


def name_of(places: tuple[str, str, str], topology: Topology) -> str:
    """The preset that these placements are on this topology, or "custom"."""
    mine = tuple(topology.extents[topology.index(place)] for place in places)
    for name, preset in PRESETS.items():
        if tuple(topology.extents[topology.index(place)] for place in preset) == mine:
            return name
    return "custom"


class Estimator:
    """Closed forms of plans for one workload and topology; equal units are asked once."""

    def __init__(self, workload: Workload, topology: Topology, request: Request, compute: str):
        self.workload, self.topology, self.request, self.compute = workload, topology, request, compute
        self.seconds = workload.clock(topology.device)[-1] * request.micro_batches
        self._levels = {level.name: level for level in topology.levels}
        self._hops: dict[object, dict[tuple[str, bool], tuple[tuple[str, float], ...]]] = {}
        self._pieces: dict[Plan, list[Piece]] = {}

    def resolve(self, plan: Plan) -> ResolvedPlan:
        return plan.resolve(self.topology, self.compute)

    def pieces(self, plan: Plan) -> list[Piece]:
        if plan not in self._pieces:
            self._pieces[plan] = pieces(self.workload, self.resolve(plan))
        return self._pieces[plan]

    def skeleton(self, plan: Plan, overlap: int) -> Skeleton:
        return Skeleton(self.workload, self.resolve(plan), overlap, known=self.pieces(plan))

    def candidate(self, plan: Plan, overlap: int) -> Candidate:
        skeleton, k = self.skeleton(plan, overlap), self.request.micro_batches
        lanes = dict.fromkeys(self._levels, 0.0)
        shard, largest = 0, 0
        for piece in skeleton.pieces:
            first = piece.specs[0]
            parts = (piece.specs, piece.read, piece.again, piece.reduced)
            key = (first.chain, tuple(tuple(spec.shape for spec in part) for part in parts))
            if key not in self._hops:
                self._hops[key] = {
                    (transfer, backward): tuple(
                        (hop[1], hop_seconds(self._levels[hop[1]], hop[4])) for hop in piece.hops(transfer, backward)
                    )
                    for transfer, backward in _TRANSFERS
                }
            times = {("gather", False): k, ("gather", True): k}
            if piece.trainable:
                times.update({("reduce", True): k, ("sync", True): 1, ("refresh", False): 1})
                shard += sum(spec.layout.shard for spec in piece.specs)
            for transfer, count in times.items():
                for level, seconds in self._hops[key][transfer]:
                    lanes[level] += count * seconds
            largest = max(largest, numel(piece.specs) * (2 if first.compute == "bfloat16" else 4))
        state = skeleton.state(k > 1)
        optimizer = shard * ADAMW_BYTES / self.topology.device.memory_bandwidth
        lanes["compute"] = self.seconds + optimizer
        return Candidate(plan, overlap, state, sum(state.values()) + self.workload.peak + largest, lanes)

    def simulate(self, candidate: Candidate) -> Candidate:
        skeleton, k = self.skeleton(candidate.plan, candidate.overlap), self.request.micro_batches
        return replace(candidate, result=play(of_skeleton(skeleton, k), k, self.request.noise))


def search(
    workload: Workload, topology: Topology, request: Request, compute: str = "bfloat16", quick: bool = False
) -> Answer:
    """The best plan for a workload on a topology.

    Args:
        compute: dtype of the weights as they are gathered, "bfloat16" or "float32".
        quick: fewer plans are simulated (for `plan="auto"`), presets only where they are candidates.

    Raises:
        NothingFits: no plan's memory is within the request's.
    """
    estimator, limit = Estimator(workload, topology, request, compute), request.limit(topology)
    presets: dict[str, Candidate] = {}
    if not quick:
        for name in PRESETS:
            if name not in ("fsdp", "mics"):  # the same as zero3 and hsdp
                presets[name] = estimator.candidate(Plan.preset(name), 2)
    overlap = request.overlaps[len(request.overlaps) // 2]
    plain = [estimator.candidate(_plan(places, {}, topology), overlap) for places in placements(topology)]
    variants = formats(request.allowed)
    extreme = variants[-1]
    tight = (
        [estimator.candidate(_plan(places, extreme, topology), overlap) for places in placements(topology)]
        if extreme
        else []
    )
    fitting = [c for c in (*plain, *tight) if c.floor <= limit]
    considered = len(plain) * len(variants) * (1 + len(request.buckets)) * len(request.overlaps)
    if not fitting:
        raise _nothing(workload, [*plain, *tight], limit)
    chosen = _places(sorted(fitting, key=_order))[: 3 if quick else 6]
    pool = [estimator.candidate(_plan(places, fields, topology), overlap) for places in chosen for fields in variants]
    pool = sorted((candidate for candidate in pool if candidate.floor <= limit), key=_order)
    simulated: list[Candidate] = []
    for candidate in pool[: 3 if quick else MOST_SIMULATED]:
        done = _best(simulated, limit)
        if done and candidate.bound > _seconds(done):
            break
        simulated.append(estimator.simulate(candidate))
    for candidate in sorted([*fitting, *pool], key=lambda c: (c.floor, c.label)):
        if _best(simulated, limit):
            break
        # What is in flight beside the floor did not fit: those that hold less are next.
        if candidate.label not in {each.label for each in simulated}:
            simulated.append(estimator.simulate(candidate))
    best = _best(simulated, limit)
    if best is None:
        raise _nothing(workload, simulated, limit)
    for variant in _refinements(best, request, estimator, quick):
        simulated.append(estimator.simulate(variant))
    best = _best(simulated, limit) or best
    for name, candidate in presets.items():
        presets[name] = estimator.simulate(candidate)
    ranked = sorted(simulated, key=lambda c: (c.result.bytes > limit if c.result else True, _seconds(c), c.label))
    for candidate in (*ranked, *presets.values()):
        candidate.verdict = "" if candidate is best else _verdict(candidate, best, limit)
    pruned = {"memory": len(plain) + len(tight) - len(fitting), "bound": len(pool) - min(len(pool), len(simulated))}
    return Answer(best, ranked, presets, considered, pruned)


def _plan(places: tuple[str, str, str], fields: dict[str, str], topology: Topology) -> Plan:
    name = name_of(places, topology)
    weights, gradients, optimizer = places
    values: dict[str, Any] = {**fields, "name": name}
    return Plan(weights, gradients, optimizer, **values)


def _order(candidate: Candidate) -> Any:
    return (candidate.bound, sum(candidate.lanes.values()), candidate.floor, candidate.label)


def _places(candidates: Sequence[Candidate]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((c.plan.weights, c.plan.gradients, c.plan.optimizer) for c in candidates))


def _seconds(candidate: Candidate) -> float:
    return candidate.result.seconds if candidate.result else float("inf")


def _best(candidates: Sequence[Candidate], limit: float) -> Candidate | None:
    """The fastest that fits; of those within 0.1 % the one that needs least memory."""
    fitting = [c for c in candidates if c.result and c.result.bytes <= limit]
    if not fitting:
        return None
    least = min(_seconds(candidate) for candidate in fitting)
    near = [candidate for candidate in fitting if _seconds(candidate) <= 1.001 * least]
    return min(near, key=lambda c: (c.result.bytes if c.result else 0, c.label))


def _refinements(best: Candidate, request: Request, estimator: Estimator, quick: bool) -> Iterator[Candidate]:
    """The best plan with other buckets, and with other overlaps."""
    seen = {len(estimator.pieces(best.plan))}
    for bucket in request.buckets:
        plan = replace(best.plan, bucket_bytes=bucket, wire=None)
        units = len(estimator.pieces(plan))
        if bucket != best.plan.bucket_bytes and units not in seen:
            seen.add(units)
            yield estimator.candidate(plan, best.overlap)
    for overlap in request.overlaps:
        if overlap != best.overlap and not quick:
            yield replace(best, overlap=overlap, result=None)


def _nothing(workload: Workload, candidates: Sequence[Candidate], limit: float) -> NothingFits:
    least = min(candidates, key=lambda c: (c.result.bytes if c.result else c.floor, c.label))
    needs = least.result.bytes if least.result else least.floor
    state = sum(least.state.values())
    hint = (
        "smaller micro-batches, recomputed activations"
        if workload.peak > state
        else "more ranks to shard over, formats that are allowed"
    )
    return NothingFits(
        f"no plan fits {limit / 1e9:.1f} GB: the one that needs least, {least.label}, needs {needs / 1e9:.1f} GB, "
        f"{(needs - limit) / 1e9:.1f} GB too much ({state / 1e9:.1f} GB model state, {workload.peak / 1e9:.1f} GB activations); "
        f"what would help: {hint}"
    )


def _verdict(candidate: Candidate, best: Candidate, limit: float) -> str:
    """Why it loses, in a line."""
    result, other = candidate.result, best.result
    assert other is not None
    if result is None:
        return "not simulated"
    if result.bytes > limit:
        state = max(candidate.state, key=lambda key: candidate.state[key])
        return f"needs {(result.bytes - limit) / 1e9:.1f} GB more than there is, most of it {state}"
    slower = result.seconds - other.seconds
    if slower <= 0.001 * other.seconds:
        return f"as fast; {(result.bytes - other.bytes) / 1e9:+.1f} GB"
    busiest = max((key for key in candidate.lanes if key != "compute"), key=lambda key: candidate.lanes[key])
    if candidate.lanes[busiest] > candidate.lanes["compute"]:
        return (
            f"+{slower / other.seconds:.0%}: {busiest} is busy {candidate.lanes[busiest]:.2f} s, longer than computing"
        )
    more = {level: s - other.levels.get(level, 0.0) for level, s in result.levels.items()}
    level, exposed = max(more, key=lambda key: more[key], default=""), result.exposed - other.exposed
    if level and exposed > 0.5 * slower:
        return f"+{slower / other.seconds:.1%}: {exposed * 1e3:.0f} ms more exposed, {more[level] * 1e3:.0f} of it on {level}"
    return (
        f"+{slower / other.seconds:.1%}: kernels around the hops, {(result.compute - other.compute) * 1e3:.0f} ms more"
    )
