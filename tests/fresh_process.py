"""Scripts in a fresh process, in which the plugin is not imported yet, or appears not to be installed.

The latter is the machine of a user who only loads a checkpoint.
"""

import re
import subprocess
import sys

WITHOUT_THE_PLUGIN = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_mfn":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""
IMPORTS = """
import builtins
import os
import sys

def asked(question=""):
    print("somebody would be asked:", question, file=sys.stderr, flush=True)
    os._exit(1)

builtins.input = asked
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
"""


def run_without_the_plugin(script, folder, *arguments):
    """Runs a script without the plugin in a folder. `IMPORTS` come first. An error in the script fails the test."""
    run_fresh(WITHOUT_THE_PLUGIN + IMPORTS + script, folder, *arguments)


def run_before_the_plugin(script, folder, *arguments):
    """Runs a script that can import the plugin in a folder. `IMPORTS` come first."""
    run_fresh(IMPORTS + script, folder, *arguments)


def python_of(markdown):
    """Python code of a Markdown text, as a user would copy it."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", markdown, re.DOTALL | re.MULTILINE))


def run_fresh(script, folder, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
