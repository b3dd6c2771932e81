"""The text dump: `options={"dump": folder}` or ZCOMPILE_DUMP=folder.

    folder/rank0/graph0.joint/     00-input.txt 01-merge.txt 02-tag.txt
    folder/rank0/graph0.forward/   00-input.txt 01-bucket.txt 02-lower.txt 03-pin.txt 04-verify.txt
    folder/rank0/graph0.backward/  ...

Each file is the whole program after a pass (zcompile.debug.text); beside it NN-pass.diff, what the pass changed, if it did; and for each
graph summary.txt (what the passes did, bytes, the ordered collective list) and times.txt, the one file that differs between two runs or
two ranks. A pass that fails leaves NN-pass.failed.txt.

Graphs are numbered over all models of a process. A folder that holds an earlier job's dump is not written over: this job's goes to
folder/rank0.2, and a warning says so. Whatever goes wrong in here is a warning, never the job's failure.
"""

from __future__ import annotations

import difflib
import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.fx import GraphModule

from zcompile.cost import LEDGER_TRANSFERS
from zcompile.debug import text
from zcompile.debug.names import Names, path
from zcompile.passes.context import Context
from zcompile.passes.nodes import TRAFFIC, collective_of, find
from zcompile.passes.verify import traffic

_claimed: dict[tuple[int, str, int], Path] = {}
"""(process, folder, rank) -> where this process writes."""


class Dump:
    """The files of one compilation: its joint graph and its halves.

    Args:
        folder: made if it does not exist.
        rank: of this process; each rank writes its own folder, with equal contents.
        number: of the compilation in this process.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int, number: int) -> None:
        self.folder, self.rank, self.number = os.fspath(folder), rank, number
        self.sources: list[str] = []
        """What Dynamo calls the inputs of the joint graph, in order; [] where it is not known."""
        self._inputs: dict[str, text.Inputs] = {}
        self._names: dict[str, Names] = {}
        self._places: dict[str, Path] = {}
        self._before: dict[str, tuple[str, list[str]]] = {}
        self._files: dict[str, int] = {}
        self._broken = False

    def observe(self, gm: GraphModule, context: Context, pass_name: str) -> None:
        """The runner's observer: write the program as it is after `pass_name` ("input": before the first)."""
        self._guarded(lambda: self._program(gm, context, pass_name))

    def finish(self, gm: GraphModule, context: Context, code: str = "") -> None:
        """After the last pass and code generation: summary.txt and times.txt. `code`: where the code came from."""
        self._guarded(lambda: self._summary(gm, context, code))

    def _guarded(self, write: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            write()
        except Exception as error:
            self._broken = True
            warnings.warn(
                f"zcompile: no further dump of graph {self.number} to {self.folder!r}: {type(error).__name__}: {error}",
                stacklevel=4,
            )

    def _program(self, gm: GraphModule, context: Context, pass_name: str) -> None:
        stage = context.stage
        if pass_name == "input":
            self._places[stage] = self._place(stage)
            self._files[stage] = 0
            self._inputs = self._inputs or text.describe_inputs(gm)  # the joint graph knows of all of them
            self._names[stage] = self._name(gm, stage)
        rows = text.lines(gm, self._inputs, stage, self._names[stage])
        number = self._files[stage]
        self._files[stage] = number + 1
        title = f"{context.name}, " + ("before the passes" if pass_name == "input" else f"after {pass_name}")
        notes = [f"  {note}" for note in context.notes.get(pass_name, ())]
        file = f"{number:02d}-{pass_name}.txt"
        self._write(stage, file, [title, *notes, "", *text.numbered(rows)])
        if stage in self._before:
            name, before = self._before[stage]
            if number and rows != before:
                changes = difflib.unified_diff(before, rows, name, file, n=1, lineterm="")
                self._write(stage, f"{number:02d}-{pass_name}.diff", list(changes))
        self._before[stage] = (file, rows)

    def _name(self, gm: GraphModule, stage: str) -> Names:
        """Names for the graph of a stage: those of the joint graph that it was cut from, where there was one."""
        joint = self._names.get("joint")
        given = {name: text.input_name(roles) for name, roles in self._inputs.items() if roles}
        plain = [
            node.name for node in gm.graph.nodes if node.op == "placeholder" and not node.name.startswith("tangents")
        ]
        if len(plain) == len(self.sources):
            given = {name: path(source) for name, source in zip(plain, self.sources, strict=True)} | given
        return Names(joint.export() if joint and stage != "joint" else None, given)

    def _summary(self, gm: GraphModule, context: Context, code: str) -> None:
        done = [
            f"  {name:10s}{'; '.join(context.notes.get(name, ['nothing to do']))}"
            for name in context.seconds
            if name != "codegen"
        ]
        collectives = [collective_of(node) for node in find(gm.graph, *TRAFFIC)]
        out = [context.name, "", *context.plan.describe().splitlines(), "", "passes", *done]
        if context.stage != "joint":
            out += ["", *_bytes(traffic(gm), context)]
            out += ["", f"collectives, in order ({len(collectives)})"]
            out += [
                f"  {i:4d}  {e.transfer:8s}{e.op:12s}{e.level:10s}{text.wire(e):10s}{e.bytes:14d}  {text.fold(e.parameters)}"
                for i, e in enumerate(collectives)
            ]
        self._write(context.stage, "summary.txt", out)
        times = [f"  {name:12s}{seconds:10.3f} s" for name, seconds in context.seconds.items()]
        self._write(context.stage, "times.txt", [context.name, *times, *([f"  code {code}"] if code else [])])

    def _place(self, stage: str) -> Path:
        """A new folder for `stage`; a compilation that comes to a stage again gets another."""
        root = _claim(self.folder, self.rank)
        for attempt in itertools.count(1):
            place = root / f"graph{self.number}.{stage}{'' if attempt == 1 else f'.{attempt}'}"
            try:
                place.mkdir()
            except FileExistsError:
                continue
            return place
        raise AssertionError

    def _write(self, stage: str, name: str, content: Sequence[str]) -> None:
        (self._places[stage] / name).write_text("\n".join(content) + "\n", encoding="utf-8")


def _claim(folder: str, rank: int) -> Path:
    """The folder of this process and rank, made for it alone; see the module's docstring."""
    key = (os.getpid(), os.path.abspath(folder), rank)
    if key not in _claimed:
        os.makedirs(folder, exist_ok=True)
        for attempt in itertools.count(1):
            place = Path(folder) / f"rank{rank}{'' if attempt == 1 else f'.{attempt}'}"
            try:
                place.mkdir()
            except FileExistsError:
                if not place.is_dir() or attempt > 1000:
                    raise
                continue
            break
        if attempt > 1:
            warnings.warn(f"zcompile: {folder} holds another job's dump; this job's is in {place}", stacklevel=6)
        _claimed[key] = place
    return _claimed[key]


def _bytes(compiled: Mapping[tuple[str, str], int], context: Context) -> list[str]:
    columns = [t for t in LEDGER_TRANSFERS if t != "refresh"]
    out = ["bytes one rank receives".ljust(26) + "".join(f"{name:>14s}" for name in columns)]
    for level in context.plan.topology.names:
        row = [compiled.get((level, transfer), 0) for transfer in columns]
        out.append(f"  {level:24s}" + "".join(f"{amount:14d}" for amount in row))
    return out
