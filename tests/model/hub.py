"""A model hub on this machine, as far as downloads and small uploads go."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories as folders, and what was asked of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.endpoint = ""
        self.created: list[dict] = []
        self.commits: dict[str, dict[str, bytes]] = {}
        self.sent: list[str] = []
        self.tokens: set[str | None] = set()

    def files(self, repo_id: str) -> list[Path]:
        return sorted(p for p in (self.root / repo_id).glob("*") if p.is_file())

    def answer(self, path: str) -> object:
        """Return the body of a GET: JSON, bytes of a file, or None where there is nothing."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo_id, rest = "/".join(parts[2:4]), parts[4:]
            if not (self.root / repo_id).is_dir():
                return None
            if rest[:1] == ["tree"]:
                return [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                    for p in self.files(repo_id)
                ]
            siblings = [{"rfilename": p.name} for p in self.files(repo_id)]
            return {"id": repo_id, "sha": SHA, "siblings": siblings}
        if len(parts) == 5 and parts[2] == "resolve":
            file = self.root / parts[0] / parts[1] / parts[4]
            return file.read_bytes() if file.is_file() else None
        return None

    def accept(self, path: str, body: bytes) -> object:
        """Return the answer to a POST."""
        if path == "/api/repos/create":
            self.created.append(request := json.loads(body))
            return {"url": f"{self.endpoint}/{request['organization']}/{request['name']}"}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file, **regular} for file in files]}
        if "/commit/" in path:
            lines = [json.loads(line)["value"] for line in body.splitlines()][1:]
            repo_id = "/".join(path.split("/")[3:5])
            self.commits[repo_id] = {v["path"]: base64.b64decode(v["content"]) for v in lines}
            return {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{SHA}", "commitOid": SHA}
        return {} if path == "/api/validate-yaml" else None


@contextmanager
def running_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve the repositories below a folder, and let the hub's client find them."""
    hub = FakeHub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, content):
            status = 404 if content is None else 200
            body = {"error": "not here"} if content is None else content
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hash(body) & (2**63 - 1):x}"')
            self.send_header("X-Repo-Commit", SHA)
            if content is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if self.command == "GET" and "/resolve/" in path:
                hub.sent.append(path.rsplit("/", 1)[1])
            self.reply(hub.answer(path))

        def do_HEAD(self):
            self.do_GET()

        def do_POST(self):
            hub.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(hub.accept(unquote(urlsplit(self.path).path), body))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
        patch.setattr(constants, "HF_XET_CACHE", str(root / "xet"), raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()
