"""A hub on loopback: enough of its HTTP interface to list, size and download the files of a folder."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@contextmanager
def serving(repositories, gated=()):
    """``{org/name: folder}`` under the address that is yielded, with the list of requests made."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer(body=True)

        def do_HEAD(self):
            self._answer(body=False)

        def do_POST(self):
            self._posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(body=True)

        def log_message(self, *args):
            pass

        def _answer(self, body):
            path = urlsplit(self.path).path
            requests.append((self.command, path))
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repo, rest = "/".join(parts[:2]), parts[2:]
            if repo in gated:
                return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            if repo not in repositories:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found."})
            folder = repositories[repo]
            files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
            if rest[:1] == ["tree"] or rest[:1] == ["paths-info"]:
                rows = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40} for n, p in files.items()
                ]
                return self._send(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
            if rest[:1] == ["resolve"]:
                data = files["/".join(rest[2:])].read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                return self._send(200, data, headers, body)
            return self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(), {})

        def _send(self, code, data, headers, body=True):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
