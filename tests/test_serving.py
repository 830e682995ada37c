"""Serving: transformers' server and chat, run by our command and by its own, asked by OpenAI's own client."""

import base64
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TextIteratorStreamer

from modeling_frozen.serving.server import build_app
from tests.helpers.hub_fixtures import HIDE_PACKAGE, ROOT
from tests.helpers.talking import QUESTION, TOKENS, Talking, picture, talking, user
from tests.helpers.tiny import COLOURS


# Ours; and transformers' own, for people without the package.
SERVERS = {
    "frozen-prefix": ["-m", "modeling_frozen.serving.server", "serve"],
    "transformers": [
        "-c", HIDE_PACKAGE + "from transformers.cli.transformers import app; app()", "serve", "--trust-remote-code",
    ],
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- without a server


def test_commands_take_what_those_of_transformers_take() -> None:
    import typer
    from transformers.cli.chat import Chat
    from transformers.cli.serve import Serve

    library = typer.Typer()
    library.command(name="serve")(Serve)
    library.command(name="chat")(Chat)
    ours, theirs = (typer.main.get_command(app).commands for app in (build_app(), library))
    assert sorted(ours) == ["chat", "serve"]
    for name, command in ours.items():
        options = [(option.name, option.opts, option.default) for option in command.params]
        assert options and options == [(option.name, option.opts, option.default) for option in theirs[name].params]


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ImportError, match=r"needs fastapi.*frozen-prefix\[serving\]"):
        build_app()(["serve", "--port", "0"], standalone_mode=False)


def test_tokens_stream_out_of_generate_as_they_come(saved: Talking) -> None:
    inputs = saved.processor(images=picture("red"), text=f"<image> {QUESTION}", return_tensors="pt")
    streamer = TextIteratorStreamer(saved.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=saved.model.generate, kwargs={**inputs, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == saved.continues(inputs)[0]
    assert len([piece for piece in pieces if piece]) > 2


# --------------------------------------------------------------------------------------------------- with a server


def data_url(colour: str) -> str:
    file = io.BytesIO()
    picture(colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def turn(*images: str) -> dict[str, Any]:
    """A user's turn as OpenAI's clients write it."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": QUESTION}]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Talking:
    return talking(tmp_path_factory.mktemp("eyes"))


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The address of a server process on a free port, and OpenAI's client for it."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    openai = pytest.importorskip("openai")
    folder = tmp_path_factory.mktemp("serve")
    command = [sys.executable, *SERVERS[request.param], "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    own = request.param == "frozen-prefix"
    process = subprocess.Popen(
        command, cwd=ROOT if own else folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if address := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
            break
    else:
        pytest.fail(f"the server ended with {process.wait()}:\n{''.join(said[-30:])}")
    reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
    reader.start()
    client = openai.OpenAI(base_url=f"{address[1]}/v1", api_key="none", max_retries=0, timeout=60)
    yield SimpleNamespace(url=address[1], client=client, own=own, said=said)
    client.close()
    process.terminate()
    process.wait(30)
    reader.join(10)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a web server with one picture per colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        picture(colour).save(folder / f"{colour}.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


def ask(server: SimpleNamespace, saved: Talking, *messages: dict[str, Any], **options: Any) -> Any:
    settings = {"model": saved.path, "max_tokens": TOKENS, "temperature": 0, **options}
    return server.client.chat.completions.create(messages=list(messages), **settings)


@pytest.mark.slow
def test_an_image_in_a_data_url_is_seen(server: SimpleNamespace, saved: Talking) -> None:
    by_hand = {colour: saved.says(user(colour)) for colour in COLOURS}
    assert len(set(by_hand.values())) > 1, "a blind model would pass"
    for colour, text in by_hand.items():
        answer = ask(server, saved, turn(data_url(colour)))
        assert answer.choices[0].message.content == text
        assert answer.usage.completion_tokens <= TOKENS < answer.usage.prompt_tokens


@pytest.mark.slow
def test_words_stream_as_they_come(server: SimpleNamespace, saved: Talking) -> None:
    chunks = list(ask(server, saved, turn(data_url("red")), stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == saved.says(user("red")) and len(pieces) > 2
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


@pytest.mark.slow
def test_images_of_the_web_several_turns_and_no_image(server: SimpleNamespace, saved: Talking, pictures: str) -> None:
    assert ask(server, saved, turn(f"{pictures}/blue.png")).choices[0].message.content == saved.says(user("blue"))
    answer = {"role": "assistant", "content": "a red square ."}
    got = ask(server, saved, turn(data_url("red"), f"{pictures}/blue.png"), answer, turn(f"{pictures}/green.png"))
    assert got.choices[0].message.content == saved.says(user("red", "blue"), answer, user("green"))
    got = ask(server, saved, {"role": "user", "content": QUESTION})
    assert got.choices[0].message.content == saved.says(user())


@pytest.mark.slow
def test_the_responses_endpoint_sees_too(server: SimpleNamespace, saved: Talking) -> None:
    content = [{"type": "input_image", "image_url": data_url("green")}, {"type": "input_text", "text": QUESTION}]
    asked = [{"role": "user", "content": content}]
    answer = server.client.responses.create(
        model=saved.path, input=asked, max_output_tokens=TOKENS, temperature=0, stream=False
    )
    assert answer.output_text == saved.says(user("green"))


@pytest.mark.slow
def test_several_clients_at_once_get_each_their_own(server: SimpleNamespace, saved: Talking, pictures: str) -> None:
    def one(index: int) -> tuple[str, str]:
        colour = list(COLOURS)[index % 4]
        url = data_url(colour) if index % 2 else f"{pictures}/{colour}.png"
        if index % 3:
            return colour, ask(server, saved, turn(url)).choices[0].message.content
        chunks = ask(server, saved, turn(url), stream=True)
        return colour, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    by_hand = {colour: saved.says(user(colour)) for colour in COLOURS}
    with ThreadPoolExecutor(6) as pool:
        for colour, text in pool.map(one, range(12)):
            assert text == by_hand[colour]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9/none.png", "none.png"),
        ("{pictures}/none.png", "none.png"),
        ("data:image/png;base64,AAAA" + 3000 * "A", "picture"),
        ("/nowhere/none.png", "no such file"),
    ],
)
def test_an_image_that_is_not_there_is_the_clients_mistake(
    server: SimpleNamespace, saved: Talking, pictures: str, url: str, said: str
) -> None:
    import openai

    with pytest.raises(openai.APIError) as caught:
        ask(server, saved, turn(url.format(pictures=pictures)))
    if server.own:
        assert isinstance(caught.value, openai.BadRequestError) and caught.value.type == "invalid_request_error"
        assert said in caught.value.body["message"] and len(caught.value.body["message"]) < 600
    # Whoever answers, the server lives on.
    client = server.client.with_options(max_retries=2)
    assert client.chat.completions.create(model=saved.path, messages=[turn(data_url("red"))], max_tokens=1).choices


@pytest.mark.slow
def test_an_unknown_model_is_named(server: SimpleNamespace, saved: Talking) -> None:
    import openai

    if not server.own:
        pytest.skip("transformers' own server says nothing")
    with pytest.raises(openai.BadRequestError, match="/nowhere/eyes"):
        ask(server, saved, turn(data_url("red")), model="/nowhere/eyes")


@pytest.mark.slow
def test_chat_talks_to_it(server: SimpleNamespace, saved: Talking, tmp_path: Path) -> None:
    if not server.own:
        pytest.skip("a client is a client")
    command = [sys.executable, "-m", "modeling_frozen.serving.server", "chat", saved.path, server.url, "do_sample=False"]
    command += ["max_new_tokens=4"]
    # The client is huggingface_hub's, which in offline mode reaches nobody, not this machine either.
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url, "COLUMNS": "200"}
    # One question; no, don't go on after the last token; the end.
    talk = f"{QUESTION}\nn\n!exit\n"
    done = subprocess.run(command, cwd=ROOT, env=env, input=talk, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert saved.says(user(), tokens=4) in done.stdout
