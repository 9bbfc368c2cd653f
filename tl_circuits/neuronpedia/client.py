"""A small HTTP client for Neuronpedia: limits of time and size, retries with random pauses, and one clear error."""

import gzip
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tl_circuits.errors import NeuronpediaError
from tl_circuits.support.extras import how_to_install

logger = logging.getLogger(__name__)

SITE = "https://www.neuronpedia.org"
_RETRIED = (429, 500, 502, 503, 504)
FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
LARGEST_ANSWER = 64 * 1024**2  # bytes, unpacked
LONGEST_SAID = 300  # characters of what a server says about an error
_PIECE = 64 * 1024


@dataclass(frozen=True)
class Client:
    """Which server to ask, with which key, and how long to try.

    Attributes:
        server: the server's address.
        key: sent to ``server`` alone, and never shown, logged or written.
        timeout: seconds to wait for one answer.
        deadline: seconds for one question with all its retries, also if the server sends its answer drop by drop.
        retries: the most retries.

    Raises:
        NeuronpediaError: for a server without TLS that is not this computer.
    """

    server: str = SITE
    key: str | None = field(default=None, repr=False)
    timeout: float = 30.0
    deadline: float = 120.0
    retries: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.server)
        if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise NeuronpediaError(f"the server {self.server!r} must start with https://, or be this computer.")

    def get(self, path: str) -> Any:
        """The parsed JSON at ``path``; None if there is nothing (404)."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """The parsed answer to ``body``, which is sent as JSON; None if there is nothing (404)."""
        return self._ask("POST", path, json.dumps(body).encode())

    def put(self, url: str, data: bytes) -> None:
        """Store JSON, gzipped or not, at a signed address. The key is not sent there."""
        headers = {"Content-Type": "application/json"}
        if data.startswith(b"\x1f\x8b"):
            headers["Content-Encoding"] = "gzip"
        self._patiently(
            f"PUT {urlsplit(url).hostname}",
            lambda r: r.request("PUT", url, data=data, headers=headers, **self._limits()),
        )

    def _ask(self, method: str, path: str, data: bytes | None) -> Any:
        headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if data else {})
        if self.key:
            headers["x-api-key"] = self.key
        url = f"{self.server.rstrip('/')}{path}"
        response = self._patiently(
            f"{method} {path}",
            lambda r: r.request(method, url, data=data, headers=headers, **self._limits()),
            as_json=True,
        )
        return response

    def _limits(self) -> dict[str, Any]:
        return {"timeout": (min(10.0, self.timeout), self.timeout), "allow_redirects": False, "stream": True}

    def _patiently(self, what: str, send: Callable[[Any], Any], as_json: bool = False) -> Any:
        """Send, and try again after failures that may pass.

        Raises:
            NeuronpediaError: with the last failure.
        """
        requests = _requests()
        wait, started, problem = FIRST_WAIT, time.monotonic(), ""
        for attempt in range(self.retries + 1):
            try:
                answer = _whole_answer(lambda: send(requests), started + self.deadline)
                if answer.status == 404 and as_json:
                    return None
                if answer.status < 300:
                    return json.loads(answer.body) if as_json else None
                problem = _refusal(answer, self.key)
                if answer.status not in _RETRIED:
                    raise NeuronpediaError(f"{what}: {problem}")
                wait = max(wait, answer.asked_to_wait)
            except requests.RequestException as error:
                problem = _failure(error)
            except (ValueError, RecursionError):
                problem = "the answer is not JSON."
            except TimeoutError:
                problem = "no whole answer in time."
            except OverflowError:
                raise NeuronpediaError(
                    f"{what}: the answer has more than {LARGEST_ANSWER:,} bytes, which is refused."
                ) from None
            pause = wait * random.uniform(0.5, 1.0) if wait < _LONGEST_WAIT else wait
            if attempt == self.retries or time.monotonic() - started + pause > self.deadline:
                break
            logger.info("%s: %s; trying again in %.1f s", what, problem, pause)
            time.sleep(pause)
            wait *= 2
        raise NeuronpediaError(f"{what}: {problem} Tried {attempt + 1} times in {time.monotonic() - started:.1f} s.")


@dataclass(frozen=True)
class _Answer:
    """A server's answer, read as a whole."""

    status: int
    body: bytes
    asked_to_wait: float


def _whole_answer(send: Callable[[], Any], until: float) -> _Answer:
    """The answer to a question, if it is there by the time ``until`` of the monotonic clock.

    Time limits of sockets begin anew with every byte, so a server could hold its asker for ever by sending one byte at
    a time. Hence the answer is read in a thread of its own, which is left behind when the time is over; what it still
    reads is bounded.

    Raises:
        TimeoutError: if it is not.
        OverflowError: if it is too large.
    """
    done: list[_Answer | BaseException] = []

    def read() -> None:
        try:
            with send() as response:
                parts, size = [], 0
                for part in response.iter_content(_PIECE):
                    size += len(part)
                    if size > LARGEST_ANSWER:
                        raise OverflowError
                    if time.monotonic() > until:
                        raise TimeoutError
                    parts.append(part)
                done.append(_Answer(response.status_code, b"".join(parts), _asked_to_wait(response)))
        except BaseException as error:  # it is raised again where the answer is waited for
            done.append(error)

    thread = threading.Thread(target=read, name="neuronpedia", daemon=True)
    thread.start()
    thread.join(max(0.0, until - time.monotonic()))
    if not done:
        raise TimeoutError
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def _requests() -> Any:
    try:
        import requests
    except ImportError as error:
        raise ImportError(f"asking Neuronpedia needs requests. Run: {how_to_install('neuronpedia')}") from error
    return requests


def _asked_to_wait(response: Any) -> float:
    """The seconds of a Retry-After header; 0 without one."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0


def _refusal(answer: _Answer, key: str | None) -> str:
    """What a refusal says, in one line and without the key, which a server may repeat."""
    try:
        body = json.loads(answer.body)
        said = body.get("error") or body.get("message") or "" if isinstance(body, dict) else ""
        details = body.get("details") if isinstance(body, dict) else None
        said = f"{said} {'; '.join(map(str, details[:3]))}" if isinstance(details, list) else str(said)
    except (ValueError, RecursionError):
        said = ""
    said = said.replace(key, "…") if key else said
    said = "".join(c if c.isprintable() else " " for c in said.strip()[:LONGEST_SAID])
    hint = {401: " Give a key (NEURONPEDIA_API_KEY).", 429: " Too many questions."}.get(answer.status, "")
    return f"the server answers {answer.status}{': ' + said if said else ''}.{hint}"


def _failure(error: Exception) -> str:
    kind = type(error).__name__
    meaning = {
        "ConnectTimeout": "no connection in time",
        "ReadTimeout": "no answer in time",
        "ConnectionError": "no connection, or cut off",
        "ChunkedEncodingError": "the answer was cut off",
        "ContentDecodingError": "the answer is damaged (gzip)",
        "JSONDecodeError": "the answer is not JSON",
    }
    return f"{meaning.get(kind, kind)}."


def compressed(data: bytes) -> bytes:
    """The data as gzip; the same bytes each time."""
    return gzip.compress(data, mtime=0)


def find_key(key: str | None) -> str | None:
    """The key given, else ``NEURONPEDIA_API_KEY``, else the entry ``neuronpedia`` of this computer's keyring."""
    if key or os.environ.get("NEURONPEDIA_API_KEY"):
        return key or os.environ["NEURONPEDIA_API_KEY"]
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return None
    try:
        return keyring.get_password("neuronpedia", "api-key")
    except KeyringError:
        return None


def default_server() -> str:
    """``$TL_CIRCUITS_NEURONPEDIA``, else the public site."""
    return os.environ.get("TL_CIRCUITS_NEURONPEDIA") or SITE
