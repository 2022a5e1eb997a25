"""The static folder in a real browser: every page from disk, keys, links, hostile text."""

import re

from hand_made_site import HOSTILE

PAGES = {
    "#/features": ".ag-row",
    "#/feature/L6/4": ".example",
    "#/model": ".curves svg",
    "#/text": ".notice",
    "#/steer": ".notice",
    "#/why": ".notice",
}


def test_every_page_opens_from_disk(open_page, site):
    page = open_page(site)
    for address, part in PAGES.items():
        page.goto(site + address)
        page.locator(part).first.wait_for()
        assert page.locator("h1").inner_text()
        assert page.title().endswith(" · made-up")
        assert page.locator("nav [aria-current=page]").count() == 1


def test_keys_alone_reach_a_feature_and_come_back(open_page, site):
    page = open_page(site + "#/features")
    page.locator(".ag-row").first.wait_for()
    page.keyboard.press("/")
    page.keyboard.type("rulers")
    page.locator(".hits [role=status]", has_text=re.compile(r"^(?!600)\d+ of 600 features")).wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    second = page.locator(".ag-cell-focus").inner_text()
    page.keyboard.press("Enter")
    page.locator(".example, .notice.empty").first.wait_for()
    assert second in page.locator("h1").inner_text()
    assert page.evaluate("document.activeElement.tagName") == "H1"
    layer, index = second[1:].split("/")
    page.keyboard.press("j")
    page.locator("h1", has_text=f"L{layer}/{int(index) + 1}").wait_for()
    page.keyboard.press("k")
    page.locator("h1", has_text=second).wait_for()
    for _ in range(3):
        page.go_back()
    page.locator(".ag-cell-focus").wait_for()
    assert page.locator(".ag-cell-focus").inner_text() == second
    assert page.locator("[data-search]").input_value() == "rulers"


def test_a_link_gives_the_same_view_again(open_page, site):
    page = open_page(site)
    page.locator(".ag-row").first.wait_for()
    page.get_by_label("Search").fill("o")
    page.get_by_label("Layer").select_option("12")
    page.get_by_label("Rate from, %").fill("0.01")
    page.get_by_label("AUROC from").fill("0.6")
    for _ in range(2):  # once more for ascending
        page.get_by_role("columnheader", name="Firing rate").click()
    page.wait_for_url(re.compile("sort=rate%3Aasc"))
    seen = view(page)
    again = open_page(page.url)
    again.locator(".ag-row").first.wait_for()
    assert view(again) == seen
    rates = [float(rate.removesuffix(" %")) for rate in again.locator(".ag-row [col-id=rate]").all_inner_texts()]
    assert len(rates) > 5
    assert rates == sorted(rates)
    assert rates[0] >= 0.01
    assert {name.split("/")[0] for name in again.locator(".ag-row [col-id=name]").all_inner_texts()} == {"L12"}


def view(page):
    """What a person sees of the list: filters, count, and the rows."""
    page.locator(".hits [role=status]").filter(has_text="of").wait_for()
    fields = page.locator(".filters input, .filters select").evaluate_all("all => all.map((each) => each.value)")
    rows = page.locator(".ag-row [col-id=name]").all_inner_texts()
    return fields, page.locator(".hits [role=status]").inner_text(), rows


def test_hostile_text_is_text(open_page, hostile_site):
    page = open_page(hostile_site)
    for address in ("#/features", *(f"#/feature/L3/{index}" for index in range(len(HOSTILE))), "#/model"):
        page.goto(hostile_site + address)
        page.locator(".ag-row, .own-label, .curves svg").first.wait_for()
        injected = "script, img, iframe, style:not(.chart style), [onload], [onerror], a:not([href^='#'])"
        assert page.locator("#app").locator(injected).count() == 0
        assert "<img src=x onerror=" in page.locator(".brand").inner_text()
        assert page.title() != "attacked"
        assert not set(page.locator("#app").inner_text()) & {"\u202e", "\u2066", "\x00", "\x1b", "\u200b"}
    page.goto(hostile_site + "#/feature/L3/7")
    page.locator(
        "h1", has_text="\u2039202E\u203aright to left\u20392066\u203a ␀\u2039001B\u203a[2J \u2039200B\u203a hidden"
    ).wait_for()


def test_a_script_in_the_page_does_not_run(open_page, site):
    """The policy of index.html holds on pages from disk: it would stop what escaping let through."""
    page = open_page(site)
    page.locator(".ag-row").first.wait_for()
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'attacked'";
        document.body.append(script);
    }""")
    assert page.title() != "attacked"
    assert any("Content Security Policy" in problem for problem in open_page.problems)
    open_page.problems.clear()


def test_a_link_to_nothing_is_told(open_page, site):
    page = open_page(site + "#/feature/%")
    page.locator(".ag-row").first.wait_for()
    for address in ("#/feature/L9/0", "#/feature/L6/300", "#/feature/<b>", "#/feature/L6"):
        page.goto(site + address)
        page.locator(".notice.error", has_text=f"There is no feature {address[10:]} in this model.").wait_for()
    page.goto(site + "#/nothing")
    page.locator(".ag-row").first.wait_for()
