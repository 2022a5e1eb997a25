"""Methods of MFN models that need the package: SAEs of other packages in and out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedModel

ModelT = TypeVar("ModelT", bound="Autoencoders")


class Autoencoders:
    """Methods of an MFN model that take SAEs in, and give MFN layers out as SAEs."""

    sae_importer: ClassVar[Callable[..., Any] | None] = None
    """Function that `from_saes` calls with the class. The package sets it; it is None in the code that travels."""
    sae_exporter: ClassVar[Callable[..., Any] | None] = None
    """Function that `to_saelens` calls with the model, likewise."""

    @classmethod
    def from_saes(
        cls: type[ModelT],
        base: PreTrainedModel | str | os.PathLike[str],
        saes: Mapping[int, str | os.PathLike[str]],
        *,
        allow_other_site: bool = False,
        base_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> ModelT:
        """Makes an MFN model of a base model and SAEs that were trained on its residual streams, without a training.

        SAEs of SAELens, sparsify and OpenAI are taken if an MFN layer is exactly the same function: TopK, and ReLU.
        At alpha = 0, the default, the model is its base. `set_blend(1.0)` lets only the SAEs' features through.

        Args:
            base: a causal LM of a supported family, its folder, or its id on the Hub.
            saes: block index -> SAE: a folder of SAELens or sparsify, a `.pt` file of OpenAI, or a release of SAELens
                as `"release:sae_id"`, which the package `sae-lens` downloads.
            allow_other_site: take SAEs that were trained at another place than that of an MFN layer. The config then
                names the places in `other_sites`, and the model card warns.
            base_kwargs: arguments of `AutoModelForCausalLM.from_pretrained` for a folder or id: `dtype`, `revision`...
            settings: `alpha` and `blend_into`, see [`MFNConfig`], and `k` for ReLU SAEs: `k=num_features` is exact, a
                smaller k keeps the largest activations alone. All others follow from the SAEs.

        Returns:
            The MFN model in evaluation mode, on the base model's device and in its dtype.

        Raises:
            ValueError: if an SAE does something that no MFN layer does, or was trained at another place; if SAEs
                differ in their number of features, k or normalisation; on a setting that contradicts them.
            ImportError: if the package `modeling_mfn` is not imported, or a release needs `sae-lens`.
        """
        if cls.sae_importer is None:
            raise ImportError("from_saes needs the package; import modeling_mfn before the model's class")
        model: ModelT = cls.sae_importer(
            base, saes, allow_other_site=allow_other_site, base_kwargs=base_kwargs, **settings
        )
        return model

    def to_saelens(self, layer: int) -> Any:
        """Returns an MFN layer as an SAE of SAELens, with the same codes and reconstructions.

        The SAE has a copy of the weights. Its input is what passes through the layer's `hook_in`.

        Args:
            layer: block index.

        Raises:
            ValueError: on a layer that is not there, or with `coding_rounds` or `refine_steps`, which no SAE has.
            ImportError: if the package `modeling_mfn` is not imported, or `sae-lens` is not installed.
        """
        if self.sae_exporter is None:
            raise ImportError("to_saelens needs the package; import modeling_mfn before the model is loaded")
        return self.sae_exporter(layer)


__all__ = ["Autoencoders"]
