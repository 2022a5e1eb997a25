"""A local Hub: the parts of the Hub's API that huggingface_hub needs to create, upload, list and download.

    with LocalHub() as hub:
        subprocess.run([...], env=os.environ | hub.environment(tmp_path))

Weights go by Git LFS as on the Hub, and large weights in parts. Other files travel inside the commit. Xet, the Hub's
newer transport, is a separate service. `environment` switches Xet off.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_the_local_hub"
LARGE_FILES = ("*.safetensors", "*.parquet")


def digest(content, algorithm="sha256"):
    return hashlib.new(algorithm, content).hexdigest()


def git_id(content):
    return digest(b"blob %d\0" % len(content) + content, "sha1")


@dataclass
class Repository:
    private: bool
    branches: dict = field(default_factory=dict)
    """Name -> commit id."""
    commits: dict = field(default_factory=dict)
    """Commit id -> {path: content}."""
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message):
        contents = sorted((path, digest(content)) for path, content in files.items())
        commit_id = digest(repr((branch, len(self.commits), contents)).encode(), "sha1")
        self.commits[commit_id], self.branches[branch] = files, commit_id
        self.messages.append(message)
        return commit_id

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


class LocalHub:
    """Server of a local Hub. Large files of more than `part_size` bytes are uploaded in parts of that size."""

    def __init__(self, part_size=2**30):
        self.part_size = part_size
        self.reset()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def reset(self):
        self.repositories, self.objects, self.parts = {}, {}, {}
        self.requests = []
        """(method, path, status) of every answer."""
        self.uploads = Counter()
        """Path of a PUT -> number of times that its content arrived whole."""
        self.drops = 0
        """Number of large uploads, after `spared`, that lose their connection midway."""
        self.spared = 0
        """Number of large uploads that arrive before the first connection is lost."""
        self.dropped = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=TOKEN):
        """Environment variables of a client, set before it imports huggingface_hub."""
        login = {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        places = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return places | login | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def add(self, repo_id, files):
        """Makes a public repository."""
        self.repositories[repo_id] = repository = Repository(private=False)
        repository.commit("main", files, "initial commit")

    def files(self, repo_id, revision="main"):
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)]

    def downloads(self):
        """Paths in repositories whose content was requested."""
        found = (re.match(r"/.+/resolve/[^/]+/([^?]+)", path) for method, path, _ in self.requests if method == "GET")
        return [unquote(match.group(1)) for match in found if match]

    def loses_this_upload(self):
        with self.lock:
            if self.spared > 0:
                self.spared -= 1
                return False
            self.drops -= 1
            return self.drops >= 0


class Failure(Exception):
    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    """Handler of requests, with one method per route of the API."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/((?:models|spaces)/.+?)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/((?:models|spaces)/.+?)/commit/([^/]+)", "commit"),
        ("POST", r"/api/((?:models|spaces)/.+?)/branch/([^/]+)", "branch"),
        ("POST", r"/api/((?:models|spaces)/.+?)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/((?:models|spaces)/.+?)/tree/([^/]+)", "tree"),
        ("GET", r"/api/((?:models|spaces)/.+?)/revision/([^/]+)", "info"),
        ("GET", r"/api/((?:models|spaces)/[^/]+/[^/]+)", "info"),
        ("POST", r"/(.+?)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})(?:/(\d+))?", "lfs_put"),
        ("POST", r"/lfs/([0-9a-f]{64})/complete", "lfs_complete"),
        ("GET", r"/((?:spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ]

    def route(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, url.path)
            if wanted == method and match:
                # a Space has `spaces/` before its name, and a model nothing
                parts = (group and unquote(group).removeprefix("models/") for group in match.groups())
                return getattr(self, name)(*parts)
        raise Failure(404, f"the local Hub has no {method} {url.path}")

    def handle_request(self):
        try:
            self.answer(*self.route())
        except Failure as failure:
            headers = {"X-Error-Message": failure.message} | ({"X-Error-Code": failure.code} if failure.code else {})
            self.read()
            self.answer(failure.status, {"error": failure.message}, headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *_):
        pass

    def read(self, stop_after=None):
        """Reads the body of a request. With `stop_after`, reading may stop after this number of bytes."""
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
                if stop_after is not None and len(content) >= stop_after:
                    return content
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length if stop_after is None else min(length, stop_after))
        del self.headers["Content-Length"], self.headers["Transfer-Encoding"]
        return content

    def answer(self, status, content=b"", headers=None):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {})
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # permissions

    def logged_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_login(self):
        if not self.logged_in():
            raise Failure(401, "Invalid username or password.")

    def repository(self, repo_id):
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and not self.logged_in()):
            raise Failure(401 if not self.logged_in() else 404, "Repository not found", "RepoNotFound")
        return found

    def at(self, repo_id, revision):
        repository = self.repository(repo_id)
        commit_id = repository.resolve(revision)
        if commit_id is None:
            raise Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit_id, repository.commits[commit_id]

    # repositories

    def whoami(self):
        self.check_login()
        return 200, {"type": "user", "name": "me", "orgs": []}

    def create(self):
        asked = json.loads(self.read())
        self.check_login()
        kind = "spaces/" if asked.get("type") == "space" else ""
        repo_id = f"{kind}{asked.get('organization') or 'me'}/{asked['name']}"
        place = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id.removeprefix(kind)}
        if repo_id in self.hub.repositories:
            return 409, place | {"error": "You already created this repo"}
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories[repo_id] = repository = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return 200, place

    def branch(self, repo_id, name):
        asked = json.loads(self.read())
        self.check_login()
        repository = self.repository(repo_id)
        if name in repository.branches:
            return 409, {"error": "Reference already exists"}
        repository.branches[name] = repository.resolve(asked.get("startingPoint", "main"))
        return 201, {}

    def info(self, repo_id, revision="main"):
        repository, commit_id, files = self.at(repo_id, revision)
        name = repo_id.removeprefix("spaces/")
        known = {"_id": digest(repo_id.encode())[:24], "id": name, "modelId": name, "sha": commit_id}
        card = re.match(rb"---\n(.*?)\n---\n", files.get("README.md", b""), re.DOTALL)
        known["cardData"] = yaml.safe_load(card.group(1)) if card else {}
        known |= {"private": repository.private, "tags": [], "downloads": 0, "likes": 0}
        return 200, known | {"siblings": [{"rfilename": path} for path in sorted(files)]}

    def entry(self, path, content):
        found = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
        if any(fnmatch(path, pattern) for pattern in LARGE_FILES):
            found["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 130}
        return found

    def tree(self, repo_id, revision):
        _, _, files = self.at(repo_id, revision)
        return 200, [self.entry(path, content) for path, content in sorted(files.items())]

    def paths_info(self, repo_id, revision):
        asked = json.loads(self.read())
        _, _, files = self.at(repo_id, revision)
        return 200, [self.entry(path, files[path]) for path in asked["paths"] if path in files]

    def resolve(self, repo_id, revision, path):
        _, commit_id, files = self.at(repo_id, revision)
        if path not in files:
            raise Failure(404, "Entry not found", "EntryNotFound")
        content = files[path]
        entry = self.entry(path, content)
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X-Repo-Commit": commit_id, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, content, headers
        start, stop = int(wanted.group(1)), int(wanted.group(2) or len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, content[start:stop], headers

    # uploads

    def validate_yaml(self):
        text = json.loads(self.read())["content"]
        block = re.match(r"^\s*---\r?\n([\s\S]*?)\r?\n---[ \t]*(\r?\n|$)", text)
        try:
            metadata = yaml.safe_load(block.group(1)) if block else {}
            errors = [] if isinstance(metadata, dict) else [{"message": "metadata is no mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def preupload(self, repo_id, revision):
        asked = json.loads(self.read())
        self.check_login()
        _, _, files = self.at(repo_id, revision)
        answers = []
        for file in asked["files"]:
            path = file["path"]
            large = any(fnmatch(path, pattern) for pattern in LARGE_FILES)
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if path in files:
                answers[-1]["oid"] = digest(files[path]) if large else git_id(files[path])
        return 200, {"files": answers}

    def lfs_batch(self, repo_id):
        asked = json.loads(self.read())
        self.check_login()
        self.repository(repo_id)
        answers = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": self.upload_action(wanted["oid"], wanted["size"])}
            answers.append(answer)
        return 200, {"transfer": "basic", "objects": answers}

    def upload_action(self, oid, size):
        place = f"{self.hub.endpoint}/lfs/{oid}"
        if size <= self.hub.part_size:
            return {"href": place}
        count = -(-size // self.hub.part_size)
        urls = {f"{part:05d}": f"{place}/{part}" for part in range(1, count + 1)}
        return {"href": f"{place}/complete", "header": {"chunk_size": str(self.hub.part_size)} | urls}

    def lfs_put(self, oid, part=None):
        if self.hub.loses_this_upload():
            self.read(stop_after=1000)
            self.hub.dropped.set()
            raise ConnectionAbortedError
        content = self.read()
        self.hub.uploads[self.path] += 1
        if part:
            self.hub.parts[oid, int(part)] = content
        elif digest(content) == oid:
            self.hub.objects[oid] = content
        else:
            raise Failure(400, "content and oid differ")
        return 200, b"", {"ETag": f'"{digest(content, "md5")}"'}

    def lfs_complete(self, oid):
        asked = json.loads(self.read())
        content = b"".join(self.hub.parts[oid, part["partNumber"]] for part in asked["parts"])
        if asked["oid"] != oid or digest(content) != oid:
            raise Failure(400, "content and oid differ")
        self.hub.objects[oid] = content
        return 200, {}

    def commit(self, repo_id, revision):
        lines = [json.loads(line) for line in self.read().splitlines()]
        self.check_login()
        repository, _, files = self.at(repo_id, revision)
        changed, message = dict(files), ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Failure(400, f"{value['path']} was not uploaded")
                changed[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del changed[value["path"]]
            else:
                raise Failure(400, f"unknown operation {key}")
        commit_id = repository.commit(revision, changed, message)
        place = f"{self.hub.endpoint}/{repo_id}/commit/{commit_id}"
        return 200, {"success": True, "commitOid": commit_id, "commitUrl": place, "hookOutput": ""}
