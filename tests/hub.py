"""A Hugging Face hub on this machine, as small as huggingface_hub's client lets it be: repositories are directories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

TOKEN = "hf_" + "s3cret" * 5
OWNER = "somebody"


class Hub:
    """Repositories below a directory; what was asked for, with which token."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.asked: list[tuple[str, str, str | None]] = []
        self.private: dict[str, bool] = {}
        self.endpoint = ""

    def files(self, repo: str) -> set[str]:
        """Names of a repository's files."""
        root = self.place / repo
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def commit(self, repo: str) -> str:
        """What a repository is at."""
        held = [(name, (self.place / repo / name).read_bytes()) for name in sorted(self.files(repo))]
        return hashlib.sha1(repr(held).encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Answer a request: status, what is sent as JSON or bytes, and headers."""
        if path == "/api/whoami-v2":
            return 200, {"name": OWNER, "type": "user"}, {}
        if path == "/api/validate-yaml":  # of a model card
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            exists = (self.place / name).exists()
            (self.place / name).mkdir(parents=True, exist_ok=True)
            if not exists:
                self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return 409 if exists else 200, {"url": f"{self.endpoint}/{name}"}, {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/([^/]+))?", path):
            if not (self.place / found[1]).is_dir():
                return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            siblings = [{"rfilename": name} for name in sorted(self.files(found[1]))]
            return 200, {"id": found[1], "sha": self.commit(found[1]), "siblings": siblings, "private": False}, {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            paths = [{"type": "file", "path": name, "size": 1, "oid": "b" * 40} for name in self.files(found[1])]
            return 200, paths, {}
        if re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}, {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.decode().splitlines()):
                target = self.place / found[1] / line["value"].get("path", "")
                if line["key"] == "file":
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
                elif line["key"] == "deletedFile":
                    target.unlink()
            return (
                200,
                {"success": True, "commitOid": self.commit(found[1]), "commitUrl": f"{self.endpoint}/{found[1]}"},
                {},
            )
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            file, at = self.place / found[1] / found[2], {"X-Repo-Commit": self.commit(found[1])}
            if not file.is_file():
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **at}
            content = file.read_bytes()
            return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **at}
        return 404, {"error": f"{method} {path}"}, {}


@contextmanager
def served(place: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let huggingface_hub find this hub instead of the true one, while inside."""
    hub = Hub(place / "repositories")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path, self.headers.get("Authorization")))
            status, sent, headers = hub.answer(self.command, path, body)
            content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(place / "hub-cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        patch.setattr(huggingface_hub.constants, name, value)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    patch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
