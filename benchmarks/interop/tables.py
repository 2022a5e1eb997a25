"""Tables of families and of the exchange with other packages. `python -m benchmarks.tables` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from benchmarks.common import records
from modeling_mfn.model.families import FAMILIES

CLAIMS = {
    "logits_at_alpha_0_equal_the_base_to_the_bit": "alpha 0",
    "figure_1_by_hand": "Figure 1",
    "embedding_codes_add_up_to_the_first_stream": "embeddings",
    "cache_left_padding_and_beams": "cache, padding, beams",
    "save_and_load_with_and_without_the_plugin": "save and load",
    "back_to_the_base": "back to the base",
    "gradient_checkpointing": "gradient checkpointing",
    "lora": "LoRA",
    "one_training_step_with_all_losses": "training step",
    "attribution_equals_central_differences": "attribution",
    "the_atlas_effects_equal_those_of_the_norm_itself": "atlas",
    "compiled_in_one_graph": "compiled",
    "block_classes_can_be_pickled": "pickled",
}
"""Claim, as the tests name it -> column."""
CELLS = {"passed": "yes", "failed": "no", "skipped": "-"}


def families() -> Iterator[list[str]]:
    """Families by claim: yes, no, or not tried."""
    cells = records.result("interop/families")["cells"]
    yield ["family", "MFN layer", *CLAIMS.values()]
    names = sorted({family for of in cells.values() for family in of})
    for name in names:
        family = FAMILIES[name.partition("-")[0]]
        parallel = family.parallel is not None and not name.endswith("-sequential")
        place = "before attention and MLP" if parallel else "between attention and MLP"
        yield [f"`{name}`", place, *(CELLS[cells[claim][name]] for claim in CLAIMS)]


WAYS = {"in": "from", "out": "to"}
PACKAGES = {"saelens": "SAELens", "sparsify": "sparsify"}


def parity() -> Iterator[list[str]]:
    """Largest differences of codes and reconstructions, by way, package and kind of SAE."""
    cases = records.result("interop/parity")["cases"]

    def kind(case: dict[str, Any]) -> tuple[str, ...]:
        return case["direction"], case["package"], case["name"]

    yield ["way", "SAE or edit", "cases", "types of weights", "k", "codes", "reconstructions", "other active sets"]
    for (direction, package, name), group in groupby(sorted(cases, key=kind), kind):
        of = list(group)
        codes, reconstructions = (f"{max(case[figure] for case in of):.1e}" for figure in ("codes", "reconstructions"))
        types, ks = (", ".join(map(str, sorted({case[each] for case in of}))) for each in ("dtype", "k"))
        other = str(sum(case["other_active_sets"] for case in of))
        yield [f"{WAYS[direction]} {PACKAGES[package]}", name, str(len(of)), types, ks, codes, reconstructions, other]


def probing() -> Iterator[list[str]]:
    """Figures of sae-probes by data set and number of features."""
    yield ["data set", "features", "AUC, validation", "AUC, test", "accuracy, test"]
    for dataset, by_number in records.result("interop/sae_probes")["datasets"].items():
        for number, of in by_number.items():
            yield [dataset, number, *(f"{of[figure]:.3f}" for figure in ("val_auc", "test_auc", "test_acc"))]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "families": families,
    "interop-parity": parity,
    "sae-probes": probing,
}

__all__ = ["TABLES"]
