"""Tables of MFN models in the tools of others, from the files under benchmarks/results/interop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.common import records

TITLES = {"llama": "Llama", "gpt2": "GPT-2, four rounds"}


def quantisation() -> Iterator[list[str]]:
    """Packed weights, codes, logits and perplexity by way of quantisation."""
    yield ["model", "weights", "projections packed", "encoders packed", "active features kept", "logits off by",
           "perplexity"]  # fmt: skip
    for family, ways in records.result("interop/quantisation")["families"].items():
        for way, of in ways.items():
            title = TITLES[family] if way == "float32" else ""
            if "packed" not in of:
                yield [title, way, "", "", "", "", f"{of['perplexity']:.2f}"]
                continue
            packed = [f"{count} of {whole}" for count, whole in of["packed"].values()]
            kept, off = f"{100 * of['active_features_kept']:.1f} %", f"{100 * of['logit_difference']:.1f} %"
            yield [title, way, *packed, kept, off, f"{of['perplexity']:.2f}"]


def exports() -> Iterator[list[str]]:
    """Largest difference of an exported model's logits from the eager model's."""
    yield ["model", "codes", "torch.export", "ONNX, onnxruntime"]
    for family, models in records.result("interop/exports")["families"].items():
        for name, of in models.items():
            codes = "none: the base model" if name == "base" else name
            title = TITLES[family].partition(",")[0]
            found = (f"{of[way]:.1e}" if of[way] else "0" for way in ("torch_export", "onnx"))
            yield [title if name == "base" else "", codes, *found]


def plain_checkpoints() -> Iterator[list[str]]:
    """Largest difference of logits of plain checkpoints in TransformerLens."""
    yield ["model", "largest logit", "largest difference in TransformerLens"]
    for family, of in records.result("interop/plain_checkpoint")["families"].items():
        title = TITLES[family].partition(",")[0]
        yield [title, f"{of['largest_logit']:.1f}", f"{of['largest_difference']:.1e}"]


def harness() -> Iterator[list[str]]:
    """Accuracy in lm-evaluation-harness with and without an active preset."""
    yield ["`active_preset`", "accuracy", "standard error"]
    for preset, of in records.result("interop/harness")["active_preset"].items():
        yield [preset, f"{of['accuracy']:.3f}", f"{of['standard_error']:.3f}"]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "exports": exports,
    "harness": harness,
    "plain-checkpoints": plain_checkpoints,
    "quantisation": quantisation,
}
