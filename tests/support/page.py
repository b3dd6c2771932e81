"""A report in a browser: Chromium, headless, opens the file from disk, as a user would.

python tests/support/page.py DIR/report.html    -> JSON: how soon it is painted and ready, how long the pointer waits for what it lights
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1400,900")  # fmt: skip


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A browser that keeps its profile in `folder`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """A page in a browser."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver = driver
        driver.get(path.as_uri())
        self.until("return document.documentElement.dataset.ready")

    def until(self, script: str, seconds: float = 120.0) -> Any:
        """What a script returns, as soon as it is something."""
        end = time.monotonic() + seconds
        while not (found := self.driver.execute_script(script)):
            assert time.monotonic() < end, script
            time.sleep(0.1)
        return found

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        code = (
            f"const done = arguments[0]; (async () => {script})().then((v) => done([v]), (e) => done(String(e.stack)))"
        )
        found = self.driver.execute_async_script(code)
        assert isinstance(found, list), found
        return found[0]

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script(f"return document.querySelector({selector!r}).innerText"))

    def point(self, chart: str, x: str, y: str) -> Any:
        """The pointer moves to a place in a chart's own coordinates; returns the actions, to click there."""
        from selenium.webdriver import ActionChains

        plot = "zc.graph.plot" if chart == "graph" else "zc.timeline.plot"
        at = self.run(
            f"(() => {{ const view = Bokeh.index.find_one({plot}), box = view.el.getBoundingClientRect(), frame = view.frame.bbox;"
            f" const {{ x_range: xs, y_range: ys, inner_width: w, inner_height: h }} = {plot};"
            f" return [box.x + frame.left + (w * ({x} - xs.start)) / (xs.end - xs.start),"
            f" box.y + frame.top + (h * (ys.end - ({y}))) / (ys.end - ys.start)]; }})()"
        )
        actions = ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(int(at[0]) - 3, int(at[1]))
        actions.w3c_actions.pointer_action.move_to_location(int(at[0]), int(at[1]))
        actions.perform()
        return ActionChains(self.driver).click()

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


_HOVER = """(async () => {
  // From the pointer's event to the end of the second frame after it: Bokeh takes moves frame by frame.
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  const lag = async (event) => { await frame(); await frame(); return performance.now() - event.timeStamp; };
  window.lags = [];
  window.lit = 0;
  const seen = (ms) => { window.lags.push(ms); window.lit += zc.selection !== null; };
  document.addEventListener("pointermove", (event) => { lag(event).then(seen); }, true);
})()"""


def speed(report: Path, *, points: int = 40) -> dict[str, float]:
    """Milliseconds: `first_paint` and `ready` from the start of loading, `hover` from a move of the pointer onto a block of the timeline
    to the frame that shows what it lights (median and worst of `points` blocks, spread over the step);
    `lit`: the part of moves that lit one."""
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as driver:
        page = Page(driver, report)
        paint = page.run(
            "performance.getEntriesByType('paint').find((e) => e.name === 'first-contentful-paint').startTime"
        )
        ready = page.run("performance.getEntriesByName('ready')[0].startTime")
        page.run(_HOVER)
        spans = page.run("zc.timeline.left.length")
        for point in range(points):
            span = spans * point // points
            at = f"(zc.timeline.left[{span}] + zc.timeline.right[{span}]) / 2"
            page.point("time", at, f"zc.timeline.tops[{span}] - 0.4")
        page.until(f"return window.lags.length >= {points}")
        lags, lit = page.run("[window.lags, window.lit]")
    return {
        "bytes": report.stat().st_size,
        "first_paint_ms": paint,
        "ready_ms": ready,
        "hover_ms": statistics.median(lags),
        "hover_worst_ms": max(lags),
        "moves": len(lags),
        "lit": lit / len(lags),
    }


if __name__ == "__main__":
    print(json.dumps(speed(Path(sys.argv[1]).resolve())))
