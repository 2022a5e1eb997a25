"""The explorer's server at a real socket: several clients at once, clients that go away, and limits."""

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from explored_model import generated, made, site

from modeling_mfn import explain

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from modeling_mfn.explorer.server.app import create_app, listen  # noqa: E402
from modeling_mfn.explorer.server.limits import Limits  # noqa: E402

PATIENCE = 60
SLOW = 0.02
"""Seconds that a forward takes longer in tests that must come in between."""
LOUD = {"L0/3": {"kind": "clamp", "value": 30.0}}
LONG = {"prompt": "we go", "max_new_tokens": 100}
PASSES = 300
"""Forward passes of `LONG`, with its three streams."""


class Server:
    """A server that runs in a thread, and the forwards of its model."""

    def __init__(self, app, port):
        self.app, self.port = app, port
        self.forwards = []
        """Thread of each forward."""

    def ask(self, path, **body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("POST", f"/api/{path}", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def answer(self, path, **body):
        with self.ask(path, **body).getresponse() as response:
            return response.status, response.read().decode()

    def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition(self.app.state.jobs):
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.005)


@contextmanager
def served(slow=0.0, **limits):
    app = create_app(*made(), site(), limits=Limits(**limits))
    listener = listen("localhost", 0)
    running = Server(app, listener.getsockname()[1])

    def forward(module, arguments):
        running.forwards.append(threading.get_ident())
        time.sleep(slow)

    handle = made()[0].base_model.register_forward_pre_hook(forward)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        running.until(lambda jobs: server.started)
        yield running
    finally:
        server.should_exit = True
        thread.join()
        handle.remove()
        listener.close()


def stream_of(text, name):
    events = [json.loads(line) for line in text.splitlines()]
    return [event["token_id"] for event in events if event.get("stream") == name and "token" in event]


def test_clients_at_once_have_their_own_answers():
    """Each answer is that of a call of its own, whoever else steers, samples or explains at the same time."""
    model, tokenizer, atlas = made()
    ways = [{}, LOUD, {"L1/7": {"kind": "ablate"}, "L2/2": {"kind": "add", "value": 9.0}}]
    asked, expected = [], []
    for number, interventions in enumerate(ways * 2):
        sampling = {"seed": number, "temperature": 1.2} if number > 2 else {}
        asked.append(("generate", {"prompt": "we go", "max_new_tokens": 8, "interventions": interventions}))
        asked[-1][1].update(sampling, sample=bool(sampling))
        expected.append((generated({}, new=8, **sampling), generated(interventions, new=8, **sampling)))
    asked.append(("explain", {"text": "the king", "top": 2}))
    expected.append(json.loads(explain(model, tokenizer, "the king", top=2, atlas=atlas).to_json()))
    with served(running=4, waiting=20) as server:
        alone = server.answer("read", text="the king")
        asked += [("read", {"text": "the king"})] * 3
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda each: server.answer(each[0], **each[1]), asked))
    assert {status for status, _ in answers} == {200}
    for (_, text), (plain, steered) in zip(answers, expected[:-1], strict=False):
        assert (stream_of(text, "plain"), stream_of(text, "steered")) == (plain, steered)
    assert json.loads(answers[6][1])["explanation"] == expected[-1]
    assert answers[7:] == [alone] * 3
    assert not any(parameter.requires_grad != model.lm_head.weight.requires_grad for parameter in model.parameters())


def test_a_client_that_goes_away_stops_its_generation_and_frees_its_place():
    with served(SLOW, running=1) as server:
        connection = server.ask("generate", **LONG, interventions=LOUD, control={"interventions": {}})
        response = connection.getresponse()
        assert json.loads(response.readline())["stream"]
        response.close()
        connection.close()
        server.until(lambda jobs: jobs.running == 0)
        stopped = len(server.forwards)
        assert stopped < PASSES / 2
        assert server.answer("generate", prompt="we go", max_new_tokens=2)[0] == 200
        assert len(server.forwards) == stopped + 4  # nothing goes on in the background


def test_an_explanation_stops_when_its_client_goes_away():
    with served(SLOW, running=1) as server:
        connection = server.ask("explain", text="the king and queen", method="integrated", top=5)
        server.until(lambda jobs: len(server.forwards) > 3)
        connection.close()
        server.until(lambda jobs: jobs.running == 0)
        stopped = len(server.forwards)
        assert stopped < 3 * 16  # one per layer and step, and more after these
        assert not made()[0].mfn_layers[0]._forward_hooks  # those of attribution are gone
        assert server.answer("read", text="a king")[0] == 200


def test_requests_wait_and_too_many_are_refused():
    with served(SLOW, running=1, waiting=1) as server:
        first = server.ask("generate", **LONG)
        generating = first.getresponse()
        generating.readline()
        waits = server.ask("predict", text="a king")
        server.until(lambda jobs: jobs.waiting == 1)
        for path, body in (("read", {"text": "a king"}), ("generate", LONG)):
            status, text = server.answer(path, **body)
            assert (status, json.loads(text)) == (
                429,
                {"detail": "1 requests run and 1 wait already; try again in a moment"},
            )
        waits.close()  # its place in the queue is free again, and its work is never done
        server.until(lambda jobs: jobs.waiting == 0)
        second = server.ask("predict", text="a king")
        server.until(lambda jobs: jobs.waiting == 1)
        generating.close()
        first.close()
        assert second.getresponse().status == 200


def test_no_pass_runs_while_an_explanation_does():
    """An explanation changes what layers give, and comes between two tokens of a generation."""
    with served(0.002, running=2) as server:
        text = {}

        def read(response):
            text["generated"] = response.read().decode()

        connection = server.ask("generate", prompt="we go", max_new_tokens=40, interventions=LOUD)
        reader = threading.Thread(target=read, args=(connection.getresponse(),))
        reader.start()
        status, explained = server.answer("explain", text="the king", top=2)
        reader.join()
    assert status == 200
    counts = {thread: server.forwards.count(thread) for thread in server.forwards}
    explaining = next(thread for thread, count in counts.items() if count != 40)
    first = server.forwards.index(explaining)
    last = len(server.forwards) - server.forwards[::-1].index(explaining)
    assert server.forwards[first:last] == [explaining] * (last - first)
    assert first > 0
    assert last < len(server.forwards)
    direct = explain(*made()[:2], "the king", top=2, atlas=made()[2])
    assert json.loads(explained)["explanation"] == json.loads(direct.to_json())
    assert stream_of(text["generated"], "steered") == generated(LOUD, new=40)


def test_work_that_takes_too_long_ends():
    with served(SLOW, seconds=0.3) as server:
        status, text = server.answer("explain", text="the king and queen", method="integrated")
        assert (status, json.loads(text)["detail"]) == (
            503,
            "the work took more than 0.3 seconds and was stopped; ask for less",
        )
        status, text = server.answer("generate", **LONG)
        assert status == 200
        ends = [json.loads(line) for line in text.splitlines()]
        assert [event["reason"] for event in ends if event.get("end")] == ["time", "time"]
        assert ends[-1]["done"] is True


def test_a_body_that_never_ends_is_refused():
    with served(body_seconds=0.2, body_bytes=100) as server:
        for sent, status in ((b'{"text"', 408), (b" " * 200, 413)):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            connection.putrequest("POST", "/api/read")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "1000")
            connection.endheaders()
            connection.send(sent)
            assert connection.getresponse().status == status
            connection.close()
