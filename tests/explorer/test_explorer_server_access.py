"""Who may reach the explorer's server, and what browsers may do with its answers."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from explored_model import made, save, site

testclient = pytest.importorskip("fastapi.testclient")

from modeling_mfn.explorer.server.access import Access, access_at, is_loopback  # noqa: E402
from modeling_mfn.explorer.server.app import create_app, listen  # noqa: E402
from modeling_mfn.explorer.server.limits import PUBLIC, Limits  # noqa: E402

TOKEN = "s3cret-é"
JSON = {"Content-Type": "application/json"}
READ = json.dumps({"text": "a king", "k": 1})


@pytest.fixture(scope="module")
def local():
    with testclient.TestClient(create_app(*made(), site()), base_url="http://localhost:8000") as client:
        yield client


@pytest.fixture
def elsewhere():
    app = create_app(*made(), site(), access=Access(hosts=None, token=TOKEN))
    with testclient.TestClient(app, base_url="http://model.example") as client:
        yield client


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:99", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("evil.example@localhost", 200),  # the name is what follows
        ("localhost@evil.example", 421),
        ("[::1", 421),
        ("", 421),
        ("127.0.0.1.nip.io", 421),
    ],
)
def test_a_name_that_leads_here_from_elsewhere_is_refused(local, host, status):
    """DNS rebinding: a page of evil.example, whose name now leads to 127.0.0.1, would read our data."""
    for path in ("/", "/api/session", "/data/site.js"):
        assert local.get(path, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # programs other than browsers
        ({"Origin": "http://localhost:8000"}, 200),
        ({"Origin": "http://localhost:9000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:8000"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"}, 403),  # a form of another port
        ({"Content-Type": "text/plain"}, 415),  # what a form can send
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_pages_of_other_sites_can_make_no_request(local, headers, status):
    assert local.post("/api/read", content=READ, headers=JSON | headers).status_code == status


def test_pages_of_other_sites_can_link_here_but_not_include_data(local):
    """The data are scripts, which any page could run to read them."""
    for path in ("/data/site.js", "/api/session"):
        assert local.get(path, headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert local.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200


def test_a_token_is_demanded_for_everything(elsewhere):
    for path in ("/", "/data/site.js", "/api/session", "/nothing"):
        for wrong in ("", TOKEN[:-1], TOKEN + "x", "\udcff"):
            headers = {"X-MFN-Token": wrong.encode("utf-8", "surrogateescape"), "Cookie": f"mfn_token={wrong!a}"}
            answer = elsewhere.get(path, headers=headers, params={"token": wrong.encode("utf-8", "surrogateescape")})
            assert answer.status_code == 401
            assert answer.json() == {"detail": "this server needs a token; open the address that mfn explore printed"}
    assert elsewhere.post("/api/read", content=READ, headers=JSON).status_code == 401


def test_the_printed_address_opens_the_pages_and_what_they_ask_for():
    app = create_app(*made(), site(), access=Access(hosts=None, token="abc"))
    with testclient.TestClient(app, base_url="http://model.example") as client:
        page = client.get("/", params={"token": "abc"})
        assert page.status_code == 200
        cookie = page.headers["set-cookie"]
        assert cookie == "mfn_token=abc; HttpOnly; SameSite=Strict; Path=/"
        assert client.get("/data/site.js").status_code == 200  # with the cookie
        client.cookies.clear()
        assert client.get("/data/site.js").status_code == 401
        assert client.post("/api/read", content=READ, headers=JSON | {"X-MFN-Token": "abc"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/session", "/nothing", "/data/site.js"])
def test_every_answer_has_the_headers_that_browsers_obey(local, path):
    headers = local.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/data/../../secret.txt",
        "/data/..%2f..%2fsecret.txt",
        "/..%5csecret.txt",
        "//secret.txt",
        "/link.txt",  # a link out of the folder
        "/%00",
        "/" + "a" * 5000,
        "/" + "%2e%2e/" * 20 + "etc/passwd",
    ],
)
def test_no_path_leads_out_of_the_folder(local, path):
    scope_path = path.encode()
    answer = local.get("http://localhost:8000" + path)
    assert answer.status_code in (400, 404), scope_path
    assert "secret" not in answer.text.replace("secret.txt", "")
    assert set(answer.json()) == {"detail"}


def test_only_addresses_of_this_machine_need_no_token():
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1")] == [True] * 4
    others = ("0.0.0.0", "::", "192.168.1.5", "model.example", "localhost.example", "")
    assert [is_loopback(host) for host in others] == [False] * 6
    tokens = {access_at(host).token for host in others}
    assert len(tokens) == 6
    assert all(len(token) >= 32 for token in tokens)
    assert access_at("127.9.9.9").token is None
    assert "127.9.9.9" in access_at("127.9.9.9").hosts


def test_a_port_that_is_taken_is_named():
    with listen("localhost", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"localhost with port {port} cannot be listened at: .*in use"):
            listen("localhost", port)
    with pytest.raises(ValueError, match=r"no\.such\.host\.invalid with port 1 cannot be listened at"):
        listen("no.such.host.invalid", 1)


RUN = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from modeling_mfn import FeatureAtlas, MFNForCausalLM
from modeling_mfn.explorer.server.app import run_explorer
folder, site = map(Path, sys.argv[1:3])
model, tokenizer = MFNForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
run_explorer(model, tokenizer, FeatureAtlas.from_pretrained(folder), site, folder=folder, host=sys.argv[3])
"""


@pytest.mark.parametrize("host", ["0.0.0.0"])
def test_a_server_for_other_machines_warns_prints_its_token_and_ends_at_an_interrupt(host, tmp_path):
    save(tmp_path / "model")
    command = [sys.executable, "-c", RUN, str(tmp_path / "model"), str(site()), host]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    try:
        said = server.stdout.readline()
        address, port, token = re.search(r"(http://\S+?:(\d+)/)\?token=(\S+)", said).groups()
        assert address
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/?token={token}").status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert out == "the explorer has ended\n"
    assert "warning: other machines can reach this server" in err
    assert "Traceback" not in err
    assert token not in err


def test_the_guide_has_the_limits():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "explore.md").read_text(encoding="utf-8")
    section = page.split("## What the server does for one request")[1]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    told = {what: (own.replace(",", ""), public.replace(",", "")) for what, own, public in rows[2:]}
    names = {
        "tokens of a text": "text_tokens",
        "tokens of a text to explain": "explained_tokens",
        "tokens to generate": "new_tokens",
        "features to steer": "interventions",
        "features per token and layer in a reading": "features_per_token",
        "features per layer in an explanation": "explained_features",
        "seconds of one request": "seconds",
    }
    for what, name in names.items():
        assert told[what] == tuple(f"{getattr(limits, name):g}" for limits in (Limits(), PUBLIC))
    for limits, place in ((Limits(), 0), (PUBLIC, 1)):
        assert told["requests at once, and waiting"][place] == f"{limits.running} and {limits.waiting}"
