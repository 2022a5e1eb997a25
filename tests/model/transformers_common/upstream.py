"""Imports transformers' common tests, with stand-ins for test modules that no distribution contains."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

from transformers_common.fetch import fetch_tests

# a GPU has other kernels and tolerances, and would skip other tests than a CPU
os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")

PACKAGE = "_transformers_own_tests"


def import_tests() -> tuple[ModuleType, ModuleType]:
    """Returns transformers' modules `tests.test_modeling_common` and `tests.test_configuration_common`.

    The modules use relative imports, so they need a package. Its name is not `tests`.
    """
    _stand_in("", __path__=[str(fetch_tests())])
    # the folders with the tests of export and generation are not distributed
    _stand_in(".exporters", __path__=[])
    _stand_in(".exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in(".generation", __path__=[])
    _stand_in(".generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in(".utils", __path__=[])
    _stand_in(".utils.test_configuration_utils", config_common_kwargs={"num_labels": 7, "use_cache": False})
    modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    # the module also imports transformers from a folder that the distribution lacks, and never uses this import
    with patch("transformers.utils.direct_transformers_import"):
        configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
    return modeling, configuration


def _stand_in(name: str, **contents: Any) -> None:
    module = sys.modules[PACKAGE + name] = ModuleType(PACKAGE + name)
    vars(module).update(contents)
