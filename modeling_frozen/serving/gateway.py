"""`frozen-prefix serve --upstream URL --connector me/eyes --connector me/other`: many connectors over one stock server.

A server of OpenAI's form that encodes the images of a request, tower and connector only, and hands the rest on to a server of
the bare language model that takes embeddings (vLLM with `--enable-prompt-embeds --trust-request-chat-template`). Each
connector is a model name. Images are encoded in batches, once for equal bytes; connectors of one tower share it.

The chat is rendered here, by the checkpoint's own template, so that the language model reads what `generate()` would read; the
upstream server is sent a template that passes it through.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers.image_utils import httpx

from ..configuration_frozen_prefix import FrozenPrefixConfig
from ..modeling_frozen_prefix import FrozenPrefixModel
from ..processors import FrozenPrefixProcessor, load_rgb_image
from .prompt_embeds import as_one_message, encode_images, encoded_part, refuse_other_than_readers, texts_between
from .requests import MediaLimits, check_requests


logger = logging.getLogger(__name__)

# Of the client's: what the rendering here has used up, or the upstream server must not see.
_USED_HERE = ("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "add_special_tokens")


@dataclass
class Connector:
    """A checkpoint as a model name: its tower and connector, and its processor."""

    name: str
    model: FrozenPrefixModel
    processor: FrozenPrefixProcessor

    def render(self, body: dict[str, Any]) -> tuple[list[str], list[Path]]:
        """
        The chat of a request as texts, between every two of which an image stands, and the images' files.

        Raises:
            ValueError: for what is no text and no image, or images that the template leaves out.
        """
        files: list[Path] = []
        messages = [{**message, "content": _content(message.get("content"), files)} for message in body["messages"]]
        goes_on = bool(body.get("continue_final_message"))
        text = self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=body.get("add_generation_prompt", not goes_on),
            continue_final_message=goes_on,
            tools=body.get("tools"),
            **(body.get("chat_template_kwargs") or {}),
        )
        return texts_between(self.processor, text, len(files)), files


def _content(content: Any, files: list[Path]) -> Any:
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif part["type"] == "image_url":
            url = part["image_url"]
            files.append(Path(url["url"] if isinstance(url, dict) else url))  # put there by `CheckRequests`
            parts.append({"type": "image"})
        else:
            raise ValueError(f"A part of type {part['type']!r}: this server takes 'text' and 'image_url'. [errors.md#server]")
    return parts


def load_connectors(names: Sequence[str], *, device: Any = "cpu", **hub_options: Any) -> dict[str, Connector]:
    """
    Loads tower and connector of each checkpoint; a tower that several were trained with, once.

    Args:
        names (`list[str]`): ids on the Hub or folders; `name=place` serves it under another name.
        device (`str`): of towers and connectors.
        hub_options: `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: for two of one name, and for what no server of embeddings can read.
    """
    loaded: dict[str, Connector] = {}
    for given in names:
        name, _, place = given.rpartition("=")
        name = name or place
        if name in loaded:
            raise ValueError(
                f"Two connectors are named {name!r}: give one of them another name, as other={place}. [errors.md#server]"
            )
        config = FrozenPrefixConfig.from_pretrained(place, **hub_options)
        refuse_other_than_readers(config)
        if config.vision_config is None:
            raise ValueError(f"{place!r} takes no images, and this server takes nothing else beside text. [errors.md#server]")
        towers = [one.model for one in loaded.values() if _same_tower(one.model.config, config)]
        model = FrozenPrefixModel.from_pretrained(
            place, load_language_model=False, load_vision_tower=not towers, **hub_options
        )
        if towers:
            model.vision_tower = towers[0].vision_tower
        model.to(device)
        loaded[name] = Connector(name, model, FrozenPrefixProcessor.from_pretrained(place, **hub_options))
    return loaded


def _same_tower(one: FrozenPrefixConfig, other: FrozenPrefixConfig) -> bool:
    held = any("vision" in (config.saved_parts or ()) or len(config.vision_parts) > 1 for config in (one, other))
    return not held and one.vision_base_model is not None and one.vision_base_model == other.vision_base_model


# ----------------------------------------------------------------------------------------------------------------- encoding


class ImageEncoder:
    """
    Encodes images in batches, one batch at a time, and keeps what was encoded.

    Args:
        batch_size: images that are encoded at once, of those that wait.
        cache_bytes: of encoded prefixes that are kept, the latest used ones.
    """

    def __init__(self, *, batch_size: int = 8, cache_bytes: int = 256 * 2**20):
        self.batch_size, self.room = batch_size, cache_bytes
        self.kept: OrderedDict[tuple[str, str], dict[str, str]] = OrderedDict()
        self.waiting: dict[tuple[str, str], tuple[Connector, Any, asyncio.Future[dict[str, str]]]] = {}
        self.encoded = self.batches = 0  # since the start, for `/health`
        self._worker: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(1)  # torch spreads a batch over the cores itself

    async def encode(self, connector: Connector, content: bytes) -> dict[str, str]:
        """The part of a message for an image's file; from the cache, from a batch that waits, or anew."""
        key = (connector.name, hashlib.sha256(content).hexdigest())
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        if key not in self.waiting:
            image = await asyncio.to_thread(load_rgb_image, content)
            if key not in self.waiting and key not in self.kept:
                self.waiting[key] = (connector, image, asyncio.get_running_loop().create_future())
                if self._worker is None or self._worker.done():
                    self._worker = asyncio.create_task(self._work())
        # A client that leaves takes no image away from another that waits for the same.
        return self.kept[key] if key in self.kept else await asyncio.shield(self.waiting[key][2])

    async def _work(self) -> None:
        while self.waiting:
            first = next(iter(self.waiting.values()))[0]
            batch = {key: one for key, one in self.waiting.items() if one[0] is first}
            batch = dict(list(batch.items())[: self.batch_size])
            images = [image for _, image, _ in batch.values()]
            try:
                parts = await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, first, images)
            except Exception as error:  # of any kind: it is that of those who asked, and the next batch is another
                for key, (_, _, future) in batch.items():
                    del self.waiting[key]
                    future.set_exception(error)
                    future.exception()  # seen, even where its client has left
                continue
            self.batches += 1
            self.encoded += len(images)
            for (key, (_, _, future)), part in zip(batch.items(), parts, strict=True):
                self._keep(key, part)
                del self.waiting[key]
                future.set_result(part)

    @staticmethod
    def _encode(connector: Connector, images: list[Any]) -> list[dict[str, str]]:
        return [encoded_part(prefix) for prefix in encode_images(connector.model, connector.processor, images)]

    def _keep(self, key: tuple[str, str], part: dict[str, str]) -> None:
        self.kept[key] = part
        self.room -= len(part["data"])
        while self.room < 0:
            self.room += len(self.kept.popitem(last=False)[1]["data"])


# ------------------------------------------------------------------------------------------------------------------- server


def _error(status: int, message: str, kind: str = "upstream_error") -> JSONResponse:
    return JSONResponse(_error_body(message, kind), status_code=status)


def _error_body(message: str, kind: str = "upstream_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def build_gateway(
    connectors: dict[str, Connector],
    upstream: str,
    *,
    upstream_model: str | None = None,
    timeout: float = 600.0,
    encoder: ImageEncoder | None = None,
    limits: MediaLimits | None = None,
) -> FastAPI:
    """
    The server.

    Args:
        connectors: of [`load_connectors`].
        upstream (`str`): address of the server of the language model, such as `http://127.0.0.1:8000`.
        upstream_model (`str`, *optional*): its model's name; by default the first that it lists.
        timeout (`float`, defaults to 600): seconds without a word from the upstream server until a request fails.
        encoder, limits: where other than the defaults are wanted.
    """
    upstream = upstream.rstrip("/").removesuffix("/v1")
    encoder = ImageEncoder() if encoder is None else encoder
    limit = httpx.Timeout(timeout, connect=min(timeout, 10.0))
    client = httpx.AsyncClient(base_url=upstream, timeout=limit, limits=httpx.Limits(max_connections=None), trust_env=False)
    known: dict[str, str] = {} if upstream_model is None else {"model": upstream_model}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    app = FastAPI(title="frozen-prefix gateway", lifespan=lifespan)

    def unreachable(error: Exception) -> JSONResponse:
        known.pop("model", None) if upstream_model is None else None  # another one may run there next time
        status = 504 if isinstance(error, httpx.TimeoutException) else 502
        return _error(status, f"The server of the language model at {upstream} can't be asked: {_reason(error)}.")

    async def model_upstream(headers: dict[str, str]) -> str:
        if "model" not in known:
            response = await client.get("/v1/models", headers=headers)
            response.raise_for_status()
            known["model"] = response.json()["data"][0]["id"]
        return known["model"]

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "owned_by": "frozen-prefix"} for name in connectors],
        }

    @app.get("/health")
    async def health() -> Response:
        try:
            (await client.get("/health")).raise_for_status()
        except httpx.HTTPError as error:
            return unreachable(error)
        return JSONResponse({"images": encoder.encoded, "batches": encoder.batches, "cached": len(encoder.kept)})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        if body.get("mm_processor_kwargs"):
            raise ValueError(
                "mm_processor_kwargs: this server encodes images as each checkpoint's processor says. Leave it out, or have a "
                "copy of the checkpoint with another processor served beside it, `--connector other=folder`."
                " [errors.md#server]"
            )
        connector = connectors.get(body["model"])
        if connector is None:
            return _error(
                404, f"No connector is named {body['model']!r}: there are {list(connectors)}.", "invalid_request_error"
            )
        texts, files = connector.render(body)
        contents = [await asyncio.to_thread(file.read_bytes) for file in files]
        encoded = await asyncio.gather(*(encoder.encode(connector, content) for content in contents))
        sent = _sent_on(body, connector, texts, encoded)
        headers = {key: value for key, value in request.headers.items() if key == "authorization"}
        try:
            sent["model"] = await model_upstream(headers)
            response = await client.send(
                client.build_request("POST", "/v1/chat/completions", json=sent, headers=headers), stream=True
            )
            if response.status_code != 200 or not body.get("stream"):
                await response.aread()
                await response.aclose()
        except (httpx.HTTPError, LookupError, ValueError) as error:
            return unreachable(error)
        if response.status_code != 200:
            return Response(response.content, response.status_code, media_type=response.headers.get("content-type"))
        if not body.get("stream"):
            return JSONResponse({**response.json(), "model": connector.name})
        return StreamingResponse(_stream(response, connector.name, upstream), media_type="text/event-stream")

    check_requests(app, limits or MediaLimits())
    return app


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}{f', {error}' if str(error) else ''}".rstrip(".")


def _sent_on(
    body: dict[str, Any], connector: Connector, texts: list[str], encoded: Sequence[dict[str, str]]
) -> dict[str, Any]:
    """The request as the upstream server gets it: one message, of texts and prefixes."""
    read = as_one_message(connector.model.config, texts, encoded)
    unsaid = {**(body.get("logit_bias") or {}), **read.pop("logit_bias")}
    sent = {key: value for key, value in body.items() if key not in _USED_HERE}
    return {**sent, **read, **({"logit_bias": unsaid} if unsaid else {})}


async def _stream(response: httpx.Response, name: str, upstream: str) -> AsyncIterator[bytes]:
    """The upstream server's events, the model's name in them ours; where it breaks off, an error that clients raise."""
    done = False
    try:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "model" in event:
                    event["model"] = name
                line = f"data: {json.dumps(event)}"
            done = done or line == "data: [DONE]"
            yield f"{line}\n".encode()
    except (httpx.HTTPError, ValueError) as error:
        yield _broken_off(upstream, _reason(error))
    else:
        if not done:
            yield _broken_off(upstream, "it ended without [DONE]")
    finally:
        await response.aclose()


def _broken_off(upstream: str, why: str) -> bytes:
    message = f"The server of the language model at {upstream} broke off: {why}."
    return f"data: {json.dumps(_error_body(message))}\n\n".encode()


# ------------------------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--upstream", required=True, metavar="URL", help="server of the language model that takes embeddings")
    parser.add_argument(
        "--connector", action="append", required=True, metavar="[NAME=]PLACE", help="checkpoint, a model name each; repeatable"
    )
    parser.add_argument("--upstream-model", help="the language model's name there (default: the first that it lists)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--device", default="cpu", help="of towers and connectors (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images encoded at once (default: %(default)s)")
    parser.add_argument("--cache-bytes", type=int, default=256 * 2**20, help="of prefixes kept (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds of silence of the upstream (default: %(default)s)"
    )
    parser.add_argument("--allow-local-media", action="store_true", help="open paths on this machine that a request names")
    parser.add_argument("--allow-private-addresses", action="store_true", help="fetch URLs inside this machine's network")
    parser.add_argument("--media-timeout", type=float, default=20.0, help="seconds until all media of a request are fetched")
    parser.add_argument("--max-media-bytes", type=int, default=64 * 2**20, help="of all media of a request")


def run(args: argparse.Namespace) -> None:
    import uvicorn

    limits = MediaLimits(args.allow_local_media, args.allow_private_addresses, args.media_timeout, args.max_media_bytes)
    app = build_gateway(
        load_connectors(args.connector, device=args.device),
        args.upstream,
        upstream_model=args.upstream_model,
        timeout=args.timeout,
        encoder=ImageEncoder(batch_size=args.batch_size, cache_bytes=args.cache_bytes),
        limits=limits,
    )
    uvicorn.run(app, host=args.host, port=args.port)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "frozen-prefix serve", description="Many connectors over one server that takes embeddings."
    )
    add_arguments(parser)
    run(parser.parse_args(arguments))


__all__ = ["Connector", "ImageEncoder", "add_arguments", "build_gateway", "load_connectors", "main", "run"]


if __name__ == "__main__":
    main()
