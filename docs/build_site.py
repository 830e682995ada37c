"""Builds the site into build/site, warnings being errors: `pip install -e ".[docs]" && python docs/build_site.py`.

    python docs/build_site.py --serve    # http://127.0.0.1:8000

What pages include is put in before the build, and not by plugins of MkDocs: files (`<!-- include: FILE -->`), the
versions, notebooks as pages, and below each kind of error in errors.md its messages. So the builder is one word: MkDocs 1.6
with Material 9.8, which its authors mend until May 2027, reads the same `mkdocs.yml` as Zensical, their next one, which was
not as strict when this was written (0.0.73).
"""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from error_messages import HEADING, ROOT, kinds, messages


BUILDER = "mkdocs"
PAGES, PREPARED, SITE = ROOT / "docs", ROOT / "build" / "docs", ROOT / "build" / "site"
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def include(name: str) -> str:
    """A file of the repository: links to pages stay links, others become what they are called."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if not name.endswith(".md"):
        return text
    text = LINK.sub(lambda link: f"]({link[1].removeprefix('docs/')})" if link[1].startswith("docs/") else link[0], text)
    pages = {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")}
    return re.sub(
        r"\[([^\]]+)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]+)?\)",
        lambda link: link[0] if link[2] in pages else link[1],
        text,
    )


def with_messages(page: str) -> str:
    """The page of errors with the messages of each kind, below what it says of them."""
    of: dict[str, list[str]] = {anchor: [] for anchor in kinds(page)}
    for message in messages():
        if message.kind and re.search(r"\w", message.text) and message.text not in of[message.kind]:
            of[message.kind].append(message.text)
    sections = re.split(r"(?=^## )", page, flags=re.MULTILINE)
    for number, section in enumerate(sections):
        if found := HEADING.match(section):
            listed = "".join(f"\n- `` {html.unescape(text)} ``" for text in of[found["anchor"]])
            sections[number] = f"{section.rstrip()}\n\nMessages, with … for what is filled in:\n{listed}\n\n"
    return "".join(sections)


def versions() -> str:
    """A table of the oldest and the newest versions that the checks run with."""
    pins = [
        dict(
            line.split("==")
            for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
            if "==" in line and line[0] != "#"
        )
        for name in ("compat.txt", "constraints.txt")
    ]
    shown = ("transformers", "torch", "huggingface-hub", "accelerate", "peft", "datasets", "numpy", "pillow", "trl", "gguf")
    rows = [f"| {name} | {pins[0].get(name, '')} | {pins[1][name]} |" for name in shown]
    return "\n".join(["| | oldest | newest |", "|---|---|---|", *rows])


def notebook_page(path: Path) -> str:
    """A notebook as a page, with what its cells printed and drew; images go beside it."""
    parts = ["---\nsearch:\n  boost: 0.5\n---"]  # below the pages that answer
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for place, output in enumerate(cell["outputs"]):
            data = output.get("data", {"text/plain": output.get("text", "")})
            drawn = next((kind for kind in ("png", "jpeg") if f"image/{kind}" in data), None)
            if drawn:
                image = path.with_name(f"{path.stem}_{number}_{place}.{drawn}")
                image.write_bytes(base64.b64decode(data[f"image/{drawn}"]))
                parts.append(f"![What the cell above drew]({image.name})")
            else:
                parts.append(f"```{{ .text .no-copy }}\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def prepare() -> None:
    shutil.rmtree(PREPARED, ignore_errors=True)
    shutil.copytree(PAGES, PREPARED, ignore=shutil.ignore_patterns("*.py", "__pycache__", "tables"))
    for path in sorted(PREPARED.rglob("*.ipynb")):
        path.with_suffix(".md").write_text(notebook_page(path), encoding="utf-8")
    for path in PREPARED.rglob("*.md"):
        page = path.read_text(encoding="utf-8")
        page = INCLUDE.sub(lambda found: include(found[1]), page).replace("<!-- versions -->", versions())
        page = page.replace(".ipynb)", ".md)")  # a link to a notebook, which GitHub shows as it is
        path.write_text(with_messages(page) if path.name == "errors.md" else page, encoding="utf-8")


def main() -> int:
    prepare()
    command = ["serve"] if "--serve" in sys.argv else ["build", "--strict"]
    # `NO_MKDOCS_2_WARNING`: the theme's word on what comes after it, which stands above.
    return subprocess.call([sys.executable, "-m", BUILDER, *command], cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})


if __name__ == "__main__":
    sys.exit(main())
