"""report.html in a browser: Chromium, headless, opens the file from disk, as a user would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import page as browser
from support import paper as world
from support.page import CHROMIUM, DRIVER, Page
from support.spawn import Pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver (apt-get install chromium-driver)"
    ),
]


def dump(_: int, folder: str, **settings: Any) -> None:
    world.step(world.wrapped(dump=folder, blocks=2, overlap=1, **settings))


@pytest.fixture(scope="module")
def report(paper: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    paper.run(dump, str(folder), timeout=300)
    return folder / "report.html"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser.browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def page(driver: Any, report: Path) -> Page:
    return Page(driver, report)


def test_it_asks_for_nothing_from_the_network(report: Path, page: Page) -> None:
    assert (
        page.run("performance.getEntriesByType('resource').map((e) => e.name).filter((n) => !n.startsWith('file:'))")
        == []
    )


def test_the_timeline_has_a_lane_for_computing_and_for_each_level(page: Page) -> None:
    assert page.run("[...zc.timeline.plot.left[0].major_label_overrides.values()]") == [
        "compute",
        "pair",
        "node",
        "cluster",
    ]
    spans = page.run("zc.timeline.spans.lane")
    assert set(spans) == {"compute", "pair", "node", "cluster"}
    drawn = page.run("zc.timeline.source('timeline-spans').data.left.length")
    assert drawn == len(spans)
    owners = page.run("zc.timeline.source('memory-owners').data.total")
    assert max(owners) > 0


def test_the_pointer_over_a_hop_lights_its_parameter_its_wait_and_its_users(page: Page) -> None:
    hop = page.run(
        "zc.step.hops.findIndex((h) => h.phase === 'backward' && h.transfer === 'gather' && h.parameters.includes('head.weight'))"
    )
    span = page.run(f"zc.timeline.ofHop.get({hop}).find((i) => zc.timeline.spans.lane[i] === 'pair')")
    page.point("time", f"(zc.timeline.left[{span}] + zc.timeline.right[{span}]) / 2", f"zc.timeline.tops[{span}] - 0.4")
    page.until("return zc.selection !== null")
    assert page.run("zc.selection") == {"hop": hop}
    lit = page.run("zc.timeline.source('timeline-lit').data.index")
    kinds = {page.run(f"zc.timeline.spans.kind[{i}]") for i in lit}
    assert {"gather", "wait", "compute", "reduce"} <= kinds, (
        "the hop, its wait, the product that reads it, the parameter's other hops"
    )
    shown = page.text("#detail")
    assert "gather over pair" in shown and "head.weight" in shown and "head.grad.mm" in shown and "paper.py" in shown


def test_a_click_holds_what_is_lit_and_escape_lets_go(page: Page) -> None:
    page.run("zc.hold({hop: 0})")
    page.run("zc.hover(null)")
    assert page.run("zc.selection") == {"hop": 0}
    page.driver.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.run("zc.held") is False  # what lies under the pointer may be lit again


def test_search_finds_a_parameter_and_shows_it(page: Page) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    box = page.driver.find_element(By.ID, "search")
    box.send_keys("blocks.1.up.weight")
    assert page.text("#found li").split() == ["parameter", "blocks.1.up.weight"]
    box.send_keys(Keys.ENTER)
    assert page.run("zc.step.parameters[zc.selection.parameter].name") == "blocks.1.up.weight"
    assert "weights over" in page.text("#detail") and page.run(
        "zc.timeline.source('timeline-lit').data.left.length > 3"
    )
    page.run("zc.hold(null)")


def test_a_click_on_a_module_unfolds_it_and_its_heading_folds_it(page: Page) -> None:
    page.run("zc.turn('graph')")
    before = page.run("zc.graph.boxes.map((b) => zc.graph.label(b.item))")
    assert any(label.startswith("blocks") for label in before) and not any(label.startswith("0  ") for label in before)
    box = "zc.graph.boxes.find((b) => zc.graph.label(b.item).startsWith('blocks'))"
    page.point("graph", f"{box}.x + {box}.w / 2", f"{box}.y + {box}.h / 2").perform()
    page.until("return zc.graph.frames.length === 1")
    after = page.run("zc.graph.boxes.map((b) => zc.graph.label(b.item))")
    assert any(label.startswith("0  ") for label in after) and any(label.startswith("1  ") for label in after)
    page.point("graph", "zc.graph.frames[0].x + zc.graph.frames[0].w / 2", "zc.graph.frames[0].y + 0.5").perform()
    page.until("return zc.graph.frames.length === 0")
    assert page.run("zc.graph.boxes.map((b) => zc.graph.label(b.item))") == before
    page.run("zc.turn('time')")


def test_every_pass_is_there_with_its_program_and_its_changes(page: Page, report: Path) -> None:
    page.run("zc.turn('programs')")
    for stage in ("joint", "forward", "backward"):
        page.run(f"zc.programs.open({stage!r})")
        shown = page.run("[...document.querySelectorAll('#passes li')].map((e) => e.dataset.pass)")
        folder = report.parent / "rank0" / f"graph0.{stage}"
        files = sorted(path.stem for path in folder.glob("[0-9]*.txt"))
        assert [file.split("-")[1] for file in files] == shown
        for number, file in enumerate(files):
            page.run(f"(zc.programs.pass = {number}, zc.programs.show())")
            lines = page.run(
                "[...document.querySelectorAll('#program .ln')].map((e) => e.textContent.replace(/^ *\\d+/, ''))"
            )
            text = (folder / f"{file}.txt").read_text().split("\n\n", 1)[1].splitlines()
            assert lines == [line[7:] for line in text], file
    page.run("(zc.programs.mode = 'changes', zc.programs.pass = 2, zc.programs.show())")
    diff = (report.parent / "rank0" / "graph0.backward" / "02-lower.diff").read_text().splitlines()[2:]
    assert page.run("[...document.querySelectorAll('#program .ln')].map((e) => e.textContent)") == diff
    page.run("zc.turn('time')")


def test_the_tables_say_what_the_ledger_says(page: Page, report: Path) -> None:
    import json

    (ledger,) = json.loads((report.parent / "ledger.json").read_text())
    page.run("zc.turn('why')")
    assert page.run("document.querySelectorAll('#why-table tbody tr').length") == sum(
        hop["exposed"] > 0 for hop in ledger["hops"]
    )
    page.run("zc.turn('parameters')")
    names = page.run("[...document.querySelectorAll('#parameters-table td.name')].map((e) => e.textContent)")
    assert sorted(names) == sorted(row["name"] for row in ledger["parameters"])
    page.run("zc.turn('time')")


def test_light_and_dark(page: Page) -> None:
    colours = []
    for _ in range(2):
        page.driver.execute_script("document.getElementById('theme').click()")
        colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2


def test_nothing_was_complained_of(page: Page) -> None:
    """The last of the module's tests: the console has heard nothing worse than a notice."""
    assert page.errors() == []


def odd(_: int, folder: str) -> None:
    import torch
    from torch import nn

    from zcompile import hierarchical_zero

    world.world(0, 8)
    model = nn.Sequential()
    for name in ("</script><b>", "a b\n%s", "\u00fc\u4e2d\u202e", "x" * 300, "'\"\\"):
        model.add_module(name, nn.Linear(8, 8))
    hierarchical_zero(model, topology="2x2x2", codegen=False, dump=folder)(torch.ones(2, 8)).sum().backward()


def test_odd_names_are_names(paper: Pool, driver: Any, tmp_path: Path) -> None:
    paper.run(odd, str(tmp_path), timeout=300)
    page = Page(driver, tmp_path / "report.html")
    names = page.run("zc.step.parameters.map((row) => row.name)")
    assert "</script><b>.weight" in names and "a b\\n%s.weight" in names and "'\"\\.weight" in names
    page.run("zc.turn('parameters')")
    assert "</script><b>.weight" in page.text("#parameters-table")
    page.run("zc.turn('graph')")
    assert any("</script><b>" in label for label in page.run("zc.graph.boxes.map((b) => zc.graph.label(b.item))"))
    assert page.errors() == []


def test_the_speed_of_a_page_is_measured_on_moves_that_light_something(report: Path) -> None:
    """What `python tests/support/page.py` prints; how fast is no test's matter."""
    found = browser.speed(report, points=5)
    assert found["lit"] == 1 and found["moves"] >= 5
    assert 0 < found["first_paint_ms"] <= found["ready_ms"] and 0 < found["hover_ms"] <= found["hover_worst_ms"]
