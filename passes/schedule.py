"""schedule: hops are under way while the graph computes.

Requires: a graph after `quantize`, each hop followed by its wait; `context.overlap`, the number of buckets in flight (0: all stays);
`context.tokens`, see Note [No shapes]; `context.memory`, the bytes that those of either direction may take (0: no bound of its own; a
bucket alone is always allowed).
Guarantees: a list schedule over a lane that computes and a lane per level; hops take what zcompile.times gives, products as long as their
weights are large, see Note [No shapes]. A bucket's gather is launched as soon as it may be (so many buckets before it is needed, and not
before its copy is expected to be fresh), its next hop when the one before is expected to have arrived, and its last wait and its unpack
stand where it is needed (in flight a quantised bucket is its codes). A reduction is launched where its gradients are there; what follows a
hop (its wait, the next hop, what becomes of the sum) stands where it is expected to have arrived, or at the graph's end. At most `overlap`
+ 1 gathered buckets and as many reduced ones are in flight, however deep the model is: where there would be more, the one that arrives
first is waited for. The order is a function of the graph's weights and the machine's data alone: equal on all ranks, whatever batch each
of them has.
Leaves alone: the nodes, what they read and thereby the bits; the order of everything that computes; the order of nodes that write one
buffer; a graph in which it cannot show that (it says so in a note).

Note [No shapes]: ranks may have batches of different shapes (a last one that is smaller, sequences of different lengths), and must run one
order of collectives. So no time that follows from a batch has a say. A product takes time in proportion to the weights that it reads, or
to the gradient that it makes, all other operations none. With `context.tokens`, an option and so the same on all ranks, that is what the
device takes for two FLOPs a token and element. Without, all products together take as long as the busiest level, the refresh of the
copies among it, in a backward half of it, as a wait that stands too early there holds up the reductions behind it. Which is about the case
in which the order matters. A step of gpt-neox-20b on 16 nodes with networks from Frontier's own down to 3 % of it (zero3, hsdp and
zero_topo, native and quantised; 32 cases, played on paper) took 3.4 % more in such orders than in the best of five that were tried, 8.6 %
at most; with tokens 1.4 %, 5.4 % at most; with half or twice as many as there were 2.5 and 1.1 %, 11.7 and 8.5 % at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Graph, GraphModule, Node

from zcompile._torch_compat import storage_key
from zcompile.passes import in_flight
from zcompile.passes.context import Context
from zcompile.passes.nodes import COLLECTIVES, PEER_GATHER, REFRESH, TRAFFIC, WAIT, arrange, collective_of
from zcompile.passes.work import weights_at_work
from zcompile.times import Lanes, hop_seconds, is_free, node_seconds, roofline

NAME = "schedule"

BALANCE = {"forward": 1.0, "backward": 0.5, "inference": 1.0}
"""Seconds of all products to those of the busiest level, by which a graph is ordered: Note [No shapes]."""


def run(gm: GraphModule, context: Context) -> None:
    place(gm.graph, context)


def place(graph: Graph, context: Context) -> None:
    """The pass, on a graph that no module holds."""
    if not context.overlap:
        context.note("off: each hop is waited for where it is launched")
        return
    schedule = _Schedule(graph, context)
    order = schedule.order()
    if order is None:
        context.note("off: a buffer is written on the way of a transfer, whose order must stay")
        return
    arrange(graph, order)
    seconds, exposed = schedule.played(order)
    context.expected = {"seconds": seconds, **{f"exposed {k}": v for k, v in exposed.items()}}
    context.note(
        f"{len(schedule.gathers)} gathered buckets, {len(schedule.reductions)} reductions, at most {context.overlap + 1} of each in "
        f"flight; by the machine's data {seconds * 1e3:.3f} ms, {sum(exposed.values()) * 1e3:.3f} ms of it waiting"
    )


def check(gm: GraphModule, context: Context) -> None:
    if not context.overlap:
        return
    gm.graph.lint()
    flying = in_flight.hops(gm)
    limit = 2 * (context.overlap + 1)  # gathers and reductions, one hop of each bucket
    if max(flying, default=0) > limit:
        raise AssertionError(f"{max(flying)} hops in flight at once; with overlap {context.overlap}: at most {limit}")
    most = max((amount for buckets, amount in in_flight.held_bytes(gm) if buckets > 1), default=0)
    if context.memory and most > context.memory:
        raise AssertionError(f"{most} bytes in flight at once; with memory {context.memory}")


@dataclass
class _Chain:
    """One bucket's transfer, cut behind each launch.

    Attributes:
        stages: nodes; the first stage ends with the first launch, the last has none.
        place: where its last stage is needed (gathers), or its first stands (reductions).
        size: bytes that it holds while in flight: what its largest hop sends (a copy of weights is there anyway) and receives.
        done: stages that have been placed.
        arrives: when what the next stage waits for is expected.
    """

    place: int
    stages: list[list[Node]] = field(default_factory=lambda: [[]])
    size: int = 0
    done: int = 0
    arrives: float = 0.0

    def append(self, nodes: list[Node]) -> None:
        for node in nodes:
            self.stages[-1].append(node)
            if node.target in COLLECTIVES:
                self.size = max(self.size, in_flight.held(node, copy=len(self.stages) == 1))
                self.stages.append([])

    @property
    def over(self) -> bool:
        return self.done == len(self.stages)


class _Schedule:
    """Places a graph's nodes one after another, and keeps the clock of each lane."""

    def __init__(self, graph: Graph, context: Context):
        self.nodes = list(graph.nodes)
        self.at = {node: number for number, node in enumerate(self.nodes)}
        self.stage, self.overlap, self.memory = context.stage, context.overlap, context.memory
        self.tokens, self.compute = context.tokens, context.plan.compute
        self.topology = context.plan.topology
        self.lanes = Lanes(self.topology.levels)
        self.fresh = self._refreshed(self.lanes)
        self.gathers = self._gathers()
        self.reductions = self._reductions()
        self.seconds = self._shares()
        self.now = 0.0
        self._out: list[Node] = []
        self._placed: set[Node] = set()
        self._flying: list[_Chain] = []  # reductions

    def order(self) -> list[Node] | None:
        """All nodes in their new order; None if it would be another program."""
        moved = {node for chain in self.gathers for stage in chain.stages for node in stage}
        starts: dict[Node, _Chain] = {}
        for chain in self.reductions:
            starts[chain.stages[0][-1]] = chain
            moved.update(node for stage in chain.stages[1:] for node in stage)
        needed = {chain.place: chain for chain in self.gathers}
        for number, node in enumerate(self.nodes):
            if number in needed:
                self._need(needed[number])
            if node.op == "output":
                while self._flying:
                    self._advance(min(self._flying, key=lambda chain: chain.arrives))
            if node in moved:
                continue
            if node in starts:
                self._room(starts[node])
            if node.op == "call_function" and not is_free(node.target):
                self._catch_up(self.now)
            self._place(node)
            if node in starts:
                self._launched(starts[node], node)
                starts[node].done = 1
                self._flying.append(starts[node])
        return self._out if self._same_program(self._out) else None

    def _shares(self) -> dict[Node, float]:
        """Seconds of each node on the lane that computes, by Note [No shapes]; a kernel that reads other ranks' memory has the lane while
        its level's links work.
        """
        busy = dict.fromkeys(self.lanes.levels, 0.0)
        seconds = {}
        for node in self.nodes:
            for level, received in node.meta.get(REFRESH, ()):
                busy[level] += hop_seconds(self.lanes.levels[level], received)
            if node.target not in TRAFFIC:
                continue
            entry = collective_of(node)
            taken = hop_seconds(self.lanes.levels[entry.level], entry.bytes)
            busy[entry.level] += taken
            if node.target is PEER_GATHER:
                seconds[node] = taken
        work = weights_at_work(self.nodes)
        if self.tokens:
            device, dtype = self.topology.device, self.compute
            return seconds | {
                node: roofline(device, 2.0 * count * self.tokens, 0.0, dtype) for node, count in work.items()
            }
        each = BALANCE[self.stage] * max(busy.values()) / (sum(work.values()) or 1)
        return seconds | {node: count * each for node, count in work.items()}

    def played(self, order: list[Node]) -> tuple[float, dict[str, float]]:
        """What the order takes on the machine with the shapes that this rank has, and the seconds of it in which it waits, by level;
        "refresh": for a copy.
        """
        lanes, now = Lanes(self.topology.levels), 0.0
        fresh = self._refreshed(lanes)
        arrives: dict[Node, float] = {}
        exposed: dict[str, float] = {}
        for node in order:
            if node.target in COLLECTIVES:
                entry = collective_of(node)
                _, arrives[node] = lanes.launch(entry.level, entry.bytes, now)
            elif node.target is PEER_GATHER:
                entry = collective_of(node)
                now += hop_seconds(lanes.levels[entry.level], entry.bytes)
            elif node.target is WAIT:
                hop = node.args[0]
                then = arrives.get(hop, fresh.get(node, 0.0))  # type: ignore[arg-type]
                if then > now:
                    what = collective_of(hop).level if hop in arrives else "refresh"  # type: ignore[arg-type]
                    exposed[what] = exposed.get(what, 0.0) + then - now
                    now = then
            else:
                now += node_seconds(node, self.topology.device)
        return now, exposed

    # -- the lanes ---------------------------------------------------------------------------------------------------------------

    def _place(self, node: Node) -> None:
        self._out.append(node)
        self._placed.add(node)
        self.now += self.seconds.get(node, 0.0)

    def _advance(self, chain: _Chain) -> None:
        """Place the next stage of a chain: wait for what it needs, and launch the next hop."""
        self.now = max(self.now, chain.arrives)
        for node in chain.stages[chain.done]:
            self._before(node)
            self._place(node)
            if node.target in COLLECTIVES:
                self._launched(chain, node)
        chain.done += 1
        if chain.over and chain in self._flying:
            self._flying.remove(chain)

    def _launched(self, chain: _Chain, node: Node) -> None:
        """A hop takes its level's lane when those before it are over."""
        entry = collective_of(node)
        _, chain.arrives = self.lanes.launch(entry.level, entry.bytes, self.now)

    def _before(self, node: Node) -> None:
        """What a stage reads of other reductions (a sum of two of them) comes first."""
        for source in node.all_input_nodes:
            while source not in self._placed:
                other = next((c for c in self._flying for stage in c.stages[c.done :] if source in stage), None)
                if other is None:
                    return  # not a program that this can order: the last check says so
                self._advance(other)

    def _catch_up(self, until: float) -> None:
        """Before an operation or a wait: place every stage whose hop has arrived by then, and launch the gathers that may be under way."""
        while True:
            current = next((i for i, chain in enumerate(self.gathers) if not chain.over), len(self.gathers))
            ahead = self.gathers[current : current + self.overlap + 1]
            held = sum(chain.size for chain in ahead if chain.done > 0)
            ready = [chain for chain in self._flying if chain.arrives <= until]
            for number, chain in enumerate(ahead):
                last = chain.done == len(chain.stages) - 1  # stands where it is needed
                fits = not self.memory or number == 0 or chain.done or held + chain.size <= self.memory
                in_order = (
                    number == 0
                    or ahead[number - 1].done > chain.done
                    or ahead[number - 1].done == len(ahead[number - 1].stages) - 1
                )
                if not last and fits and in_order and chain.arrives <= until:
                    ready.append(chain)
            if not ready:
                return
            self._advance(min(ready, key=lambda chain: chain.arrives))

    def _need(self, chain: _Chain) -> None:
        """A gathered bucket is read next."""
        for earlier in self.gathers[: self.gathers.index(chain)]:
            while earlier.done < 1:  # on one communicator gathers are launched in their order
                self._advance(earlier)
        while not chain.over:
            self._catch_up(max(self.now, chain.arrives))
            self._advance(chain)

    def _room(self, chain: _Chain) -> None:
        """A reduction is launched next: no more than so many are in flight."""
        while self._flying and (
            len(self._flying) > self.overlap
            or (self.memory and sum(each.size for each in self._flying) + chain.size > self.memory)
        ):
            self._advance(min(self._flying, key=lambda each: each.arrives))

    # -- what the graph holds ----------------------------------------------------------------------------------------------------

    def _gathers(self) -> list[_Chain]:
        last: dict[tuple[str, ...], Node] = {}
        for node in self.nodes:
            if node.target in COLLECTIVES and collective_of(node).transfer == "gather":
                last[collective_of(node).parameters] = node  # a bucket's hops stand in their order
        taken: set[Node] = set()
        found = []
        for collective in last.values():
            (wait,) = (user for user in collective.users if user.target is WAIT)
            nodes = sorted((node for node in _ancestors(wait) if node not in taken), key=self.at.__getitem__)
            taken.update(nodes)
            chain = _Chain(self.at[nodes[0]])
            chain.append(nodes)
            found.append(chain)
        found.sort(key=lambda chain: chain.place)
        for chain in found:  # none is launched before its copy is expected
            chain.arrives = max((self.fresh.get(node, 0.0) for node in chain.stages[0]), default=0.0)
        return found

    def _refreshed(self, lanes: Lanes) -> dict[Node, float]:
        """Waits for a copy: when it is expected. A forward begins with the refresh of its copies, one after the other, each level busy
        with another one.
        """
        found = {}
        for node in self.nodes:
            arrives = 0.0
            for level, received in node.meta.get(REFRESH, ()):
                _, arrives = lanes.launch(level, received, arrives)
            if arrives:
                found[node] = arrives
        return found

    def _reductions(self) -> list[_Chain]:
        found: list[_Chain] = []
        bucket: dict[Node, int] = {}
        stage: dict[Node, int] = {}
        for node in self.nodes:
            before = [arg for arg in node.all_input_nodes if arg in bucket]
            starts = node.target in COLLECTIVES and collective_of(node).transfer != "gather" and not before
            if starts:
                bucket[node], stage[node] = len(found), 0
                found.append(_Chain(self.at[node], [[node], []], in_flight.held(node)))
            elif before and node.op != "output":
                number = bucket[node] = max(bucket[arg] for arg in before)
                stage[node] = max(stage[arg] + (arg.target in COLLECTIVES) for arg in before)
                chain = found[number]
                while len(chain.stages) <= stage[node]:
                    chain.stages.append([])
                chain.stages[stage[node]].append(node)
        return found

    def _same_program(self, order: list[Node]) -> bool:
        """Every node after what it reads, and all that touch a buffer that is written in their old order."""
        if len(order) != len(self.nodes):
            return False
        new = {node: number for number, node in enumerate(order)}
        sharing: dict[object, list[Node]] = {}
        for node in self.nodes:
            sharing.setdefault(_storage(node), []).append(node)
        if any(new[arg] > new[node] for node in order for arg in node.all_input_nodes):
            return False
        for node in self.nodes:
            for buffer in _written(node):
                users = {user for alias in sharing[_storage(buffer)] for user in alias.users}
                if any((self.at[user] < self.at[node]) != (new[user] < new[node]) for user in users - {node}):
                    return False
        return True


def _ancestors(node: Node) -> set[Node]:
    """The node and all it derives from, inputs left out."""
    found: set[Node] = set()
    queue = [node]
    while queue:
        each = queue.pop()
        if each not in found and each.op != "placeholder":
            found.add(each)
            queue += each.all_input_nodes
    return found


def _written(node: Node) -> list[Node]:
    """The arguments that a node writes to, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    found: list[Node] = []
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [
                each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, Node)
            ]
    return found


def _storage(node: Node) -> object:
    """Equal for nodes whose values share memory."""
    value = node.meta.get("val")
    return storage_key(value) if isinstance(value, torch.Tensor) else node
