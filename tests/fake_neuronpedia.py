"""A Neuronpedia on this computer: a real HTTP server with its rules, limits and oddities, and faults on demand."""

import gzip
import json
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema

SCHEMA = json.loads((Path(__file__).parent.parent / "tl_circuits/neuronpedia/graph-schema.json").read_text())
KEY = "sk-np-very-secret"


class FakeNeuronpedia:
    """What the server holds, what it was asked, and the faults it is to show.

    ``faults``: kinds used up one by question: slow, reset, cut-gzip, not-json, drip, drip-head, large, echo, 429, 500.
    """

    def __init__(self):
        self.features, self.models, self.source_sets = {}, {"tiny-model"}, {"tiny-set"}
        self.graphs, self.asked, self.faults, self.latency, self.signed, self.keys_seen = {}, [], [], 0.0, {}, []
        self.owners = {}
        self.url = ""

    def add_feature(self, model, layer, index, description, kind="np_max-act"):
        self.features[model, f"{layer}-tiny-set", str(index)] = {
            "modelId": model,
            "layer": f"{layer}-tiny-set",
            "index": str(index),
            "frac_nonzero": 0.01,
            "maxActApprox": 9.0,
            "explanations": [
                {"description": "another way to say it", "typeName": "oai_token-act-pair"},
                {"description": description, "typeName": kind},
            ]
            if description
            else [],
            "pos_str": [" Austin", " Dallas"],
            "neg_str": [" the"],
            "pos_values": [1.0, 0.5],
            "neg_values": [-1.0],
            "activations": [
                {"tokens": ["a", " city", "!"], "values": [0.0, 4.0, 1.0], "maxValue": 4.0, "maxValueTokenIndex": 1}
            ],
        }

    def answer(self, method, path, body, headers):
        """Status, JSON."""
        keyed = headers.get("x-api-key") == KEY
        if path.startswith("/api/features"):
            rows = [self.features.get((q["modelId"], q["layer"], str(q["index"]))) for q in json.loads(body)]
            return 200, [row for row in reversed(rows) if row]  # unknown ones are left out; the order means nothing
        if match := re.fullmatch(r"/api/feature/([^/]+)/([^/]+)/(\d+)", path):
            found = self.features.get(match.groups())
            return (200, found) if found else (404, {"error": "Not Found"})
        if path == "/api/explanation/search":
            return self.search(json.loads(body))
        if path == "/api/graph/signed-put":
            query = json.loads(body)
            if not keyed:
                return 401, {"error": "This endpoint requires authorization."}
            if not query["filename"].endswith(".json"):
                return 400, {"error": "Invalid file extension - must be .json"}
            if not 1024 <= query["contentLength"] <= 104857600:
                return 500, {"error": "Failed to generate signed URL"}
            name = f"put{len(self.signed)}"
            self.signed[name] = {"length": query["contentLength"], "data": None}
            return 200, {"url": f"{self.url}/bucket/{name}?signature=x", "key": name, "putRequestId": name}
        if path.startswith("/bucket/") and method == "PUT":
            slot = self.signed[path.split("/")[2].split("?")[0]]
            if len(body) != slot["length"]:
                return 403, {"error": "SignatureDoesNotMatch"}
            slot["data"] = gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body
            return 200, {}
        if path == "/api/graph/save-to-db":
            return self.save(json.loads(body)["putRequestId"]) if keyed else (401, {"error": "no"})
        if match := re.fullmatch(r"/api/graph/([^/]+)/([^/]+)", path):
            found = self.graphs.get(match.groups())
            if found is None:
                return 404, {"error": "Not Found"}
            meta = found["metadata"]
            return 200, {
                "id": "1", "modelId": meta["scan"], "slug": meta["slug"], "prompt": meta["prompt"],
                "promptTokens": meta["prompt_tokens"], "titlePrefix": "", "url": f"{self.url}/bucket/x",
            }  # fmt: skip
        return 404, {"error": "Not Found"}

    def search(self, query):
        if len(query["query"]) < 3:
            return 400, {"message": "query must be at least 3 characters"}
        hits = [
            {
                "modelId": m,
                "layer": s,
                "index": i,
                "description": f["explanations"][-1]["description"],
                "cosine_similarity": 0.5,
            }
            for (m, s, i), f in sorted(self.features.items())
            if m == query["modelId"]
            and s in query["layers"]
            and f["explanations"]
            and query["query"] in f["explanations"][-1]["description"]
        ]
        page = hits[query["offset"] : query["offset"] + 20]
        more = len(page) == 20
        return 200, {
            "results": page,
            "resultsCount": len(page),
            "hasMore": more,
            "nextOffset": query["offset"] + 20 if more else None,
        }

    def save(self, name):
        graph = json.loads(self.signed[name]["data"])
        wrong = [e.message for e in jsonschema.Draft7Validator(SCHEMA).iter_errors(graph)]
        if wrong:
            return 400, {"error": "Invalid graph format.", "details": wrong}
        meta = graph["metadata"]
        if re.search(r"[^a-zA-Z0-9_.-]", meta["scan"] + meta["slug"]):
            return 400, {"error": "Invalid scan or slug."}
        if meta["scan"] not in self.models:
            return 400, {"error": "ERR_MODEL_DOES_NOT_EXIST"}
        source_set = meta.get("info", {}).get("neuronpedia_source_set")
        if source_set and source_set not in self.source_sets:
            return 500, {"error": "Failed to generate signed URL"}  # the foreign key
        if self.owners.get((meta["scan"], meta["slug"])) == "another":
            return 400, {"error": "This model already has this slug, and it was created by another user."}
        self.graphs[meta["scan"], meta["slug"]] = graph
        return 200, {
            "message": "Graph saved to database",
            "url": f"https://www.neuronpedia.org/{meta['scan']}/graph?slug={meta['slug']}",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        fake = self.server.fake
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fake.asked.append((self.command, self.path))
        fake.keys_seen.append((self.path, self.headers.get("x-api-key")))
        time.sleep(fake.latency)
        fault = fake.faults.pop(0) if fake.faults else None
        if fault == "slow":
            time.sleep(0.5)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "not-json":
            return self.reply(200, b"<html>soon back</html>")
        if fault == 429:
            return self.reply(429, b'{"error": "Too many requests"}', {"Retry-After": "0.2"})
        if fault == 500:
            return self.reply(500, b"oops")
        if fault == "drip":  # a byte now and then, for ever: no time limit of a socket ever passes
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            try:
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            except OSError:
                return
        if fault == "drip-head":
            self.close_connection = True
            try:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
                while True:
                    self.wfile.write(b"a")
                    time.sleep(0.05)
            except OSError:
                return
        if fault == "large":
            return self.reply(200, gzip.compress(b" " * (8 * 2**20)), {"Content-Encoding": "gzip"})
        if fault == "echo":
            return self.reply(
                400,
                json.dumps({"error": f"no such key: {self.headers.get('x-api-key')}\x1b[31m" + "x" * 10_000}).encode(),
            )
        status, answer = fake.answer(self.command, self.path, body, self.headers)
        data, extra = json.dumps(answer).encode(), {}
        if fault in ("cut", "cut-gzip") or "gzip" in self.headers.get("Accept-Encoding", "") and len(data) > 1000:
            data, extra = gzip.compress(data), {"Content-Encoding": "gzip"}
        if fault == "cut-gzip":
            return self.reply(status, data[: len(data) // 2], extra)
        if fault == "cut":  # half of what was announced
            self.reply(status, data[: len(data) // 2], extra, announced=len(data))
            self.close_connection = True
            return
        self.reply(status, data, extra)

    do_POST = do_PUT = do_GET

    def reply(self, status, data, headers=None, announced=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if announced is None else announced))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running():
    """The server at work on a port of its own; ``fake.stop()`` takes it away."""
    fake = FakeNeuronpedia()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.fake = True, fake
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def stop():
        if thread.is_alive():
            server.shutdown()
            server.server_close()
            thread.join()

    fake.stop = stop
    try:
        yield fake
    finally:
        stop()
