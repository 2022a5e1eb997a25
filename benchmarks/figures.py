"""Figures of the documents, drawn as SVG from the files under benchmarks/results.

python -m benchmarks.figures    # writes docs/images/{fidelity,verdicts,sensitivity,all-blocks}.svg
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from benchmarks.common import records
from benchmarks.small import sensitivity
from benchmarks.small.tables import CLAIMS, DOMAINS, FAMILIES, Verdict, fidelity_runs, percent_above, verdicts
from benchmarks.smollm2.tables import CURVES
from modeling_mfn.evaluation.intervals import Estimate

IMAGES = records.REPOSITORY / "docs" / "images"
INK, MUTED, LINE, CARD = "#1f2328", "#57606a", "#d0d7de", "#ffffff"
SCHEMES = {
    "ink": (INK, "#e6edf3"),
    "muted": (MUTED, "#a5adb6"),
    "line": (LINE, "#30363d"),
    "card": (CARD, "#161b22"),
}
"""Variable -> colour in a light and in a dark scheme. Other colours are the same in both."""
HUES = ("#2f7ed8", "#c2571a", "#2e9e6b", "#9457c9", "#b8860b", "#c23b72")
FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "modeling_mfn",  # the same ids in every run
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that the layout is the same on every machine
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
LEAN = (
    (r' id="(?!p|m)[\w.]+"', ""),
    (r"font-family: 'DejaVu Sans'; ", ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r" ?\n *", " "),
    (r"(\.\d\d)\d+", r"\1"),
)
"""Patterns in matplotlib's tags: needless ids, fonts, rotations by 0, line breaks and digits."""
RUN_NAMES = {
    "stream": "codes the stream",
    "update": "codes the update",
    "pursuit-4": "update, four rounds",
    "pursuit-8": "update, eight rounds",
    "pursuit-4-from-dense": "four rounds, from the dense model",
    "pursuit-8-from-dense": "eight rounds, from the dense model",
}
"""Run -> its name in the figure, in the order of the figure."""
AIM = 2
"""Percent above dense that the project aims at."""
HEADLINES = {
    "firing rate CV": "coefficient of variation of firing rates; lower is better",
    "purity gain over h": "gain of purity over coordinates of h; higher is better",
    "matched correlation": "correlation of matched features; higher is better",
    "correlation of logits": "correlation with predicted logits; higher is better",
    "perplexity_loss_targets": "perplexity loss there, 1 is +100 %; lower is better",
}
"""Figure that decides a prediction -> its text."""


def fidelity() -> Figure:
    """Perplexity above dense by model, run and domain."""
    bars: list[tuple[str, str, list[float]]] = []
    for family, title in FAMILIES.items():
        runs = fidelity_runs(family, "coding")
        dense = runs.pop("dense")
        bars += [(title, RUN_NAMES[name], percent_above(runs[name], dense)) for name in RUN_NAMES if name in runs]
    figure = pixels(860, 470)
    axes = figure.add_axes((0.37, 0.13, 0.59, 0.77))
    place, ticks, told = 0.0, [], ""
    for family, run, values in bars:
        if family != told:
            place += 0.75
            axes.text(-0.58, place - 0.72, family, transform=beside_rows(axes), weight="bold", va="center", size=13)
            told = family
        for number, (value, hue) in enumerate(zip(values, HUES, strict=False)):
            at = place + 0.26 * (number - 1)
            axes.barh(at, value, height=0.22, color=hue, clip_on=False)
            axes.text(value + 0.3, at, f"{value:.1f}", size=10.5, va="center", color=MUTED)
        ticks.append((place, run))
        place += 1
    axes.set_yticks(*zip(*ticks, strict=True), size=11.5)
    axes.set_ylim(place - 0.4, -0.2)
    axes.axvline(AIM, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), clip_on=False)
    axes.text(AIM + 0.2, -0.12, f"aim: {AIM} %", size=10.5, color=MUTED, va="bottom")
    axes.set_xlabel("perplexity above the dense model, %")
    axes.grid(axis="x", clip_on=False)
    axes.set_axisbelow(True)
    marks = [Line2D([], [], color=hue, linewidth=7, label=name) for name, hue in zip(DOMAINS, HUES, strict=False)]
    figure.legend(handles=marks, loc="upper right", ncols=3, bbox_to_anchor=(0.97, 1.0), handlelength=0.8)
    return figure


def verdict_figure() -> Figure:
    """Deciding figure of each prediction next to its baseline, in both families."""
    found = verdicts()
    figure = pixels(1000, 580)
    strips = list(dict.fromkeys(verdict.result.prediction for verdict in found))
    for number, prediction in enumerate(strips):
        axes = figure.add_axes((0.395, 0.815 - 0.172 * number, 0.235, 0.1))
        draw_strip(axes, [verdict for verdict in found if verdict.result.prediction == prediction])
    for at, text in {0.395: "with 95 % intervals", 0.655: "MFN", 0.775: "baseline", 0.895: "outcome"}.items():
        figure.text(at, 0.955, text, size=11, color=MUTED)
    marks = [
        Line2D([], [], color=hue, marker="o", linewidth=2, markerfacecolor=face, label=f"{family}, {kind}")
        for family, hue in zip(FAMILIES.values(), HUES, strict=False)
        for kind, face in (("MFN", hue), ("baseline", CARD))
    ]
    figure.legend(handles=marks, loc="lower center", ncols=4, bbox_to_anchor=(0.5, 0.0), fontsize=11)
    return figure


def draw_strip(axes: Axes, both: list[Verdict]) -> None:
    """Draws one prediction: a row per family, the claim on the left, values and outcome on the right."""
    result = both[0].result
    beside, claim = beside_rows(axes), f"{result.prediction}  {CLAIMS[result.prediction]}"
    axes.text(-1.59, -0.22, claim, transform=beside, weight="bold", va="center", size=12)
    for at, text in ((0.38, HEADLINES[result.headline]), (0.92, f"baseline: {result.baseline}")):
        axes.text(-1.59, at, text, transform=beside, va="center", size=11, color=MUTED)
    for row, (verdict, hue) in enumerate(zip(both, HUES, strict=False)):
        figures = verdict.result.figures
        own, other = (figures[subject][result.headline] for subject in ("MFN", result.baseline))
        draw_estimate(axes, own, row - 0.15, hue, hue)
        draw_estimate(axes, other, row + 0.15, hue, CARD)
        for at, text in ((1.105, f"{own.value:.3g}"), (1.615, f"{other.value:.3g}"), (2.125, verdict.result.outcome)):
            axes.text(at, row, text, transform=beside, va="center", size=11)
    axes.set_yticks(range(len(both)), [verdict.family for verdict in both], size=11)
    axes.set_ylim(len(both) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=10)
    axes.grid(axis="x", clip_on=False)


def draw_estimate(axes: Axes, estimate: Estimate, at: float, hue: str, face: str) -> None:
    """Draws a value with its interval as a horizontal line."""
    axes.plot([estimate.low, estimate.high], [at, at], color=hue, linewidth=2, clip_on=False)
    axes.plot([estimate.value], [at], "o", color=hue, markerfacecolor=face, markersize=7, clip_on=False)


def sensitivity_figure() -> Figure:
    """Differences of each run from the study's own models, in three columns.

    Lines reach from the smallest to the largest difference over seeds. A hollow point marks a run whose alpha ends
    below 1, so that there is no bottleneck.
    """
    found = records.result("sensitivity/summary")
    rows = [(name, hue) for runs, hue in zip(sensitivity.RUNS.values(), HUES, strict=True) for name in runs]
    figure = pixels(1000, 570)
    titles = {
        sensitivity.PERPLEXITY: "perplexity, difference in %",
        "purity": "purity of one feature, difference",
        sensitivity.ALIGNMENT: "matched correlation, difference",
    }
    for column, (key, title) in enumerate(titles.items()):
        axes = figure.add_axes((0.165 + 0.278 * column, 0.06, 0.255, 0.83))
        ends = [end for place in range(len(rows)) for end in (place, place, math.nan)]
        axes.plot([0, 1, math.nan] * len(rows), ends, color=LINE, linewidth=0.8, transform=beside_rows(axes))
        for place, (name, hue) in enumerate(rows):
            if key in found[name]:
                face = CARD if found[name]["alpha"] < 1 else hue
                draw_estimate(axes, Estimate(**found[name][key]), place, hue, face)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows] if column == 0 else [""] * len(rows), size=11)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.axvline(0, color=MUTED, linewidth=1, zorder=0, clip_on=False)
        axes.set_title(title, size=12)
        axes.tick_params(axis="x", labelsize=10)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", clip_on=False)
        axes.set_axisbelow(True)
    marks = [
        Line2D([], [], color=hue, marker="o", linewidth=2, label=varied)
        for varied, hue in zip(sensitivity.RUNS, HUES, strict=True)
    ]
    figure.legend(handles=marks, loc="upper center", ncols=6, fontsize=11, columnspacing=1.4)
    return figure


def all_blocks_figure() -> Figure:
    """Loss of SmolLM2-135M on validation text by tokens of training, dense and through features in all blocks."""
    figure = pixels(860, 360)
    axes = figure.add_axes((0.08, 0.16, 0.72, 0.76))
    for (stage, title), hue in zip(CURVES.items(), HUES, strict=False):
        curve = records.result(f"all_blocks/{stage}")["curve"]
        tokens, losses = ([at[name] for at in curve] for name in ("tokens", "loss"))
        axes.plot([count / 1000 for count in tokens], losses, color=hue, marker="o", markersize=4)
        axes.text(tokens[-1] / 1000 + 6, losses[-1], f"{title}: {losses[-1]:.2f}", color=hue, va="center", size=11.5)
    axes.set_xlabel("thousand tokens of training inside the model")
    axes.set_ylabel("nats per token")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return figure


def pixels(width: int, height: int) -> Figure:
    """Empty figure of a size in pixels."""
    return Figure(figsize=(width / 72, height / 72))


def beside_rows(axes: Axes) -> Any:
    """Coordinates with x in widths of the axes and y in data."""
    return blended_transform_factory(axes.transAxes, axes.transData)


FIGURES: dict[str, Callable[[], Figure]] = {
    "fidelity": fidelity,
    "verdicts": verdict_figure,
    "sensitivity": sensitivity_figure,
    "all-blocks": all_blocks_figure,
}
TITLES = {
    "fidelity": "Perplexity above the dense model, by model, run and domain",
    "verdicts": "Deciding figure of each prediction, next to its baseline, in both families",
    "sensitivity": "Perplexity, purity and alignment of each run, as differences from the models of the study",
    "all-blocks": "Loss on validation text by tokens of training, of the dense control and of the MFN model",
}
"""Texts for readers who cannot see a figure."""


def drawn(name: str) -> str:
    """SVG of a figure. It follows the reader's colour scheme and is the same, byte for byte, in every run."""
    out = StringIO()
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[name]()
        figure.patch.set_visible(False)
        figure.savefig(out, format="svg")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    light, dark = (" ".join(f"--{key}: {of[place]};" for key, of in SCHEMES.items()) for place in (0, 1))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f"<!-- matplotlib {matplotlib.__version__} -->\n"
        f"<title>{TITLES[name]}</title>\n"
        f"<style>\n:root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"text {{ font-family: {FONT}; }}\n</style>\n"
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" '
        'style="fill: var(--card); stroke: var(--line)"/>'
        f"{lean(out.getvalue().partition('</metadata>')[2])}"
    )


def lean(svg: str) -> str:
    """Body of matplotlib's SVG without needless parts, with variables in place of the colours of a scheme."""

    def shortened(tag: re.Match[str]) -> str:
        text = tag[0]
        for pattern, replacement in LEAN:
            text = re.sub(pattern, replacement, text)
        return text

    svg = re.sub(r"<[^>]*>", shortened, svg)
    svg = re.sub(r"\n *(<g/>)?(?=\n)|(?<=\n) +", "", svg)
    for variable, (light, _) in SCHEMES.items():
        svg = svg.replace(light, f"var(--{variable})")
    return svg


def main() -> None:
    """Draws all figures."""
    for name in FIGURES:
        (IMAGES / f"{name}.svg").write_text(drawn(name), encoding="utf-8")


if __name__ == "__main__":
    main()
