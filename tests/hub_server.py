"""A Hugging Face Hub on this machine: answers what huggingface_hub and `datasets` ask of it, from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


@dataclass
class Repository:
    """A repository: its files in each commit, oldest first.

    `readers` and `writers` hold tokens; everybody may read a repository without readers.
    """

    commits: dict[str, Files] = field(default_factory=dict)
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()

    def files(self, revision: str) -> tuple[str, Files] | None:
        """A commit and its files; None for an unknown revision."""
        head = next(reversed(self.commits), COMMIT)
        revision = head if revision == "main" else revision
        return (revision, self.commits.get(revision, {})) if revision in {*self.commits, head} else None


class Hub(ThreadingHTTPServer):
    """Data sets (`datasets/OWNER/NAME`) and models (`OWNER/NAME`), as the Hub's API shows them.

    Attributes:
        repositories: by their address.
        owners: the token of each owner who may create repositories.
        requests: how many there were.
        failures: status codes for the next requests of a method and a part of the path, or -n to send only n bytes.
    """

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Repository], owners: Mapping[str, str] = {}) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.owners = dict(repositories), dict(owners)
        self.requests = 0
        self.failures: dict[tuple[str, str], list[int]] = {}

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        """Answers requests until the end of the block."""
        with self:
            threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
            yield self
            self.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def token(self) -> str:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ")

    def reply(self, code: int, body: Any, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: self.sent])
        self.close_connection = self.sent is not None

    def fails(self) -> bool:
        """Whether this request fails on purpose, and has been answered."""
        self.server.requests += 1
        self.sent: int | None = None
        for (method, part), codes in self.server.failures.items():
            if codes and method == self.command and part in self.path:
                code = codes.pop(0)
                if code > 0:
                    self.reply(code, {"error": "on purpose"})
                    return True
                self.sent = -code
        return False

    def do_GET(self) -> None:
        if self.fails():
            return
        found = re.fullmatch(
            r"(?:/api)?/(?:models/)?((?:datasets/)?[\w-]+/[\w.-]+)(?:/(revision|tree|resolve)/([^/?]+)/?([^?]*))?(?:\?.*)?",
            self.path,
        )
        repository = self.server.repositories.get(found[1]) if found else None
        if repository is None or (repository.readers and self.token not in repository.readers):
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        state = repository.files(unquote(found[3] or "main"))
        if state is None:
            return self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        commit, files = state
        if found[2] in (None, "revision"):
            about = {"id": found[1].removeprefix("datasets/"), "sha": commit, "private": bool(repository.readers)}
            self.reply(200, about | {"tags": [], "siblings": [{"rfilename": name} for name in files]})
        elif found[2] == "tree":
            names = [name for name in files if name.startswith(f"{found[4]}/" if found[4] else "")]
            folders = {} if found[4] else {name.rpartition("/")[0] for name in names if "/" in name}
            entries = [
                {"type": "file", "oid": "0" * 40, "size": len(files[name]), "path": name}
                for name in names
                if "/" not in name or found[4]
            ]
            self.reply(
                200, entries + [{"type": "directory", "oid": "1" * 40, "size": 0, "path": name} for name in folders]
            )
        elif found[4] not in files:
            self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            self.file(files[found[4]], commit)

    do_HEAD = do_GET

    def file(self, content: bytes, commit: str) -> None:
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": etag, "X_Linked_Etag": etag, "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit}
        headers["Accept_Ranges"] = "bytes"
        if not self.headers["Range"]:
            return self.reply(200, content, **headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1 if last else None]
        where = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return self.reply(206, part, Content_Range=where, **headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.fails():
            return
        if self.path == "/api/validate-yaml":
            readme = json.loads(body)["content"]
            errors = [] if readme.startswith("---\n") else [{"message": "no metadata"}]
            return self.reply(400 if errors else 200, {"errors": errors, "warnings": []})
        if self.token not in self.server.owners.values():
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        found = re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)/(preupload|commit)/main", self.path)
        repository = self.server.repositories.get(found[1]) if found else None
        if repository is None:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if self.token not in repository.writers:
            return self.reply(403, {"error": "You don't have the rights"})
        if found[2] == "preupload":
            modes = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.reply(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        commit = hashlib.sha1(body).hexdigest()
        repository.commits[commit] = dict(repository.files("main")[1]) | files
        url = f"{self.server.address}/{found[1]}/commit/{commit}"
        return self.reply(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def create(self, wanted: dict[str, Any]) -> None:
        owner, address = wanted["organization"], f"{wanted['organization']}/{wanted['name']}"
        if address in self.server.repositories:
            return self.reply(
                409, {"error": "You already created this model repo", "url": f"{self.server.address}/{address}"}
            )
        if self.server.owners.get(owner) != self.token:
            return self.reply(403, {"error": f"You don't have the rights to create a model of {owner}"})
        private = wanted.get("visibility") == "private" or wanted.get("private")
        self.server.repositories[address] = Repository({}, (self.token,) if private else (), (self.token,))
        return self.reply(200, {"url": f"{self.server.address}/{address}"})
