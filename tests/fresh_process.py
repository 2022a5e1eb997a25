"""Scripts in a fresh process, in which the plugin is not imported yet, or appears not to be installed.

The latter is the machine of a user who only loads a checkpoint. Most scripts run in a fork of a server that has
imported the large packages but not the plugin: their imports take most of a script's seconds.
"""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree

SERVER = Path(__file__).with_name("fork_server.py")
MODULES = tempfile.TemporaryDirectory()
"""Folder into which transformers copies the code of saved models. It is empty when a script begins."""
ENVIRONMENT = {**os.environ, "HF_MODULES_CACHE": f"{MODULES.name}/modules"}
"""Environment of the server. Packages read much of it when they are imported."""
SECONDS = 300
"""Time after which a script hangs."""

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
    run_forked(WITHOUT_THE_PLUGIN + IMPORTS + script, folder, *arguments)


def run_before_the_plugin(script, folder, *arguments):
    """Runs a script that can import the plugin in a folder. `IMPORTS` come first."""
    run_forked(IMPORTS + script, folder, *arguments)


def python_of(markdown):
    """Python code of a Markdown text, as a user would copy it."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", markdown, re.DOTALL | re.MULTILINE))


def run_fresh(script, folder, *arguments):
    """Runs a script in an interpreter of its own. Nothing is imported, and all of the environment counts."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr


def run_forked(script, folder, *arguments):
    with tempfile.TemporaryDirectory() as place:
        Forked(script, folder, *arguments, output=Path(place, "output")).finish()


class Forked:
    """Process of a script, given as text or as a file: a fork of the server, in a session of its own.

    What it prints goes into the file `output`.
    """

    def __init__(self, script, folder, *arguments, output, environment=None):
        rmtree(ENVIRONMENT["HF_MODULES_CACHE"], ignore_errors=True)
        from_file = isinstance(script, Path)
        request = {
            "output": str(output),
            "folder": str(folder),
            "environment": ENVIRONMENT | (environment or {}),
            "file": str(script) if from_file else None,
            "code": script.read_text(encoding="utf-8") if from_file else script,
            "arguments": [str(argument) for argument in arguments],
        }
        self.pid, self.exitcode, self.output = ask(request), None, output

    def wait(self, seconds=SECONDS):
        """Returns the exit code, or None if the process still runs after a time."""
        until = time.monotonic() + seconds
        while self.exitcode is None and time.monotonic() < until:
            self.exitcode = ask(self.pid)
            time.sleep(0.01)
        return self.exitcode

    def kill(self):
        if self.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def finish(self):
        """Waits for the process. A failure is an error with the end of what the process printed."""
        code = self.wait()
        self.kill()
        assert code == 0, (code, self.output.read_text()[-3000:])


def ask(request):
    """Returns the answer of the server of this process to a request."""
    server = _server()
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@functools.cache
def _server():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(SERVER)], env=ENVIRONMENT, **pipes)


def ranks(count):
    """Environments of processes that belong together, as `accelerate launch` would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    group |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    groups = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in each.items()} for each in groups]
