"""The test Hub as pytest fixtures: a server process of its own, and fresh Pythons that talk to it through the wire.

    from tests.helpers.hub_fixtures import hub  # noqa: F401      a server per test; `module_hub` is one per test module

    def test_push(hub):
        hub.run("from huggingface_hub import create_repo; create_repo('me/eyes')")
        assert hub.commits("me/eyes")[0]["title"] == "initial commit"

huggingface_hub reads its endpoint once, at import, so nothing here imports it: clients run in fresh processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.helpers import fresh_python


ROOT = Path(__file__).resolve().parents[2]
# What a user's shell may hold and a test must not inherit.
PRIVATE = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HUGGING_FACE_", "PYTEST_")
PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}
HIDE_PACKAGE = "import sys; sys.modules['modeling_frozen'] = None  # as for those who never installed it\n"


class Hub:
    """A running test Hub. `endpoint` and the contents stay the same over `stop()` and `start()`."""

    token, other_token = "hf_me", "hf_you"  # they write as "me" and as "you"

    def __init__(self, folder: Path, page_size: int = 1000) -> None:
        self.folder, self.root, self.page_size = folder, folder / "hub", page_size
        self.process: subprocess.Popen[str] | None = None
        self.endpoint = ""
        self.start()

    # The server

    def start(self) -> None:
        """Starts the server; after `stop()` on the same port, with all it held."""
        port = self.endpoint.rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "benchmarks.loopback_hub.server", "--port", port, "--root", str(self.root)]
        command += ["--page-size", str(self.page_size), "--until-eof"]
        # It ends when the pipe does: with this process, however that may end.
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()
        if not self.endpoint:
            raise RuntimeError(f"the test Hub ended with {self.process.wait()} before it served: {command}")

    def stop(self) -> None:
        """Takes the server down: connections are refused until `start()`."""
        if self.process is not None:
            self.process.communicate()
            self.process = None

    def request(
        self,
        method: str,
        path: str,
        data: Any = None,
        *,
        token: str | None = token,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """One plain HTTP request, without the client library: (status, headers, body). `data` goes as JSON."""
        sent = dict(headers or {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.endpoint + path, data=body, headers=sent, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    def admin(self, method: str, path: str, data: Any = None) -> Any:
        status, _, body = self.request(method, f"/_admin/{path}", data, token=None)
        if status != 200:
            raise ValueError(body.decode())
        return json.loads(body)

    def add_user(self, name: str, token: str, *, orgs: tuple[str, ...] = (), role: str = "write") -> None:
        """Makes `token` known; role "read" may write nowhere."""
        self.admin("POST", "user", {"name": name, "token": token, "orgs": list(orgs), "role": role})

    # Cutting the wire

    def cut(
        self,
        match: str,
        *,
        where: str | None = None,
        after_bytes: int = 0,
        how: str = "close",
        times: int | None = 1,
    ) -> None:
        """Drops the connection of the next `times` requests whose "METHOD /path?query" matches; see
        `benchmarks/loopback_hub/wire.py`.

        The client tries an LFS PUT six times (23 s), a download six times (5 s) but once under how="reset", and a
        commit once: `times=None` cuts until `mend()`.
        """
        fault = {"match": match, "where": where, "after_bytes": after_bytes, "how": how, "times": times}
        self.admin("POST", "fault", fault)

    def answer_with(self, match: str, status: int, *, times: int | None = 1) -> None:
        """Answers matching requests with an error, and does not carry them out."""
        self.admin("POST", "fault", {"match": match, "status": status, "times": times})

    def mend(self) -> None:
        self.admin("DELETE", "fault")

    # What went over the wire, and what is there

    def stats(self) -> dict[str, dict[str, int]]:
        """{label: {"requests", "bytes_in", "bytes_out"}} since the start or `reset_stats()`; in is what clients sent.

        Labels: account, repository, info, tree, commits, refs, yaml, preupload, lfs_batch, lfs_upload, lfs_verify,
        commit, resolve, discussions, other. Bytes are those of HTTP, headers included.
        """
        return self.admin("GET", "stats")

    def bytes_in(self, *labels: str) -> int:
        """Bytes that clients sent, of these labels or of all."""
        return sum(count["bytes_in"] for label, count in self.stats().items() if not labels or label in labels)

    def bytes_out(self, *labels: str) -> int:
        """Bytes that clients were sent, of these labels or of all."""
        return sum(count["bytes_out"] for label, count in self.stats().items() if not labels or label in labels)

    def log(self) -> list[dict[str, Any]]:
        """Requests since the start or `reset_stats()`: method, path, label, status (0: cut), bytes_in, bytes_out."""
        return self.admin("GET", "log")

    def reset_stats(self) -> None:
        self.admin("POST", "reset")

    def get(self, path: str, *, token: str | None = token) -> Any:
        """A GET's JSON, all pages of a listing; raises LookupError with the Hub's error code."""
        status, headers, body = self.request("GET", path, token=token)
        if status != 200:
            raise LookupError(f"{status} {headers.get('X-Error-Code')}: {body.decode()}")
        data = json.loads(body)
        if 'rel="next"' in headers.get("Link", ""):
            address = headers["Link"].partition("<")[2].partition(">")[0]
            data += self.get(address.removeprefix(self.endpoint), token=token)
        return data

    def commits(self, repo_id: str, revision: str = "main", *, kind: str = "models") -> list[dict[str, Any]]:
        """The commits of a branch, newest first: id, title, message, date, authors."""
        return self.get(f"/api/{kind}/{repo_id}/commits/{quote(revision, safe='')}")

    def files(self, repo_id: str, revision: str = "main", *, kind: str = "models") -> dict[str, int]:
        """{path: size in bytes} of a revision."""
        entries = self.get(f"/api/{kind}/{repo_id}/tree/{quote(revision, safe='')}?recursive=1")
        return {entry["path"]: entry["size"] for entry in entries if entry["type"] == "file"}

    def read(self, repo_id: str, path: str, revision: str = "main", *, kind: str = "models") -> bytes:
        """A file's content as it lies on the Hub."""
        prefix = "" if kind == "models" else f"{kind}/"
        status, headers, body = self.request("GET", f"/{prefix}{repo_id}/resolve/{quote(revision, safe='')}/{quote(path)}")
        if status != 200:
            raise LookupError(f"{status} {headers.get('X-Error-Code')}: {body.decode()}")
        return body

    # Clients

    def new_home(self) -> Path:
        """An empty HF_HOME: a machine that has downloaded nothing yet."""
        return Path(tempfile.mkdtemp(prefix="home-", dir=self.folder))

    def env(
        self,
        home: Path | None = None,
        *,
        token: str | None = token,
        offline: bool = False,
        package: bool = True,
        **variables: str,
    ) -> dict[str, str]:
        """A whole environment for a fresh Python: this Hub, `token` (None: nobody), HF_HOME (None: a new one)."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(PRIVATE) and k.lower() not in PROXIES}
        paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT)] * package + paths)
        kept |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or self.new_home()),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
        }
        if token:
            kept["HF_TOKEN"] = token
        if offline:
            kept["HF_HUB_OFFLINE"] = "1"
        return kept | variables

    def spawn(
        self,
        code: str,
        home: Path | None = None,
        *,
        token: str | None = token,
        offline: bool = False,
        package: bool = True,
        **variables: str,
    ) -> fresh_python.Running:
        """Starts `code` in a fresh Python in an empty folder and returns at once; `finish` waits for it.

        `package=False` is a machine without modeling_frozen. Uppercase keywords are further environment variables.
        """
        env = self.env(home, token=token, offline=offline, package=package, **variables)
        code = ("" if package else HIDE_PACKAGE) + textwrap.dedent(code)
        return fresh_python.start("-c", code, env=env, cwd=tempfile.mkdtemp(prefix="cwd-", dir=self.folder))

    def finish(self, process: fresh_python.Running, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Waits for a spawned Python: returncode, stdout, stderr."""
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"no end after {timeout} s\n{out}\n{err}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def attempt(self, code: str, home: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        """As `run`, for code that may fail: returncode, stdout, stderr."""
        return self.finish(self.spawn(code, home, **options))

    def run(self, code: str, home: Path | None = None, **options: Any) -> str:
        """Runs `code` in a fresh Python and returns its stdout; an AssertionError with all it wrote where it fails.

        Options are those of `spawn`: token, offline, package, and environment variables in uppercase.
        """
        done = self.attempt(code, home, **options)
        if done.returncode != 0:
            raise AssertionError(f"the client ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def run_json(self, code: str, home: Path | None = None, **options: Any) -> Any:
        """As `run`, for code whose last line of output is JSON."""
        return json.loads(self.run(code, home, **options).splitlines()[-1])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub for this test."""
    hub = Hub(tmp_path)
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def module_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub for all tests of a module: each uses repository names of its own."""
    hub = Hub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.stop()
