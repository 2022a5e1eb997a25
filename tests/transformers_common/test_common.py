"""transformers' own common model tests on MFN models, and on their plain base models as the yardstick: `conftest.py`
fails the run where an MFN model does not pass what its base model passes."""

from __future__ import annotations

import copy
import json
import unittest
from typing import NamedTuple

from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from modeling_mfn import MFNConfig, MFNForCausalLM, MFNModel

from .upstream import import_tests

modeling, configuration = import_tests()

# The tests tell a headless model and a causal LM by transformers' own lists of class names, so ours go on them.
modeling.MODEL_MAPPING_NAMES = {**modeling.MODEL_MAPPING_NAMES, "mfn": "MFNModel"}
modeling.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {**modeling.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "mfn": "MFNForCausalLM"}

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = LlamaConfig(**SIZE, **TOKENS, num_key_value_heads=2, intermediate_size=37, max_position_embeddings=512)
GPT2 = GPT2Config(**SIZE, **TOKENS, max_position_embeddings=512)
MFN = {"num_features": 64, "k": 8, "alpha": 1.0}


class Subject(NamedTuple):
    """What one class of tests runs on."""

    models: tuple[type[PreTrainedModel], type[PreTrainedModel]]
    config: PreTrainedConfig


SUBJECTS = {
    "Llama": Subject((LlamaModel, LlamaForCausalLM), LLAMA),
    "MFNLlama": Subject((MFNModel, MFNForCausalLM), MFNConfig(text_config=LLAMA, **MFN)),
    "GPT2": Subject((GPT2Model, GPT2LMHeadModel), GPT2),
    "MFNGPT2": Subject((MFNModel, MFNForCausalLM), MFNConfig(text_config=GPT2, **MFN)),
}


class ModelTester:
    """The config, inputs and expected sizes that the tests ask for."""

    batch_size, seq_length, is_training = 13, 7, True
    vars().update(SIZE | TOKENS)

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def get_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self.subject.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        input_ids = modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": input_ids.new_ones(input_ids.shape).tril()}


class CommonTests(modeling.ModelTesterMixin, modeling.GenerationTesterMixin):
    subject: Subject
    test_can_init_all_missing_weights_before_2023 = True  # or models whose config file states no year are let off

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.subject)
        set_seed(0)
        modeling.global_rng.seed(0)

    @property
    def all_model_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return self.subject.models

    @property
    def _is_composite(self) -> bool:
        # an MFN model is composite by its config, and yet has one attention implementation: tests of both kinds hold
        return self.subject.models[0] is MFNModel and "non_composite" not in self._testMethodName

    def test_config(self) -> None:
        config = self.subject.config
        tester = configuration.ConfigTester(self, type(config), **json.loads(config.to_json_string()))
        tester.run_common_tests(can_init_without_params=type(config) is not MFNConfig)


for name, subject in SUBJECTS.items():
    vars()[name] = type(name, (CommonTests, unittest.TestCase), {"subject": subject, "__module__": __name__})
