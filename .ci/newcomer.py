"""A newcomer's path by the documentation's own commands and code, each as it is written, none edited.

    mkdir -p SOMEWHERE/benchmarks && cp -r README.md docs tests .ci/newcomer.py SOMEWHERE
    cp -r benchmarks/__init__.py benchmarks/loopback_hub SOMEWHERE/benchmarks && cd SOMEWHERE && python newcomer.py

Runs with the package as it was installed from its wheel. What the newcomer types runs in a folder that holds nothing but data,
without a checkout in reach; the parents that pages name are tiny random ones, served under those names by the tests' Hub on
the loopback address. Then a second machine, an environment of its own without the package, loads what was pushed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.docs_world import FENCE, OWNERS
from tests.helpers.hub_fixtures import Hub


DOCS = Path(__file__).resolve().parent / "docs"
SHELL = "set -euo pipefail\n"
SERVE = """
import modeling_frozen
from tests.helpers.docs_world import serve

assert "site-packages" in modeling_frozen.__file__, modeling_frozen.__file__
serve()
"""
# What the newcomer brings: photos, and questions about them in LLaVA's JSON.
DATA = """
import json
from pathlib import Path
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}
Path("images").mkdir()
rows = []
for number in range(80):
    name, colour = list(COLOURS.items())[number % 4]
    image = Image.new("RGB", (20, 18), colour)
    image.putpixel((number % 20, number // 20), (255, 255, 255))  # no two photos are the same
    image.save(f"images/{number:03}.jpg")
    turns = [("human", "<image>\\nwhat colour ?"), ("gpt", f"{name} .")]
    turns = [{"from": who, "value": said} for who, said in turns]
    rows.append({"id": f"{number:03}", "image": f"{number:03}.jpg", "conversations": turns})
Path("llava.json").write_text(json.dumps(rows))
image.save("photo.jpg")
"""

PHOTO = "from PIL import Image\nImage.new('RGB', (20, 18), 'red').save('photo.jpg')\n"


def written(page: str, heading: str, language: str, number: int = 0) -> str:
    """A block of a page: the `number`th in `language` of the section under `heading`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/{page} has no section {heading!r} any more"
    found = [match[3] for match in FENCE.finditer(section[1]) if match[2] == language]
    assert len(found) > number, f"docs/{page} has {len(found)} blocks of {language} under {heading!r} now"
    return found[number]


class Machine:
    """A folder with data, a Hub's cache of its own, and the programs of an environment."""

    def __init__(self, folder: Path, hub: Hub, environment: Path):
        self.folder = folder
        folder.mkdir()
        self.variables = hub.env(package=False)
        self.variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.variables.pop("PYTHONPATH")

    def run(self, title: str, command: Sequence[str], typed: str = "") -> str:
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=self.folder, env=self.variables, input=typed, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{title}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)
        return done.stdout

    def shell(self, title: str, commands: str, typed: str = "") -> str:
        return self.run(title, ["bash", "-c", SHELL + commands], typed)

    def python(self, title: str, *blocks: str) -> str:
        """Blocks in one file, as somebody keeps them who copies them one after another."""
        (self.folder / "mine.py").write_text("\n".join(blocks), encoding="utf-8")
        return self.run(title, ["python", "mine.py"])


def by_commands(machine: Machine, hub: Hub) -> None:
    """From data to the Hub on the command line."""
    machine.python("data of one's own", DATA)
    lines = written("reference/command.md", "From data to a model that is scored", "bash").splitlines()
    said = {}
    for line in lines:
        name = line.split()[1]
        typed = "what colour ?\n/exit\n" if name == "chat" else ""
        said[name] = machine.shell(f"$ {line}", line, typed)
    assert list(said) == ["check", "train", "caption", "chat", "evaluate"], list(said)
    assert "llava\nrows: 80\n" in said["check"], said["check"]
    assert "Saved to eyes." in said["train"], said["train"]
    assert said["caption"].startswith("photo.jpg"), said["caption"]
    assert said["chat"].count("> ") == 2 and len(said["chat"].split("> ")[1].strip()) > 0, said["chat"]
    assert re.search(r"^sighted .*\n.*^blind ", said["evaluate"], re.MULTILINE | re.DOTALL), said["evaluate"]
    machine.python("pushed", written("share.md", "A folder that was trained before", "python"))
    files = hub.files("me/eyes")
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= set(files), files
    assert "modeling_frozen_prefix.py" in files, files
    assert not [name for name in files if "checkpoint-" in name or "held_out" in name or name.endswith(".bin")], files
    card = hub.read("me/eyes", "README.md").decode()
    assert "\n## Training\n" in card and "\n## Evaluation\n" in card and "| blind " in card, card


def by_python(machine: Machine) -> None:
    """The tutorial on questions, from its own JSON to the Hub."""
    page = "questions.md"
    rows = json.loads(written(page, "The data", "json"))
    (machine.folder / "llava.json").write_text(written(page, "The data", "json"), encoding="utf-8")
    picture = f"""
from pathlib import Path
from PIL import Image
for name in {[row["image"] for row in rows]} + ["photo.jpg"]:
    Path(name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (20, 18), "red").save(name)
"""
    machine.python("images that the tutorial's JSON names", picture)
    machine.shell(f"docs/{page}, its command", written(page, "The data", "bash"))
    # The first block pushes what was trained; "me/eyes", which the second begins from, is what the commands pushed.
    code = [written(page, heading, "python", number) for heading in ("Train", "Ask") for number in (0, 1)]
    machine.python(f"docs/{page}, its code", *code)


def on_another_machine(machine: Machine) -> None:
    """What somebody does who has neither the package nor a checkout."""
    machine.python("a photo", PHOTO)
    absent = "import importlib.util\nassert importlib.util.find_spec('modeling_frozen') is None\n"
    code = written("share.md", "Whoever loads it", "python", 1)
    assert machine.python("loaded without the package", absent, code).strip()


def blocks_of_card(hub: Hub) -> list[str]:
    return [match[3] for match in FENCE.finditer(hub.read("me/eyes", "README.md").decode()) if match[2] == "python"]


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(Path(folder))
        try:
            hub.add_user("me", hub.token, orgs=OWNERS)
            hub.run(SERVE)
            here = Path(sys.prefix)
            first = Machine(Path(folder, "first"), hub, here)
            by_commands(first, hub)
            by_python(Machine(Path(folder, "second"), hub, here))
            fresh = Path(folder, "fresh")
            subprocess.run([sys.executable, "-m", "venv", fresh], check=True)
            # As docs/installation.md says: torch's build for CPUs first.
            torch = subprocess.run(
                [sys.executable, "-c", "import torch; print(torch.__version__.split('+')[0])"],
                check=True, capture_output=True, text=True,
            ).stdout.strip()  # fmt: skip
            pip = {**os.environ, "PATH": f"{fresh / 'bin'}{os.pathsep}{os.environ['PATH']}"}
            for command in (f"pip install torch=={torch}", written("share.md", "Whoever loads it", "bash")):
                subprocess.run(["bash", "-c", SHELL + command], check=True, env=pip, cwd=folder)
            another = Machine(Path(folder, "third"), hub, fresh)
            on_another_machine(another)
            first.python("the same photo", PHOTO)
            with_package, without = blocks_of_card(hub)
            assert another.python("the card's own code, without the package", without) == first.python(
                "the card's own code, with the package", with_package
            )
        finally:
            hub.stop()
    print(f"a newcomer's path: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
