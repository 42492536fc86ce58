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

POLL_SECONDS = 0.01  # how long a server may take to notice that it is to end
SHA = "0123456789abcdef0123456789abcdef01234567"
SHAS = {"main": SHA, "v2": "2" * 40}
NAMES = {sha: name for name, sha in SHAS.items()}


class FakeHub:
    """Repositories as folders, and what was asked of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.endpoint = ""
        self.created: list[dict] = []
        self.commits: dict[str, dict[str, bytes]] = {}
        self.sent: list[str] = []
        self.tokens: set[str | None] = set()
        self.asked: list[str] = []
        self.gated: dict[str, str] = {}  # token by repository
        self.refused: dict[str, int] = {}  # status of a POST by a part of its path
        self.branches: list[str] = []  # that were made

    def folder(self, repo_id: str, revision: str) -> Path:
        """Return the files of a revision: main lies under its name, v2 under ``name@v2``."""
        is_main = revision in ("main", SHA)
        name = repo_id if is_main else f"{repo_id}@{NAMES.get(revision, revision)}"
        return self.root / name

    def answer(self, path: str, token: str | None) -> object:
        """Return the body of a GET: JSON, bytes of a file, or the code of an error."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo_id, rest = "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if len(rest) > 1 else "main"
        elif parts[2:3] == ["resolve"]:
            repo_id, revision = "/".join(parts[:2]), parts[3]
        else:
            return "RepoNotFound"
        if not (self.root / repo_id).is_dir():
            return "RepoNotFound"
        if self.gated.get(repo_id) not in (None, token):
            return "GatedRepo"
        folder = self.folder(repo_id, revision)
        if not folder.is_dir():
            return "RevisionNotFound"
        if parts[0] != "api":
            file = folder.joinpath(*parts[4:])
            return file.read_bytes() if file.is_file() else "EntryNotFound"
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
        if rest[:1] == ["tree"]:
            return [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in names.items()
            ]
        siblings = [{"rfilename": name} for name in names]
        return {"id": repo_id, "sha": SHAS.get(revision, revision), "siblings": siblings}

    def accept(self, path: str, body: bytes, query: str) -> object:
        """Return the answer to a POST, or the status of an error."""
        for part, status in self.refused.items():
            if part in path:
                return status
        if path == "/api/repos/create":
            self.created.append(request := json.loads(body))
            name = f"{request['organization']}/{request['name']}"
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return {"url": f"{self.endpoint}/{name}"}
        if "/branch/" in path:
            self.branches.append(path.split("/", 6)[6])
            return {}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file, **regular} for file in files]}
        if "/commit/" in path:
            lines = [json.loads(line)["value"] for line in body.splitlines()][1:]
            repo_id = "/".join(path.split("/")[3:5])
            self.commits[repo_id] = {v["path"]: base64.b64decode(v["content"]) for v in lines}
            answer = {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{SHA}", "commitOid": SHA}
            request = {"pullRequestUrl": f"{self.endpoint}/{repo_id}/discussions/1"}
            return {**answer, **(request if "create_pr=1" in query else {})}
        return {} if path == "/api/validate-yaml" else None


@contextmanager
def running_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve the repositories below a folder, and let the hub's client find them."""
    hub = FakeHub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, content):
            code = content if isinstance(content, str) else "RepoNotFound"
            is_error = content is None or isinstance(content, str | int)
            status = (403 if code == "GatedRepo" else 404) if is_error else 200
            if isinstance(content, int):
                status, code = content, ""
            body = {"error": "not here"} if is_error else content
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hash(body) & (2**63 - 1):x}"')
            revision = urlsplit(self.path).path.partition("/resolve/")[2].partition("/")[0]
            self.send_header("X-Repo-Commit", SHAS.get(revision, revision or SHA))
            if is_error:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if self.command == "GET" and "/resolve/" in path:
                hub.sent.append(path.split("/", 5)[5])
            hub.asked.append(path)
            self.reply(hub.answer(path, self.headers.get("Authorization")))

        def do_HEAD(self):
            self.do_GET()

        def do_POST(self):
            hub.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            address = urlsplit(self.path)
            self.reply(hub.accept(unquote(address.path), body, address.query))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
        patch.setattr(constants, "HF_XET_CACHE", str(root / "xet"), raising=False)
        # Transformers makes its client once, for the hub that it knows then.
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()
