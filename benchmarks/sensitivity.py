"""What each loss and each setting does to features and to perplexity (section 9 of the paper): the models of
`fidelity.py`'s losses and sweeps, by how pure a feature is, and by how alike those of two seeds are.

    python benchmarks/sensitivity.py             # every model of fidelity.py that is there, and has no result yet
    python benchmarks/sensitivity.py --figure    # the figure, from the results

Each model's result goes to benchmarks/results/sensitivity/<name>.json, the figure to docs/sensitivity.svg.
"""

from __future__ import annotations

import json
import statistics
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import concepts
import corpora
import fidelity
import small_models
import tables
import torch
import typer
import word_lists
from datasets import Dataset, concatenate_datasets

from modeling_mfn import MFNForCausalLM
from modeling_mfn.demo_assets import cache_folder
from modeling_mfn.evaluation.alignment import cross_seed_alignment
from modeling_mfn.evaluation.probing import probe_model
from modeling_mfn.evaluation.result import MFN, mean
from modeling_mfn.evaluation.tasks import Task, word_tasks

RESULTS = Path(__file__).parent / "results" / "sensitivity"
FIGURE = Path(__file__).parent.parent / "docs" / "sensitivity.svg"
FAMILY, TOKENS = "llama", 16_384
"""Held-out tokens of each domain."""
GROUPS = ("short", "losses", "sweep")
ALIGNMENT = "alignment: matched correlation"
COLOURS = {"short": "black", "losses": "#b2182b", "sweep": "#2166ac"}


class Texts:
    """Held-out windows, the tasks of words on them, and other windows to match features on."""

    @cached_property
    def by_domain(self) -> dict[str, Dataset]:
        return {domain: small_models.data().evaluation(domain, TOKENS) for domain in corpora.DOMAINS}

    @cached_property
    def held_out(self) -> Dataset:
        return concatenate_datasets(list(self.by_domain.values()))

    @cached_property
    def choosing(self) -> Dataset:
        return small_models.data().sample(TOKENS, after=fidelity.BASE_TOKENS + 2 * fidelity.SHORT_TOKENS)

    @cached_property
    def tasks(self) -> list[Task]:
        tokenizer = corpora.tokenizer(small_models.VOCABULARY)
        groups = {
            "concepts": concepts.concepts(),
            "polarity": word_lists.polarity(),
            "part of speech": word_lists.parts_of_speech(),
        }
        domains = [domain for domain, rows in self.by_domain.items() for _ in range(len(rows))]
        return word_tasks(groups, self.held_out, tokenizer, sources=domains)


def twin(name: str) -> str:
    """The same run with another seed."""
    own = name.partition("/")[2]
    return f"noise/{own}-seed-1" if own in ("recon-util", "five") else f"twin/{own}"


def folder_of(name: str) -> Path:
    return cache_folder() / "fidelity" / FAMILY / name


def load(name: str) -> MFNForCausalLM | None:
    return MFNForCausalLM.from_pretrained(folder_of(name)) if folder_of(name).exists() else None


def measure(name: str, texts: Texts) -> dict[str, Any] | None:
    """`None` where there is no model."""
    model, other = load(name), load(twin(name))
    if model is None:
        return None
    scores = (
        probe_model(model, texts.held_out, texts.tasks, residuals=False).groupby(["probe", "task"])["held_out"].mean()
    )
    figures: dict[str, Any] = {
        probe: mean(scores[probe].to_numpy())._asdict() for probe in ("purity", "five-feature probe", "linear probe")
    }
    if other is not None:
        found = cross_seed_alignment({MFN: [model, other]}, texts.held_out, texts.choosing).figures[MFN]
        figures |= {f"alignment: {figure}": value._asdict() for figure, value in found.items()}
    return figures


def is_known(name: str, file: Path) -> bool:
    """Whether all has been measured that can be."""
    return file.exists() and (
        ALIGNMENT in json.loads(file.read_text(encoding="utf-8")) or not folder_of(twin(name)).exists()
    )


def gap(name: str) -> float:
    """Mean over domains of perplexity above dense training, in per cent."""
    group, _, run = name.partition("/")
    return statistics.mean(tables.over(tables.read(FAMILY, group)[run], tables.read(FAMILY, "short")["dense"]))


def draw() -> None:
    """Purity, and alignment, against what a run costs in perplexity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = {
        "purity": "purity: AUROC of one feature",
        ALIGNMENT: "matched correlation of two seeds",
    }
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for file in sorted(RESULTS.glob("*/*.json")):
            found, name = json.loads(file.read_text(encoding="utf-8")).get(key), f"{file.parent.name}/{file.stem}"
            if found is None:
                continue
            x, colour = gap(name), COLOURS[file.parent.name]
            axes.errorbar(
                x, found["value"], [[found["value"] - found["low"]], [found["high"] - found["value"]]],
                fmt="o", color=colour, elinewidth=0.5, markersize=4,
            )  # fmt: skip
            axes.annotate(file.stem, (x, found["value"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel("perplexity above dense training, %")
        axes.set_ylabel(title)
        axes.set_xscale("log")
    figure.savefig(FIGURE, metadata={"Date": None})


def main(
    only_figure: Annotated[bool, typer.Option("--figure", help="Draw the results that are there.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of this process.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    texts = Texts()
    runs = [name.partition("/")[2] for name in fidelity.runs() if name.startswith(f"{FAMILY}/")]
    for name in (name for name in runs if name.partition("/")[0] in GROUPS and not only_figure):
        file = RESULTS / f"{name}.json"
        figures = None if name == "short/dense" or is_known(name, file) else measure(name, texts)
        if figures is not None:
            print(name, flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    draw()


if __name__ == "__main__":
    typer.run(main)
