"""Imports transformers' own tests, with stand-ins for test modules that are not at hand."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

from transformers_common.fetch import fetch_tests, lacks_suites

# a GPU has other kernels and tolerances, and would skip other tests than a CPU
os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")

PACKAGE = "_transformers_own_tests"


class Upstream(NamedTuple):
    """Modules of transformers' tests."""

    modeling: ModuleType
    configuration: ModuleType
    suite: tuple[type, ...]
    """Classes that a test class of a causal LM derives from."""


def import_tests() -> Upstream:
    """Returns transformers' tests of models.

    The modules use relative imports, so they need a package. Its name is not `tests`.
    """
    folder = fetch_tests()
    _stand_in("", __path__=[str(folder)])
    _unless_there(".exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _unless_there(".generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _unless_there(".utils.test_configuration_utils", config_common_kwargs={"num_labels": 7, "use_cache": False})
    modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    # the module also imports transformers from a folder that the distribution lacks, and never uses this import
    with patch("transformers.utils.direct_transformers_import"):
        configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
    if lacks_suites(folder):
        return Upstream(modeling, configuration, (modeling.ModelTesterMixin, modeling.GenerationTesterMixin))
    # tests of pipelines take tiny models from the Hub
    _stand_in(".test_pipeline_mixin", PipelineTesterMixin=type("PipelineTesterMixin", (), {}))
    _unless_there(".test_tensor_parallel_mixin", TensorParallelTesterMixin=type("TensorParallelTesterMixin", (), {}))
    causal = importlib.import_module(f"{PACKAGE}.causal_lm_tester")
    return Upstream(modeling, configuration, (causal.CausalLMModelTest,))


def _unless_there(name: str, **contents: Any) -> None:
    try:
        importlib.import_module(PACKAGE + name)
    except ImportError:
        if folder := name.rpartition(".")[0]:
            _stand_in(folder, __path__=[])
        _stand_in(name, **contents)


def _stand_in(name: str, **contents: Any) -> None:
    module = sys.modules[PACKAGE + name] = ModuleType(PACKAGE + name)
    vars(module).update(contents)
