"""A small server that speaks as much of the Hub's API as huggingface_hub uses to read a model.

It keeps a log of what was asked, answers ranges, sends weights from a second host as the Hub does, offers Xet, and
fails on request: a connection that breaks off in the middle of a file, damaged bytes, a private or gated model, an
outage.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECOND_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Asked:
    """A request that the server got."""

    method: str
    host: str  # the Hub's own, or the one that it sends weights from
    path: str
    file: str | None  # of the model, where it was a file that was asked for
    first_byte: int | None  # of the range asked for
    token: str | None


@dataclass
class Model:
    """A model on the server: its files by commit."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]  # commit by name
    token: str | None = None  # without it, the model is reported as missing
    gated: bool = False  # to everyone


@dataclass
class HubServer:
    """Serves models until the block ends."""

    models: dict[str, Model] = field(default_factory=dict)
    log: list[Asked] = field(default_factory=list)
    break_after: dict[str, list[int]] = field(default_factory=dict)  # bytes that the next answers for a file give
    damaged: list[str] = field(default_factory=list)  # files whose next answer has a wrong byte, once per entry
    held: dict[str, threading.Event] = field(default_factory=dict)  # files that are not sent before the event
    xet: set[str] = field(default_factory=set)  # files that are also offered through Xet
    known_tokens: list[str] | None = None  # where it is a list, any other token is refused
    status: int | None = None  # what every request is answered with, whatever it asks

    def add(self, name: str, files: Path | dict[str, bytes], commit: str = COMMIT, branch: str = "main") -> Model:
        """Puts a folder's files on a branch of a model."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        model = self.models.setdefault(name, Model({}, {}))
        model.commits[commit] = files
        model.branches[branch] = commit
        return model

    def fetched(self) -> list[str]:
        """The files that were sent, in order, each as often as it was."""
        return [asked.file for asked in self.log if asked.method == "GET" and asked.file]

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # the name that http.server looks for
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.status is not None:
            self._note(path, None)
            self._send(self.hub.status, b'{"error": "as the test wants it"}')
        elif self._bad_token():
            self._note(path, None)
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            self._file(match[3], self.hub.models[match[1]].commits[match[2]][match[3]], {})
        else:
            self._refuse(404, "", "no such address")

    def _bad_token(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.known_tokens is not None and token not in ["", *self.hub.known_tokens]

    def _note(self, path: str, file: str | None) -> None:
        bearer, wanted = self.headers.get("Authorization"), self.headers.get("Range")
        self.hub.log.append(
            Asked(
                method=self.command,
                host=self.headers["Host"].partition(":")[0],
                path=path,
                file=file,
                first_byte=int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else None,
                token=bearer.removeprefix("Bearer ") if bearer else None,
            )
        )

    def _commit(self, name: str, revision: str) -> str | None:
        """The commit to serve, or None when the request has been refused."""
        model = self.hub.models.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if model is None or (model.token and token != model.token):
            if token:
                self._refuse(404, "RepoNotFound", "Repository not found")
            else:
                self._refuse(401, "RepoNotFound", "Invalid username or password.")
            return None
        if model.gated:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
            return None
        commit = revision if revision in model.commits else model.branches.get(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _describe(self, name: str, revision: str) -> None:
        self._note(self.path, None)
        if commit := self._commit(name, revision):
            siblings = []
            for file, data in self.hub.models[name].commits[commit].items():
                sibling: dict[str, object] = {"rfilename": file, "size": len(data), "blobId": _git_hash(data)}
                if _is_large(file):
                    sibling["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
                siblings.append(sibling)
            document = {"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings}
            self._send(200, json.dumps(document).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        commit = self._commit(name, revision)
        if commit is None:
            self._note(self.path, None)
            return
        data = self.hub.models[name].commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            self._note(self.path, None)
            self._refuse(404, "EntryNotFound", "Entry not found", headers)
        elif _is_large(file):
            self._note(self.path, None)
            port = self.server.server_address[1]
            headers |= {
                "X-Linked-Size": str(len(data)),
                "X-Linked-ETag": f'"{_sha256(data)}"',
                "Location": f"http://localhost:{port}/cdn/{name}/{commit}/{file}?signature=1",
            }
            if file in self.hub.xet:
                headers |= {
                    "X-Xet-Hash": _sha256(b"xet" + data),
                    "Link": f'<{self.hub.url}/api/models/{name}/xet-read-token/{commit}>; rel="xet-auth"',
                }
            self._send(302, b"", headers)
        else:
            self._file(file, data, {**headers, "ETag": f'"{_git_hash(data)}"'})

    def _file(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        self._note(self.path, file)
        start = self.hub.log[-1].first_byte or 0
        if self.command == "GET" and file in self.hub.held:
            self.hub.held[file].wait(60)
        if self.command == "GET" and file in self.hub.damaged:
            self.hub.damaged.remove(file)
            data = data[:-1] + bytes([data[-1] ^ 1])
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        breaks = self.hub.break_after.get(file)
        sent = breaks.pop(0) if breaks and self.command == "GET" else None
        self._send(206 if start else 200, data[start:], headers, sent)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), {**extra, **(headers or {})})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, broken_after: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:broken_after])
            if broken_after is not None:
                self.wfile.flush()
                self.close_connection = True


@contextlib.contextmanager
def hub_in_use(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A server that huggingface_hub takes for the Hub in this process, with a cache of its own and no waiting.

    huggingface_hub reads its environment when it is imported, which may have been earlier; so its constants are set.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with HubServer() as server:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what is kept when a connection breaks off
        patch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        close_session()  # connections to a server of an earlier test
        yield server
        close_session()


def _is_large(file: str) -> bool:
    return file.endswith(".safetensors")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
