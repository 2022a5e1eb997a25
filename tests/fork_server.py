"""Process that has imported the large packages, but not the plugin. It forks itself for every script that it is given.

Each line of its input is a request in JSON: a script to start, answered with the number of its process; or the number
of a process, answered with its exit code, or with null while it runs.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

PRELOADED = [
    "torch",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "safetensors.torch",
    "datasets",
    "peft",
]


def next_script():
    """Answers requests. Returns in a fork, with the script that the fork is to run."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    for line in requests:
        request = json.loads(line)
        if isinstance(request, int):
            process, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        else:
            answer = os.fork()
            if not answer:
                return request
        print(json.dumps(answer), file=answers, flush=True)
    return sys.exit()


def begin(output, folder, environment, file, code, arguments):
    """Makes the process look like an interpreter that was started with a script. Returns the compiled script."""
    os.setsid()
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = [file or "-c", *arguments], str(Path(file).parent) if file else ""
    return compile(code, file or "<string>", "exec")


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    assert "modeling_mfn" not in sys.modules
    gc.freeze()  # forks share memory that nobody writes to
    script = begin(**next_script())
    exec(script, {"__name__": "__main__"})
