"""Tables of README.md and of the pages under docs/, from the files under benchmarks/results.

python -m benchmarks.tables    # writes each table between its <!-- table: NAME --> and <!-- end --> marks
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from benchmarks.common import records
from benchmarks.explorer import tables as explorer
from benchmarks.interop import client_tables
from benchmarks.interop import tables as interop
from benchmarks.reliability import tables as reliability
from benchmarks.small import tables as small
from benchmarks.smollm2 import tables as smollm2
from benchmarks.speed import tables as speed
from modeling_mfn.utils.display import markdown_table

MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
RUN = "update"
"""Run with k = 32 that stands for each family."""


def documents() -> list[Path]:
    """README and all pages that have marked tables."""
    pages = [records.REPOSITORY / "README.md", *sorted((records.REPOSITORY / "docs").rglob("*.md"))]
    return [page for page in pages if MARKED.search(page.read_text(encoding="utf-8"))]


def glance() -> Iterator[list[str]]:
    """Main results in a few rows: fidelity, speed and the five predictions."""
    yield ["result", "outcome", "MFN", "compared with"]
    for family, title in small.FAMILIES.items():
        runs = small.fidelity_runs(family, "coding")
        dense, run = runs["dense"], runs[RUN]
        gap = statistics.mean(small.percent_above(run, dense))
        own, other = (" / ".join(small.perplexities(record)) for record in (run, dense))
        yield [f"Perplexity, {title}, k = {run['settings']['k']}", f"{gap:.0f} % above dense", own, f"dense: {other}"]
    joint, dense = (records.result(f"all_blocks/evaluate/{of}") for of in ("joint", "dense"))
    lost, (own, other) = joint["lost_to_dense"]["mean"], (of["loss"]["mean"] for of in (joint, dense))
    title = f"Loss, SmolLM2-135M, all {len(joint['layers'])} blocks, k = {joint['settings']['k']}"
    yield [title, f"{lost:.2f} nats above dense", f"{own:.2f}", f"dense: {other:.2f}"]
    ratios = {name: of["both"] for name, of in records.result("layer")["ratios"].items()}
    own_time = ratios["modeling_mfn"]
    for name, title in (("sparsify", "sparsify"), ("dense", "dense equations")):
        times = f"{ratios[name] / own_time:.1f} times as fast"
        yield [f"Time of a layer, next to {title}", times, f"{own_time:.2f}", f"{title}: {ratios[name]:.2f}"]
    for prediction, of in groupby(small.verdicts(), key=lambda verdict: verdict.result.prediction):
        both = list(of)
        figures = [verdict.result.figures for verdict in both]
        subject, headline = both[0].result.baseline, both[0].result.headline
        own, other = (" / ".join(f"{each[name][headline].value:.3g}" for each in figures) for name in ("MFN", subject))
        outcomes = ", ".join(f"{verdict.family}: {verdict.result.outcome}" for verdict in both)
        figure = headline.replace("_", " ")
        yield [f"{prediction}: {small.CLAIMS[prediction].lower()}", outcomes, f"{figure}: {own}", f"{subject}: {other}"]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "glance": glance,
    **small.TABLES,
    **smollm2.TABLES,
    **speed.TABLES,
    **reliability.TABLES,
    **interop.TABLES,
    **client_tables.TABLES,
    **explorer.TABLES,
}


def rewritten(document: str) -> str:
    """Text of a document with all marked tables made again."""

    def table(found: re.Match[str]) -> str:
        header, *rows = TABLES[found["name"]]()
        return f"{found[1]}\n{markdown_table(header, rows)}\n\n{found[3]}"

    return MARKED.sub(table, document)


def main() -> None:
    """Writes the tables into all documents that have marks."""
    for page in documents():
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
