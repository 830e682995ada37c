"""examples/demo.py in a real browser: a picture goes in, words and figures come out."""

import copy
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.tiny import join, rows


pytest.importorskip("gradio")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PROMPT = "is what colour ?"  # to most others the random language model says nothing but special tokens


@pytest.fixture(scope="module")
def demo_module() -> Any:
    import demo  # needs gradio

    return demo


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    model, processor = join(folder)
    model.save_pretrained(folder / "eyes")
    processor.save_pretrained(folder / "eyes")
    rows(1)[0]["image"].save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def demo(demo_module: Any, checkpoint: Path) -> Any:
    return demo_module.Demo(str(checkpoint / "eyes"))


def expected(demo: Any, image: Image.Image, prompt: str, tokens: int) -> str:
    inputs = demo.processor(images=[image], text=[prompt], return_tensors="pt")
    ids = demo.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return demo.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.filterwarnings("ignore")
def test_words_stream_as_generate_writes_them(demo: Any, demo_module: Any) -> None:
    image = rows(1)[0]["image"]
    pieces = list(demo.stream(image, PROMPT, 12, first_sentence=False))
    assert pieces[-1] == expected(demo, image, PROMPT, 12) != ""
    assert all(after.startswith(before) for before, after in zip(pieces, pieces[1:], strict=False))
    assert not demo.is_chat and demo.prompt(PROMPT, as_chat=False) == PROMPT
    asked = demo.prompt(PROMPT, as_chat=True)
    assert asked.count("<image>") == 1 and asked.endswith("Assistant:") and not asked.startswith("<s>")


def test_a_language_model_with_a_template_of_its_own_is_asked_in_it(demo: Any) -> None:
    chatty = copy.copy(demo)
    chatty.processor = copy.deepcopy(demo.processor)
    # Text alone: the processor makes such a template render images.
    chatty.processor.tokenizer.chat_template = "{% for m in messages %}{{ bos_token + '[' + m['content'] + ']' }}{% endfor %}"
    chatty.processor.chat_template = chatty.processor._with_images(chatty.processor.tokenizer.chat_template)
    assert chatty.is_chat and not demo.is_chat
    assert chatty.prompt("what is", as_chat=True) == "[<image>what is]"  # BOS is the processor's to put


def test_writing_ends_when_the_reader_goes_and_tells_what_went_wrong(demo: Any, demo_module: Any) -> None:
    image, before = rows(1)[0]["image"], threading.active_count()
    stream = demo.stream(image, PROMPT, 12, first_sentence=False)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(Exception, match="learned positions|max_new_tokens|ValueError"):
        list(demo.stream(image, PROMPT, 0, first_sentence=False))
    stop = demo_module.Stop(demo.processor.tokenizer, first_sentence=True)
    ids = demo.processor.tokenizer(["a square .", "a . square"], return_tensors="pt")["input_ids"]
    assert stop(ids, None).tolist() == [True, False]
    stop.gone.set()
    assert stop(ids, None).tolist() == [True, True]


def test_the_quickstart_model_is_trained_once(demo_module: Any, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")  # what the quickstart writes last
    assert demo_module.quickstart_model(tmp_path) == tmp_path / "eyes"
    pictures, questions = demo_module.quickstart_examples(tmp_path / "examples", count=3)
    assert len(pictures) == 3 and all(Image.open(path).size == (256, 256) for path in pictures)
    assert "what colour ?" in questions


@pytest.fixture(scope="module")
def page(checkpoint: Path) -> Iterator[str]:
    """The address of a running demo."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--model", str(checkpoint / "eyes")]
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
    page: str, browser: Any, demo: Any, demo_module: Any, checkpoint: Path
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
    assert text_of("#answer textarea") == expected(demo, image, PROMPT, 40)
    blind = expected(demo, demo_module.blind_picture(image), PROMPT, 40) or demo_module.NOTHING
    assert text_of("#blind textarea") == blind
    wait.until(lambda browser: not browser.find_elements(By.CSS_SELECTOR, "#looked .generating"))
    _, owed, words = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
    owed.click()
    find("#owed img")
    words.click()
    assert find("#words img").get_attribute("src")
    assert not browser.find_element(By.CSS_SELECTOR, "#note").text  # nothing was refused
