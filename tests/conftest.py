"""Shared by all tests: one thread per process, no network, and the folder of real weights where there is one."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach the Hub; Hub tests run their own server
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real weights and photos, for tests marked `real_data`."""
    named = os.environ.get("FROZEN_PREFIX_ASSETS")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("no folder of real data: name it by FROZEN_PREFIX_ASSETS")
    return folder


class _Deprecations(logging.Handler):
    """transformers says most of what it deprecates in log lines, once a process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            self.said.append(record.getMessage())


@pytest.fixture(autouse=True)
def _nothing_deprecated_is_used(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("old_names"):
        yield
        return
    heard, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(heard)
    yield
    logger.removeHandler(heard)
    assert not heard.said


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
