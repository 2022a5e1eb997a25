"""A process that has died or is stopped is not waited for."""

import os
import socket
import subprocess
import sys

import pytest

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


def start(rank, port, *arguments, code=WORKER):
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("lost", "how", "message"),
    [
        (1, "SIGSTOP", "process 1 has given no sign of life for 2 s, while process 0 waited for the end"),
        (0, "SIGKILL", "connection to the other processes is lost, while process 1 waited for"),
    ],
)
def test_a_process_that_is_lost_is_named(lost, how, message):
    port = free_port()
    running = [start(rank, port, str(lost), how) for rank in range(2)]
    try:
        _, errors = running[1 - lost].communicate(timeout=100)
    finally:
        for each in running:
            each.kill()
            each.wait()
    assert "TimeoutError" in errors
    assert message in errors


def test_the_log_of_a_training_names_a_process_that_is_stopped():
    port = free_port()
    running = [start(rank, port, code=WATCHER) for rank in range(2)]
    try:
        _, errors = running[0].communicate(timeout=100)
    finally:
        for each in running:
            each.kill()
            each.wait()
    assert errors.count("process 1 has given no sign of life for 2 s") == 1
    assert "until ddp_timeout" in errors
