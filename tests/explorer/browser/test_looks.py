"""Looks of the static pages: themes, widths, accessibility by axe-core, charts, and what a browser keeps."""

import json
from pathlib import Path

import pytest
from hand_made_site import write_hand_made_site

from modeling_mfn.features.atlas.label_files import read_label_file

AXE = (Path(__file__).parents[1] / "vendor" / "axe.js").read_text(encoding="utf-8")
pytestmark = pytest.mark.browser
PAGES = {
    "#/features?q=rulers": ".ag-row",
    "#/feature/L6/4": ".chart svg",
    "#/feature/L6/7": ".notice.empty",  # dead
    "#/model": ".curves svg",
    "#/text": "h1",
    "#/steer": "h1",
    "#/why": "h1",
}
WIDTHS = [360, 700, 1280, 2560]


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


def test_axe_finds_nothing_serious(open_page, site, scheme):
    page = open_page(site, color_scheme=scheme)
    page.locator(".ag-row").first.wait_for()
    found = {}
    for address, part in PAGES.items():
        page.goto(site + address)
        page.locator(part).first.wait_for()
        # evaluated by the debugger: the policy of the page would refuse a script of another folder
        page.evaluate(AXE)
        for width in (360, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            results = page.evaluate("axe.run(document, {preload: false, resultTypes: ['violations']})")
            serious = [each for each in results["violations"] if each["impact"] in ("serious", "critical")]
            found |= {f"{address} {each['id']}": [node["html"] for node in each["nodes"]][:3] for each in serious}
            assert len(results["passes"]) > 15  # axe has looked
    assert not found, json.dumps(found, indent=1)


def test_axe_sees_a_fault(open_page, site):
    page = open_page(site)
    page.locator(".ag-row").first.wait_for()
    page.evaluate("document.querySelector('h1').style.color = 'var(--line)'")
    page.evaluate(AXE)
    results = page.evaluate("axe.run(document, {preload: false, resultTypes: ['violations']})")
    assert "color-contrast" in {each["id"] for each in results["violations"]}


def test_theme_follows_the_system_until_one_is_chosen(open_page, site):
    page = open_page(site, color_scheme="dark")
    page.locator(".ag-row").first.wait_for()
    assert brightness(page) < 60
    page.get_by_label("Theme").select_option("light")
    assert brightness(page) > 200
    page.reload()
    page.locator(".ag-row").first.wait_for()
    assert brightness(page) > 200  # a browser keeps it
    page.get_by_label("Theme").select_option("auto")
    assert brightness(page) < 60
    page.emulate_media(color_scheme="light")
    assert brightness(page) > 200


def brightness(page):
    """Brightest channel of the page's and of the table's background; both must be on one side."""
    colours = page.evaluate("""() => [document.body, document.querySelector('.ag-row')]
        .map((element) => getComputedStyle(element).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number))""")
    levels = [max(colour) for colour in colours if colour != [0, 0, 0]]
    assert max(levels) - min(levels) < 40
    return levels[0]


def test_no_page_is_wider_than_the_window(open_page, site, hostile_site):
    page = open_page(site)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        for start, address in [
            *((site, each) for each in PAGES),
            (hostile_site, "#/feature/L3/11"),
            (hostile_site, "#/model"),
        ]:
            page.goto(start + address)
            page.locator("h1").wait_for()
            page.locator(".loading").wait_for(state="detached")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (address, width)


def test_narrow_windows_show_fewer_columns(open_page, site):
    page = open_page(site)
    seen = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(300)
        seen.append(page.locator(".ag-header-cell").count())
    assert seen == sorted(seen)
    assert seen[0] == 3
    assert seen[-1] == 10


def test_histogram_draws_the_counts_of_the_record(open_page, site):
    page = open_page(site + "#/feature/L6/4")
    page.locator(".chart svg rect").first.wait_for()
    counts = page.evaluate("MFN.store.feature('L6/4').then((record) => record.histogram.map(([, count]) => count))")
    heights = page.locator(".chart svg rect").evaluate_all(
        "all => all.map((each) => Number(each.getAttribute('height')))"
    )
    assert len(heights) == len(counts) == 20
    scale = max(heights) / max(counts)
    assert heights == pytest.approx([count * scale for count in counts], abs=1)
    described = page.locator(".chart svg").get_attribute("aria-describedby")
    assert f"{sum(counts):,} activations" in page.locator(f"#{described}").text_content()


def test_tokens_are_shaded_by_their_activation(open_page, site):
    page = open_page(site + "#/feature/L6/4")
    page.locator(".example").first.wait_for()
    example = page.evaluate("MFN.store.feature('L6/4').then((record) => record.examples[0])")
    first = page.locator(".example").first
    first.get_by_role("button", name="more text").click()
    tokens = first.locator(".example-text .token")
    shares = tokens.evaluate_all("all => all.map((each) => Number(each.style.getPropertyValue('--share')))")
    assert shares == pytest.approx([value / example["activation"] for value in example["activations"]], abs=0.001)
    assert tokens.nth(example["offset"]).get_attribute("class") == "token current active"
    first.locator(".example-text").focus()
    assert f"{example['activation']:.3g}" in first.locator(".values").inner_text()


def test_own_label_is_kept_found_and_downloaded(open_page, site):
    page = open_page(site + "#/feature/L12/30")
    page.get_by_label("Your label").fill("  my <b>own</b>  ")
    page.keyboard.press("Enter")
    page.locator("h1", has_text="my <b>own</b>").wait_for()
    page.reload()
    page.locator("h1", has_text="my <b>own</b>").wait_for()
    page.goto(site + "#/features?q=own&labels=human")
    page.locator(".ag-row").wait_for()
    assert page.locator(".ag-row [col-id=name]").inner_text() == "L12/30"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download my label").click()
    rows = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert rows == [{"feature": "L12/30", "label": "my <b>own</b>", "source": "human"}]
    page.goto(site + "#/feature/L12/30")
    page.get_by_label("Your label").fill("")
    page.get_by_role("button", name="Remove").click()
    page.locator("h1", has_text="own").wait_for(state="detached")
    page.reload()
    page.locator(".own-label").wait_for()
    assert "own" not in page.locator("h1").inner_text()


def test_downloaded_labels_can_be_imported(open_page, site, tmp_path):
    """`mfn atlas --labels` reads the file that the page offers."""
    page = open_page(site + "#/feature/L12/31")
    page.get_by_label("Your label").fill("mine")
    page.get_by_role("button", name="Save").click()
    page.locator("h1", has_text="mine").wait_for()
    page.goto(site + "#/features")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download my label").click()
    download.value.save_as(tmp_path / "labels.json")
    (label,) = read_label_file(tmp_path / "labels.json")
    assert (label.feature, label.label) == ("L12/31", "mine")


def test_copied_lines_work(open_page, site):
    page = open_page(site + "#/feature/L6/4", permissions=["clipboard-read", "clipboard-write"])
    page.locator(".example").first.wait_for()
    mean = page.evaluate("MFN.store.feature('L6/4').then((record) => record.mean_activation)")
    copied = {}
    for name in ("Copy Python", "Copy command", "Copy JSON"):
        page.get_by_role("button", name=name).click()
        page.get_by_role("button", name=name).locator(".copied", has_text="Copied").wait_for()
        copied[name] = page.evaluate("navigator.clipboard.readText()")
    clamp = f"{mean:.3g}"
    assert copied["Copy Python"] == f'with model.steer({{"L6/4": Clamp({clamp})}}):'
    assert copied["Copy command"] == f'mfn steer MODEL "The" --set L6/4=clamp:{clamp}'
    assert json.loads(copied["Copy JSON"])["feature"] == "L6/4"
    assert (
        page.get_by_role("link", name="Steer with it").get_attribute("href") == f"#/steer?set=L6%2F4%3Dclamp%3A{clamp}"
    )


def test_picker_suggests_and_takes_the_keys(open_page, site):
    """The box that Steer uses, put into an empty page."""
    page = open_page(site + "#/why")
    page.locator("h1").wait_for()
    page.evaluate("""() => {
        const place = document.createElement("div");
        document.querySelector("main").append(place);
        preact.render(preact.h(MFN.FeaturePicker, {label: "Pick", onPick: (name) => (window.picked = name)}), place);
    }""")
    box = page.get_by_role("combobox", name="Pick")
    box.fill("L12/17")
    page.locator("[role=option]").first.wait_for()
    assert page.locator("[role=option]").first.locator(".feature-name").inner_text() == "L12/17"
    names = page.locator("[role=option] .feature-name").all_inner_texts()
    assert all("L12/17" in name for name in names)
    box.press("ArrowDown")
    box.press("Enter")
    assert page.evaluate("picked") == names[1]
    assert box.input_value() == ""
    assert page.locator("[role=option]").count() == 0


def test_a_missing_file_is_told_and_asked_for_again(open_page, tmp_path):
    address = write_hand_made_site(tmp_path, 40, (6,)).as_uri()
    file = tmp_path / "data" / "features" / "L6" / "1.js"
    content = file.read_text()
    file.unlink()
    page = open_page(address + "#/feature/L6/33")
    page.locator(".notice.error", has_text="data/features/L6/1.js cannot be read").wait_for()
    file.write_text(content)
    page.keyboard.press("j")
    page.locator("h1", has_text="L6/34").wait_for()
    page.locator(".own-label").wait_for()
    open_page.problems[:] = [each for each in open_page.problems if "ERR_FILE_NOT_FOUND" not in each]
