"""A stand-in for W&B's server on this machine, as much of it as the real client (wandb-core) asks for.

    with WandbServer() as server:          # WANDB_BASE_URL=server.url
        ...
        (run,) = server.runs.values()
        run.history, run.config, run.summary, run.files

It answers GraphQL (who am I, create or resume a run, where to put files), takes the stream of history and summary, and
stores files.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Run:
    """What the server knows of one run."""

    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # of each streamed file, by their number
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # displayName, tags …
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows in the order of their places."""
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        """The last one sent."""
        lines = self.lines.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}

    def _resume_status(self, name: str) -> dict[str, Any]:
        history, events = (
            list(self.lines.get(file, {}).values()) for file in ("wandb-history.jsonl", "wandb-events.jsonl")
        )
        return {
            "id": name,
            "name": name,
            "displayName": self.about.get("displayName"),
            "summaryMetrics": json.dumps(self.summary),
            "config": json.dumps(self.config),
            "wandbConfig": json.dumps({"t": 1}),
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": 0,
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "tags": self.about.get("tags") or [],
            "notes": None,
        }


class WandbServer:
    """Serves on 127.0.0.1 until the `with` block ends.

    Attributes:
        url: for WANDB_BASE_URL.
        status: HTTP status of all answers, those below 300 with content; None takes requests and never answers.
        takes_rows: False refuses (403) the stream of rows alone.
        runs: by (project, id).
        sent: paths and bodies of all requests that were answered well.
    """

    def __init__(self, status: int | None = 200) -> None:
        self.status = status
        self.takes_rows = True
        self.runs: dict[tuple[str, str], Run] = {}
        self.sent: list[bytes] = []
        self.changed = threading.Condition()  # something was streamed
        self._closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status = owner.status
                if status is None:
                    owner._closing.wait()
                    self.close_connection = True
                    return
                if not owner.takes_rows and self.path.endswith("file_stream"):
                    status = 403
                text = json.dumps(
                    owner._answer(self.path, body) if status < 300 else {"error": "out of order"}
                ).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_PUT = do_GET = do_POST

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that was killed in the middle of a request

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections and takes no more."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_until(self, condition: Callable[[Run], object], timeout: float = 60) -> None:
        """Returns when there is a run of which `condition` is true."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(condition(run) for run in self.runs.values()), timeout), (
                "it never happened"
            )

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        with self.changed:
            self.sent.append(path.encode() + b"\n" + body)
            parts = unquote(urlsplit(path).path).strip("/").split("/")
            if parts[0] == "graphql":
                request = json.loads(body)
                return {"data": self._graphql(request["query"], request.get("variables") or {})}
            if parts[0] == "storage":  # storage/PROJECT/RUN/file…
                self.runs[parts[1], parts[2]].files["/".join(parts[3:])] = body
            elif parts[-1] == "file_stream":  # files/ENTITY/PROJECT/RUN/file_stream
                self._stream(self.runs[parts[2], parts[3]], json.loads(body))
                self.changed.notify_all()
            return {}

    def _stream(self, run: Run, request: dict[str, Any]) -> None:
        for name, chunk in (request.get("files") or {}).items():
            for number, line in enumerate(chunk["content"], start=chunk["offset"]):
                run.lines.setdefault(name, {})[number] = line
        if request.get("complete"):
            run.exit_code = request["exitcode"]

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = query.split("(")[0].split("{")[0].split()[1]
        project = {
            "id": "p",
            "name": variables.get("project"),
            "entity": {"id": "e", "name": variables.get("entity") or "somebody"},
        }
        match operation:
            case "Viewer":
                return {
                    "viewer": {
                        "id": "v",
                        "entity": "somebody",
                        "username": "somebody",
                        "email": "",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "RunResumeStatus":
                name = variables["name"]
                run = self.runs.get((variables["project"], name))
                return {"model": {**project, "bucket": run._resume_status(name) if run else None}}
            case "UpsertBucket":
                key = variables["project"], variables["name"]
                new = key not in self.runs
                run = self.runs.setdefault(key, Run())
                if variables.get("config"):
                    run.config = json.loads(variables["config"])
                run.about |= {name: value for name, value in variables.items() if value is not None}
                bucket = {
                    "id": key[1],
                    "name": key[1],
                    "displayName": run.about.get("displayName"),
                    "config": json.dumps(run.config),
                    "project": project,
                }
                return {"upsertBucket": {"bucket": bucket | {"historyLineCount": len(run.history)}, "inserted": new}}
            case "CreateRunFiles":
                where = f"{self.url}/storage/{variables['project']}/{variables['run']}"
                files = [{"name": name, "uploadUrl": f"{where}/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
            case _:
                return {}
