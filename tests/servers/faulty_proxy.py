"""An HTTP proxy in front of an S3 server: passes, delays, throttles, answers with errors, or refuses connections."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_PIECE_BYTES = 64 << 10
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class Exchange:
    """One request as the proxy saw it; sizes are those of the bodies."""

    method: str
    path: str
    status: int
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True)
class _Mode:
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    error_rate: float = 0.0
    error_status: int = 503
    only: str = ""


class FaultyProxy:
    """Listens on a free loopback port from :meth:`start` on. Behaves well until told otherwise.

    Attributes:
        exchanges: every request so far, in the order of the answers.
    """

    def __init__(self, target: str, *, seed: int = 0) -> None:
        split = urlsplit(target)
        assert split.hostname is not None
        self._target = (split.hostname, split.port or 80)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.mode = _Mode()
        self.refusing = False
        self.exchanges: list[Exchange] = []
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    def __enter__(self) -> FaultyProxy:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """The URL that clients take instead of the server's."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listens; on the same port as before if it did before."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="faulty-proxy", daemon=True).start()

    def stop(self) -> None:
        """Closes the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def pass_all(self) -> None:
        """Behaves well again."""
        self.mode = _Mode()
        if self._server is None:
            self.refusing = False
            self.start()

    def slow(self, *, bytes_per_s: float | None = None, delay_s: float = 0.0) -> None:
        """All bodies together pass at ``bytes_per_s``; each request waits ``delay_s`` first."""
        self.mode = _Mode(delay_s=delay_s, bytes_per_s=bytes_per_s)

    def errors(self, *, rate: float, status: int = 503, only: str = "") -> None:
        """A share ``rate`` of the requests whose path holds ``only`` is answered with ``status`` before the server."""
        self.mode = _Mode(error_rate=rate, error_status=status, only=only)

    def refuse(self) -> None:
        """Nobody listens any more; open connections end at their next request."""
        self.refusing = True
        self.stop()

    def received_bytes(self, *, method: str = "GET", part: str = "") -> int:
        """Bytes that clients got in answer to ``method`` on paths that hold ``part``."""
        return sum(e.received_bytes for e in list(self.exchanges) if e.method == method and part in e.path)

    def fails_now(self, path: str) -> bool:
        """Whether the dice say error."""
        with self._lock:
            return self.mode.only in path and self._random.random() < self.mode.error_rate

    def throttle(self, num_bytes: int) -> None:
        """Waits until ``num_bytes`` more may pass."""
        rate = self.mode.bytes_per_s
        if rate is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / rate
            wait_s = self._free_at - time.monotonic()
        while wait_s > 0 and self.mode.bytes_per_s == rate:
            time.sleep(min(wait_s, 0.2))
            wait_s -= 0.2

    @property
    def target(self) -> tuple[str, int]:
        """Host and port of the server behind."""
        return self._target


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        proxy = self.proxy
        if proxy.refusing:
            self.close_connection = True
            return
        time.sleep(proxy.mode.delay_s)
        if proxy.fails_now(self.path):
            self._answer_error(proxy.mode.error_status)
        else:
            self._relay()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _answer_error(self, status: int) -> None:
        sent = sum(len(piece) for piece in self._body())
        text = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>planted by the test</Message></Error>"
        body = b"" if self.command == "HEAD" else text
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.proxy.exchanges.append(Exchange(self.command, self.path, status, sent, len(body)))

    def _relay(self) -> None:
        connection = http.client.HTTPConnection(*self.proxy.target, timeout=120)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders()
            sent = 0
            for piece in self._body():
                self.proxy.throttle(len(piece))
                connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                sent += len(piece)
            if chunked:
                connection.send(b"0\r\n\r\n")
            self._answer(connection.getresponse(), sent)
        except OSError:
            self.close_connection = True
        finally:
            connection.close()

    def _answer(self, response: http.client.HTTPResponse, sent: int) -> None:
        has_length = response.getheader("Content-Length") is not None
        has_body = self.command != "HEAD" and response.status not in (204, 304)
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        chunked = has_body and not has_length
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        received = 0
        while has_body and (piece := response.read(_PIECE_BYTES)):
            self.proxy.throttle(len(piece))
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            received += len(piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.proxy.exchanges.append(Exchange(self.command, self.path, response.status, sent, received))

    def _body(self) -> Iterator[bytes]:
        """The request's body in pieces, without the framing of chunked transfer."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left > 0:
            piece = self.rfile.read(min(left, _PIECE_BYTES))
            if not piece:
                raise ConnectionError("the client went away")
            left -= len(piece)
            yield piece

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""
