"""A compiled graph and what is known of it: its ordered collective list, its bytes, its parameters."""

from __future__ import annotations

import contextlib
import hashlib
import json
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.profiler import record_function

from zcompile._torch_compat import below_autograd, profiling
from zcompile.cost import Bytes
from zcompile.faults.sites import Listed, about, index
from zcompile.passes.nodes import Collective

if TYPE_CHECKING:
    from zcompile.engine import Engine


class Program:
    """Called like the code generator's result; before it runs, the ranks agree that they run equal collective lists.

    Attributes:
        name: "forward 0", "backward 0", ... in the order of compiling.
        collectives: the ordered list; `identity` is a number that is equal where the lists are.
        seconds: wall time by pass, and of code generation ("codegen") with the waiting for another rank's.
        code: where the code came from: "generated", "loaded" or "interpreted".
        expected: what the schedule expects of it, in seconds by the machine's data: see zcompile.passes.context.
        peaks: bytes that gathers, gradients, ... hold at most while it runs: see zcompile.faults.memory.
        reads: names of the parameters that it gathers.
        direct: it calls nothing that might differentiate on its own, so autograd's kernels need not be asked.
        predicted, compiled: bytes one rank receives when it runs, by closed form and from the graph.
    """

    def __init__(self, name: str, stage: str, engine: Engine, code: Callable[..., Any], collectives: list[Collective], predicted: Bytes,
                 compiled: Bytes):  # fmt: skip
        self.name, self.stage = name, stage
        self._engine = weakref.ref(engine)
        self._code = code
        self.collectives = collectives
        self._sites = index(collectives)
        self.predicted, self.compiled = predicted, compiled
        text = json.dumps([entry.identity for entry in collectives])
        self.identity = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        self.runs = 0
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.code = "interpreted"
        self.reads: frozenset[str] = frozenset()
        self.direct = False

    def entry(self) -> Callable[[list[Any]], Any]:
        """The function to hand to AOTAutograd: called with a list of inputs, which it empties."""

        def run(inputs: list[Any]) -> Any:
            return self(inputs)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def __call__(self, inputs: list[Any]) -> Any:
        engine = self._engine()
        assert engine is not None
        try:
            engine.course.enter(self)
            self.runs += 1
            engine.traffic.program(self)
            if self.stage != "backward":
                engine.reads.compiled |= self.reads
            engine.running = self
            spans = record_function(f"zc {self.name}") if profiling() else contextlib.nullcontext()
            past = below_autograd() if self.direct else contextlib.nullcontext()
            with about(Listed(self.name, self._sites)), spans, past:
                out = self._code(inputs)
        except Exception as error:  # of a backward nobody else hears
            engine.runtime.broke_off(error)
            raise
        engine.running = None  # and not after an error: what ran is asked for then
        return out
