"""A stand-in for the Hugging Face hub on the loopback: one data set, as much of the protocol as its client asks for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@contextmanager
def serve(name: str, files: dict[str, bytes]) -> Iterator[str]:
    """Serve the files of the data set called `name` (owner/name); gives the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if file := re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.+)", path):
                content = files.get(file[1])
                return self.answer(content, ETag=f'"{hashlib.sha1(content or b"").hexdigest()}"')
            if tree := re.fullmatch(rf"/api/datasets/{name}/tree/[^/]+/?(.*)", path):
                return self.answer(json.dumps(list(entries(files, tree[1]))).encode())
            if path.startswith(f"/api/datasets/{name}"):
                siblings = [{"rfilename": file} for file in files]
                return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            return self.answer(None)

        do_HEAD = do_GET

        def answer(self, content: bytes | None, **headers: str) -> None:
            self.send_response(404 if content is None else 200)
            headers |= {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content or b""))}
            if content is None:
                headers["X-Error-Code"] = "EntryNotFound"
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def entries(files: dict[str, bytes], folder: str) -> Iterator[dict]:
    prefix = f"{folder}/" if folder else ""
    below = [file for file in files if file.startswith(prefix)]
    for name in sorted({file[len(prefix) :].split("/")[0] for file in below}):
        path = prefix + name
        kind = {"type": "file", "size": len(files[path])} if path in files else {"type": "directory", "size": 0}
        yield kind | {"path": path, "oid": "b" * 40}
