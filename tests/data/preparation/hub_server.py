"""A stand-in for the Hugging Face hub on the loopback interface, for the real client: what the test puts there."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Its files, and what was asked of it."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files = files
        """Data set or model to path to content."""
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        """Paths whose next answer breaks off in the middle."""
        self.damaged: set[str] = set()
        """Paths that are sent with one byte changed."""
        self.sent: list[tuple[str, int]] = []
        """Path and first byte of every answer with content."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, with_content: bool) -> None:
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[:2] in (["api", "datasets"], ["api", "models"]):
            self._api("/".join(parts[2:4]), parts[4] if parts[4:] else "revision", "/".join(parts[6:]))
        elif parts[0] == "datasets":
            self._file("/".join(parts[1:3]), "/".join(parts[5:]), with_content)
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), "/".join(parts[4:]), with_content)
        else:
            self._send(404, {}, b"")

    def _api(self, name: str, kind: str, folder: str) -> None:
        if name not in self.hub.files:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        elif kind == "revision":
            files = self.hub.files[name]
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            self._send(200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        elif "recursive=true" in self.path.lower():
            entries = [self._entry(path, content) for path, content in self.hub.files[name].items()]
            self._send(200, {}, json.dumps(entries).encode())
        else:
            found = [path for path in self.hub.files[name] if path.rpartition("/")[0] == folder]
            entries = [self._entry(path, self.hub.files[name][path]) for path in sorted(found)]
            self._send(
                200 if found else 404, {} if found else {"X-Error-Code": "EntryNotFound"}, json.dumps(entries).encode()
            )

    @staticmethod
    def _entry(path: str, content: bytes) -> dict:
        digest = hashlib.sha256(content).hexdigest()
        lfs = {"oid": digest, "size": len(content), "pointerSize": 1}
        return {"type": "file", "path": path, "size": len(content), "oid": digest[:40], "lfs": lfs}

    def _file(self, name: str, path: str, with_content: bool) -> None:
        if name in self.hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"")
            return
        if path not in self.hub.files.get(name, {}):
            self._send(404, {"X-Error-Code": "EntryNotFound" if name in self.hub.files else "RepoNotFound"}, b"")
            return
        content = self.hub.files[name][path]
        etag = hashlib.sha256(content).hexdigest()
        if path in self.hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        head = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            head["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cut = with_content and path in self.hub.cut
        if with_content:
            self.hub.sent.append((path, first))
            self.hub.cut.discard(path)
        self._send(206 if first else 200, head, content[first:], cut)

    def _send(self, code: int, head: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in {**head, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = True


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Its address, as HF_ENDPOINT takes it."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
