"""Monosemantic Feature Neurons: transformers that read through named, sparse features.

Importing the package is light: torch and transformers are imported with the first name that needs them.
`AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know MFN models as soon as the package is imported.
A [`FeatureAtlas`] can be read where torch and transformers are not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import auto_classes
from .model.version import __version__

if TYPE_CHECKING:
    from .data.text import TextWindows, load_text, pack
    from .evaluation.measures.perplexity import perplexity
    from .features.atlas import FeatureAtlas
    from .features.attribution import Explanation, explain
    from .features.comparison import compare_features
    from .features.labelling.automatic import label_features
    from .features.labelling.describer import describe_features
    from .hub.push import push
    from .interop.export import export_saes
    from .interop.sources import find_saes
    from .model.configuration_mfn import MFNConfig
    from .model.feature_editing import find_duplicates
    from .model.interventions import Ablate, Add, Clamp, Scale
    from .model.mfn_for_causal_lm import MFNCausalLMOutput, MFNForCausalLM, MFNModel
    from .model.sparse_code import SparseCode
    from .training.activation_cache import ActivationCache, CachedResiduals
    from .training.trainer import MFNTrainer, MFNTrainingArguments
    from .training.trainer_mixin import MFNTrainerMixin

_PUBLIC = {
    ".data.text": ("TextWindows", "load_text", "pack"),
    ".evaluation.measures.perplexity": ("perplexity",),
    ".features.atlas": ("FeatureAtlas",),
    ".features.attribution": ("Explanation", "explain"),
    ".features.comparison": ("compare_features",),
    ".features.labelling.automatic": ("label_features",),
    ".features.labelling.describer": ("describe_features",),
    ".hub.push": ("push",),
    ".interop.export": ("export_saes",),
    ".interop.sources": ("find_saes",),
    ".model.configuration_mfn": ("MFNConfig",),
    ".model.feature_editing": ("find_duplicates",),
    ".model.interventions": ("Ablate", "Add", "Clamp", "Scale"),
    ".model.mfn_for_causal_lm": ("MFNCausalLMOutput", "MFNForCausalLM", "MFNModel"),
    ".model.sparse_code": ("SparseCode",),
    ".training.activation_cache": ("ActivationCache", "CachedResiduals"),
    ".training.trainer": ("MFNTrainer", "MFNTrainingArguments"),
    ".training.trainer_mixin": ("MFNTrainerMixin",),
}
"""Module -> its public names. The imports above say the same to editors and type checkers."""
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])

auto_classes.register_when_imported()


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_MODULE_OF[name], __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"modeling_mfn.{name} needs {error.name}, which is not installed") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
