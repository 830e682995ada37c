"""Shared by all tests: one thread per process, no network, the folder of real weights where there is one, and the mark of
those that compare bits."""

import functools
import gc
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging import version

from tests.helpers.bits import compares_bits


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach the Hub; Hub tests run their own server
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of tensors this small wait for each other more than they work, and those of two workers fight for the cores:
# three times as long. Whatever the caller's shell asks for, and before any library reads it, here and in what tests start.
for _library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"
if "torch" in sys.modules:  # brought by another plugin of pytest, so it has read its setting
    sys.modules["torch"].set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """With several workers each takes a run of neighbours, so that what a file's tests share is made once."""
    if getattr(config.option, "dist", "no") == "load":  # what `-n` says where `--dist` says nothing
        config.option.dist = "worksteal"


def pytest_collection_finish() -> None:
    """Millions of objects that imports made live to the end. Set aside, they are not looked through at each collection:
    `Trainer` asks for one at each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real weights and photos, for tests marked `real_data`."""
    named = os.environ.get("FROZEN_PREFIX_ASSETS")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("no folder of real data: name it by FROZEN_PREFIX_ASSETS")
    return folder


# What transformers says of itself: its assistants' candidates are generated so.
_OF_THEIR_OWN: tuple[str, ...] = ("Passing `generation_config` together with generation-related arguments",)
if importlib.util.find_spec("peft") and version.parse(importlib.metadata.version("peft")) < version.parse("0.21"):
    _OF_THEIR_OWN += ("`use_return_dict` is deprecated",)  # PEFT reads it


class _Deprecations(logging.Handler):
    """transformers says most of what it deprecates in log lines, once a process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage() and not record.getMessage().startswith(_OF_THEIR_OWN):
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


@pytest.fixture(scope="session", autouse=True)
def _end_of_fresh_pythons() -> Iterator[None]:
    yield
    if "tests.helpers.fresh_python" in sys.modules:
        sys.modules["tests.helpers.fresh_python"].stop()


# Where a model looks up what runs its parents, without weights, to learn their shapes.
PROBES = (
    ("modeling_frozen.vision_towers", "probe_vision_tower"),
    ("modeling_frozen.backbones", "probe_language_model"),
    ("modeling_frozen.cross_attention", "probe_decoder"),
    ("modeling_frozen.modeling_frozen_prefix_classification", "probe_text_width"),
    ("modeling_frozen.modeling_frozen_prefix_retrieval", "probe_text_width"),
)


@pytest.fixture(scope="session", autouse=True)
def _probe_the_same_parents_once() -> Iterator[None]:
    """Nine tenths of what it costs to build a tiny model are probing, and tests build of the same few parents again and
    again. A test of a probe itself imports it by name, as the tests are collected: what it calls remembers nothing.
    """

    def remembered(probe: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[str, Any] = {}

        @functools.wraps(probe)
        def call(*args: Any, **kwargs: Any) -> Any:
            key = repr((args, kwargs))  # of a configuration or a processor: its class, and all that it says
            if key not in known:
                known[key] = probe(*args, **kwargs)
            return known[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in PROBES:
            patch.setattr(f"{module}.{name}", remembered(getattr(importlib.import_module(module), name)))
        yield


@pytest.fixture(autouse=True)
def _no_loader_is_left_behind() -> Iterator[None]:
    """A training that ended in an error, or in mid-epoch, leaves its data loader where accelerate looks for the active one."""
    yield
    if "accelerate.state" in sys.modules:
        for loader in sys.modules["accelerate.state"].GradientState().dataloader_references:
            if loader is not None:
                loader.end()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and compares_bits(item.function):
            item.add_marker("bits")
