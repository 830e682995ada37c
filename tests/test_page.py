"""`frozen-prefix demo` in a real browser: a picture goes in, words and figures come out."""

import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modeling_frozen.serving.answering import NOTHING, load
from tests.helpers import fresh_python
from tests.helpers.tiny import join, rows


pytest.importorskip("gradio")
from modeling_frozen.serving.page import DPI, blind_picture  # noqa: E402  (needs gradio)


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PROMPT = "is what colour ?"  # to most others the random language model says nothing but special tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    model, processor = join(folder)
    model.save_pretrained(folder / "eyes")
    processor.save_pretrained(folder / "eyes")
    rows(1)[0]["image"].save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def eyes(checkpoint: Path) -> tuple[Any, Any]:
    return load(checkpoint / "eyes", "cpu")


def expected(eyes: tuple[Any, Any], image: Image.Image, prompt: str, tokens: int) -> str:
    model, processor = eyes
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def page(checkpoint: Path) -> Iterator[str]:
    """The address of a running demo."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "modeling_frozen.cli", "demo", str(checkpoint / "eyes"), "--questions", PROMPT]
    command += ["--pictures", str(checkpoint), "--device", "cpu"]
    with open(checkpoint / "stderr", "w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            match = next((match for line in server.stdout if (match := re.search(r"http://\S+", line))), None)
            assert match, (checkpoint / "stderr").read_text()
            yield match[0]
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Chromium is driven by the package playwright")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if not binary:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


DROP = """([element, content]) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(new File([bytes], "picture.png", { type: "image/png" }))
    element.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }))
}"""
# What can be seen and does not lie within the window, or is cut by its own box; a text field scrolls.
SEEN = "h1, p, label, span, button, img, textarea, .cm-line, [role=tab]"
OUTSIDE = """(seen) => [...document.querySelectorAll(seen)].filter((one) => {
    const { left, right, width, height } = one.getBoundingClientRect(), style = getComputedStyle(one)
    if (!width || !height || !one.checkVisibility({ visibilityProperty: true, opacityProperty: true })) return false
    if (style.clipPath !== "none" || (width <= 1 && height <= 1)) return false  // for readers of screens
    const cut = one.tagName !== "TEXTAREA" && style.overflowX !== "visible" && one.scrollWidth > one.clientWidth + 1
    return left < -1 || right > window.innerWidth + 1 || cut
}).map((one) => one.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_picture_goes_in_and_words_figures_and_code_come_out(
    page: str, browser: Any, eyes: tuple[Any, Any], checkpoint: Path, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 860}, permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    opened.set_default_timeout(90_000)
    opened.goto(page)
    content = base64.b64encode((checkpoint / "picture.png").read_bytes()).decode()
    opened.wait_for_selector("#picture input[type=file]", state="attached")
    opened.evaluate(DROP, [opened.query_selector("#picture button"), content])
    opened.wait_for_selector("#picture img")
    opened.fill("#question textarea, #question input", PROMPT)
    opened.click("#ask")
    opened.wait_for_selector("#looked img")
    image = Image.open(checkpoint / "picture.png").convert("RGB")
    said = expected(eyes, image, PROMPT, 40)
    blind = expected(eyes, blind_picture(image), PROMPT, 40) or NOTHING
    assert opened.input_value("#answer textarea") == said and opened.input_value("#blind textarea") == blind
    opened.wait_for_selector("#looked .generating", state="detached")
    tabs = opened.query_selector_all("button[role=tab]:visible")
    assert [one.inner_text() for one in tabs] == ["Looks", "Owes", "Prefix", "Code"]
    for one, figure in zip(tabs, ("#looked", "#owed", "#words", "#code"), strict=True):
        one.click()
        if figure != "#code":
            shown = opened.wait_for_selector(f"{figure} img")
            opened.wait_for_function("(image) => image.complete && image.naturalWidth", arg=shown)
            # Drawn for this window: letters of ten points are at least seven pixels high.
            scale = shown.evaluate("(image) => image.clientWidth / image.naturalWidth")
            assert scale * DPI * 10 / 72 >= 7, (figure, scale)
        assert not opened.evaluate(OUTSIDE, SEEN), figure
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert not opened.inner_text("#note")  # nothing was refused

    opened.click("#code button[aria-label*=opy], #code button[title*=opy]")
    code = opened.evaluate("navigator.clipboard.readText()")
    context.close()
    image.save(checkpoint / "photo.png")
    code = code.replace("photo.jpg", "photo.png")
    done = fresh_python.run("-c", code, env=fresh_python.environment(), cwd=checkpoint)
    assert done.stdout == f"{said}\n", done.stderr
