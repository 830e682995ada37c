"""Serving: transformers' server, run by our command and by its own, asked by OpenAI's own client."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.image_utils import httpx

from modeling_frozen.serving.server import build_app
from tests.helpers.hub_fixtures import HIDE_PACKAGE, ROOT
from tests.helpers.talking import QUESTION, TOKENS, Talking, picture, talking, user
from tests.helpers.tiny import COLOURS, join, save_parents


# Ours; and transformers' own, for people without the package.
OURS = ["-m", "modeling_frozen.cli", "serve"]
SERVERS = {
    "frozen-prefix": [*OURS, "--allow-private-addresses"],
    "transformers": [
        "-c", HIDE_PACKAGE + "from transformers.cli.transformers import app; app()", "serve", "--trust-remote-code",
    ],
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- without a server


def test_it_takes_what_that_of_transformers_takes() -> None:
    import typer
    from transformers.cli.serve import Serve

    library = typer.Typer(add_completion=False)
    library.command(name="serve")(Serve)
    ours, theirs = (typer.main.get_command(app) for app in (build_app(), library))
    options = [(option.name, option.opts, option.default) for option in ours.params]
    expected = [(option.name, option.opts, option.default) for option in theirs.params]
    assert expected and options[: len(expected)] == expected
    added = ["allow_local_media", "allow_private_addresses", "media_timeout", "max_media_bytes"]
    assert [option for option, _, _ in options[len(expected) :]] == added


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ImportError, match=r"needs fastapi.*frozen-prefix\[serving\]"):
        build_app()(["--port", "0"], standalone_mode=False)


def test_continuous_batching_is_for_language_models_alone(saved: Talking) -> None:
    """transformers' takes ids and no images: with `--continuous-batching` its server answers a model of ours without it."""
    pytest.importorskip("fastapi")
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerationState

    modality = ModelManager.get_model_modality(saved.model, saved.processor)
    assert not GenerationState(continuous_batching=True).use_continuous_batching(saved.model, modality)
    assert GenerationState(continuous_batching=True).use_continuous_batching(saved.model, type(modality)["LLM"])


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
    return talking(tmp_path_factory.mktemp("saved"))


@contextmanager
def started(folder: Path, *command: str, own: bool = True, **env: str) -> Iterator[SimpleNamespace]:
    """The address of a server process on a free port, and OpenAI's client for it."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    openai = pytest.importorskip("openai")
    process = subprocess.Popen(
        [sys.executable, *command, "--host", "127.0.0.1", "--port", "0", "--device", "cpu"],
        cwd=ROOT if own else folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip
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


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    own = request.param == "frozen-prefix"
    with started(tmp_path_factory.mktemp("serve"), *SERVERS[request.param], own=own) as running:
        yield running


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Ours as it starts without any option, where nothing was ever downloaded."""
    folder = tmp_path_factory.mktemp("strict")
    with started(folder, *OURS, HF_HUB_CACHE=str(folder / "none")) as running:
        yield running


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Ours with everything allowed, and little of it."""
    options = ["--allow-private-addresses", "--allow-local-media", "--media-timeout", "2", "--max-media-bytes", "40000"]
    with started(tmp_path_factory.mktemp("limited"), *OURS, *options) as running:
        yield running


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
        ("data:image/png;base64,AAAA" + 3000 * "A", "is no image that can be read"),
        ("/nowhere/none.png", "nor a file"),
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
    with pytest.raises(openai.BadRequestError, match="/nowhere/saved"):
        ask(server, saved, turn(data_url("red")), model="/nowhere/saved")


# ------------------------------------------------------------------------------------------------------ clients' mistakes


def post(server: SimpleNamespace, path: str, body: Any, timeout: float = 60, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        server.url + path, content=content, timeout=timeout, headers={"content-type": "application/json", **headers}
    )


def chat(**changes: Any) -> dict[str, Any]:
    body = {"messages": [turn(data_url("red"))], "max_tokens": 2, "temperature": 0, **changes}
    return {key: value for key, value in body.items() if value is not ...}


def shown(url: Any, key: str = "image_url") -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": [{"type": key, key: url}]}])


TRUNCATED = data_url("red")[:-60]
CHATS: dict[str, Any] = {
    "no messages": chat(messages=...), "messages null": chat(messages=None), "messages empty": chat(messages=[]),
    "messages a string": chat(messages="hi"), "messages an object": chat(messages={"role": "user", "content": "hi"}),
    "message a string": chat(messages=["hi"]), "message null": chat(messages=[None]),
    "no role": chat(messages=[{"content": "hi"}]), "role a number": chat(messages=[{"role": 3, "content": "hi"}]),
    "role empty": chat(messages=[{"role": "", "content": "hi"}]),
    "content a number": chat(messages=[{"role": "user", "content": 3}]),
    "content an object": chat(messages=[{"role": "user", "content": {"type": "text", "text": "hi"}}]),
    "content of strings": chat(messages=[{"role": "user", "content": ["hi"]}]),
    "part without type": chat(messages=[{"role": "user", "content": [{"text": "hi"}]}]),
    "part without text": chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
    "text a number": chat(messages=[{"role": "user", "content": [{"type": "text", "text": 3}]}]),
    "image without url": chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    "url null": shown(None), "url a number": shown(3), "url empty": shown(""), "url a list": shown(["a"]),
    "url an object": shown({}), "url null inside": shown({"url": None}), "url a number inside": shown({"url": 3}),
    "scheme ftp": shown({"url": "ftp://example.com/a.png"}), "scheme file": shown({"url": "file:///etc/hostname"}),
    "no host": shown({"url": "http://"}), "bad port": shown({"url": "http://example.com:99999/a.png"}),
    "bad host": shown({"url": "http://exa mple/a.png"}), "long host": shown({"url": f"http://{'a' * 300}.com/a.png"}),
    "unknown host": shown({"url": "http://nowhere.invalid/a.png"}), "bad address": shown({"url": "http://[::1/a.png"}),
    "data empty": shown({"url": "data:image/png;base64,"}), "data without comma": shown({"url": "data:image/png;base64"}),
    "data no base64": shown({"url": "data:image/png;base64,@@@@"}),
    "data no picture": shown({"url": "data:image/png;base64,AAAA"}),
    "data text": shown({"url": "data:text/plain,hello"}), "picture cut off": shown({"url": TRUNCATED}),
    "local path": shown({"url": "/etc/hostname"}), "relative path": shown({"url": "README.md"}),
    "tilde": shown({"url": "~/a.png"}),
    "nul in path": shown({"url": "/etc/\0"}), "loopback": shown({"url": "http://127.0.0.1:9/a.png"}),
    "loopback by name": shown({"url": "http://localhost:9/a.png"}),
    "loopback as number": shown({"url": "http://2130706433/a.png"}),
    "loopback v6": shown({"url": "http://[::1]:9/a.png"}), "mapped": shown({"url": "http://[::ffff:127.0.0.1]:9/a.png"}),
    "metadata address": shown({"url": "http://169.254.169.254/latest/meta-data"}),
    "private": shown({"url": "http://10.0.0.1/a.png"}),
    "any address": shown({"url": "http://0.0.0.0:9/a.png"}), "multicast": shown({"url": "http://224.0.0.1/a.png"}),
    "video of a path": shown({"url": "/etc/hostname"}, "video_url"),
    "audio of a path": shown({"url": "/etc/hostname"}, "audio_url"),
    "sound of a path": shown({"data": "/etc/hostname"}, "input_audio"), "sound without data": shown({}, "input_audio"),
    "temperature a string": chat(temperature="hot"), "temperature below 0": chat(temperature=-1),
    "temperature a list": chat(temperature=[1]), "temperature NaN": chat(temperature=float("nan")),
    "temperature infinite": chat(temperature=float("inf")),
    "top_p 0": chat(temperature=1, top_p=0), "top_p above 1": chat(temperature=1, top_p=2), "top_p a string": chat(top_p="a"),
    "max_tokens 0": chat(max_tokens=0), "max_tokens below 0": chat(max_tokens=-3),
    "max_tokens a string": chat(max_tokens="five"),
    "max_tokens a list": chat(max_tokens=[]), "max_tokens huge": chat(max_tokens=10**30),
    "seed a string": chat(seed="a"), "seed huge": chat(seed=2**80), "seed a float": chat(seed=0.5),
    "frequency_penalty a string": chat(frequency_penalty="a"), "frequency_penalty -1": chat(frequency_penalty=-1),
    "logit_bias a list": chat(logit_bias=[1]), "logit_bias of words": chat(logit_bias={"red": 1}),
    "logit_bias null": chat(logit_bias={"3": None}), "logit_bias past the vocabulary": chat(logit_bias={"99999999": 1.0}),
    "stop a number": chat(stop=3), "stop empty": chat(stop=""), "stop a list of numbers": chat(stop=[3]),
    "stop no list": chat(stop=[]),
    "generation_config no JSON": chat(generation_config="{"), "generation_config a list": chat(generation_config="[]"),
    "generation_config an object": chat(generation_config={}),
    "generation_config wrong": chat(generation_config='{"num_beams": -1}'),
    "template arguments a list": chat(chat_template_kwargs=[1]),
    "template arguments twice": chat(chat_template_kwargs={"tools": []}),
    "template broken": chat(chat_template_kwargs={"chat_template": "{% for %}"}),
    "template that raises": chat(chat_template_kwargs={"chat_template": "{{ raise_exception('no') }}"}),
    "tools a string": chat(tools="a"), "tools of strings": chat(tools=["a"]),
    "tool call without function": chat(messages=[{"role": "assistant", "tool_calls": [{}]}]),
    "tool arguments no JSON": chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]),
    "unknown field": chat(fields="x"), "stream a string": chat(stream="perhaps"), "model a number": chat(model=3),
    "model empty": chat(model=""), "model with spaces": chat(model="a b c"), "model a path": chat(model="/etc/hostname"),
    "model null": chat(model=None), "several answers": chat(generation_config='{"num_return_sequences": 2}'),
    "lone surrogate": chat(messages=[{"role": "user", "content": "\ud800"}]),
}  # fmt: skip
DECISION = {"model": "nobody/nothing", "state": "[a]", "questions": {"a": {"type": "noul", "instructions": "[a]?"}}}
OTHERS: dict[str, tuple[str, Any]] = {
    "no JSON": ("/v1/chat/completions", b"{"), "empty": ("/v1/chat/completions", b""), "a list": ("/v1/chat/completions", []),
    "null": ("/v1/chat/completions", None), "no UTF-8": ("/v1/chat/completions", b'{"a": "\xff"}'),
    "deep": ("/v1/chat/completions", b'{"messages":' + b"[" * 100_000), "completions empty": ("/v1/completions", {}),
    "prompt a list": ("/v1/completions", {"prompt": ["a"]}), "prompt empty": ("/v1/completions", {"prompt": ""}),
    "input missing": ("/v1/responses", {}), "input a number": ("/v1/responses", {"input": 3}),
    "input empty": ("/v1/responses", {"input": []}), "input of strings": ("/v1/responses", {"input": ["a"]}),
    "input of unknown items": ("/v1/responses", {"input": [{"type": "unknown", "role": "user"}, {"type": "unknown"}]}),
    "input of a path": (
        "/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "/etc/hostname"}]}]},
    ),
    "asset of a path": ("/v1/systemone", {**DECISION, "assets": {"[a]": {"data_base64": "/etc/hostname"}}}),
    "asset of a private address": ("/v1/systemone", {**DECISION, "assets": {"[a]": {"data_base64": "http://127.0.0.1:9/a"}}}),
    "load nothing": ("/load_model", {}), "load a number": ("/load_model", {"model": 3}), "load a list": ("/load_model", []),
    "no such route": ("/v1/nothing", {}), "transcription without a file": ("/v1/audio/transcriptions", {}),
}  # fmt: skip


@pytest.mark.slow
def test_no_mistake_of_a_client_answers_500_or_stops_the_server(strict: SimpleNamespace, saved: Talking) -> None:
    asked = {name: ("/v1/chat/completions", {"model": saved.path, **body}) for name, body in CHATS.items()}
    for name, (path, body) in OTHERS.items():
        if isinstance(body, dict) and path in ("/v1/completions", "/v1/responses"):
            body = {"model": saved.path, **body}
        asked[name] = path, body
    assert len(asked) >= 90
    answers = {name: post(strict, *one) for name, one in asked.items()}
    wrong = {name: (one.status_code, one.text[:200]) for name, one in answers.items() if not 400 <= one.status_code < 500}
    assert not wrong, f"{len(wrong)} of {len(asked)}: {wrong}"
    for name, one in answers.items():
        assert len(one.text) < 5000 and ("error" in one.json() or "detail" in one.json()), name
    streamed = {name: post(strict, path, {**body, "stream": True}) for name, (path, body) in asked.items() if name in CHATS}
    assert not {name: one.status_code for name, one in streamed.items() if one.status_code >= 500}
    assert httpx.get(f"{strict.url}/health").json() == {"status": "ok"}
    assert ask(strict, saved, turn(data_url("red"))).choices[0].message.content == saved.says(user("red"))
    assert "Traceback" not in "".join(strict.said)


@pytest.mark.slow
def test_models_are_listed_where_nothing_was_downloaded(strict: SimpleNamespace) -> None:
    assert isinstance(httpx.get(f"{strict.url}/v1/models").raise_for_status().json()["data"], list)


@pytest.mark.slow
def test_a_slow_picture_stops_nobody_else(limited: SimpleNamespace, saved: Talking) -> None:
    """Bytes that drip, a server that never answers, one that redirects for ever, one that sends without end."""
    asked = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            if self.path == "/circle":
                self.send_response(302)
                self.send_header("Location", "/circle")
                return self.end_headers()
            if self.path == "/silent":
                time.sleep(30)
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100_000):
                    self.wfile.write(b"x" * (4096 if self.path == "/huge" else 1))
                    if self.path == "/dripping":
                        time.sleep(0.2)
            except OSError:
                pass  # the client had enough

        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    expected = {
        "dripping": "not there within 2 s", "silent": "not there within 2 s", "circle": "redirected more than 5 times",
        "huge": "more than 40,000 bytes",
    }  # fmt: skip
    ask(limited, saved, turn(data_url("red")))  # the model is loaded
    try:
        with ThreadPoolExecutor() as pool:
            urls = {name: f"http://127.0.0.1:{web.server_port}/{name}" for name in expected}
            waiting = {
                name: pool.submit(post, limited, "/v1/chat/completions", {"model": saved.path, **shown({"url": url})})
                for name, url in urls.items()
            }
            assert asked.wait(10)
            served = 0
            while not waiting["dripping"].done():
                assert httpx.get(f"{limited.url}/health", timeout=2).status_code == 200
                assert ask(limited, saved, turn(data_url("blue"))).choices[0].message.content == saved.says(user("blue"))
                served += 1
            assert served > 1
            for name, message in expected.items():
                answer = waiting[name].result()
                assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text
    finally:
        web.shutdown()
        web.server_close()


@pytest.mark.slow
def test_what_is_allowed_is_opened(limited: SimpleNamespace, saved: Talking, pictures: str, tmp_path: Path) -> None:
    picture("green").save(tmp_path / "green.png")
    assert ask(limited, saved, turn(str(tmp_path / "green.png"))).choices[0].message.content == saved.says(user("green"))
    assert ask(limited, saved, turn(f"{pictures}/blue.png")).choices[0].message.content == saved.says(user("blue"))
    large = io.BytesIO()
    Image.effect_noise((300, 300), 90).save(large, "PNG")
    url = "data:image/png;base64," + base64.b64encode(large.getvalue()).decode()
    assert "more than 40,000 bytes" in post(limited, "/v1/chat/completions", {"model": saved.path, **shown({"url": url})}).text
    Image.new("1", (13300, 13300)).save(tmp_path / "wide.png")
    answer = post(limited, "/v1/chat/completions", {"model": saved.path, **shown({"url": str(tmp_path / "wide.png")})})
    assert answer.status_code == 400 and "13300 x 13300 pixels" in answer.text


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Talking:
    """A model that writes letters to the end of its table of 120 positions."""
    folder = tmp_path_factory.mktemp("short")
    tower, words = save_parents(folder)
    names = ["<pad>", "<s>", "</s>", "Ġ", "Ċ", *map(chr, range(33, 127))]  # bytes as GPT-2 spells them
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(words)
    config = GPT2Config(
        n_positions=120, n_embd=32, n_layer=2, n_head=4, vocab_size=len(names), initializer_range=0.5, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(words)
    model, processor = join(folder)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    return Talking(model, processor, str(folder / "saved"))


def streamed(answer: Any, stream: bool) -> tuple[str, str, Any]:
    """Text, why it ended, and usage, of either form."""
    if not stream:
        return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage
    chunks = list(answer)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason, chunks[-1].usage


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_answer(strict: SimpleNamespace, short: Talking, stream: bool) -> None:
    whole = short.says(user("red"), tokens=20)
    for stop in (whole[4:6], ["@@@@", whole[7:9]]):
        end = min(whole.index(one) + len(one) for one in ([stop] if isinstance(stop, str) else stop) if one in whole)
        text, reason, _ = streamed(ask(strict, short, turn(data_url("red")), max_tokens=20, stop=stop, stream=stream), stream)
        assert (text, reason) == (whole[:end], "stop")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_the_last_position_ends_an_answer_as_a_limit_does(strict: SimpleNamespace, short: Talking, stream: bool) -> None:
    for limit in (None, 500):
        text, reason, usage = streamed(ask(strict, short, turn(data_url("red")), max_tokens=limit, stream=stream), stream)
        assert reason == "length" and text
        assert usage.prompt_tokens + usage.completion_tokens == 120 + 1  # the last word is never read
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="learned positions"):
        ask(strict, short, {"role": "user", "content": "a" * 130}, stream=False)
