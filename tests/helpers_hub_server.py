"""A Hub for tests: a real HTTP server on loopback with the part of the API that huggingface_hub needs to push a
repository in one commit and load it back. The server can refuse a token or drop a connection."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_may_write"


@dataclass
class Repository:
    """Branches, each a list of commits: (sha, {path: content})."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by sha
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": []})
    pull_requests: int = 0

    def add_commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch].append(sha)
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None


class HubServer(ThreadingHTTPServer):
    """Serves until `shutdown`.

    Attributes:
        repositories, blobs: the committed content; the uploaded large files.
        requests: "METHOD /path" of each request, in order.
        drop: pattern of requests whose connection is dropped, and how often.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.drop: tuple[str, int] = ("", 0)
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision) or ""]

    def must_drop(self, request: str) -> bool:
        with self.lock:
            self.requests.append(request)
            pattern, times = self.drop
            if times and re.search(pattern, request):
                self.drop = (pattern, times - 1)
                return True
            return False


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.server.must_drop(f"{self.command} {path}"):
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for method, pattern, needs_token, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                if needs_token and not may_write:
                    return self.answer(401, {"error": "Invalid credentials in Authorization header"})
                return action(self, body, *match.groups())
        self.answer(404, {"error": f"no route for {self.command} {path}"})

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **names}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def snapshot(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Sha and files of a revision; sends the error response if there is none."""
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self.headers.get("Authorization", "").endswith(TOKEN)):
            self.answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        sha = repository.resolve(revision)
        if sha is None:
            self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return None
        return sha, repository.commits[sha]

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if repo_id in self.server.repositories:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"}
            )
        repository = Repository(private=asked.get("visibility") == "private")
        repository.add_commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[repo_id] = repository
        self.answer(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        if found := self.snapshot(repo_id, revision or "main"):
            sha, files = found
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": repo_id, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None = None) -> None:
        if found := self.snapshot(repo_id, revision):
            within = f"{folder}/" if folder else ""
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
                for name, data in found[1].items()
                if name.startswith(within)
            ]
            if within and not entries:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            self.answer(200, entries)

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        repository = self.server.repositories[repo_id]
        if name in repository.branches:
            return self.answer(409, {"error": "Reference already exists"})
        repository.branches[name] = list(repository.branches["main"])
        self.answer(200, {})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return self.answer(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        if "license: nonsense" in content:
            return self.answer(400, {"errors": [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]})
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self.snapshot(repo_id, revision):
            files = []
            for asked in json.loads(body)["files"]:
                mode = "lfs" if asked["path"].endswith(".safetensors") else "regular"
                old = found[1].get(asked["path"])
                oid = None if old is None else hashlib.sha256(old).hexdigest() if mode == "lfs" else git_oid(old)
                files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer(200, {"files": files})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another sha256"})
        self.server.blobs[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repository = self.server.repositories[repo_id]
        files = dict(repository.commits[repository.resolve(revision) or ""])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        is_pull_request = "create_pr=1" in urlsplit(self.path).query
        if is_pull_request:
            repository.pull_requests += 1
            revision = f"refs/pr/{repository.pull_requests}"
            repository.branches[revision] = list(repository.branches["main"])
        sha = repository.add_commit(revision, files)
        answer = {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{repository.pull_requests}"
        self.answer(200, answer)

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        if found := self.snapshot(repo_id, revision):
            sha, files = found
            if name not in files:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            data = files[name]
            self.answer(200, data, X_Repo_Commit=sha, ETag=f'"{git_oid(data)}"')


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


ID = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, bool, Any]] = [
    ("POST", "/api/repos/create", True, Handler.create),
    ("POST", "/api/validate-yaml", False, Handler.validate),
    ("GET", f"/api/models/{ID}", False, Handler.info),
    ("GET", f"/api/models/{ID}/revision/(.+)", False, Handler.info),
    ("GET", f"/api/models/{ID}/tree/(refs/pr/\\d+|[^/]+)(?:/(.*))?", False, Handler.tree),
    ("POST", f"/api/models/{ID}/branch/(.+)", True, Handler.branch),
    ("POST", f"/api/models/{ID}/preupload/(.+)", True, Handler.preupload),
    ("POST", f"/{ID}.git/info/lfs/objects/batch", True, Handler.lfs_batch),
    ("PUT", "/lfs/(.+)", False, Handler.lfs_put),
    ("POST", f"/api/models/{ID}/commit/(.+)", True, Handler.commit),
    ("GET HEAD", f"/{ID}/resolve/(refs/pr/\\d+|[^/]+)/(.+)", False, Handler.resolve),
]
