"""The gateway: several connectors over one server of the bare language model, asked by OpenAI's own client."""

import asyncio
import base64
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.image_utils import httpx

from tests.helpers.hub_fixtures import ROOT
from tests.helpers.talking import QUESTION, TOKENS, Talking, picture, talking, user
from tests.helpers.tiny import COLOURS, NOT_READERS, join, join_not_a_reader


pytest.importorskip("fastapi", reason="the gateway is of the extra serving")
openai = pytest.importorskip("openai", reason="the gateway is asked by OpenAI's client, of the extra slow")

from modeling_frozen.serving.gateway import ImageEncoder, build_gateway, load_connectors  # noqa: E402
from modeling_frozen.serving.prompt_embeds import prompt_embeds  # noqa: E402


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def data_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def turn(*colours: str, text: str = QUESTION) -> dict[str, Any]:
    pictures = [data_part(picture(one)) for one in colours]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


class Process:
    """A server in a Python of its own, which can be killed and started again on its port."""

    def __init__(self, port: int, *command: str):
        self.port, self.command = port, command
        self.start()

    def start(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *self.command], cwd=ROOT, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.said: list[bytes] = []
        threading.Thread(target=lambda: self.said.extend(self.process.stderr or ()), daemon=True).start()
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    raise AssertionError(b"".join(self.said).decode()) from None
                time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> list[Talking]:
    """Two connectors of one pair of parents."""
    folder = tmp_path_factory.mktemp("eyes")
    first = talking(folder)
    torch.manual_seed(7)
    model, processor = join(folder, connector_type="resampler", prefix_length=3)
    model.model.connector.set_output_norm(3 * model.get_input_embeddings().weight.norm(dim=-1).mean().item())
    model.save_pretrained(folder / "other")
    processor.save_pretrained(folder / "other")
    return [first, Talking(model, processor, str(folder / "other"))]


@pytest.fixture(scope="module")
def served(eyes: list[Talking]) -> Iterator[SimpleNamespace]:
    words = eyes[0].model.config.text_base_model["name_or_path"]
    upstream, port = free_port(), free_port()
    language_model = Process(upstream, "-m", "tests.helpers.embeds_server", words, str(upstream))
    connectors = [
        part for name, one in zip(("one", "two"), eyes, strict=True) for part in ("--connector", f"{name}={one.path}")
    ]
    gateway = Process(
        port,
        "-m",
        "modeling_frozen.cli",
        "serve",
        "--upstream",
        f"http://127.0.0.1:{upstream}",
        *connectors,
        "--port",
        str(port),
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    yield SimpleNamespace(client=client, language_model=language_model, gateway=gateway, upstream=upstream)
    client.close()
    gateway.kill()
    language_model.kill()


def said(served: SimpleNamespace, model: str, *messages: dict[str, Any], **options: Any) -> str:
    answer = served.client.chat.completions.create(model=model, messages=list(messages), max_tokens=TOKENS, **options)
    if not options.get("stream"):
        assert answer.model == model
        return answer.choices[0].message.content
    events = list(answer)
    assert {event.model for event in events} == {model}
    pieces = [event.choices[0].delta.content for event in events]
    assert len([piece for piece in pieces if piece]) >= len("".join(pieces).split())  # a word at a time
    return "".join(pieces)


def test_two_connectors_at_once_say_what_generate_says(served: SimpleNamespace, eyes: list[Talking]) -> None:
    asked = [(index, colour, stream) for stream in (False, True) for index in range(2) for colour in COLOURS]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda one: said(served, ("one", "two")[one[0]], turn(one[1]), stream=one[2]), asked))
    expected = [eyes[index].says(user(colour)) for index, colour, _ in asked]
    assert got == expected
    assert len(set(expected)) > 4
    assert served.client.models.list().data[1].id == "two"


def test_several_images_turns_and_text_alone(served: SimpleNamespace, eyes: list[Talking]) -> None:
    answer = {"role": "assistant", "content": "red ."}
    assert said(served, "two", turn("red", "blue")) == eyes[1].says(user("red", "blue"))
    expected = eyes[0].says(user("red"), {"role": "assistant", "content": [{"type": "text", "text": "red ."}]}, user("blue"))
    assert said(served, "one", turn("red"), answer, turn("blue")) == expected
    assert said(served, "one", turn()) == eyes[0].says(user())


def test_images_are_encoded_once_for_all_who_ask(served: SimpleNamespace) -> None:
    def counted() -> dict[str, int]:
        return httpx.get(f"http://127.0.0.1:{served.gateway.port}/health", trust_env=False).json()

    said(served, "two", turn("green"))
    before = counted()
    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda stream: said(served, "two", turn("green"), stream=stream), [False, True] * 4))
    assert len(answers) == 1 and counted() == before
    said(served, "two", {"role": "user", "content": [data_part(Image.new("RGB", (20, 18), (1, 2, 3))), turn()["content"][0]]})
    assert counted()["images"] == before["images"] + 1


SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
BROKEN = {"type": "image_url", "image_url": {"url": "data:,xx"}}


@pytest.mark.parametrize(
    ("model", "content", "status", "words"),
    [("nobody", [], 404, "No connector is named 'nobody'"), ("one", [BROKEN], 400, "neither"), ("one", [SOUND], 400, "takes")],
)
def test_a_clients_mistake_is_named(served: SimpleNamespace, model: str, content: Any, status: int, words: str) -> None:
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        said(served, model, {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]})
    assert caught.value.status_code == status


def test_what_is_asked_of_the_processor_is_refused(served: SimpleNamespace) -> None:
    with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs.*another processor"):
        said(served, "one", turn("red"), extra_body={"mm_processor_kwargs": {"crop_to_patches": True}})


def test_a_placeholder_that_a_user_writes_takes_no_image(served: SimpleNamespace) -> None:
    for colours in ((), ("red",)):
        with pytest.raises(openai.BadRequestError, match="leave it out of the text"):
            said(served, "one", turn(*colours, text="what <image> ?"))


def test_the_upstream_server_dies_and_comes_back_under_load(served: SimpleNamespace, eyes: list[Talking]) -> None:
    long = {"model": "one", "max_tokens": 100, "stream": True, "extra_body": {"ignore_eos": True}}
    outcomes: list[str] = []
    stop = threading.Event()

    def client(index: int) -> None:
        while not stop.is_set():
            try:
                events = served.client.chat.completions.create(messages=[turn(list(COLOURS)[index])], **long)
                outcomes.append("answered" if len(list(events)) > 20 else "cut short without a word")
            except Exception as error:  # OpenAI's, or that of the library below where the gateway itself dies in a stream
                outcomes.append(f"{type(error).__name__}: {error}")
                time.sleep(0.05)

    clients = [threading.Thread(target=client, args=(index,)) for index in range(4)]
    for one in clients:
        one.start()

    def until(seen: str) -> None:
        start, deadline = len(outcomes), time.monotonic() + 60
        while not any(seen in one for one in outcomes[start:]):
            assert time.monotonic() < deadline, outcomes[-5:]
            time.sleep(0.02)

    until("answered")
    served.language_model.kill()
    until("can't be asked")
    served.language_model.start()
    until("answered")
    served.gateway.kill()
    until("APIConnectionError")
    served.gateway.start()
    until("answered")
    stop.set()
    for one in clients:
        one.join(60)
        assert not one.is_alive()
    assert "cut short without a word" not in outcomes
    known = ("answered", "can't be asked", "broke off", "APIConnectionError", "RemoteProtocolError", "ReadError")
    assert [one for one in outcomes if not any(sentence in one for sentence in known)] == []
    assert said(served, "one", turn("red")) == eyes[0].says(user("red"))


def test_equal_images_are_encoded_once_and_others_in_batches(eyes: list[Talking]) -> None:
    connectors = load_connectors([one.path for one in eyes])
    first, second = connectors.values()
    assert first.model.vision_tower is second.model.vision_tower
    assert first.model.language_model is None
    contents = []
    for colour in COLOURS:
        file = io.BytesIO()
        picture(colour).save(file, "PNG")
        contents.append(file.getvalue())
    encoder = ImageEncoder(batch_size=8)

    async def ask(*contents: bytes) -> list[dict[str, str]]:
        return await asyncio.gather(*(encoder.encode(first, content) for content in contents))

    async def together() -> None:
        parts = await ask(*contents, *contents)
        assert parts[: len(contents)] == parts[len(contents) :]
        assert (encoder.encoded, encoder.batches <= 4) == (4, True)
        await ask(*contents)
        assert encoder.encoded == 4
        alone = prompt_embeds(eyes[0].model, eyes[0].processor, picture("red"))
        tensors = [torch.load(io.BytesIO(base64.b64decode(one["data"]))) for one in (parts[0], *alone)]
        assert torch.allclose(*tensors, atol=1e-5)
        with pytest.raises(ValueError, match="not an image"):
            await ask(contents[0], b"no image")
        await encoder.encode(second, contents[0])
        assert encoder.encoded == 5
        small = ImageEncoder(cache_bytes=len(parts[0]["data"]))
        for content in contents:
            await small.encode(first, content)
        assert len(small.kept) == 1

    asyncio.run(together())


@pytest.mark.parametrize("kind", NOT_READERS)
def test_what_no_server_of_embeddings_reads_is_refused(kind: str, tmp_path: Path) -> None:
    join_not_a_reader(tmp_path, kind)
    with pytest.raises(ValueError, match=f"{NOT_READERS[kind]}.*frozen-prefix serve"):
        load_connectors([str(tmp_path / "eyes")])


def test_two_connectors_of_one_name_are_refused(eyes: list[Talking]) -> None:
    with pytest.raises(ValueError, match="Two connectors are named 'a'"):
        load_connectors([f"a={eyes[0].path}", f"a={eyes[1].path}"])


def test_the_gateway_is_an_app_of_its_own(eyes: list[Talking]) -> None:
    from fastapi.testclient import TestClient

    app = build_gateway(load_connectors([f"one={eyes[0].path}"]), f"http://127.0.0.1:{free_port()}/v1", timeout=5)
    with TestClient(app) as client:
        assert client.get("/health").status_code == 502
        answer = client.post("/v1/chat/completions", json={"model": "one", "messages": [turn("red")]})
        assert answer.status_code == 502
        assert "can't be asked: ConnectError" in answer.json()["error"]["message"]
