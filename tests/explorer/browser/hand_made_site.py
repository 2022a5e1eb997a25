"""A static explorer with made-up features, written with the standard library alone.

`python tests/explorer/browser/hand_made_site.py OUT [FEATURES]` makes one to look at.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[3] / "modeling_mfn" / "explorer" / "assets"
CHUNK, PART = 32, 20_000
WORDS = [
    "the",
    "king",
    "river",
    "said",
    "blue",
    "seven",
    "court",
    "Paris",
    "not",
    "\n",
    "def",
    "return",
    "1999",
    ".",
    "queen",
]
LABELS = ["names of rulers", "colours", "numbers of years", "verbs of speech", "definitions in code", None, None, None]
SOURCES = ["stories", "code"]
HOSTILE = [
    "<script>document.title = 'attacked'</script>",
    "<img src=x onerror=\"document.title = 'attacked'\">",
    "\"'><svg onload=alert(1)>",
    "</script><script>alert(2)</script>",
    "javascript:alert(3)",
    "${alert(4)} {{constructor.constructor('alert(5)')()}} `${1}`",
    "<a href='javascript:alert(6)'>x</a><style>*{display:none}</style>",
    "\u202eright to left\u2066 \x00\x1b[2J \u200b hidden",
    "&lt;b&gt; &amp; %3Cb%3E \\u003cb",
    "z\u0335\u0321" + "\u0335" * 500,
    "__proto__",
    "wide" * 500,
]


def token(rng: random.Random) -> str:
    return " " + rng.choice(WORDS)


def example(rng: random.Random, kind: str, stratum: int | None, rank: int, top: float) -> dict[str, Any]:
    tokens = [token(rng) for _ in range(32)]
    place = rng.randrange(8, 28)
    activations = [round(top * rng.random() * 0.6, 4) if rng.random() < 0.12 else 0 for _ in tokens]
    activations[place] = top
    where = {"window": rng.randrange(900), "position": place + 40, "source": rng.choice(SOURCES), "offset": place}
    return {
        "kind": kind,
        "stratum": stratum,
        "rank": rank,
        "activation": top,
        **where,
        "tokens": tokens,
        "activations": activations,
    }


def feature(layer: int, index: int, features: int, texts: list[str], page: bool) -> dict[str, Any]:
    """One feature; `texts` replace its label and tokens if there are any."""
    rng = random.Random(layer * 1_000_003 + index)
    dead = rng.random() < 0.05
    shown = page and not dead
    rate = 0.0 if dead else math.exp(rng.uniform(math.log(1e-5), math.log(0.1)))
    top = 0.0 if dead else rng.uniform(2, 12)
    label = rng.choice(LABELS)
    labels = [{"label": label, "source": "automatic", "score": round(rng.random(), 3), "method": "concept"}]
    labels[0]["auroc"] = round(rng.uniform(0.5, 1), 3)
    examples = [example(rng, "top", None, rank, top * 0.97**rank) for rank in range(10)] if shown else []
    for octave in (2.0, 1.0, 0.5) if shown else ():
        examples += [example(rng, "stratum", octave, rank, 1.7 * octave) for rank in range(3)]
    others = rng.sample(range(features), min(6, features)) if shown else []
    record = {
        "feature": f"L{layer}/{index}",
        "layer": layer,
        "index": index,
        "status": "dead" if dead else "active",
        "firing_count": round(rate * 2_000_000),
        "firing_rate": rate,
        "source_counts": [round(rate * 1_500_000), round(rate * 500_000)],
        "mean_activation": None if dead else top / 3,
        "max_activation": None if dead else top,
        "histogram": [] if dead else [[50 + n, round(1e4 * math.exp(-((n - 9) ** 2) / 30))] for n in range(20)],
        "promoted": [[token(rng), round(1.5 - n / 10, 3)] for n in range(10)],
        "suppressed": [[token(rng), round(-1.2 + n / 12, 3)] for n in range(10)],
        "nearest": [[each, round(0.7 - n / 10, 3)] for n, each in enumerate(others)],
        "co_active": [[each, round(0.3 - n / 30, 3), 900 - 90 * n] for n, each in enumerate(others)],
        "labels": labels if label else [],
        "examples": examples,
    }
    if texts:
        hostile(record, texts[index % len(texts)])
    return record


def hostile(record: dict[str, Any], text: str) -> None:
    """Puts a text everywhere where a text of a model, of a corpus or of a person is shown."""
    record["labels"] = [{"feature": record["feature"], "label": text, "source": text, "score": 0.5, "auroc": 0.9}]
    record["promoted"] = [[text, 1.0], *record["promoted"]]
    record["suppressed"] = [[text, -1.0], *record["suppressed"]]
    for each in record["examples"]:
        each["source"] = text
        each["tokens"][each["offset"]] = text


def row(record: dict[str, Any]) -> dict[str, Any]:
    best = record["labels"][0] if record["labels"] else {}
    fires_on = list(dict.fromkeys(each["tokens"][each["offset"]] for each in record["examples"]))[:3]
    return {
        "layer": record["layer"],
        "index": record["index"],
        "status": record["status"],
        "rate": record["firing_rate"],
        "mean": record["mean_activation"],
        "max": record["max_activation"],
        "label": best.get("label"),
        "label_source": best.get("source"),
        "score": best.get("score"),
        "auroc": best.get("auroc"),
        "fires_on": fires_on,
        "promotes": [each for each, _ in record["promoted"][:3]],
    }


def write(out: Path, name: str, value: Any) -> None:
    packed = base64.b64encode(gzip.compress(json.dumps(value).encode(), 6)).decode()
    file = out / "data" / f"{name}.js"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'MFN.receive("{name}","{packed}");\n', encoding="utf-8")


def verdict(name: str, outcome: str) -> dict[str, Any]:
    figures = {"MFN": {"rate CV": {"value": 1.3, "low": 1.2, "high": 1.4}}, "post-hoc SAE": {"rate CV": {"value": 1.9}}}
    texts = {"claim": "Rates converge.", "criterion": "A CV below the SAE's.", "reason": "1.3 is below 1.9."}
    return {"prediction": name, "outcome": outcome, "headline": "rate CV", "figures": figures, **texts}


def model_page(name: str) -> dict[str, Any]:
    curves = {
        "loss": [[step, 4 * math.exp(-step / 300) + 3] for step in range(0, 1001, 20)],
        "alpha": [[step, min(1.0, step / 800)] for step in range(0, 1001, 20)],
    }
    perplexity = {"data": "stories", "tokens": 4096, "base": 40.62, "alpha_0": 40.62, "alpha_1": 54.21}
    verdicts = [verdict("P1", "confirmed"), verdict("P2", "not confirmed")]
    presets = {"royal": {"positions": "all", "interventions": {"L6/3": {"kind": "clamp", "value": 4.0}}}}
    facts = [["name", name], ["base", "made-up/base"], ["MFN layers", "6, 12"], ["k", 32], ["alpha", 1.0]]
    training = {"max_steps": 1000, "arguments": {"learning_rate": 1e-3}, "curves": curves}
    pages = {"facts": facts, "config": {"k": 32}, "training": training, "fidelity": [perplexity], "verdicts": verdicts}
    return {**pages, "presets": presets, "card": None}


def write_hand_made_site(
    out: Path,
    features: int = 200,
    layers: tuple[int, ...] = (6, 12),
    texts: list[str] | None = None,
    name: str = "made-up",
    pages: bool = True,
) -> Path:
    """Copies the assets to `out`, and writes data of `features` features per layer. Returns the page's file.

    `texts` stand in the place of labels, tokens and sources. Without `pages`, only the list has data.
    """
    shutil.copytree(ASSETS, out, dirs_exist_ok=True)
    rows = []
    for layer in layers:
        records = [feature(layer, index, features, texts or [], pages) for index in range(features)]
        rows += [row(each) for each in records]
        for start in range(0, features if pages else 0, CHUNK):
            write(out, f"features/L{layer}/{start // CHUNK}", records[start : start + CHUNK])
    parts = [rows[start : start + PART] for start in range(0, len(rows), PART)]
    for number, part in enumerate(parts):
        write(out, f"index/{number}", {column: [each[column] for each in part] for column in part[0]})
    write(out, "model", model_page(name))
    of_layer = {
        "features": features,
        "dead_share": 0.05,
        "active_features": 0,
        "firing_rate_mean": 0.01,
        "max_activation": 12,
    }
    data = {"tokens": 2_000_000, "windows": 1000, "window": 2000}
    site = {
        "schema": 1,
        "version": "0",
        "name": name,
        "base": "made-up/base",
        "live": False,
        "layers": [{"layer": layer, **of_layer} for layer in layers],
        "k": 32,
        "alpha": 1.0,
        "codes": "update",
        "data": {**data, "sources": [{"name": each, "tokens": 1_000_000} for each in (texts or SOURCES)[:2]]},
        "histogram_edges": [2 ** ((edge - 80) / 8) for edge in range(113)],
        "chunk": CHUNK,
        "index_parts": len(parts),
        "features": len(rows),
        "labelled": sum(each["label"] is not None for each in rows),
        "features_digest": "0" * 64,
    }
    text = json.dumps(site).replace("<", "\\u003c")
    (out / "data" / "site.js").write_text(f'MFN.receive("site", {text});\n', encoding="utf-8")
    return out / "index.html"


if __name__ == "__main__":
    print(write_hand_made_site(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200))
