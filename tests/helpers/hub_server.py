"""A stand-in for the Hugging Face hub: the part of its HTTP interface that huggingface_hub uses for models."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """The repositories of a server, and what was asked of it.

    Attributes:
        repositories: by ORG/NAME, the files of each commit by revision.
        requests: method and path of each request.
        url: where the server listens.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}  # what was uploaded as large files, by sha256
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a repository; return its hash."""
        text = json.dumps([name, branch, sorted((n, hashlib.sha256(c).hexdigest()) for n, c in files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.repositories.setdefault(name, {}).update({branch: files, commit: files})
        return commit

    def commit_of(self, name: str, revision: str) -> str | None:
        """Return the commit that a branch or commit stands for."""
        revisions = self.repositories.get(name, {})
        files = revisions.get(revision)
        return (
            next((r for r, f in revisions.items() if f is files and len(r) == 40), None) if files is not None else None
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub on this machine for a while."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._get(True)

    def do_HEAD(self) -> None:
        self._get(False)

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.blobs[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, b"")

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        path, content = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            if not self.headers.get("Authorization"):
                return self._json({"error": "Invalid credentials"}, 401)
            data = json.loads(content)
            name = f"{data['organization']}/{data['name']}" if data.get("organization") else data["name"]
            known = name in self.hub.repositories
            self.hub.repositories.setdefault(name, {"main": {}})
            return self._json({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409 if known else 200)
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.hub.url}/blobs/{o['oid']}"}},
                }
                for o in json.loads(content)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        parts = path.removeprefix("/api/models/").split("/")
        name, what, branch = "/".join(parts[:2]), parts[2], "/".join(parts[3:])
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]  # fmt: skip
            return self._json({"files": files})
        if what == "commit":
            return self._commit(name, branch, content)
        if what == "paths-info":
            wanted = parse_qs(content.decode()).get("paths", [])
            files = self.hub.repositories.get(name, {}).get(branch, {})
            return self._json([_entry(n, files[n]) for n in wanted if n in files])
        self._json({"error": f"no {path}"}, 404)

    def _commit(self, name: str, branch: str, content: bytes) -> None:
        files = dict(self.hub.repositories[name].get(branch, {}))
        for line in content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.add(name, files, branch)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _get(self, with_body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/"))
        name, resolved, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit = self.hub.commit_of(name, revision)
        files = self.hub.repositories.get(name, {}).get(revision, {})
        if not resolved or commit is None or file not in files:
            code = (
                "RepoNotFound"
                if name not in self.hub.repositories
                else "EntryNotFound"
                if commit
                else "RevisionNotFound"
            )
            return self._answer(404, b"", {"X-Error-Code": code})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}
        self._answer(200, files[file], headers, with_body)

    def _api(self, path: str) -> None:
        parts = path.split("/")
        name = "/".join(parts[:2])
        revision = "/".join(parts[3:]).removesuffix("/") or "main"
        if name not in self.hub.repositories:
            return self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.commit_of(name, revision)
        if commit is None:
            return self._json({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repositories[name][revision]
        if parts[2:3] == ["tree"]:
            return self._json([_entry(n, c) for n, c in files.items()])
        self._json(
            {"id": name, "modelId": name, "sha": commit, "tags": [], "siblings": [{"rfilename": n} for n in files]}
        )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        content = self.rfile.read(size := int(self.headers.get("Content-Length") or 0))
        if len(content) < size:
            raise ConnectionError("the client has ended")
        return content

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
