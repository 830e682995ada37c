"""transformers.js in Node and in headless Chromium, for tests, which are skipped, with the reason, where one is missing."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


PACKAGE = "@huggingface/transformers"
HOW = (
    f"install it with `ONNXRUNTIME_NODE_INSTALL_CUDA=skip npm install --ignore-scripts {PACKAGE}@4.3.2` in an empty folder "
    "and name that folder's node_modules by FROZEN_PREFIX_NODE_MODULES"
)


def node_modules() -> Path:
    """The folder that holds the npm package."""
    folder = os.environ.get("FROZEN_PREFIX_NODE_MODULES")
    if folder is None or not Path(folder, PACKAGE).is_dir():
        pytest.skip(f"the npm package {PACKAGE} is not there: {HOW}")
    return Path(folder).resolve()


def in_node(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What transformers.js says to each of the jobs (see `in_node.mjs`)."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, version 18 or later, is not installed")
    command = [node, str(Path(__file__).with_name("in_node.mjs")), str(node_modules())]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def served(places: Mapping[str, Path], changed: Mapping[str, str] | None = None) -> Iterator[str]:
    """Folders (and texts of pages) on 127.0.0.1, by the beginnings of their paths; gives the address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

        def translate_path(self, path: str) -> str:
            path = path.split("?")[0]
            start = max((one for one in places if path.startswith(one)), key=len, default=None)
            return "/nowhere" if start is None else str(places[start] / path.removeprefix(start))

        def do_GET(self) -> None:
            page = (changed or {}).get(self.path.split("?")[0])
            if page is None:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Chromium:
    """A page of headless Chromium, told what to do over a pipe by its DevTools protocol."""

    def __init__(self, profile: Path):
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if program is None:
            pytest.skip("neither chromium nor google-chrome is installed")
        (read, chromium_writes), (chromium_reads, write) = os.pipe(), os.pipe()
        self.lines, self.commands = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        # It reads from descriptor 3 and writes to 4.
        ends = functools.partial(self._as_three_and_four, chromium_reads, chromium_writes)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=ends,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(chromium_reads)
        os.close(chromium_writes)
        self.patience = threading.Timer(120, self.process.kill)  # what waits for an answer then reads the end of the pipe
        self.patience.daemon = True
        self.patience.start()
        self.count, self.session = 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    @staticmethod
    def _as_three_and_four(reads: int, writes: int) -> None:
        reads, writes = os.dup(reads), os.dup(writes)  # so that neither is 3 or 4 when the other goes there
        for one in (3, 4):
            if one not in (reads, writes):
                continue
            moved = os.dup(one)
            reads, writes = (moved if one == reads else reads), (moved if one == writes else writes)
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        line = bytearray()
        while (byte := self.lines.read(1)) != b"\0":
            assert byte, "Chromium ended, or had no answer for two minutes"
            line += byte
        return json.loads(line)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def close(self) -> None:
        self.patience.cancel()
        self.process.terminate()
        self.process.wait(timeout=30)
        self.lines.close()
        self.commands.close()
