"""Monosemantic Feature Neurons: transformers that read through named, sparse features.

Importing this package registers `MFNConfig`, `MFNModel` and `MFNForCausalLM` with the Auto classes of transformers.
Without torch and transformers there is the atlas alone: what is known about features is read without the model.
"""

from importlib.util import find_spec

from .features.atlas import FeatureAtlas

if find_spec("torch") and find_spec("transformers"):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .features.attribution import Explanation, explain
    from .hub.push import push_model
    from .model.configuration_mfn import MFNConfig, __version__
    from .model.interventions import Ablate, Add, Clamp, Scale
    from .model.modeling_mfn import MFNCausalLMOutput, MFNForCausalLM, MFNModel
    from .model.sparse_code import SparseCode
    from .training.trainer import MFNTrainer, MFNTrainingArguments

    AutoConfig.register("mfn", MFNConfig, exist_ok=True)
    AutoModel.register(MFNConfig, MFNModel, exist_ok=True)
    AutoModelForCausalLM.register(MFNConfig, MFNForCausalLM, exist_ok=True)

    # save_pretrained then writes the code that trust_remote_code=True loads where this package is not installed
    MFNConfig.register_for_auto_class()
    MFNModel.register_for_auto_class("AutoModel")
    MFNForCausalLM.register_for_auto_class("AutoModelForCausalLM")

    # what push_to_hub of a model calls
    MFNForCausalLM.publisher = push_model

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Explanation",
    "FeatureAtlas",
    "MFNCausalLMOutput",
    "MFNConfig",
    "MFNForCausalLM",
    "MFNModel",
    "MFNTrainer",
    "MFNTrainingArguments",
    "Scale",
    "SparseCode",
    "__version__",
    "explain",
]


def __getattr__(name: str) -> object:
    if name in __all__:  # and was not imported above
        raise ImportError(f"{name} needs torch and transformers, which are not installed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
