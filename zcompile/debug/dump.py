"""The dump: `options={"dump": folder}`, ZCOMPILE_DUMP=folder, or `zcompile dump`.

    folder/rank0/graph0.joint/     00-input.txt 01-merge.txt 02-tag.txt
    folder/rank0/graph0.forward/   00-input.txt 01-bucket.txt 02-lower.txt ... 06-verify.txt
    folder/rank0/graph0.backward/  ...
    folder/ledger.txt ledger.json trace.json report.html      of the first rank that dumps: see zcompile.debug.views

Each numbered file is the whole program after a pass (zcompile.debug.text); beside it NN-pass.diff, what the pass changed, if it did; and
for each graph summary.txt (what the passes did, bytes, the ordered collective list) and times.txt. Between two ranks and two runs only
times.txt and report.html differ, which say how long the passes took. A pass that fails leaves NN-pass.failed.txt.

Graphs are numbered over all models of a process. A folder that holds an earlier job's dump is not written over: this job's goes to
folder/rank0.2, folder/report.2.html and so on, and a warning says so. Whatever goes wrong in here is a warning, never the job's failure.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from torch.fx import GraphModule

from zcompile import passes
from zcompile.cost import LEDGER_TRANSFERS
from zcompile.debug import record, text, views
from zcompile.debug.names import Names, path, printable
from zcompile.debug.record import Program, Record
from zcompile.debug.step import Step
from zcompile.layout import ParamSpec
from zcompile.ops import ACCUMULATE, SYNC
from zcompile.passes.context import Context
from zcompile.passes.nodes import GATHER, TRAFFIC, collective_of, find, phase_of
from zcompile.passes.verify import traffic
from zcompile.wording import fold, wire

INPUT = "input"
_LAST = (passes.JOINT[-1].NAME, passes.LOWERED[-1].NAME)
_places: dict[tuple[int, str, int], Place] = {}
_meant: dict[tuple[int, str], Path] = {}
"""What a folder's name meant when this process first dumped into it: a script may change the working directory."""


class Place:
    """Where one process dumps, made for it alone: `root`, its rank's folder, and the views beside it.

    Args:
        folder: made if it does not exist.
        with_views: whether this rank writes the views.
    """

    def __init__(self, folder: Path, rank: int, with_views: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count(1):
            self.root = folder / f"rank{rank}{'' if attempt == 1 else f'.{attempt}'}"
            try:
                self.root.mkdir()
            except FileExistsError:
                if not self.root.is_dir() or attempt > 1000:
                    raise
                continue
            break
        if attempt > 1:
            warnings.warn(f"zcompile: {folder} holds another job's dump; this job's is in {self.root}", stacklevel=6)
        # Another job may have dumped another rank: no folder of this rank's says that its views are there.
        self.views = views.Views(folder, max(attempt, views.newest(folder) + 1)) if with_views else None

    @staticmethod
    def of(folder: str, rank: int, with_views: bool) -> Place:
        """That of this process and rank."""
        process = os.getpid()
        place = _meant.setdefault((process, folder), Path(os.path.abspath(folder)))
        key = (process, str(place), rank)
        if key not in _places:
            _places[key] = Place(place, rank, with_views)
        return _places[key]

    @staticmethod
    def made(folder: str, rank: int) -> Place | None:
        """That of this process and rank, where it has dumped into the folder."""
        return _places.get((os.getpid(), os.path.abspath(folder), rank))


_collecting: list[list[Step]] = []


@contextlib.contextmanager
def collecting() -> Iterator[list[Step]]:
    """Inside, every compilation's step is put into the list, with the programs after each pass, whether they are written or not."""
    found: list[Step] = []
    _collecting.append(found)
    try:
        yield found
    finally:
        _collecting.remove(found)


class Dump:
    """What is kept of one compilation, its joint graph and its halves, and the files of it.

    Args:
        folder: made if it does not exist; "": nothing is written, and of the programs the last one is kept (for zcompile.explain).
        rank: of this process; each rank writes its own folder, with equal contents.
        number: of the compilation in this process.
        specs: of all parameters of the model, in the order of their units.
        trained: names of those that are.
        first: whether it is the first compilation of the model, with which the step's refreshes are counted.
        with_views: whether ledger, trace and report are written too.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int, number: int, specs: Sequence[ParamSpec] = (),
                 trained: Collection[str] = (), first: bool = True, with_views: bool = True) -> None:  # fmt: skip
        self.folder, self.rank, self.number, self.with_views = os.fspath(folder), rank, number, with_views
        self.specs, self.trained, self.first = specs, trained, first
        self.sources: Sequence[str] = ()
        """What Dynamo calls the inputs of the joint graph, in order; () where it is not known."""
        self.step: Step | None = None
        self.whole = bool(self.folder or _collecting)
        """Whether the text of every pass is kept."""
        self._inputs: dict[str, text.Inputs] = {}
        self._names: dict[str, Names] = {}
        """Of the graphs that are in the passes. Of a graph that has been through them none is kept: names hold its nodes, and those
        their tensors, for as long as the model is trained."""
        self._joint: dict[str, tuple[str, str]] = {}
        """Names of the joint graph, for those that it is cut into."""
        self._folders: dict[str, Path] = {}
        self._broken = False

    def observe(self, gm: GraphModule, context: Context, pass_name: str) -> None:
        """The runner's observer: write the program as it is after `pass_name` ("input": before the first)."""
        self._guarded(lambda: self._program(gm, context, pass_name))

    def finish(self, context: Context, code: str = "") -> None:
        """After the last pass and code generation: summary.txt, times.txt and the views. `code`: where the code came from."""
        self._guarded(lambda: self._finish(context, code))

    def _guarded(self, write: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            write()
        except Exception as error:
            self._broken = True
            if self.step is not None:
                self.step.broken = f"{type(error).__name__}: {error}"
            if self.folder:
                warnings.warn(
                    f"zcompile: no further dump of graph {self.number} to {self.folder!r}: {type(error).__name__}: {error}",
                    stacklevel=4,
                )

    # -- programs ----------------------------------------------------------------------------------------------------------------

    def _program(self, gm: GraphModule, context: Context, pass_name: str) -> None:
        stage = context.stage
        if self.step is None:
            accumulating = any(phase_of(node) in (ACCUMULATE, SYNC) for node in find(gm.graph, GATHER))
            self.step = Step(self.number, context.plan, self.specs, self.trained, accumulating, self.first)
            for steps in _collecting:
                steps.append(self.step)
        if pass_name == INPUT:
            if self.folder:
                self._folders[stage] = self._folder(stage)
            self.step.records[stage] = Record(context.name, self.number, stage)
            self._inputs = self._inputs or text.describe_inputs(gm)  # the joint graph knows of all of them
            self._names[stage] = self._name(gm, stage)
        names = self._names[stage]
        names.update(gm)
        found, last = self.step.records[stage], pass_name in _LAST
        if last:
            found.rows = record.rows(gm, names, self._inputs, stage)
            lines = [text.line(row.name, row.value, row.what, row.source) for row in found.rows]
            del self._names[stage]
            if stage == "joint":
                self._joint = names.export()
        elif self.whole:
            lines = text.lines(gm, self._inputs, stage, names)
        if self.whole or last:
            self._add(found, pass_name, lines, context)
        self.step.kept |= context.kept
        if last and stage != "joint":
            self.step.play(gm, stage)
            found.traffic = traffic(gm)
            found.collectives = [collective_of(node) for node in find(gm.graph, *TRAFFIC)]

    def _add(self, found: Record, pass_name: str, lines: list[str], context: Context) -> None:
        before = found.programs[-1] if found.programs else None
        changes = list(difflib.unified_diff(before.lines, lines, n=1, lineterm=""))[2:] if before else []
        seconds = context.seconds.get(pass_name, 0.0)
        found.programs.append(Program(pass_name, lines, changes, list(context.notes.get(pass_name, ())), seconds))
        if self.folder:
            self._write_program(context, found.programs)

    def _write_program(self, context: Context, programs: Sequence[Program]) -> None:
        """The file of the last program, and its difference from the one before."""
        number, program = len(programs) - 1, programs[-1]
        file = f"{number:02d}-{program.name}.txt"
        title = f"{context.name}, " + ("before the passes" if program.name == INPUT else f"after {program.name}")
        notes = [f"  {note}" for note in program.notes]
        self._write(context.stage, file, [title, *notes, "", *text.numbered(program.lines)])
        if program.changes:
            before = f"{number - 1:02d}-{programs[-2].name}.txt"
            self._write(
                context.stage, file.removesuffix(".txt") + ".diff", [f"--- {before}", f"+++ {file}", *program.changes]
            )

    def _name(self, gm: GraphModule, stage: str) -> Names:
        """Names for the graph of a stage: those of the joint graph that it was cut from, where there was one."""
        given = {name: text.input_name(roles) for name, roles in self._inputs.items() if roles}
        plain = [
            node.name for node in gm.graph.nodes if node.op == "placeholder" and not node.name.startswith("tangents")
        ]
        if len(plain) == len(self.sources):
            given = {name: path(source) for name, source in zip(plain, self.sources, strict=True)} | given
        return Names(None if stage == "joint" else self._joint, given)

    # -- summaries and views -----------------------------------------------------------------------------------------------------

    def _finish(self, context: Context, code: str) -> None:
        assert self.step is not None
        found = self.step.records[context.stage]
        found.code = code
        for program in found.programs:
            program.seconds = context.seconds.get(program.name, 0.0)
        if not self.folder:
            return
        done = [
            f"  {name:10s}{'; '.join(context.notes.get(name, ['nothing to do']))}"
            for name in context.seconds
            if name != "codegen"
        ]
        out = [context.name, "", *context.plan.describe().splitlines(), "", "passes", *done]
        if context.stage != "joint":
            out += ["", *_bytes(found.traffic, context)]
            out += ["", f"collectives, in order ({len(found.collectives)})"]
            out += [
                f"  {i:4d}  {e.transfer:8s}{e.op:12s}{e.level:10s}{wire(e):10s}{e.bytes:14d}  {printable(fold(e.parameters))}"
                for i, e in enumerate(found.collectives)
            ]
        self._write(context.stage, "summary.txt", out)
        times = [f"  {name:12s}{seconds:10.3f} s" for name, seconds in context.seconds.items()]
        self._write(context.stage, "times.txt", [context.name, *times, *([f"  code {code}"] if code else [])])
        if context.stage != "joint":
            place = Place.of(self.folder, self.rank, self.with_views)
            if place.views:
                place.views.update([self.step])

    # -- files -------------------------------------------------------------------------------------------------------------------

    def _folder(self, stage: str) -> Path:
        """A new folder for `stage`; a compilation that comes to a stage again gets another."""
        root = Place.of(self.folder, self.rank, self.with_views).root
        for attempt in itertools.count(1):
            place = root / f"graph{self.number}.{stage}{'' if attempt == 1 else f'.{attempt}'}"
            try:
                place.mkdir()
            except FileExistsError:
                continue
            return place
        raise AssertionError

    def _write(self, stage: str, name: str, content: Sequence[str]) -> None:
        (self._folders[stage] / name).write_text("\n".join(content) + "\n", encoding="utf-8")


def _bytes(compiled: Mapping[tuple[str, str], int], context: Context) -> list[str]:
    columns = [t for t in LEDGER_TRANSFERS if t != "refresh"]
    out = ["bytes one rank receives".ljust(26) + "".join(f"{name:>14s}" for name in columns)]
    for level in context.plan.topology.names:
        row = [compiled.get((level, transfer), 0) for transfer in columns]
        out.append(f"  {level:24s}" + "".join(f"{amount:14d}" for amount in row))
    return out
