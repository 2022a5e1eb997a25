"""A process that has died or is stopped is not waited for."""

import pytest
from fresh_process import Forked, ranks

WORKER = """
import os, signal, sys
from modeling_mfn.utils import processes

processes.SILENCE = 2.0
process = processes.join_processes()
processes.wait_for_processes("the start")
if process.process_index == int(sys.argv[1]):
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
processes.wait_for_processes("the end")
"""
WATCHER = """
import os, signal, sys, time
from modeling_mfn.utils import processes

processes.SILENCE = 2.0
with processes.watched_processes():
    process = processes.join_processes()
    processes.wait_for_processes("the start")
    if process.process_index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(6)
"""


def errors(folder, which, code, *arguments):
    """Runs code in two processes, ends both when one of them has ended, and returns what that one wrote."""
    outputs = [folder / f"output-{rank}" for rank in range(2)]
    running = [
        Forked(code, folder, *arguments, output=output, environment=group)
        for output, group in zip(outputs, ranks(2), strict=True)
    ]
    try:
        assert running[which].wait(100) is not None
    finally:
        for each in running:
            each.kill()
    return outputs[which].read_text()


@pytest.mark.parametrize(
    ("lost", "how", "message"),
    [
        (1, "SIGSTOP", "process 1 has given no sign of life for 2 s, while process 0 waited for the end"),
        (0, "SIGKILL", "connection to the other processes is lost, while process 1 waited for"),
    ],
)
def test_a_process_that_is_lost_is_named(lost, how, message, tmp_path):
    written = errors(tmp_path, 1 - lost, WORKER, lost, how)
    assert "TimeoutError" in written
    assert message in written


def test_the_log_of_a_training_names_a_process_that_is_stopped(tmp_path):
    written = errors(tmp_path, 0, WATCHER)
    assert written.count("process 1 has given no sign of life for 2 s") == 1
    assert "until ddp_timeout" in written
