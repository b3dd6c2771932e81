"""`zcompile diff`: where two dumps part first, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from support import paper as world
from support.commands import TIMEOUT, command, run
from support.spawn import Pool

from zcompile.debug import compare


def two(_: int, folder: str, plan: str, ranks: str) -> None:
    for rank in (int(text) for text in ranks.split(",")):
        world.step(world.wrapped(rank, plan=plan, dump=folder, dump_ranks=ranks))


def test_diff_says_where_plans_part_first_and_that_ranks_do_not(paper: Pool, tmp_path: Path) -> None:
    for plan, ranks in (("zero_topo", "0,5"), ("zero3", "0,5")):
        paper.run(two, str(tmp_path / plan), plan, ranks, timeout=TIMEOUT)
    code, shown, _ = run(paper, "diff", str(tmp_path / "zero_topo"))
    assert code == 0 and shown.startswith("equal"), shown
    code, shown, _ = run(paper, "diff", str(tmp_path / "zero_topo"), str(tmp_path / "zero3"))
    assert code == 1
    first, *rest = shown.splitlines()
    assert "they part at graph 0 joint, plan" in first
    assert "  -  weights:   pair" in rest and "  +  weights:   world (8 ranks, up to cluster)" in rest
    changed = tmp_path / "zero_topo" / "rank5" / "graph0.forward" / "02-lower.txt"
    changed.write_text(changed.read_text().replace("= relu(", "= gelu("))
    code, shown, _ = run(paper, "diff", str(tmp_path / "zero_topo"), "--json", "-")
    (pair,) = json.loads(shown)["pairs"]
    assert code == 1 and [part["part"] for part in pair["differing"]] == ["graph 0 forward, lower"]
    assert pair["differing"][0]["first"]["a"].partition("=")[2].strip().startswith("relu(blocks.0.up.mm)")


def dumps(folder: Path, **ranks: str) -> None:
    """A dump: rank -> a line of its program."""
    for rank, line in ranks.items():
        place = folder / rank / "graph0.forward"
        place.mkdir(parents=True)
        (place / "00-input.txt").write_text(f"title\n\n    0  {line}\n")


def test_diff_says_so_where_it_compares_other_ranks(tmp_path: Path) -> None:
    dumps(tmp_path / "a", rank0="x")
    dumps(tmp_path / "b", rank5="x")
    dumps(tmp_path / "c", rank0="x", rank5="y")
    note = "they have no rank in common: rank0 is compared with rank5"
    code, shown, _ = command(0, "diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 0 and shown.startswith(note)
    assert note in command(0, "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "-")[1]
    code, shown, _ = command(0, "diff", str(tmp_path / "b"), str(tmp_path / "c"))
    assert code == 1 and shown.startswith("differ") and "c/rank5" in shown, "with its own rank, not with the first"
    code, shown, _ = command(0, "diff", str(tmp_path / "a" / "rank0"), str(tmp_path / "c" / "rank5"))
    assert code == 1 and shown.startswith("differ"), "who names two ranks means them"


def test_diff_refuses_what_is_no_dump(paper: Pool, tmp_path: Path) -> None:
    assert run(paper, "diff", str(tmp_path / "none"))[::2] == (2, f"zcompile diff: {tmp_path / 'none'} is no folder\n")
    code, _, error = run(paper, "diff", str(tmp_path), str(tmp_path))
    assert code == 2 and "holds no dump" in error
    (tmp_path / "rank0" / "graph0.forward").mkdir(parents=True)
    assert "holds one rank's dump" in run(paper, "diff", str(tmp_path))[2]


def test_one_line_more_is_one_line_in_a_diff(tmp_path: Path) -> None:
    """Numbers of lines are not compared."""
    for name, lines in (("a", ["x", "y"]), ("b", ["w", "x", "y"])):
        place = tmp_path / name / "graph0.forward"
        place.mkdir(parents=True)
        (place / "00-input.txt").write_text("title\n\n" + "".join(f"{i:5d}  {line}\n" for i, line in enumerate(lines)))
    (part,) = compare.compare(tmp_path / "a", tmp_path / "b").differing
    assert (part.added, part.removed, part.first) == (1, 0, (0, "x", "w"))
