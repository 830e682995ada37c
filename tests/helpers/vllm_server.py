"""vLLM's server of OpenAI's form, for tests that ask it."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.helpers.fresh_python import ROOT


ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def openai_server(module: str, *options: str, **variables: str) -> Iterator[SimpleNamespace]:
    """A server of OpenAI's form, a module that takes `--host` and `--port`, and OpenAI's client for it."""
    openai = pytest.importorskip("openai")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), *options],
        cwd=ROOT, env={**os.environ, **ENV, **variables}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        for _ in range(600):
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None, "".join(said[-60:])
                time.sleep(1)
        yield SimpleNamespace(client=client, url=f"http://127.0.0.1:{port}", model=client.models.list().data[0].id)
    finally:
        client.close()
        process.terminate()
        process.wait(60)


@contextmanager
def vllm_server(*options: str, **variables: str) -> Iterator[SimpleNamespace]:
    """vLLM's server of OpenAI's form, small and exact."""
    common = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8"]
    with openai_server("vllm.entrypoints.openai.api_server", *common, *options, **variables) as server:
        yield server
