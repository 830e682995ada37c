"""The site as it is built (`python docs/build_site.py`, with the extra `docs`): its own search finds the page that answers."""

import json
import shutil
import subprocess

import pytest

from tests.helpers.docs_world import ROOT


SITE = ROOT / "build" / "site"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="no site: `python docs/build_site.py` builds it"),
    pytest.mark.skipif(shutil.which("node") is None, reason="the search is JavaScript: node runs it"),
]
# What a user types, and the page that answers.
QUESTIONS = {
    "my captions are all the same": "symptoms",
    "how many vectors?": "choose",
    "two GPUs": "several_devices",
    "which licence has the checkpoint?": "share",
    "loss is stuck": "symptoms",
    "loss is NaN": "symptoms",
    "it never stops": "symptoms",
    "out of memory": "memory",
    "which learning rate": "recipes",
    "format of my data": "data",
    "torchvision nms does not exist": "installation",
    "use another vision tower": "towers",
    "new language model": "language_models",
    "share on the Hub": "share",
    "several images": "media",
    "does the language model change?": "frozen",
    "serve with llama.cpp": "llama_cpp",
    "cache features": "features",
    "resume training": "streaming",
    "is it blind?": "evaluation",
    "LoRA": "memory",
    "chat template": "chat",
    "quantised": "small_devices",
    # by the words of an error
    "has fingerprint, but the connector was trained with": "errors",
    "reads padding as if it were words": "errors",
    "no known format has the fields": "data",
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    asked = "\n".join(QUESTIONS)
    command = ["node", str(ROOT / "tests" / "helpers" / "search_site.js"), str(SITE)]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    return dict(zip(QUESTIONS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_among_the_first_three(question: str, found: dict[str, list[str]]) -> None:
    pages = [location.partition("#")[0].strip("/") for location in found[question][:3]]
    assert QUESTIONS[question] in pages
