"""Text, Steer and Why in a browser, on a server with a tiny model: their numbers are those of the library."""

import ast
import json
import re
import shlex
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from live_explorer import HOSTILE, LABELS, live

from modeling_mfn import Clamp, Scale, explain
from modeling_mfn.cli.steer import _read_settings

expect = pytest.importorskip("playwright.sync_api").expect
AXE = Path(__file__).parents[1] / "vendor" / "axe.js"
TEXT = "|".join(["w3", "w50", HOSTILE[0], "w71", HOSTILE[2], "w9", HOSTILE[3], "w60"])
PAGES = {
    "text": {"text": TEXT, "without": "L2/9"},
    "steer": {"prompt": TEXT, "set": ["L2/9=clamp:3", f"{LABELS[1]}=add:2"], "max": 6, "control": 1},
    "why": {"text": TEXT, "position": 5},
}


def ids_of(text):
    return live().tokenizer(text, return_tensors="pt")["input_ids"]


@torch.no_grad()
def probabilities(text, position, interventions=None):
    with live().model.steer(interventions or {}):
        return live().model(ids_of(text)[:, : position + 1]).logits[0, -1].softmax(-1)


def number(text):
    """Reads a number as the pages write it."""
    return float(text.replace("\u2212", "-").replace(",", "").split()[0])


def rounded(exact):
    """The exact number, within what three significant digits leave out."""
    return pytest.approx(exact, rel=6e-3, abs=1e-9)


def shortened(value):
    """A number as the data of the pages has it, with four significant digits."""
    return float(f"{value:.4g}")


def shown_as(token):
    """A token as the pages show it: what is hidden becomes visible, and piled-up marks are cut."""
    named = {"\x00": "␀", "\n": "↵"} | {each: f"\u2039{ord(each):04X}\u203a" for each in "\u202e\u2066\x1b"}
    text = "".join(named.get(character, character) for character in token)
    return text[:5] + "…" if token == HOSTILE[4] else text


def generated(interventions, positions="all", new=6, **settings):
    model, ids = live().model, ids_of(TEXT)
    torch.manual_seed(settings.pop("seed", 0))
    with torch.no_grad(), model.steer(interventions, positions):
        out = model.generate(input_ids=ids, max_new_tokens=new, pad_token_id=0, do_sample=bool(settings), **settings)
    return [live().tokenizer.decode([token]) for token in out[0, ids.shape[1] :].tolist()]


def common_length(a, b):
    """Length of the longest common subsequence, by its definition."""
    rows = {(i, j): 0 for i in range(len(a) + 1) for j in range(len(b) + 1)}
    for i, j in ((i, j) for i in range(len(a)) for j in range(len(b))):
        same = a[i] == b[j]
        rows[i + 1, j + 1] = rows[i, j] + 1 if same else max(rows[i, j + 1], rows[i + 1, j])
    return rows[len(a), len(b)]


def test_text_page_shows_what_the_model_reads(open_page):
    """Cells, features of a cell and predictions are compared with a forward pass; keys and the address with both."""
    with torch.no_grad():
        codes = live().model(ids_of(TEXT), output_codes=True).codes
    maxima = {
        (row["layer"], row["index"]): row["max_activation"]
        for row in live().atlas.features.select(["layer", "index", "max_activation"]).to_pylist()
    }
    page = open_page(live().url("text", text=TEXT, token=1, layer=0), live().address)
    grid = page.get_by_role("grid")
    expect(grid).to_be_visible()
    for row, (layer, code) in enumerate(codes.items()):
        shares = [
            max((value / (maxima[layer, index] or float("inf"))) for index, value in zip(*pairs, strict=True))
            for pairs in zip(code.indices[0].tolist(), code.values[0].tolist(), strict=True)
        ]
        cells = page.locator(f"[role=gridcell][data-row='{row}']")
        shown = cells.evaluate_all("all => all.map(each => each.style.getPropertyValue('--share'))")
        assert [float(share) for share in shown] == pytest.approx([min(share, 1) for share in shares], abs=6e-4)
    page.get_by_role("listbox", name="Tokens of the text").get_by_role("option", selected=True).focus()
    press_at_once(page, "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight")
    page.wait_for_url(re.compile("token=3$"))
    page.locator("[role=gridcell][data-row='0'][data-at='1']").focus()
    press_at_once(page, "ArrowRight", "ArrowDown", "Enter")
    page.wait_for_url(re.compile("token=2&layer=2"))
    pairs = sorted(zip(codes[2].values[0, 2].tolist(), codes[2].indices[0, 2].tolist(), strict=True))[::-1]
    active = [(f"L2/{index}", value) for value, index in pairs if value > 0]
    panel = page.get_by_role("region", name="Features of the cell")
    names = panel.locator("tbody .feature-name").all_text_contents()
    values = panel.locator("tbody td:nth-child(2)").all_text_contents()
    assert set(names) == {name for name, _ in active}
    assert all(number(value) == rounded(dict(active)[name]) for name, value in zip(names, values, strict=True))
    feature = active[0][0]
    page.get_by_role("button", name=f"Ablate {feature}").click()
    check_predictions(page, feature)
    page.wait_for_url(re.compile("without="))
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    check_predictions(page, feature)
    expect(page.locator(".heat-cell.chosen")).to_have_attribute("data-at", "2")
    page.get_by_label("Strongest features by token").check()
    expect(page.locator(".by-token tbody tr")).to_have_count(len(TEXT.split("|")))


def press_at_once(page, *keys):
    """Presses keys faster than the page draws: each must count from where the one before it led."""
    page.evaluate(
        """keys => keys.forEach(key => document.activeElement.dispatchEvent(
            new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true })))""",
        keys,
    )


def check_predictions(page, feature):
    table = page.get_by_role("table", name="Largest changes")
    expect(table).to_be_visible()
    plain, without = (probabilities(TEXT, 2, edits) for edits in ({}, {feature: {"kind": "ablate"}}))
    largest = (plain - without).abs().topk(10).indices.tolist()
    rows = [row.locator("th, td").all_text_contents() for row in table.locator("tbody tr").all()]
    assert len(rows) == 10
    for (token, _, before, after, change), index in zip(rows, largest, strict=True):
        assert token == shown_as(live().tokenizer.decode([index]))
        assert number(before) == rounded(100 * plain[index].item())
        assert number(after) == rounded(100 * without[index].item())
        assert number(change) == rounded(100 * (without - plain)[index].item())


def columns(page):
    """Texts and marks of each column: {name: [(token, True if it is marked)]}."""
    script = "all => all.map(each => [each.textContent, each.localName === 'mark'])"
    return {
        column.get_attribute("data-stream"): column.locator(".generated > :not(.caret)").evaluate_all(script)
        for column in page.locator(".stream").all()
    }


def wait_until_done(page):
    expect(page.get_by_role("status").filter(has_text="Done in")).to_be_visible(timeout=30_000)


def test_steer_page_generates_what_the_library_generates(open_page):
    """Three columns, their marks and perplexities; the control is chosen by chance, the rest is known."""
    typical = shortened(live().atlas.row("L2/9")["mean_activation"])
    state = {"prompt": TEXT, "set": f"L2/9=clamp:{typical}", "max": 6, "sample": 1, "temperature": 0.7, "seed": 3}
    page = open_page(live().url("steer", **state), live().address)
    slider = page.get_by_role("slider", name="Strength of L2/9")
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    strength = 4 * typical
    page.wait_for_url(lambda url: f"clamp%3A{strength:.6g}&" in url)
    page.get_by_role("button", name="Same with a random feature").click()
    wait_until_done(page)
    shown = columns(page)
    control = page.locator("[data-stream=control] .feature-name").text_content()
    assert control != "L2/9"
    instead = 4 * shortened(live().atlas.row(control)["mean_activation"])
    edits = {"plain": {}, "steered": {"L2/9": Clamp(strength)}, "control": {control: Clamp(instead)}}
    for name, interventions in edits.items():
        expected = generated(interventions, temperature=0.7, seed=3)
        assert [token.removeprefix(" ") for token, _ in shown[name]] == list(map(shown_as, expected)), name
        with torch.no_grad(), live().model.steer(interventions):
            ids = ids_of(TEXT)
            loss = torch.nn.functional.cross_entropy(live().model(ids).logits[0, :-1], ids[0, 1:])
        expect(page.locator(f"[data-perplexity={name}]")).to_be_visible()
        assert number(page.locator(f"[data-perplexity={name}]").text_content()) == rounded(loss.exp().item())
    for name in ("steered", "control"):
        texts = [token for token, _ in shown[name]]
        common = common_length([token for token, _ in shown["plain"]], texts)
        assert sum(not marked for _, marked in shown[name]) == common
    both = [[token for token, marked in shown[name] if not marked] for name in ("plain", "steered")]
    assert both[0] == both[1]
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    expect(page.get_by_label("Strength of L2/9, as a number")).to_have_value("4")
    expect(page.get_by_role("button", name="Same with a random feature")).to_have_attribute("aria-pressed", "true")


@pytest.mark.browser
def test_stop_ends_the_work(open_page):
    page = open_page(live().url("steer", prompt=TEXT, set="L2/9=scale:2", max=400), live().address)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-stream=plain] .generated > span").nth(3)).to_be_attached(timeout=30_000)
    assert live().running == 1
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("stopped").first).to_be_visible()
    deadline = time.monotonic() + 10
    while live().running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live().running == 0
    assert len(columns(page)["plain"]) < 400


@pytest.mark.browser
def test_presets_are_saved_loaded_and_deleted(open_page):
    name = "a/b <b>&amp;</b>"
    state = {"prompt": "w3", "set": ["L2/9=add:1.5@L0/3", "L0/5=ablate"], "positions": "prompt"}
    page = open_page(live().url("steer", **state), live().address)
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Save as a preset").click()
    expect(page.get_by_text("Saved as")).to_be_visible()
    saved = json.loads((live().folder / "config.json").read_text())["steering_presets"][name]
    assert saved == {
        "positions": "prompt",
        "interventions": {
            "L2/9": {"kind": "add", "value": 1.5, "when": "L0/3", "above": 0.0},
            "L0/5": {"kind": "ablate"},
        },
    }
    page.goto(live().url("steer", prompt="w3"))
    page.get_by_role("region", name="Presets").locator("select").select_option(name)
    page.get_by_role("button", name="Load").click()
    page.wait_for_url(re.compile(r"set=L2%2F9%3Dadd%3A1.5%40L0%2F3&set=L0%2F5%3Dablate&positions=prompt"))
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("Deleted")).to_be_visible()
    assert not json.loads((live().folder / "config.json").read_text())["steering_presets"]


@pytest.mark.browser
def test_copies_mean_the_same_to_shell_and_python(open_page):
    """The command is read by the command line's own parser, and the Python text by Python."""
    settings = ["L2/9=clamp:3.25", f"{LABELS[1]}=scale:2"]
    prompt = '-it\'s "5" $HOME `x` \\ \n\u2028 \u202e end'
    state = {"prompt": prompt, "set": settings, "sample": 1, "seed": 4, "positions": "generated", "temperature": 0.5}
    page = open_page(live().url("steer", **state), live().address)
    page.evaluate("copies = []; navigator.clipboard.writeText = async (text) => copies.push(text); 0")
    for name in ("Copy as Python", "Copy as mfn steer"):
        page.get_by_role("button", name=name).click()
        expect(page.get_by_role("button", name=name)).to_contain_text("Copied")
    python, command = page.evaluate("copies")
    words = shlex.split(command)
    assert words[:3] == ["mfn", "steer", "tiny"]
    given = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert given == settings
    assert words[-2:] == ["--", prompt]
    assert {"--sample", "--seed", "--positions"} < set(words)
    features = _read_settings(given, str(live().folder))
    tree = ast.parse(python)
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(values["inputs"].args[0]) == prompt
    interventions = ast.literal_eval(values["interventions"])
    assert interventions["L2/9"] == {"kind": "clamp", "value": 3.25}
    assert {tuple(map(int, name[1:].split("/"))) for name in interventions} == set(features)
    assert all(each == Scale(2.0) for feature, each in features.items() if feature != (2, 9))


def test_why_page_draws_and_exports_the_explanation(open_page):
    explanation = explain(live().model, live().tokenizer, TEXT, 5, top=3, atlas=live().atlas)
    page = open_page(live().url("why", text=TEXT, position=5, top=3), live().address)
    expect(page.locator(".why-picture")).to_be_visible(timeout=30_000)
    accounts = page.locator("#accounts tbody tr")
    for row, layer in zip(range(accounts.count()), reversed(explanation.layers), strict=False):
        parts = accounts.nth(row).locator("[data-part]").all_text_contents()
        exact = [layer.attribution - layer.others, layer.others, layer.baseline, layer.remainder]
        assert [number(part) for part in parts] == pytest.approx(exact, abs=5.1e-4)
    assert accounts.count() == len(explanation.layers) + 1
    for feature in explanation.features:
        row = page.locator(f"#features-table tr[data-feature='{feature.name}']")
        for name in ("attribution", "ablation"):
            shown = number(row.locator(f"[data-number={name}]").text_content())
            assert shown == pytest.approx(getattr(feature, name), abs=5.1e-4)
    first = explanation.features[0]
    page.locator(f".why-node[data-feature='{first.name}']").focus()
    expect(page.get_by_label("Numbers of the feature")).to_contain_text(first.name)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the graph").click()
    assert json.loads(Path(download.value.path()).read_text()) == json.loads(json.dumps(explanation.to_graph()))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the picture").click()
    check_drawing(ElementTree.parse(download.value.path()).getroot(), explanation)
    page.locator(f".why-node[data-feature='{first.name}']").focus()
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: url.endswith(f"#/feature/{first.name}"))


def check_drawing(svg, explanation):
    """Lines and bars of the file hold the numbers, in proportion; nothing in it needs a style sheet."""
    space = "{http://www.w3.org/2000/svg}"
    lines = {(line.get("data-feature"), line.get("data-from")): line for line in svg.iter(f"{space}path")}
    widths = {}
    for feature in explanation.features:
        line = lines[feature.name, "feature"]
        assert float(line.get("data-weight")) == pytest.approx(feature.attribution, abs=1e-6)
        assert (line.get("stroke-dasharray") == "none") == (feature.attribution >= 0)
        assert line.get("stroke").startswith("rgb")
        widths[feature.attribution] = float(line.get("stroke-width").removesuffix("px"))
        shares = feature.inputs.by_token if feature.inputs else []
        strongest = sorted(enumerate(shares), key=lambda each: -abs(each[1]))[:3]
        drawn = {place: share for place, share in strongest if abs(share) >= 0.1 * abs(strongest[0][1])}
        to_it = [(start, line) for (name, start), line in lines.items() if name == feature.name]
        found = {int(start): line for start, line in to_it if start != "feature"}
        assert {place: float(line.get("data-weight")) for place, line in found.items()} == pytest.approx(drawn)
    strongest = max(widths, key=abs)
    for weight, width in widths.items():
        assert width - 0.8 == pytest.approx((widths[strongest] - 0.8) * abs(weight / strongest), abs=0.02)
    layers = {group.get("data-layer"): group for group in svg.iter(f"{space}g") if group.get("data-layer")}
    assert set(layers) == {"0", "2", "embeddings"}
    bars = []
    for layer in explanation.layers:
        groups = {group.get("data-part"): group for group in layers[str(layer.layer)] if group.get("data-part")}
        values = {name: float(group.get("data-value")) for name, group in groups.items()}
        assert values["baseline"] == pytest.approx(layer.baseline)
        assert values["remainder"] == pytest.approx(layer.remainder)
        assert sum(values.values()) == pytest.approx(explanation.target.value, abs=1e-4)
        bars += [(abs(values[name]), float(group.find(f"{space}rect").get("width"))) for name, group in groups.items()]
    longest, width_of_longest = max(bars)
    for value, width in bars:
        assert width == pytest.approx(max(0.5, width_of_longest * value / longest), rel=1e-3)


def axe(page):
    page.evaluate(AXE.read_text())
    script = "async () => (await axe.run(document)).violations.map(each => [each.id, each.impact, each.nodes[0].html])"
    return [each for each in page.evaluate(script) if each[1] in ("serious", "critical")]


@pytest.mark.browser
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_hostile_becomes_markup_and_axe_finds_nothing(open_page, name, mode):
    page = open_page(live().url(name, **PAGES[name]), live().address, color_scheme=mode)
    if name == "steer":
        page.get_by_role("button", name="Generate").click()
        wait_until_done(page)
    expect(page.get_by_text(HOSTILE[0]).first).to_be_visible(timeout=30_000)
    if name == "text":
        expect(page.get_by_role("table", name="Largest changes")).to_be_visible()
    if name == "why":
        expect(page.locator(".why-picture")).to_be_visible(timeout=30_000)
        page.locator(".why-node").first.focus()
    assert page.locator("#app img, #app script, [onerror]").count() == 0
    assert not set("\u202e\u2066\x1b\x00") & set(page.locator("#app").text_content())
    assert axe(page) == []


@pytest.mark.browser
def test_refusals_are_shown_and_old_requests_given_up(open_page):
    page = open_page(live().url("text", text="w3|" * 200), live().address)
    expect(page.get_by_role("alert")).to_contain_text("100")
    gone, held = [], []
    page.on("requestfailed", lambda request: gone.append(json.loads(request.post_data)["text"]))
    page.route("**/api/read", lambda route: route.continue_() if held else held.append(route))
    page.get_by_label("Text", exact=True).fill("w3|w4")
    expect(page.get_by_text("Reading")).to_be_visible()
    page.wait_for_timeout(600)
    assert len(held) == 1
    page.get_by_label("Text", exact=True).fill("w5|w6|w7")
    expect(page.get_by_text("3 tokens")).to_be_visible()
    assert gone == ["w3|w4"]
    expect(page.get_by_role("alert")).to_have_count(0)
    page = open_page(live().url("why", text="w3|w4", token="w5|w6"), live().address)
    expect(page.get_by_role("alert")).to_contain_text("w5|w6")
    page = open_page(live().url("steer", prompt="w3", set=["L9/1=ablate", "L0/2=melt:3"]), live().address)
    expect(page.get_by_text("L9/1 is not a feature of this model").first).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    # the browser's console tells of every refusal
    told = [each for each in open_page.problems if "status of 422" not in each and "ERR_ABORTED" not in each]
    open_page.problems[:] = told


@pytest.mark.browser
def test_a_folder_says_what_the_pages_need(open_page, site):
    for name in PAGES:
        page = open_page(f"{site}#/{name}")
        expect(page.get_by_role("status")).to_contain_text("mfn explore MODEL")
        assert page.get_by_role("textbox").count() == 0
