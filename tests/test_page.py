"""`frozen-prefix demo` in a real browser: a picture goes in, words and figures come out."""

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
from tests.helpers.tiny import join, rows


pytest.importorskip("gradio")
from modeling_frozen.serving.page import blind_picture  # noqa: E402  (needs gradio)


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
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium with its driver on this machine")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1250"):
        options.add_argument(argument)
    options.binary_location = binary
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_a_picture_goes_in_and_words_and_figures_come_out(
    page: str, browser: Any, eyes: tuple[Any, Any], checkpoint: Path
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector: str) -> Any:
        return wait.until(lambda browser: browser.find_element(By.CSS_SELECTOR, selector))

    def text_of(selector: str) -> str:
        return wait.until(lambda browser: browser.find_element(By.CSS_SELECTOR, selector).get_attribute("value"))

    wait = WebDriverWait(browser, 60, ignored_exceptions=[Exception])
    browser.get(page)
    find("#picture input[type=file]").send_keys(str(checkpoint / "picture.png"))
    find("#picture img")
    find("#question textarea, #question input").send_keys(PROMPT)
    find("#ask").click()
    find("#looked img")
    image = Image.open(checkpoint / "picture.png").convert("RGB")
    assert text_of("#answer textarea") == expected(eyes, image, PROMPT, 40)
    blind = expected(eyes, blind_picture(image), PROMPT, 40) or NOTHING
    assert text_of("#blind textarea") == blind
    wait.until(lambda browser: not browser.find_elements(By.CSS_SELECTOR, "#looked .generating"))
    _, owed, words = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
    owed.click()
    find("#owed img")
    words.click()
    assert find("#words img").get_attribute("src")
    assert not browser.find_element(By.CSS_SELECTOR, "#note").text  # nothing was refused
