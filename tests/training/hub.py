"""A stand-in of the Hub's HTTP interface: as much of it as pushing a model needs, with faults at will.

Large files go by the Git LFS batch interface (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), commits
as the lines of JSON that huggingface_hub sends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a-token-for-tests"
READ_TOKEN = "hf_one-that-only-reads"
LARGE = (".safetensors",)


@dataclass
class Repository:
    """Branches, each a mapping from path to content."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds, what it was asked, and which faults it has left."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """of Git LFS, by SHA-256"""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """method, path and Authorization of each request"""
    dropped_uploads: int = 0
    """uploads of large files whose connection will be closed half-way"""
    dropped_commits: int = 0
    """commits that will be done, but whose connection is closed before the answer"""

    def asked(self, method: str, part: str) -> int:
        """How many requests had this method and this part in their path."""
        return sum(found == method and part in path for found, path, _ in self.requests)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of the loopback address."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the tests look at `Hub.requests`."""

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        self.state.requests.append(("PUT", path, self.headers.get("Authorization", "")))
        if self.state.dropped_uploads:
            self.state.dropped_uploads -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self._body()
        digest = path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != digest:
            self._answer(400, {"error": "the content is not what was announced"})
            return
        self.state.objects[digest] = content
        self._answer(200, {})

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization", "")
        self.state.requests.append((self.command, path, authorization))
        body = self._body()
        if authorization not in (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}"):
            self._answer(401, {"error": "Invalid username or password."})
        elif self.command == "POST" and authorization != f"Bearer {TOKEN}":
            self._answer(403, {"error": "You don't have the rights"})
        elif path == "/api/whoami-v2":
            self._answer(200, {"type": "user", "name": "owner", "orgs": []})
        elif path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif (found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/([^/]+))?", path)) and found[
            1
        ] in self.state.repositories:
            self._repository(found[1], found[2], found[3], body)
        else:
            self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or 'owner'}/{wanted['name']}"
        if name in self.state.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.state.url}/{name}"})
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.state.repositories[name] = Repository(private)
        self.state.repositories[name].branches["main"][".gitattributes"] = b"*.safetensors filter=lfs\n"
        self._answer(200, {"url": f"{self.state.url}/{name}"})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            made = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.state.objects:
                made["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{entry['oid']}"}}
            objects.append(made)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _repository(self, name: str, verb: str | None, revision: str | None, body: bytes) -> None:
        repository = self.state.repositories[name]
        branch = repository.branches.get(revision or "main")
        if verb == "branch":
            self._answer(409 if branch is not None else 200, {})
            repository.branches.setdefault(str(revision), {})
        elif branch is None:
            self._answer(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        elif verb in (None, "revision"):
            self._answer(200, {"id": name, "modelId": name, "private": repository.private, "sha": "0" * 40})
        elif verb == "tree":
            self._answer(200, [self._entry(path, content) for path, content in branch.items()])
        elif verb == "preupload":
            self._answer(200, {"files": [self._mode(entry, branch) for entry in json.loads(body)["files"]]})
        elif verb == "commit":
            self._commit(name, repository, branch, body)
        else:
            self._answer(400, {"error": f"unknown verb {verb}"})

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}

    def _mode(self, entry: dict[str, Any], branch: dict[str, bytes]) -> dict[str, Any]:
        large = entry["path"].endswith(LARGE)
        there = branch.get(entry["path"])
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_id(there)
        made = {"path": entry["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        return made if oid is None else made | {"oid": oid}

    def _commit(self, name: str, repository: Repository, branch: dict[str, bytes], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branch[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del branch[value["path"]]
        repository.commits.append(lines[0]["value"])
        if self.state.dropped_commits:
            self.state.dropped_commits -= 1
            self.close_connection = True
            self.connection.close()
            return
        oid = hashlib.sha1(body).hexdigest()
        self._answer(200, {"commitOid": oid, "commitUrl": f"{self.state.url}/{name}/commit/{oid}", "success": True})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: Any, code: str | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)


def git_id(content: bytes) -> str:
    """The object id that git gives to a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
