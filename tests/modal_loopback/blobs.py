"""The HTTP side: blobs that are too large for gRPC, and files of volumes."""

import hashlib
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Blobs:
    """PUT and GET under /blobs/, GET of volumes' files under /volumes/, on a port of 127.0.0.1."""

    def __init__(self, volumes: Path):
        self.contents: dict[str, bytes] = {}
        self.volumes = volumes
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"
        threading.Thread(target=self._httpd.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()

    def volume_file(self, volume: str, path: str) -> str:
        """The address of a volume's file."""
        return f"{self.url}/volumes/{volume}/{urllib.parse.quote(path.lstrip('/'))}"

    def read(self, path: str) -> bytes | None:
        kind, _, name = urllib.parse.unquote(path).strip("/").partition("/")
        if kind == "blobs":
            return self.contents.get(name)
        file = self.volumes / name
        return file.read_bytes() if file.is_file() else None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        blobs = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                blobs.contents[self.path.rpartition("/")[2]] = body
                self._answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

            def do_GET(self) -> None:
                body = blobs.read(self.path)
                self._answer(404 if body is None else 200, body or b"", {})

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Nothing: the tests' own output is enough."""

        return Handler
