"""A list of 100,000 features in a real browser: rows in the document stay few, and times are printed."""

import re
import time

import pytest
from hand_made_site import write_hand_made_site

from benchmarks.explorer.load_times import SCROLL

pytestmark = pytest.mark.browser
FEATURES = 100_000


@pytest.fixture(scope="module")
def large_site(tmp_path_factory):
    """The list alone: pages of features would take minutes to invent."""
    return write_hand_made_site(tmp_path_factory.mktemp("large"), FEATURES, (6,), pages=False).as_uri()


def test_a_hundred_thousand_features_scroll(open_page, large_site, capsys):
    start = time.perf_counter()
    page = open_page(large_site)
    page.locator(".ag-row").first.wait_for()
    shown = time.perf_counter() - start
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert page.locator(".hits [role=status]").inner_text() == "100,000 of 100,000 features"
    scrolled = page.evaluate(SCROLL)
    assert max(scrolled["rows"]) < 150
    start = time.perf_counter()
    page.get_by_label("Search").fill("rulers L6/99")
    page.locator(".hits [role=status]", has_text=re.compile(r"^(?!100,000)[0-9,]+ of")).wait_for()
    searched = time.perf_counter() - start
    names = page.locator(".ag-row [col-id=name]").all_inner_texts()
    assert names
    assert all("L6/99" in name for name in names)
    times = sorted(scrolled["times"])
    with capsys.disabled():
        print(
            f"\n100,000 features: first paint {paint:.0f} ms, list {shown:.2f} s, search {searched * 1000:.0f} ms; "
            f"frames while scrolling: median {times[60]:.0f} ms, 95 % {times[114]:.0f} ms, longest {times[-1]:.0f} ms"
        )


def test_the_last_feature_is_reached_by_keys(open_page, large_site):
    page = open_page(large_site)
    page.locator(".ag-row").first.wait_for()
    page.get_by_label("Search").press("ArrowDown")
    page.keyboard.press("Control+ArrowDown")
    page.locator(".ag-cell-focus", has_text="L6/99999").wait_for()
