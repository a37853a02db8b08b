"""A stand-in of the Hub's HTTP interface, as huggingface_hub 2.4 calls it: repositories, preupload,
Git LFS in one piece and in several, commits as lines of JSON, trees, settings and cards.

What it is sent it holds against its sum, as the Hub does. It notes every request, and answers what
a test tells it to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

from llmpipe.front.push.licence_ids import LICENCES

TOKEN = "hf_" + "Wr1teT0ken" * 3
"""That may write to the namespaces of the stand-in."""

PART = 150_000
"""Bytes of a part, of what is sent in several."""

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": ATTRIBUTES})
    large: set[str] = field(default_factory=set)
    """Paths of what is kept by Git LFS."""
    commits: list[str] = field(default_factory=lambda: ["Initial commit"])

    @property
    def head(self) -> str:
        return hashlib.sha1("\n".join(self.commits).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    size: int


@dataclass(frozen=True)
class Answer:
    """What a request is answered with in place of what it asks for."""

    status: int
    said: str = ""
    headers: tuple[tuple[str, str], ...] = ()


Refuse = Callable[[Request], Answer | None]


class Hub:
    """Its state, and what a test does to it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.cards: dict[str, dict] = {}
        """Metadata of repositories of others, by kind and name: `model:NAME`."""
        self.objects: dict[str, bytes] = {}
        """What was sent by Git LFS, by its sha256, whether a commit names it or not."""
        self.parts: dict[str, dict[int, bytes]] = {}
        self.namespaces = {"me"}
        self.licences = set(LICENCES)
        self.requests: list[Request] = []
        self.refuse: Refuse = lambda request: None
        self.in_parts = False
        self.lock = threading.Lock()
        self.url = ""

    def asked(self, pattern: str) -> list[Request]:
        """The requests whose `METHOD path` has a pattern."""
        return [one for one in self.requests if re.search(pattern, f"{one.method} {one.path}")]

    @contextmanager
    def serving(self):
        """Meanwhile it answers at `url`."""
        hub = self

        class Handler(_Handler):
            state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def environment(hub: Hub) -> dict[str, str]:
    """What a command is given to find the stand-in, and nothing else."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement

    def log_message(self, *_):
        pass

    def do(self) -> None:
        hub = self.state
        length = int(self.headers.get("Content-Length") or 0)
        bearer = self.headers.get("Authorization")
        token = bearer.removeprefix("Bearer ") if bearer else None
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, token, length)
        with hub.lock:
            hub.requests.append(request)
        refused = hub.refuse(request)
        try:
            body = self._body(length)
        except ConnectionError:
            return
        if refused:
            return self._answer(refused.status, {"error": refused.said}, refused.headers)
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                with hub.lock:
                    status, document, *headers = answer(hub, request, body, *match.groups())
                return self._answer(status, document, headers)
        self._answer(404, {"error": f"no {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = do

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionError("the sender is gone")
            return body
        parts = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, document, headers=()) -> None:
        body = json.dumps(document).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except ConnectionError:
            pass  # of a test that kills whoever asked


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# --- answers --------------------------------------------------------------------------------------


def _closed(hub: Hub, request: Request, name: str = ""):
    """The answer to who may not; None to who may."""
    if request.token != TOKEN:
        return 401, {"error": "Invalid credentials in Authorization header"}
    if name and name not in hub.repos:
        return 404, {"error": "Repository not found"}, ("X-Error-Code", "RepoNotFound")
    return None


def create(hub: Hub, request: Request, body: bytes):
    asked = json.loads(body)
    if closed := _closed(hub, request):
        return closed
    if asked["organization"] not in hub.namespaces:
        said = "You don't have the rights to create a model under the namespace "
        return 403, {"error": f'{said}"{asked["organization"]}"'}
    name = f"{asked['organization']}/{asked['name']}"
    if not re.fullmatch(r"(?!.*(--|\.\.|\.git$))\w[\w.-]{0,94}\w|\w", asked["name"], re.ASCII):
        return 400, {"error": f"Invalid repository name: {asked['name']}"}
    if name in hub.repos:
        return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
    hub.repos[name] = Repo(private=asked.get("visibility") == "private")
    return 200, {"url": f"{hub.url}/{name}", "name": name}


def about(hub: Hub, request: Request, _body: bytes, kind: str, name: str, _revision=None):
    card = hub.cards.get(f"{kind}:{name}")
    if card is not None:
        return 200, {"id": name, "sha": "0" * 40, "private": False, "cardData": card}
    if closed := _closed(hub, request, name):
        return closed
    repo = hub.repos[name]
    return 200, {"id": name, "sha": repo.head, "private": repo.private}


def tree(hub: Hub, request: Request, _body: bytes, name: str, _revision: str):
    if closed := _closed(hub, request, name):
        return closed
    repo = hub.repos[name]
    return 200, [_listed(path, content, repo) for path, content in repo.files.items()]


def _listed(path: str, content: bytes, repo: Repo) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
    if path in repo.large:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["oid"] = git_sha1(f"pointer {sha256}".encode())
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry


RELATIONS = ("adapter", "finetune", "merge", "quantized")

TASKS = ("text-generation", "text-classification", "text-ranking", "feature-extraction", "other")
"""Of the Hub's tasks those of texts."""


def validate(hub: Hub, request: Request, body: bytes):
    """As the Hub looks at the metadata of a card."""
    data = _metadata(json.loads(body)["content"])
    if data is None:
        return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
    errors = [{"message": message} for message in _refused(hub, data)]
    return (400 if errors else 200), {"errors": errors, "warnings": []}


def _metadata(card: str) -> dict | None:
    match = re.match(r"---\n(.*?)\n---\n", card, re.S)
    return yaml.safe_load(match[1]) if match else None


def _refused(hub: Hub, data: dict) -> Iterator[str]:
    """What of a card's metadata is none that the Hub knows."""
    if data.get("license") not in hub.licences:
        yield f'"license" must be one of [{", ".join(sorted(hub.licences))}]'
    name = data.get("license_name")
    if name is not None and (data["license"] != "other" or not re.fullmatch(r"[\w.+-]+", name)):
        yield '"license_name" is of license: other, and an id'
    if data.get("pipeline_tag") not in TASKS:
        yield f'"pipeline_tag" must be one of [{", ".join(TASKS)}]'
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            yield f'"base_model" with value "{base}" is not valid. Use a model id from the Hub'
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        yield '"tags" must be an array of strings'
    for result in (data.get("model-index") or [{"results": []}])[0]["results"]:
        task, rows = result["task"], result["dataset"]
        complete = task["type"] and rows["type"] and rows["name"]
        if not complete or not all("type" in m and "value" in m for m in result["metrics"]):
            yield '"model-index" is not complete'


def preupload(hub: Hub, request: Request, body: bytes, name: str, _revision: str):
    if closed := _closed(hub, request, name):
        return closed
    repo = hub.repos[name]
    files = []
    for file in json.loads(body)["files"]:
        path, there = file["path"], repo.files.get(file["path"])
        large = path.endswith((".safetensors", ".gguf", ".bin")) or file["size"] > 10_000_000
        info = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if there is not None:
            sha256 = hashlib.sha256(there).hexdigest()
            info["oid"] = sha256 if path in repo.large else git_sha1(there)
        files.append(info)
    return 200, {"files": files}


def batch(hub: Hub, request: Request, body: bytes, name: str):
    if closed := _closed(hub, request, name):
        return closed
    objects = []
    for one in json.loads(body)["objects"]:
        action = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] not in hub.objects:
            upload = {"href": f"{hub.url}/storage/{one['oid']}?X-Amz-Signature=s1gned"}
            if hub.in_parts:
                count = -(-one["size"] // PART)
                urls = {str(i): f"{hub.url}/storage/{one['oid']}/{i}" for i in range(1, count + 1)}
                header = {"chunk_size": str(PART)} | urls
                upload = {"href": f"{hub.url}/storage/{one['oid']}/complete", "header": header}
            verify = {"href": f"{hub.url}/storage/{one['oid']}/verify"}
            action["actions"] = {"upload": upload, "verify": verify}
        objects.append(action)
    return 200, {"transfer": "basic", "objects": objects}


def store(hub: Hub, request: Request, body: bytes, oid: str):
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "the content has another sha256"}
    hub.objects[oid] = body
    return 200, {}


def store_part(hub: Hub, request: Request, body: bytes, oid: str, part: str):
    hub.parts.setdefault(oid, {})[int(part)] = body
    return 200, {}, ("ETag", f'"{hashlib.md5(body).hexdigest()}"')


def complete(hub: Hub, request: Request, body: bytes, oid: str):
    parts = hub.parts.pop(oid, {})
    asked = [part["partNumber"] for part in json.loads(body)["parts"]]
    return store(hub, request, b"".join(parts[number] for number in asked), oid)


def verify(hub: Hub, request: Request, body: bytes, oid: str):
    known = hub.objects.get(oid)
    size = json.loads(body)["size"]
    return (200, {}) if known is not None and len(known) == size else (404, {"error": "not there"})


def commit(hub: Hub, request: Request, body: bytes, name: str, _revision: str):
    if closed := _closed(hub, request, name):
        return closed
    repo = hub.repos[name]
    files, large = dict(repo.files), set(repo.large)
    lines = [json.loads(line) for line in body.splitlines()]
    header = lines[0]["value"]
    if header.get("parentCommit", repo.head) != repo.head:
        return 412, {"error": "A commit has happened since. Please refresh and try again."}
    for line in lines[1:]:
        value = line["value"]
        path = value["path"]
        if line["key"] == "deletedFile":
            del files[path]
            large.discard(path)
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                return 400, {"error": f"{path}: its content was not sent"}
            files[path] = hub.objects[value["oid"]]
            large.add(path)
        else:
            files[path] = base64.b64decode(value["content"])
            large.discard(path)
    card = _metadata(files["README.md"].decode()) if "README.md" in files else None
    if errors := list(_refused(hub, card)) if card else []:
        return 400, {"error": f"Invalid metadata in README.md: {errors[0]}"}
    repo.files, repo.large = files, large
    repo.commits.append(header["summary"])
    url = f"{hub.url}/{name}/commit/{repo.head}"
    return 200, {"commitUrl": url, "commitOid": repo.head}


def settings(hub: Hub, request: Request, body: bytes, name: str):
    if closed := _closed(hub, request, name):
        return closed
    hub.repos[name].private = json.loads(body)["visibility"] == "private"
    return 200, {}


_NAME = r"([^/]+/[^/]+)"
_OID = r"([0-9a-f]{64})"

ROUTES = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("GET", rf"/api/(model|dataset)s/{_NAME}", about),
    ("GET", rf"/api/(model|dataset)s/{_NAME}/revision/([^/]+)", about),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", tree),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", batch),
    ("PUT", rf"/storage/{_OID}", store),
    ("PUT", rf"/storage/{_OID}/(\d+)", store_part),
    ("POST", rf"/storage/{_OID}/complete", complete),
    ("POST", rf"/storage/{_OID}/verify", verify),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", commit),
    ("PUT", rf"/api/models/{_NAME}/settings", settings),
]
