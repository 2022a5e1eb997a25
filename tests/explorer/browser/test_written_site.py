"""Folders that the package writes, opened in a browser: what the writer writes is what the pages read."""

import json

import pytest

from benchmarks.explorer.sites import main

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of an invented model and its explorer."""
    out = tmp_path_factory.mktemp("written") / "invented"
    main(out, 256, 0)
    return out


def test_pages_show_what_the_atlas_has(open_page, written):
    from modeling_mfn import FeatureAtlas

    atlas = FeatureAtlas.from_pretrained(written / "model")
    rows = {row["name"]: row for row in atlas.features.to_pylist()}
    address = (written / "explorer" / "index.html").as_uri()
    page = open_page(address + "#/features?sort=max:desc")
    page.locator(".ag-row").first.wait_for()
    page.locator(".hits [role=status]", has_text=f"{len(rows)} of {len(rows)} features").wait_for()
    strongest = page.locator(".ag-row[row-index='0']").first.locator("[col-id=name]").inner_text()
    largest = max((row["max_activation"] or 0) for row in rows.values())
    assert rows[strongest]["max_activation"] == largest
    for name in [strongest, min(rows, key=lambda name: rows[name]["firing_count"])]:
        page.goto(f"{address}#/feature/{name}")
        page.locator("h1", has_text=name).wait_for()
        page.locator(".own-label").wait_for()
        facts = dict(
            zip(page.locator(".facts dt").all_inner_texts(), page.locator(".facts dd").all_inner_texts(), strict=True)
        )
        assert facts["status"] == rows[name]["status"]
        assert facts["firings"].replace(",", "") == str(rows[name]["firing_count"])
    page.goto(address + "#/model")
    page.locator(".curves svg").first.wait_for()
    config = json.loads((written / "model" / "config.json").read_text(encoding="utf-8"))
    facts = page.locator(".facts").first.inner_text()
    assert str(config["num_features"]) in facts
