"""Picture of a sentence: its content, and hostile text that could break it."""

from xml.etree import ElementTree

from atlas_data import HOSTILE

from benchmarks.smollm2.sentence import drawing
from modeling_mfn.features.reading import ActiveFeature, ReadToken, TextReading

SVG = "{http://www.w3.org/2000/svg}"


def read_token(position, token, *labelled):
    """Makes a token with features of the given labels and activations. Activations are shares of the largest one."""
    features = [
        ActiveFeature(f"L1/{index}", label, 2.0, share, 0.0, None, None)
        for index, (label, share) in enumerate(labelled)
    ]
    return ReadToken(position, position, token, " next", features)


def drawn(*tokens, **how):
    return ElementTree.fromstring(drawing(TextReading(tokens), {"L1/0": [" Is", " is", "\n"]}, **how))


def test_each_token_has_its_strongest_names_and_how_many_it_has():
    names = [("titles", 0.9), (None, 0.8), ("titles", 0.5), ("fires on: ' king'", 0.25), ("time", 0.1)]
    picture = drawn(read_token(0, " king", *names), read_token(1, " is", (None, 1.0)), per_token=2)
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert texts[:6] == ["king", "4 of 5 have a name", "titles", "L1/0 · 90%", "king", "L1/3 · 25%"]
    assert texts[6:] == ["is", "0 of 1 have a name", "is · ⏎", "L1/0 · 100%"]  # tokens stand in for the missing label
    card, *boxes = picture.iter(f"{SVG}rect")
    widths = [float(box.get("width")) for box in boxes]
    assert [bar / box for box, bar in zip(widths[::2], widths[1::2], strict=True)] == [0.9, 0.25, 1.0]
    assert all(float(box.get("x")) + float(box.get("width")) < float(card.get("width")) for box in boxes)


def test_text_of_others_stays_text():
    picture = drawn(*(read_token(at, text, (text, 0.5)) for at, text in enumerate(HOSTILE)))
    assert {node.tag.removeprefix(SVG) for node in picture.iter()} == {"svg", "title", "style", "rect", "text"}
    assert all((node.text or "").isprintable() for node in picture.iter(f"{SVG}text"))
