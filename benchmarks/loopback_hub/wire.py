"""The wire of the loopback Hub of `server.py`: connections that count bytes and can be cut, routing, the admin API.

The admin API needs no token and is never counted:

    POST   /_admin/fault   {"match": regex on "METHOD /path?query", "where", "after_bytes", "how", "times", "status"}
    DELETE /_admin/fault   forget all faults
    GET    /_admin/stats   {label: {"requests", "bytes_in", "bytes_out"}}, all bytes of HTTP, headers included
    GET    /_admin/log     all requests: {"method", "path", "label", "status" (0 was cut), "bytes_in", "bytes_out"}
    POST   /_admin/reset   counters and log start anew
    POST   /_admin/user    {"name", "token", "orgs"?, "role"?: "write" | "read"}

A fault needs `match` alone. It drops the TCP connection `times` times (default 1; null: for ever). `where` is
- "request": after `after_bytes` of the request's body, at the latest at its end; the request is never carried out
  (the default where `match` begins with POST or PUT);
- "response": carried out, and cut after the headers and `after_bytes` of the body, at the latest before its last byte;
  an answer without a body is not sent at all (the default otherwise);
- "silence": carried out, and not a byte of answer.
`how` is "close", after which the client takes a download up again, or "reset", after which it gives up at once.
With `status` that status is answered, nothing is carried out, and no wire is cut.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from benchmarks.loopback_hub.store import HubError, Repo, Store


class Cut(Exception):
    """The wire is to be dropped here."""


class HubServer(ThreadingHTTPServer):
    """The server, its faults and its counters."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type, root: Path, page_size: int = 1000) -> None:
        super().__init__(address, handler)
        self.store, self.page_size = Store(root), page_size
        self.endpoint = f"http://{self.server_address[0]}:{self.server_address[1]}"
        self.faults: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.active = 0  # requests between their first line and their entry in the log
        self.quiet = threading.Condition()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients may go away whenever they like
            super().handle_error(request, client_address)

    def take_fault(self, method: str, target: str) -> dict[str, Any] | None:
        with self.quiet:
            for fault in self.faults:
                if fault["times"] != 0 and re.search(fault["match"], f"{method} {target}"):
                    fault["times"] = None if fault["times"] is None else fault["times"] - 1
                    return fault
        return None

    def complete_log(self) -> list[dict[str, Any]]:
        """The log once no request is under way: a client may ask before its last answer was written down."""
        with self.quiet:
            self.quiet.wait_for(lambda: self.active == 0, timeout=5)
            return list(self.log)


class Wire(io.RawIOBase):
    """A socket that counts what goes through it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.count = connection, 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        received = self.connection.recv_into(buffer)
        self.count += received
        return received

    def write(self, data: Any) -> int:
        self.connection.sendall(data)
        self.count += len(data)
        return len(data)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


ROUTES: list[tuple[str, re.Pattern[str], str, Callable[..., Any]]] = []
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"
REV = r"(?P<revision>[^/]+)"


def route(method: str, pattern: str, label: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the handler of a raw (quoted) path; named groups arrive unquoted. `label` names the counter."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(pattern), label, function))
        return function

    return register


class WireHandler(BaseHTTPRequestHandler):
    """One method per endpoint: it returns what is answered as JSON, or sends the answer itself and returns None."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms per request on a kept connection
    timeout = 120

    # The wire

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.into, self.out = Wire(self.connection), Wire(self.connection)
        self.rfile, self.wfile = io.BufferedReader(self.into), self.out  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def body_chunks(self) -> Iterator[bytes]:
        """The request's body; the wire is cut in it where a fault says so."""
        left = self.fault["after_bytes"] if self.fault and self.fault["where"] == "request" else None
        for chunk in self.raw_chunks():
            if left is not None:
                left -= len(chunk)
                if left < 0:
                    break
            yield chunk
        if left is not None:
            raise Cut

    def raw_chunks(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read1(min(left, 1 << 14))  # type: ignore[attr-defined]
            if not chunk:
                raise Cut  # the client went away: a part of a request is no request
            left -= len(chunk)
            yield chunk

    def cut(self) -> None:
        self.close_connection = True
        if self.fault and self.fault["how"] == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        else:
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was faster

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        where = self.fault["where"] if self.fault else None
        if where == "silence" or (where == "response" and (self.command == "HEAD" or not body)):
            raise Cut
        self.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if where == "response":
            self.wfile.write(body[: min(self.fault["after_bytes"], len(body) - 1)])
            self.status = 0
            raise Cut
        self.wfile.write(body)

    def reply_json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        self.reply(status, json.dumps(data).encode(), headers)

    def serve(self) -> None:
        raw = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(raw.query).items()}
        self.status, self.fault, self.body = 0, None, b""
        for method, pattern, label, function in ROUTES:  # noqa: B007
            match = pattern.fullmatch(raw.path) if method == self.command.replace("HEAD", "GET") else None
            if match:
                break
        else:
            label, function, match = "other", WireHandler.unknown, re.match("", "")
        assert match is not None
        admin = label == "admin"
        with self.server.quiet:
            self.server.active += not admin
        if not admin:
            self.fault = self.server.take_fault(self.command, self.path)
        try:
            self.answer(label, function, {key: unquote(value or "") for key, value in match.groupdict().items()})
        except (Cut, OSError):
            self.status = 0
            self.cut()
        finally:
            with self.server.quiet:
                self.server.active -= not admin
                bytes_in, bytes_out = self.into.take(), self.out.take()
                if not admin:
                    entry = {"method": self.command, "path": self.path, "label": label, "status": self.status}
                    self.server.log.append(entry | {"bytes_in": bytes_in, "bytes_out": bytes_out})
                self.server.quiet.notify_all()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def answer(self, label: str, function: Callable[..., Any], groups: dict[str, str]) -> None:
        if "kind" in groups:
            groups["kind"] = groups["kind"] or "models"
        try:
            if label != "lfs_upload":  # which streams its body to disk
                self.body = b"".join(self.body_chunks())
            if self.fault and self.fault["status"]:
                raise HubError(self.fault["status"], "a fault that was asked for")
            self.user = self.who()
            try:
                data = function(self, **groups)
            except (LookupError, TypeError, ValueError) as error:
                raise HubError(400, f"{self.command} {self.path} was not understood: {error!r}") from error
            if data is not None:
                self.reply_json(data)
        except HubError as error:
            headers = {
                "X-Error-Message": " ".join(error.message.split()).encode("ascii", "replace").decode(),
                **error.headers,
            }
            if error.code:
                headers["X-Error-Code"] = error.code
            self.reply_json({"error": error.message, **error.body}, error.status, headers)

    # Asked by the endpoints

    def who(self) -> dict[str, Any] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.server.store.tokens.get(header.removeprefix("Bearer ").strip())
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"the request's body is no JSON: {error}") from error

    def repo(self, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        return self.server.store.find(kind, repo_id, self.user, write=write)

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def page(self, items: list[Any]) -> None:
        """A page of a listing, and where the next one is."""
        start, size = int(self.query.get("cursor", 0)), self.server.page_size
        headers = {}
        if start + size < len(items):
            address = urlsplit(self.path)
            others = [part for part in address.query.split("&") if part and not part.startswith("cursor=")]
            query = "&".join([*others, f"cursor={start + size}"])
            headers["Link"] = f'<{self.server.endpoint}{address.path}?{query}>; rel="next"'
        self.reply_json(items[start : start + size], headers=headers)

    def unknown(self) -> Any:
        raise HubError(404, f"this Hub has no {self.command} {self.path}")

    # Admin

    @route("POST", r"/_admin/fault", "admin")
    def add_fault(self) -> Any:
        asked = self.json()
        fault = {"after_bytes": 0, "times": 1, "how": "close", "status": None, "where": None} | asked
        unknown = set(fault) - {"match", "after_bytes", "times", "how", "status", "where"}
        if unknown or "match" not in fault:
            raise HubError(400, f"a fault needs match; unknown: {sorted(unknown)}")
        if fault["how"] not in ("close", "reset") or fault["where"] not in (None, "request", "response", "silence"):
            raise HubError(400, "how is close or reset; where is request, response or silence")
        if fault["status"] is not None and fault["where"] is not None:
            raise HubError(400, "a fault gives a status or cuts somewhere, not both")
        if fault["status"] is None and fault["where"] is None:
            fault["where"] = "request" if re.match(r"\W*(POST|PUT)\b", fault["match"]) else "response"
        re.compile(fault["match"])
        with self.server.quiet:
            self.server.faults.append(fault)
        return fault

    @route("DELETE", r"/_admin/fault", "admin")
    def clear_faults(self) -> Any:
        with self.server.quiet:
            self.server.faults.clear()
        return {}

    @route("GET", r"/_admin/log", "admin")
    def show_log(self) -> Any:
        return self.server.complete_log()

    @route("GET", r"/_admin/stats", "admin")
    def stats(self) -> Any:
        counts: dict[str, dict[str, int]] = {}
        for entry in self.server.complete_log():
            count = counts.setdefault(entry["label"], {"requests": 0, "bytes_in": 0, "bytes_out": 0})
            count["requests"] += 1
            count["bytes_in"] += entry["bytes_in"]
            count["bytes_out"] += entry["bytes_out"]
        return counts

    @route("POST", r"/_admin/reset", "admin")
    def reset(self) -> Any:
        self.server.complete_log()
        with self.server.quiet:
            self.server.log.clear()
        return {}

    @route("POST", r"/_admin/user", "admin")
    def add_user(self) -> Any:
        asked, store = self.json(), self.server.store
        with store.lock:
            user = {"name": asked["name"], "orgs": asked.get("orgs", []), "role": asked.get("role", "write")}
            store.tokens[asked["token"]] = user
            store.save()
        return {}
