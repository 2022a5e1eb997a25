"""Debian's chromium, and times until the explorer's pages can be used in it, from disk."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PAGES = {
    "list": ("#/features", ".ag-row .ag-cell"),
    "feature": ("#/feature/{feature}", ".columns h2"),
    "model": ("#/model", ".curves svg"),
}
"""Page -> address, and what is there once the page can be used."""
WHEN_SHOWN = """
window.shownAt = null;
new MutationObserver(() => {
    if (window.shownAt === null && document.querySelector(SELECTOR)) window.shownAt = performance.now();
}).observe(document, {childList: true, subtree: true});
"""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
SCROLL = """async () => {
    const body = document.querySelector(".ag-viewport, .ag-body-viewport, .ag-grid-viewport");
    const times = [], rows = [];
    let last = performance.now();
    for (let step = 0; step < 120; step += 1) {
        body.scrollTop = (body.scrollHeight - body.clientHeight) * ((step * 37) % 120) / 119;
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - last);
        last = performance.now();
        rows.push(document.querySelectorAll(".ag-row").length);
    }
    return {times, rows};
}"""
"""Scrolls to 120 places all over the list; returns the time of each frame, and the rows in the document after it."""


def load_times(site: Path, feature: str, rounds: int) -> dict[str, Any]:
    """Opens each page several times, each in a new context.

    Returns:
        Medians in milliseconds, and the frames while the list scrolls. Other work on the machine disturbs the processor
        time of the page's process less than times by the clock.
    """
    found: dict[str, Any] = {}
    with chromium() as browser:
        for name, (address, selector) in PAGES.items():
            opened = f"{(site / 'index.html').as_uri()}{address.format(feature=feature)}"
            runs = [_open(browser, opened, selector) for _ in range(rounds)]
            found[name] = {each: round(statistics.median(run[each] for run in runs)) for each in runs[0]}
        found["scrolling"] = _scroll(browser, f"{(site / 'index.html').as_uri()}#/features")
        found["browser"] = browser.version
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """Browser without a window, until the end of the context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def _page(browser: Any, address: str, selector: str) -> Iterator[Any]:
    context = browser.new_context(offline=True, viewport={"width": 1440, "height": 900})
    context.add_init_script(WHEN_SHOWN.replace("SELECTOR", json.dumps(selector)))
    page = context.new_page()
    page.goto(address)
    page.locator(selector).first.wait_for(state="attached", timeout=120_000)
    yield page
    context.close()


def _open(browser: Any, address: str, selector: str) -> dict[str, float]:
    with _page(browser, address, selector) as page:
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
        processor = metrics["ProcessTime"]
        times = {"first_paint_ms": page.evaluate(FIRST_PAINT), "usable_ms": page.evaluate("window.shownAt")}
        return times | {"processor_ms": 1000 * processor}


def _scroll(browser: Any, address: str) -> dict[str, float]:
    with _page(browser, address, PAGES["list"][1]) as page:
        times = sorted(page.evaluate(SCROLL)["times"])
    shares = {"median_ms": 0.5, "95_percent_ms": 0.95, "longest_ms": 1.0}
    return {name: round(times[int(share * (len(times) - 1))], 1) for name, share in shares.items()}


__all__ = ["FLAGS", "SCROLL", "chromium", "load_times"]
