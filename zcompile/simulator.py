"""Plays scheduled graphs on lanes: what a step takes on a machine that need not be here. Pure: no device, no clock, no communication.

A `Player` has a clock for computing and, in zcompile.times.Lanes, one for each level's links; graphs are played one after another on the
same clocks, so that what one leaves under way the next finds there. The nodes of a graph run in its order: an operation takes the
compute lane, a launch takes nothing of it and puts its hop on its level's lane, a wait ends when its hop does. These are the times by
which the schedule pass has ordered the graph: played alone, a graph takes what the pass expected.

Note [Reasons]: of an exposed hop, time could have been saved in one of three ways. It queued for its lane ("lane busy"), or it was
launched later than its input was there ("budget": that is what bounds launches), or neither: then its input came too late. If nothing
was left to compute between its input and the end of its phase, there was "nothing to hide behind"; else the graph asked for it at
once, a "dependency". What would have saved most names the reason.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

from zcompile.passes.nodes import (
    ALL_GATHER,
    COLLECTIVES,
    PEER_GATHER,
    QUANTIZE,
    REQUANTIZE,
    TRAFFIC,
    TRANSFER,
    WAIT,
    WIRE,
    collective_of,
)
from zcompile.timeline import COMPUTE, Hop, Memory, Span, Timeline
from zcompile.times import Lanes, hint, node_flops, node_seconds
from zcompile.topology import Topology

_TINY = 1e-12
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "u8"}


@dataclass(frozen=True)
class Noise:
    """Ranks that are not equally fast. Transfers wait for the slowest.

    Attributes:
        jitter: standard deviation of an operation's time, as a part of it, independent on each rank.
        straggler: factor on every operation's time on one rank.
        ranks: how many ranks are played beside one another where there is jitter; more are slower to wait for.
        seed: of the jitter.
    """

    jitter: float = 0.0
    straggler: float = 1.0
    ranks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.jitter < 1:
            raise ValueError(
                f"jitter {self.jitter!r}: must be a part of an operation's time, from 0 up to, not including, 1"
            )
        if not self.straggler >= 1:
            raise ValueError(f"straggler {self.straggler!r}: must be a factor from 1")
        if not 1 <= self.ranks <= 4096:
            raise ValueError(f"noise ranks {self.ranks!r}: must be a number from 1 to 4096")

    @property
    def played(self) -> int:
        return self.ranks if self.jitter else 1 + (self.straggler > 1)


@dataclass
class Player:
    """The clocks of a step in progress. `graph`, `refresh`, `operation`, `charge` and `release` move them; `finish` gives the timeline.

    With noise, the timeline is that of the first rank, which is no straggler.
    """

    topology: Topology
    noise: Noise = field(default_factory=Noise)
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        self.lanes = Lanes(self.topology.levels)
        self.now = [0.0] * self.noise.played
        """Of each rank that is played."""
        self.arrivals: dict[str, float] = {}
        """parameter -> when its copy is fresh."""
        self.last_on: dict[str, str] = {}
        """level -> the hop that was last put on its lane."""
        self._held: dict[str, int] = {}
        self._random = random.Random(self.noise.seed)

    # -- the parts of a step -----------------------------------------------------------------------------------------------------

    def graph(self, graph: Graph, stage: str, phase: str = "") -> None:
        """Play a lowered graph. stage: "forward", "backward" or "inference". phase: what its spans say (default: the stage)."""
        _Play(self, graph, stage, phase or stage).run()

    def refresh(self, units: Sequence[Refresh], phase: str = "refresh") -> None:
        """Launch refreshes from now on: units follow one another, each level busy with another unit. Waits stand in the forward."""
        start = max(self.now)
        for unit in units:
            ready = start
            for level, received, wire in unit.hops:
                begin, end = self.lanes.launch(level, received, ready)
                name, cause = f"refresh {fold(unit.parameters)}", self.last_on.get(level, "") if begin > ready else ""
                self.last_on[level] = name
                self.timeline.spans.append(
                    Span(level, name, begin, end, "", "refresh", phase, level, wire, received, unit.parameters)
                )
                self.timeline.hops.append(
                    Hop(
                        "",
                        "",
                        phase,
                        level,
                        "refresh",
                        wire,
                        received,
                        unit.parameters,
                        ready,
                        ready,
                        begin,
                        end,
                        end,
                        "",
                        cause,
                    )
                )
                ready = end
            self.arrivals.update(dict.fromkeys(unit.parameters, ready))

    def operation(self, name: str, seconds: float, kind: str = "compute", phase: str = "", node: str = "") -> None:
        """Something takes the compute lane for so long."""
        begin = self.now[0]
        for rank in range(len(self.now)):
            self.now[rank] += seconds * self._factor(rank)
        if self.now[0] > begin:
            self.timeline.spans.append(Span(COMPUTE, name, begin, self.now[0], node, kind, phase))

    def charge(self, owner: str, amount: int, at: float | None = None) -> None:
        """`amount` more bytes (less, if negative) belong to `owner` from now on."""
        if not amount:
            return
        self._held[owner] = self._held.get(owner, 0) + amount
        when = self.now[0] if at is None else at
        now = Memory(when, {key: value for key, value in self._held.items() if value})
        memory = self.timeline.memory  # of one moment: its peak, and what is left of it
        if memory and memory[-1].at == when and (memory[-1].total <= now.total or _is_rest(memory)):
            memory.pop()
        while memory and memory[-1].at == when and memory[-1].total <= now.total:
            memory.pop()
        memory.append(now)

    def begin_memory(self, inputs: Iterable[tuple[str, int]], stage: str) -> None:
        """A graph's inputs that are no model state. A backward's were left by its forward, where that was played."""
        total: dict[str, int] = {}
        for owner, amount in inputs:
            total[owner] = total.get(owner, 0) + amount
        for owner, amount in total.items():
            self.charge(owner, amount - (self._held.get(owner, 0) if stage == "backward" else 0))

    def finish(self) -> Timeline:
        """The step is over when the slowest rank's computing is, and every lane's work is done."""
        self.timeline.seconds = max([*self.now, *(hop.end for hop in self.timeline.hops)])
        self.timeline.spans.sort(key=lambda span: (span.begin, span.end))
        self.timeline.hops.sort(key=lambda hop: (hop.launched, hop.begin))
        return self.timeline

    # -- what the parts use ------------------------------------------------------------------------------------------------------

    def launch(self, level: str, received: int) -> tuple[float, float, str]:
        """A hop that all ranks have launched by now: (begin, end, the name of the hop that had the lane until then)."""
        begin, end = self.lanes.launch(level, received, max(self.now))
        return begin, end, self.last_on.get(level, "") if begin > max(self.now) else ""

    def wait(self, until: float, span: Span) -> None:
        """No rank goes on before `until`; `span` says what for."""
        begin = self.now[0]
        self.now = [max(now, until) for now in self.now]
        if self.now[0] > begin:
            self.timeline.spans.append(replace(span, begin=begin, end=self.now[0]))

    def _factor(self, rank: int) -> float:
        factor = self.noise.straggler if rank == len(self.now) - 1 and rank else 1.0
        if self.noise.jitter:
            factor *= max(0.0, self._random.gauss(1.0, self.noise.jitter))
        return factor


@dataclass(frozen=True)
class Refresh:
    """The refresh of one unit: its hops (level, bytes that one rank receives, wire format), outermost first, and its parameters."""

    parameters: tuple[str, ...]
    hops: tuple[tuple[str, int, str], ...]


def fold(names: Sequence[str], most: int = 2) -> str:
    """A few names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def play(graph: Graph, stage: str, topology: Topology, noise: Noise | None = None) -> Timeline:
    """One scheduled graph alone, on idle lanes, its copies fresh.

    Args:
        stage: "forward", "backward" or "inference".
        noise: jitter and stragglers; None for none.
    """
    player = Player(topology, noise or Noise())
    player.graph(graph, stage)
    return player.finish()


class _Play:
    """One graph on a player's clocks."""

    def __init__(self, player: Player, graph: Graph, stage: str, phase: str):
        self.player, self.stage, self.phase = player, stage, phase
        self.nodes: list[Node] = list(graph.nodes)
        self.device = player.topology.device
        self.flying: dict[Node, Hop] = {}
        self.ready: dict[Node, float] = {}
        self.begin = player.now[0]
        self.memory = _Liveness(self.nodes, stage)
        self.hops: list[Hop] = []

    def run(self) -> None:
        player = self.player
        player.begin_memory(self.memory.inputs(), self.stage)
        for node in self.nodes:
            for owner, amount in self.memory.before(node):
                player.charge(owner, amount)
            self._node(node)
            for owner, amount in self.memory.after(node):
                player.charge(owner, amount)
        for owner, amount in self.memory.end():
            player.charge(owner, amount)
        last = max(
            (span.end for span in player.timeline.spans if span.phase == self.phase and span.kind == "compute"),
            default=0.0,
        )
        player.timeline.hops += [self._with_reason(hop, last) for hop in self.hops]

    def _node(self, node: Node) -> None:
        player = self.player
        inputs = max((self.ready.get(arg, self.begin) for arg in node.all_input_nodes), default=self.begin)
        if node.op != "call_function":
            self.ready[node] = self.begin
        elif node.target in COLLECTIVES:
            self.flying[node] = self._launch(node, inputs)
            self.ready[node] = self.flying[node].end
        elif node.target is WAIT:
            self.ready[node] = self._wait(node)
        elif node.target is PEER_GATHER:  # computing stands still while the level's links work for it
            hop = replace(self._launch(node, inputs), wait=node.name, waited=player.now[0], reason="dependency")
            self.hops.append(hop)
            self._stand_still(hop.end, node, "read", hop.level, hop.wire, hop.bytes, hop.parameters)
            self.ready[node] = hop.end
        else:
            seconds = node_seconds(node, self.device)
            player.timeline.flops += node_flops(node)
            name = str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]
            player.operation(name, seconds, "compute", self.phase, node.name)
            self.ready[node] = inputs + seconds if TRANSFER in node.meta else player.now[0]

    def _launch(self, node: Node, ready: float) -> Hop:
        """Put a node's hop on its lane."""
        player, entry, launched = self.player, collective_of(node), self.player.now[0]
        begin, end, cause = player.launch(entry.level, entry.bytes)
        wire = entry.wire or _SHORT.get(entry.dtype, entry.dtype)
        label = player.last_on[entry.level] = f"{entry.transfer} {fold(entry.parameters)}"
        what = (entry.level, wire, entry.bytes, entry.parameters)
        player.timeline.spans.append(Span(entry.level, label, begin, end, node.name, entry.transfer, self.phase, *what))
        moments = (ready, launched, begin, end, end)
        return Hop(
            node.name,
            "",
            self.phase,
            entry.level,
            entry.transfer,
            wire,
            entry.bytes,
            entry.parameters,
            *moments,
            cause=cause,
        )

    def _wait(self, node: Node) -> float:
        """Returns when what it waits for is there."""
        source = node.args[0]
        assert isinstance(source, Node)
        if source in self.flying:
            hop = replace(self.flying[source], wait=node.name, waited=self.player.now[0])
            self.hops.append(hop)
            self._stand_still(hop.end, node, f"wait for {hop.transfer}", hop.level, hop.wire, hop.bytes, hop.parameters)
            return hop.end
        names = tuple(node.meta.get("zc_parameters", ()))  # whose copy it is
        until = max((self.player.arrivals.get(name, 0.0) for name in names), default=0.0)
        if until > self.player.now[0]:
            self._stand_still(until, node, "wait for refresh", self._refreshed(node, set(names)), "", 0, names)
        return max(until, self.begin)

    def _stand_still(
        self, until: float, node: Node, what: str, level: str, wire: str, received: int, names: tuple[str, ...]
    ) -> None:
        name = f"{what} {fold(names)}"
        self.player.wait(
            until, Span(COMPUTE, name, 0.0, 0.0, node.name, "wait", self.phase, level, wire, received, names)
        )

    def _refreshed(self, wait: Node, names: set[str]) -> str:
        """The last hop of the refresh that a wait is for is exposed: says so, and returns its level."""
        hops = self.player.timeline.hops
        found = [i for i, hop in enumerate(hops) if hop.transfer == "refresh" and names & set(hop.parameters)]
        if not found:
            return ""
        hop = hops[found[-1]]
        reason = "lane busy" if hop.begin > hop.launched else "nothing to hide behind"
        hops[found[-1]] = replace(hop, wait=wait.name, waited=self.player.now[0], reason=reason)
        return hop.level

    def _with_reason(self, hop: Hop, last: float) -> Hop:
        """See Note [Reasons]. last: when the phase's computing was over."""
        if hop.exposed <= _TINY or hop.reason:
            return hop if hop.reason else replace(hop, cause="")
        queued, late = hop.begin - hop.launched, hop.launched - hop.ready
        if queued >= late and queued > _TINY:
            return replace(hop, reason="lane busy")
        if late > _TINY:
            return replace(hop, reason="budget", cause="")
        computing = self.begin + _TINY < hop.ready < last - _TINY
        return replace(hop, reason="dependency" if computing else "nothing to hide behind", cause="")


class _Liveness:
    """When each storage of a graph comes and goes, and whose it is.

    Weights (masters, copies) and the inputs that hold them are no allocations of a graph: they are the step's model state. A value is
    there from its node on until its last reader has run; a graph's outputs stay.
    """

    def __init__(self, nodes: Sequence[Node], stage: str):
        self.nodes, self.stage = nodes, stage
        self.key: dict[Node, object] = {}
        self.owner: dict[object, str] = {}
        self.size: dict[object, int] = {}
        self.first: dict[object, Node] = {}
        self.last: dict[object, Node] = {}
        kept: set[object] = set()
        for node in nodes:
            if node.op == "output":
                kept = {self.key[arg] for arg in node.all_input_nodes if arg in self.key}
                continue
            self._own(node)
            for arg in node.all_input_nodes:
                if arg in self.key:
                    self.last[self.key[arg]] = node
        self.free: dict[Node, list[object]] = {}
        for key, node in self.last.items():
            if key not in kept and key in self.size:
                self.free.setdefault(node, []).append(key)
        self._placeholders = {self.key[node] for node in nodes if node.op == "placeholder" and node in self.key}
        self._kept = kept

    def _own(self, node: Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return
        if node.target is WAIT and isinstance(node.args[0], Node) and node.args[0] in self.key:
            self.key[node] = self.key[node.args[0]]
            self.last[self.key[node]] = node
            return
        key: object = value.untyped_storage()._cdata
        self.key[node] = key
        self.last[key] = node
        if key not in self.first:
            self.first[key] = node
            owner = _owner(node)
            if owner:
                self.owner[key] = owner
                self.size[key] = hint(value.untyped_storage().nbytes())

    def inputs(self) -> Iterable[tuple[str, int]]:
        """What is there when the graph begins."""
        for key in self._placeholders:
            if key in self.size:
                yield self.owner[key], self.size[key]

    def before(self, node: Node) -> Iterable[tuple[str, int]]:
        key = self.key.get(node)
        if node.op != "placeholder" and key in self.size and self.first[key] is node:
            yield self.owner[key], self.size[key]

    def after(self, node: Node) -> Iterable[tuple[str, int]]:
        for key in self.free.get(node, ()):
            yield self.owner[key], -self.size[key]

    def end(self) -> Iterable[tuple[str, int]]:
        """A backward's outputs are gradients at O, which are model state from here on; a forward's stay for its backward."""
        if self.stage == "backward":
            for key in self._kept:
                if key in self.size:
                    yield self.owner[key], -self.size[key]


def _owner(node: Node) -> str:
    """Whose the storage is that a node makes; "" if it is model state."""
    ours = [user for user in node.users if TRANSFER in user.meta]
    if node.op == "placeholder":
        return "" if ours or TRANSFER in node.meta or not node.users else "activations"
    transfer = node.meta.get(TRANSFER)
    if transfer is None:
        return "gradients" if any(user.meta[TRANSFER] != "gather" for user in ours) else "activations"
    if node.target in (QUANTIZE, REQUANTIZE) or (
        node.target in TRAFFIC and (node.target is not ALL_GATHER or WIRE in node.meta)
    ):
        return "gathered" if node.target is PEER_GATHER else "wire"
    return "gathered" if transfer == "gather" else "gradients"


def _is_rest(memory: Sequence[Memory]) -> bool:
    return len(memory) > 1 and memory[-2].at == memory[-1].at
