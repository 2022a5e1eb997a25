"""An invented atlas of any size, next to the config, records and results of an invented model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import GPT2Config

from benchmarks.common import records
from benchmarks.explorer.invented_text import label_text, vocabulary
from modeling_mfn import MFNConfig
from modeling_mfn.features.atlas.labels import Label, Labels
from modeling_mfn.features.atlas.schema import (
    EXAMPLES,
    EXAMPLES_FILE,
    FEATURES,
    FEATURES_FILE,
    FOLDER,
    HISTOGRAM_EDGES,
    LABELS_FILE,
    METADATA_FILE,
    NUM_BINS,
    SCHEMA_VERSION,
    bin_of,
)
from modeling_mfn.features.atlas.storage import write_labels
from modeling_mfn.model.version import __version__

LAYERS = [2, 5, 8, 11]
"""Layers over which the features are spread evenly."""
TOKENS, WINDOWS, WINDOW = 1_000_000, 7812, 128
SOURCES = ["somebody/news", "drama.txt", "code"]
TOP, STRATA, CONTEXT, BEFORE = 16, 14, 32, 24
"""Examples of a feature, and tokens of each, as the harvest keeps them by default."""
DEAD, PRUNED, LABELLED = 0.03, 0.01, 0.4
"""Shares of features."""
FEATURES_AT_ONCE = 1024


def write_model(folder: Path, features: int, seed: int = 0) -> None:
    """Writes the folder of a model, without weights, and its atlas.

    Args:
        folder: Folder to make.
        features: Number of features, a multiple of the number of layers.
        seed: Seed of everything.
    """
    if features % len(LAYERS):
        raise ValueError(f"features is {features}; it must be a multiple of {len(LAYERS)}, the number of layers")
    (folder / FOLDER).mkdir(parents=True)
    generator = np.random.default_rng(seed)
    per_layer = features // len(LAYERS)
    base = GPT2Config(n_embd=64, n_head=2, n_layer=12, vocab_size=5000, bos_token_id=0, eos_token_id=0)
    config = MFNConfig(text_config=base, layers=LAYERS, num_features=per_layer, k=32, alpha=1.0, codes="update")
    config.text_config._name_or_path = "somebody/invented-base"
    config.features_digest = config.weights_digest = "0123456789abcdef"
    config.steering_presets = _presets()
    config.save_pretrained(folder)
    Invented(folder / FOLDER, per_layer, generator).write()
    _write_records(folder, generator)


class Invented:
    """An atlas that is written piece by piece, so that its size is limited by the disk alone."""

    def __init__(self, folder: Path, per_layer: int, generator: np.random.Generator) -> None:
        self.folder, self.per_layer, self.generator = folder, per_layer, generator
        self.tokens = pa.array(vocabulary(5000, generator))
        self.figures: dict[str, Any] = {}

    def write(self) -> None:
        """Writes all files of the atlas."""
        labels = Labels()
        with (
            pq.ParquetWriter(self.folder / FEATURES_FILE, FEATURES, compression="zstd") as features,
            pq.ParquetWriter(self.folder / EXAMPLES_FILE, EXAMPLES, compression="zstd") as examples,
        ):
            for layer in LAYERS:
                counts = self._counts()
                for start in range(0, self.per_layer, FEATURES_AT_ONCE):
                    index = np.arange(start, min(start + FEATURES_AT_ONCE, self.per_layer))
                    scales = np.where(counts[index] > 0, self.generator.lognormal(0.5, 0.7, len(index)), 0.0)
                    features.write_table(self._features(layer, index, counts[index], scales))
                    examples.write_table(self._examples(layer, index[scales > 0], scales[scales > 0]))
                    self._label(labels, layer, index)
                self._figure(layer, counts)
        write_labels(self.folder / LABELS_FILE, labels, "0123456789abcdef")
        (self.folder / METADATA_FILE).write_text(json.dumps(self._metadata(), indent=2), encoding="utf-8")

    def _counts(self) -> np.ndarray:
        rates = np.minimum(self.generator.lognormal(-6, 1.5, self.per_layer), 0.9)
        rates[self.generator.random(self.per_layer) < DEAD] = 0
        return (rates * TOKENS).astype(np.int64)

    def _features(self, layer: int, index: np.ndarray, counts: np.ndarray, scales: np.ndarray) -> pa.Table:
        draw, rows = self.generator, len(index)
        status = np.where(counts > 0, "alive", np.where(draw.random(rows) < PRUNED / DEAD, "pruned", "dead"))
        shares = draw.dirichlet([5, 3, 1], rows)
        by_source = (shares * counts[:, None]).astype(np.int64)
        by_source[:, 0] += counts - by_source.sum(1)
        histogram = np.zeros((rows, NUM_BINS), np.int64)
        for _ in range(24):  # each feature's activations lie around its scale
            bins = bin_of(scales * draw.lognormal(-0.4, 0.6, rows))
            np.add.at(histogram, (np.arange(rows), bins), counts // 24)
        silent = counts == 0
        columns = {
            "layer": np.full(rows, layer),
            "index": index,
            "name": [f"L{layer}/{each}" for each in index.tolist()],
            "status": status.tolist(),
            "firing_count": counts,
            "source_counts": by_source.tolist(),
            "firing_rate": counts / TOKENS,
            "mean_activation": pa.array(scales * 0.8, mask=silent),
            "max_activation": pa.array(scales * 4, mask=silent),
            "histogram": histogram.tolist(),
            "promoted": self._effects(rows, 1),
            "suppressed": self._effects(rows, -1),
            "nearest": self._neighbours(rows, "cosine"),
            "co_active": self._neighbours(rows, "jaccard", count=True),
        }
        return pa.table({name: pa.array(column) for name, column in columns.items()}).cast(FEATURES)

    def _effects(self, rows: int, sign: int) -> list[Any]:
        ids = self.generator.integers(0, len(self.tokens), (rows, 10))
        effects = sign * np.sort(self.generator.random((rows, 10)))[:, ::-1]
        texts = self.tokens.to_pylist()
        return [
            [{"token_id": token, "token": texts[token], "effect": effect} for token, effect in zip(*row, strict=True)]
            for row in zip(ids.tolist(), effects.tolist(), strict=True)
        ]

    def _neighbours(self, rows: int, name: str, count: bool = False) -> list[Any]:
        index = self.generator.integers(0, self.per_layer, (rows, 8)).tolist()
        values = np.sort(self.generator.random((rows, 8)))[:, ::-1].tolist()
        more = {"count": 12} if count else {}
        return [
            [{"index": each, name: value} | more for each, value in zip(*row, strict=True)]
            for row in zip(index, values, strict=True)
        ]

    def _examples(self, layer: int, index: np.ndarray, scales: np.ndarray) -> pa.Table:
        draw, each = self.generator, TOP + STRATA
        rows = len(index) * each
        # words of a text are Zipfian; a feature fires on one of two tokens, and weakly on a few others
        ids = np.minimum(draw.zipf(1.3, (rows, CONTEXT)) - 1, len(self.tokens) - 1).astype(np.int32)
        favourites = draw.integers(0, len(self.tokens), (len(index), 2)).repeat(each, 0)
        ids[:, BEFORE] = favourites[np.arange(rows), draw.integers(0, 2, rows)]
        rank = np.tile([*range(TOP), *range(STRATA)], len(index))
        top = np.tile(np.arange(each) < TOP, len(index))
        strongest = scales.repeat(each) * np.where(top, 4 - rank * 0.1, np.exp2(-(rank // 4)))
        activations = np.where(draw.random((rows, CONTEXT)) < 0.1, strongest[:, None] * draw.random((rows, CONTEXT)), 0)
        activations[:, BEFORE] = strongest
        offsets = pa.array(np.arange(0, rows * CONTEXT + 1, CONTEXT, np.int32))
        flat = pa.array(ids.reshape(-1))
        columns = {
            "layer": pa.array(np.full(rows, layer)),
            "index": pa.array(index.repeat(each)),
            "kind": pa.array(np.where(top, "top", "stratum").tolist()),
            "stratum": pa.array(np.exp2(np.floor(np.log2(strongest))), mask=top),
            "rank": pa.array(rank),
            "activation": pa.array(strongest),
            "window": pa.array(draw.integers(0, WINDOWS, rows)),
            "position": pa.array(draw.integers(BEFORE, WINDOW, rows)),
            "source": pa.array(SOURCES).take(pa.array(draw.integers(0, len(SOURCES), rows))),
            "offset": pa.array(np.full(rows, BEFORE)),
            "token_ids": pa.ListArray.from_arrays(offsets, flat),
            "tokens": pa.ListArray.from_arrays(offsets, pa.DictionaryArray.from_arrays(flat, self.tokens)),
            "activations": pa.ListArray.from_arrays(offsets, pa.array(activations.reshape(-1).astype(np.float32))),
        }
        return pa.table(columns).cast(EXAMPLES)

    def _label(self, labels: Labels, layer: int, index: np.ndarray) -> None:
        draw = self.generator
        for each in index[draw.random(len(index)) < LABELLED].tolist():
            sources = draw.choice(
                ["automatic", "llm:somebody/describer", "human", "imported"], 2, p=[0.6, 0.3, 0.06, 0.04]
            )
            for source in set(sources.tolist()):
                details: dict[str, Any] = {}
                if source == "automatic":
                    area = round(float(draw.uniform(0.9, 1)), 4)
                    details = {"method": "concept", "auroc": area, "precision": 0.7, "recall": 0.4, "occurrences": 120}
                score = None if source == "human" else details.get("auroc", round(float(draw.random()), 3))
                labels.add(Label(f"L{layer}/{each}", label_text(draw), source, score, details))

    def _figure(self, layer: int, counts: np.ndarray) -> None:
        rates = counts / TOKENS
        self.figures[str(layer)] = {
            "features": self.per_layer,
            "dead_share": float((counts == 0).mean()),
            "firing_rate_mean": float(rates.mean()),
            "firing_rate_std": float(rates.std()),
            "active_features": float(rates.sum()),
            "max_activation": 40.0,
            "logit_scale": 3.0,
        }

    def _metadata(self) -> dict[str, Any]:
        model = {"name_or_path": "invented", "layers": LAYERS, "num_features": self.per_layer, "k": 32, "alpha": 1.0}
        sources = [{"name": name, "tokens": TOKENS // len(SOURCES)} for name in SOURCES]
        return {
            "schema_version": SCHEMA_VERSION,
            "mfn_version": __version__,
            "model": model | {"features_digest": "0123456789abcdef"},
            "data": {
                "sources": sources,
                "tokens": TOKENS,
                "windows": WINDOWS,
                "window": WINDOW,
                "skip_first": 1,
                "skip_tokens": [],
            },
            "histogram_edges": [float(edge) for edge in HISTOGRAM_EDGES],
            "layers": self.figures,
        }


def _presets() -> dict[str, Any]:
    calm = {"L2/1": {"kind": "clamp", "value": 4.0}, "L5/7": {"kind": "ablate"}}
    late = {"L8/3": {"kind": "add", "value": 2.0, "when": "L2/1", "above": 0.5}}
    return {
        "calm": {"positions": "all", "interventions": calm},
        "late <b>": {"positions": "generated", "interventions": late},
    }


def _write_records(folder: Path, generator: np.random.Generator) -> None:
    """Writes a training's record and curves, perplexities, and the results of an evaluation."""
    steps = np.arange(10, 2001, 10)
    history = [
        {
            "step": int(step),
            "epoch": step / 2000,
            "loss": 3 + 4 * np.exp(-step / 300) + generator.normal(0, 0.05),
            "reconstruction_loss": np.exp(-step / 500),
            "alpha": min(1.0, step / 1000),
            "learning_rate": 1e-3 * (1 - step / 2000),
            "dead_share": 0.3 * np.exp(-step / 400),
        }
        for step in steps
    ]
    record = {
        "versions": {"modeling_mfn": __version__, "transformers": "5.23.0", "torch": "2.13.0"},
        "arguments": {"learning_rate": 0.001, "lambda_recon": 1.0, "alpha_shape": "linear", "seed": 0},
        "steps": 2000,
        "planned_steps": 2000,
        "tokens": 16_384_000,
        "processes": 1,
        "alpha": 1.0,
        "k": 32,
        "figures": {"loss": history[-1]["loss"]},
    }
    row = {"base": 24.1, "alpha_0": 24.1, "alpha_1": 31.7, "weights": "0123456789abcdef", "k": 32}
    perplexities = [{"data": name, "tokens": 65_536} | row for name in SOURCES]
    files = {"training_record.json": record, "trainer_state.json": {"log_history": history}}
    for name, content in (files | {"evaluation.json": {"perplexity": perplexities}}).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "evaluation").mkdir()
    for file in (records.RESULTS / "predictions" / "llama").glob("P?.json"):
        shutil.copy(file, folder / "evaluation")


__all__ = ["write_model"]
