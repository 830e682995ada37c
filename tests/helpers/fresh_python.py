"""Fresh Pythons at a third of their price: forked from one that has imported torch and no more than torch needs.

    done = fresh_python.run("-c", "import transformers; print(transformers.__version__)", env={...}, cwd=folder)
    done.returncode, done.stdout, done.stderr

Most of a fresh process is the import of torch, SciPy and scikit-learn, which read nothing of what a test varies. So one
server per test process imports those once, and each fresh Python is a fork of it: with an environment, a folder,
arguments and a `__main__` of its own, and with all of `transformers`, `huggingface_hub` and this package still to be
imported. What must start from nothing (what an import costs, say) takes `subprocess`. So does everything here where
there is no fork to trust: on Windows and macOS.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "scipy.stats", "sklearn.metrics"),
    *("pandas", "pyarrow", "PIL.Image", "safetensors.torch", "tokenizers"),
)
# What reads the environment as it is imported, and what the tests are about.
NEVER_PRELOADED = ("transformers", "huggingface_hub", "datasets", "modeling_frozen", "tests")
ROOT = Path(__file__).resolve().parents[2]
FORKS = sys.platform == "linux"


class Running:
    """A fresh Python that runs: as `subprocess.Popen`, as far as tests need it."""

    def __init__(self, arguments: tuple[str, ...], env: dict[str, str] | None, cwd: str | os.PathLike[str] | None) -> None:
        self.args, self.returncode = [sys.executable, *arguments], None
        self.written = [tempfile.NamedTemporaryFile(prefix="fresh-") for _ in range(2)]
        env = dict(os.environ if env is None else env)
        self.process: subprocess.Popen[bytes] | None = None
        if FORKS:
            files = [file.name for file in self.written]
            self.pid: int = _ask(arguments=arguments, env=env, cwd=str(cwd or os.getcwd()), files=files)
        else:
            out, err = self.written
            self.process = subprocess.Popen(self.args, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            self.pid = self.process.pid

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.process.poll() if self.process else _ask(wait=self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end: what it wrote to stdout and to stderr. `subprocess.TimeoutExpired` where it does not end."""
        started = time.monotonic()
        while self.poll() is None:
            waited = time.monotonic() - started
            if timeout is not None and waited > timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(min(0.05, 0.01 + waited / 50))
        out, err = (Path(file.name).read_text(encoding="utf-8", errors="replace") for file in self.written)
        return out, err


def environment(**variables: str) -> dict[str, str]:
    """The tests' own environment, in which this repository's packages are found, with further variables."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **variables}


def start(*arguments: str, env: dict[str, str] | None = None, cwd: str | os.PathLike[str] | None = None) -> Running:
    """Starts `python *arguments` (`-c CODE …`, `-m MODULE …` or `SCRIPT …`) and returns at once."""
    return Running(arguments, env, cwd)


def run(
    *arguments: str,
    env: dict[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python *arguments` to its end: returncode, stdout, stderr."""
    running = start(*arguments, env=env, cwd=cwd)
    try:
        out, err = running.communicate(timeout)
    except BaseException:
        running.kill()
        raise
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def run_side_by_side(function: Callable[..., None], *arguments: str | int, count: int = 2) -> None:
    """`function(rank, *arguments)`, of a module that imports anywhere, in so many fresh Pythons at once."""
    code = f"from {function.__module__} import {function.__name__} as function; function"
    running = [start("-c", f"{code}{(rank, *arguments)!r}", env=environment()) for rank in range(count)]
    try:
        deadline = time.monotonic() + 300
        while None in {one.poll() for one in running} and time.monotonic() < deadline:
            if any(one.returncode for one in running):  # the others would wait for it
                break
            time.sleep(0.02)
    finally:
        for one in running:
            one.kill()
    errors = [one.communicate()[1] for one in running]
    assert all(one.returncode == 0 for one in running), "\n".join(errors)


# ----------------------------------------------------------------------------------- the server, seen from the tests

_server: subprocess.Popen[str] | None = None


def _ask(**request: Any) -> Any:
    global _server
    if _server is None:
        # Without the caller's PYTHONPATH: what stands there comes first in each fork, and would be too late.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        _server = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    assert _server.stdin is not None and _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    answer = _server.stdout.readline()
    if not answer:
        raise RuntimeError(f"the server of fresh Pythons ended with {_server.wait()}: its error stands above")
    return json.loads(answer)


def stop() -> None:
    """Ends the server, where one was started."""
    global _server
    if _server is not None:
        _server.communicate()
        _server = None


# ----------------------------------------------------------------------------------------------- within the server


def serve() -> None:
    """Answers requests, a line each: {"arguments", "env", "cwd", "files"} with a pid, {"wait": pid} with its end or null."""
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:  # what is not installed is not imported by a fork either
            pass
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(NEVER_PRELOADED))
    assert not loaded, f"{loaded} must be imported anew by each fresh Python, but PRELOADED brings them"
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")  # stdout itself is each fork's own
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                _become(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _become(arguments: list[str], env: dict[str, str], cwd: str, files: list[str]) -> NoReturn:
    """From here on this process is `python *arguments` of another environment."""
    code = 1
    try:
        for number, path in enumerate([os.devnull, *files]):
            opened = os.open(path, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        _seed_anew()
        code = _run_main(arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _finish(code)


def _seed_anew() -> None:
    """Each process starts from chance; of the three, `random` sees to that by itself in a fork."""
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()


def _run_main(arguments: list[str]) -> int:
    import runpy
    import types

    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first, *rest = arguments
    # What the interpreter does with its arguments; sys.path[0] is the server's own folder.
    named = {"-c": "", "-m": os.getcwd()}.get(first, os.path.dirname(os.path.abspath(first)))
    sys.path[:] = [named, *path, *sys.path[1:]]
    importlib.invalidate_caches()
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            return 0
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__dict__["__builtins__"] = __builtins__
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = [first, *rest]
            main.__file__ = first
            exec(compile(Path(first).read_bytes(), first, "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _finish(code: int) -> NoReturn:
    """What the interpreter does at its end, but for taking the server's modules apart."""
    import atexit
    import threading

    try:
        threading._shutdown()  # waits for threads, pools of threads among them
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = code or 1
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
