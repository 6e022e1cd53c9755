"""A Hugging Face Hub on this machine, kept in memory: enough of its HTTP interface for real clients to push and pull.

Repositories of models with branches, a commit per push, public and private; two users with a token each. No LFS and no
Xet: every file is a regular one. Clients are told of it by the environment (`Hub.env`), which `huggingface_hub` reads
when it is imported, so they run in processes of their own.

    with Hub.running() as hub:
        run(code, env=hub.env())         # create_repo, upload_folder, from_pretrained("alice/tiny"), ...
        hub.files("alice/tiny")          # {"config.json": b"...", ...} at the head of main
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USERS = {"hf_alice": "alice", "hf_bob": "bob"}
TOKENS = {user: token for token, user in USERS.items()}
TIME = "2026-01-01T00:00:00.000Z"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
REPO = r"(?P<repo>[^/]+/[^/]+)"
LINKED = re.compile(r"https?://\S+|LICENSE(\.md|\.txt)?")
SLUG = re.compile(r"[a-z0-9._-]+")
# A sample of the Hub's list of licences.
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "gemma", "llama2", "llama3", "other", "unknown"}


class Refusal(Exception):
    """An answer that is no success: its status, the Hub's code for it, what it says."""

    def __init__(self, status: int, code: str, message: str, commit: str | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.commit = status, code, message, commit


@dataclass
class Repo:
    """A repository: every commit's files, and the commit each branch is at."""

    id: str
    is_private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> str:
        """Adds a commit to a branch."""
        oid = hashlib.sha1(f"{self.id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.titles.append(title)
        return oid

    def find(self, revision: str) -> str:
        """The commit of a branch or a commit's hash."""
        found = self.branches.get(revision, revision)
        if found not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found


def blob_id(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata_errors(content: str) -> list[str]:
    """What the Hub has against a card's metadata (the checks that ours could fail)."""
    block = re.match(r"---\r?\n([\s\S]*?)\r?\n---\s*(\n|$)", content)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    bases = data.get("base_model", [])
    errors = [
        f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for base in ([bases] if isinstance(bases, str) else bases)
        if not REPO_ID.fullmatch(base)
    ]
    if data.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if not SLUG.fullmatch(data.get("license_name", "x")):
        errors.append('"license_name" must be an id like my-license-1.0')
    if not LINKED.fullmatch(data.get("license_link", "LICENSE")):
        errors.append('"license_link" must be LICENSE, LICENSE.md or a URL')
    if data.get("base_model_relation", "merge") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    if not all(isinstance(one, str) for name in ("tags", "datasets") for one in data.get(name, [])):
        errors.append('"tags" and "datasets" must be lists of strings')
    return errors


@dataclass
class Hub:
    """The server's memory, and what tests ask of it; while `is_broken` it answers that it cannot."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""
    is_broken: bool = False
    lock: RLock = field(default_factory=RLock)

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["Hub"]:
        """A hub that answers at `endpoint` for as long as the context lasts."""
        hub = cls()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def env(self, token: str | None = TOKENS["alice"]) -> dict[str, str]:
        """What a client's environment needs; the empty token is none."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        return self.repos[repo].commits[self.repos[repo].find(revision)]

    def write(self, repo: str, files: dict[str, bytes], is_private: bool = False) -> str:
        """Puts files into a repository, as somebody else would; returns the commit."""
        one = self.repos.get(repo) or self.create(repo, is_private)
        return one.commit("main", self.files(repo) | files, "Written by the test")

    def create(self, repo: str, is_private: bool) -> Repo:
        """A new repository with an empty first commit."""
        self.repos[repo] = Repo(repo, is_private)
        self.repos[repo].commit("main", {}, "initial commit")
        return self.repos[repo]

    def readable(self, repo: str, user: str | None) -> Repo:
        """A repository, where there is one that this user may see."""
        found = self.repos.get(repo)
        if found is None or (found.is_private and user != repo.partition("/")[0]):
            status, message = (401, "Invalid username or password.") if user is None else (404, "Repository not found")
            raise Refusal(status, "RepoNotFound", message)
        return found

    def writable(self, repo: str, user: str | None) -> Repo:
        """A repository that this user may push to."""
        found = self.readable(repo, user)
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if user != repo.partition("/")[0]:
            raise Refusal(403, "", f"You do not have permission to write to {repo}")
        return found


class _Handler(BaseHTTPRequestHandler):
    """HTTP in, the hub's answers out; one method per endpoint, found by `ROUTES`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Tests' output stays readable."""

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(path)}")
            try:
                if self.hub.is_broken:
                    raise Refusal(503, "", "Service unavailable")
                self.user = self._user()
                self._route(path)
            except Refusal as refusal:
                self._refuse(refusal)

    do_GET = do_HEAD = do_POST = do_DELETE = _handle

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _route(self, path: str) -> None:
        for method, pattern, answer in ROUTES:
            if (match := re.fullmatch(pattern, path)) and method == self.command.replace("HEAD", "GET"):
                answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                return
        raise Refusal(404, "", f"This hub has no {self.command} {path}")

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, refusal: Refusal) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": refusal.message}
        headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
        headers |= {"X-Repo-Commit": refusal.commit} if refusal.commit else {}
        self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _values(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        token = {"displayName": "test", "role": "write"}
        auth = {"type": "access_token", "accessToken": token}
        self._json({"type": "user", "id": self.user, "name": self.user, "orgs": [], "auth": auth})

    def create(self) -> None:
        values = self._values()
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        owner = values.get("organization") or self.user
        if owner != self.user:
            raise Refusal(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{values['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}", "name": repo}
        if repo in self.hub.repos:
            self._json(url | {"error": "You already created this model repo"}, 409)
            return
        self.hub.create(repo, values.get("visibility") == "private" or bool(values.get("private")))
        self._json(url)

    def validate(self) -> None:
        content = self._values()["content"]
        if errors := metadata_errors(content):
            self._json({"errors": [{"message": error} for error in errors], "warnings": []}, 400)
            return
        warnings = [] if content.startswith("---") else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": [], "warnings": warnings})

    def info(self, repo: str, revision: str = "") -> None:
        found = self.hub.readable(repo, self.user)
        commit = found.find(revision or "main")
        files = found.commits[commit]
        block = re.match(r"---\n([\s\S]*?)\n---", files.get("README.md", b"").decode())
        card = yaml.safe_load(block[1]) if block else {}
        self._json(
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": commit,
                "private": found.is_private,
                "gated": False,
                "disabled": False,
                "lastModified": TIME,
                "createdAt": TIME,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags", []),
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": [{"rfilename": name} for name in sorted(files)],
                "spaces": [],
            }
        )

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        found = self.hub.readable(repo, self.user)
        prefix = f"{folder}/" if folder else ""
        files = {name: body for name, body in found.commits[found.find(revision)].items() if name.startswith(prefix)}
        if folder and not files:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        is_recursive = "recursive=true" in urlsplit(self.path).query.lower()
        shown = {name: _entry(name, body) for name, body in files.items() if "/" not in name.removeprefix(prefix)}
        if is_recursive:
            shown = {name: _entry(name, body) for name, body in files.items()}
        self._json([shown[name] for name in sorted(shown)])

    def paths_info(self, repo: str, revision: str) -> None:
        found = self.hub.readable(repo, self.user)
        files = found.commits[found.find(revision)]
        self._json([_entry(name, files[name]) for name in parse_qs(self.body.decode())["paths"] if name in files])

    def refs(self, repo: str) -> None:
        branches = self.hub.readable(repo, self.user).branches
        named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches.items()]
        self._json({"branches": named, "converts": [], "tags": [], "pullRequests": []})

    def branch(self, repo: str, name: str) -> None:
        found = self.hub.writable(repo, self.user)
        if name in found.branches:
            raise Refusal(409, "", f"Reference {name} already exists")
        found.branches[name] = found.find(self._values().get("startingPoint", "main"))
        self._json({})

    def preupload(self, repo: str, revision: str) -> None:
        found = self.hub.writable(repo, self.user)
        files = found.commits[found.find(revision)]
        answers = []
        for name in (one["path"] for one in self._values()["files"]):
            oid = blob_id(files[name]) if name in files else None
            answers.append({"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def commit(self, repo: str, revision: str) -> None:
        found = self.hub.writable(repo, self.user)
        if revision not in found.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, header = dict(found.commits[found.find(revision)]), {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                header = value
            else:
                OPERATIONS[operation["key"]](files, value)
        if header.get("parentCommit", found.branches[revision]) != found.branches[revision]:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        errors = metadata_errors(files["README.md"].decode()) if "README.md" in files else []
        if errors:
            raise Refusal(400, "", f"Your push was rejected: {errors[0]}")
        oid = found.commit(revision, files, header["summary"])
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": None})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self.hub.readable(repo, self.user)
        commit = found.find(revision)
        content = found.commits[commit].get(name)
        if content is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", commit)
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            self._send(200, content, headers)
            return
        first = int(start[1])
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self._send(206, content[first:], headers)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "oid": blob_id(content), "size": len(content)}


def _add(files: dict[str, bytes], value: dict[str, Any]) -> None:
    content = value["content"]
    files[value["path"]] = base64.b64decode(content) if value["encoding"] == "base64" else content.encode()


def _delete_file(files: dict[str, bytes], value: dict[str, Any]) -> None:
    if value["path"] not in files:
        raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
    del files[value["path"]]


def _delete_folder(files: dict[str, bytes], value: dict[str, Any]) -> None:
    prefix = value["path"].rstrip("/") + "/"
    for name in [name for name in files if name.startswith(prefix)]:
        del files[name]


def _copy(files: dict[str, bytes], value: dict[str, Any]) -> None:
    files[value["path"]] = files[value["srcPath"]]


OPERATIONS: dict[str, Callable[[dict[str, bytes], dict[str, Any]], None]] = {
    "file": _add,
    "deletedFile": _delete_file,
    "deletedFolder": _delete_folder,
    "copyFile": _copy,
}
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{REPO}", _Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", f"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", f"/api/models/{REPO}/refs", _Handler.refs),
    ("POST", f"/api/models/{REPO}/branch/(?P<name>[^/]+)", _Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
)
