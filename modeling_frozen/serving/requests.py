"""What a client sends, checked before transformers' server reads it: fields, and the images, videos and audio they point to.

transformers' handlers open whatever a request names, on the server's own loop: one slow address would stop every other
request, a path would be read from the server's disk, an address inside its network fetched. Here each request is read as a
whole, its fields are checked, and its media are fetched beside other requests, within limits, into files of their own that
live as long as the request. What is the client's mistake is answered with status 400, and says what it was.
"""

import asyncio
import base64
import io
import ipaddress
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from huggingface_hub.errors import CacheNotFound
from jinja2 import TemplateError
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from transformers.image_utils import httpx


logger = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = 128 * 2**20
_MAX_REDIRECTS = 5
# A data URL that can't be read is repeated in transformers' message, all of it.
_LONGEST_MESSAGE = 500
# Errors of transformers' handlers, and of the model, that a request brings about: fields and images that don't fit, files
# and repositories that aren't there, a chat that its template refuses. Others are the server's own, and are answered 500.
_MISTAKES = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, ImportError, NotImplementedError,
    RecursionError, TemplateError, Image.DecompressionBombError, httpx.HTTPError, httpx.InvalidURL,
)  # fmt: skip


@dataclass(frozen=True)
class MediaLimits:
    """
    What a request may fetch.

    Args:
        allow_local_media: whether paths on the server's disk are opened.
        allow_private_addresses: whether addresses inside the server's network, its own among them, are fetched.
        media_timeout: seconds until all media of a request must be there.
        max_media_bytes: of all media of a request together.
    """

    allow_local_media: bool = False
    allow_private_addresses: bool = False
    media_timeout: float = 20.0
    max_media_bytes: int = 64 * 2**20


# ----------------------------------------------------------------------------------------------------------------- fields

_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Generation(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    max_new_tokens: _Count | None = None
    num_beams: _Count | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=1)] | None = None


class _Body(BaseModel):
    """Fields that transformers' handlers read without looking; the handlers know the others, and refuse what is unknown."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: _Text | None = None
    stream: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d+$")], float] | None = None
    stop: _Text | Annotated[list[_Text], Field(min_length=1)] | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    max_output_tokens: _Count | None = None
    generation_config: Json[_Generation] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    type: str
    text: str | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: _Text
    content: str | list[_Part] | None = None


class _Chat(_Body):
    messages: Annotated[list[_Message], Field(min_length=1)]


class _Completion(_Body):
    prompt: _Text


class _Response(_Body):
    input: _Text | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None


_BODIES: dict[str, type[_Body]] = {
    "/v1/chat/completions": _Chat,
    "/v1/completions": _Completion,
    "/v1/responses": _Response,
    "/v1/systemone": _Body,
}


# ------------------------------------------------------------------------------------------------------------------ media

_MEDIA = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio", "data_base64": "image"}


def _media_of(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """(medium, where it stands, under which key, source) of everything that a request points to."""
    assets = body.get("assets")
    places: list[Any] = [body.get("messages"), body.get("input"), *(assets.values() if isinstance(assets, dict) else ())]
    while places:
        place = places.pop()
        if isinstance(place, list):
            places.extend(place)
        elif isinstance(place, dict):
            places.append(place.get("content"))
            for key in _MEDIA.keys() & place.keys():
                value = place[key]
                inner = key if not isinstance(value, dict) else "data" if key == "input_audio" else "url"
                holder = place if inner == key else value
                if not isinstance(source := holder.get(inner), str) or not source:
                    raise ValueError(
                        f"{key} must be a URL, or an object with one under 'url', got {value!r:.80}. [errors.md#server]"
                    )
                yield _MEDIA[key], holder, inner, source


async def _fetch_all(media: list[tuple[str, dict[str, Any], str, str]], limits: MediaLimits, folder: Path) -> None:
    """Puts the path of a file in place of each source."""
    budget = [limits.max_media_bytes]
    async with httpx.AsyncClient(follow_redirects=False, timeout=limits.media_timeout, trust_env=False) as client:
        reads = [_read(client, source, limits, budget) for _, _, _, source in media]
        contents = await asyncio.wait_for(asyncio.gather(*reads), limits.media_timeout)
    for index, ((medium, holder, key, source), content) in enumerate(zip(media, contents, strict=True)):
        if medium == "image":
            _check_image(content, source)
        path = folder / f"{index}"
        path.write_bytes(content)
        # Audio stands under "data", as base64 alone.
        holder[key] = base64.b64encode(content).decode() if key == "data" else str(path)


async def _read(client: Any, source: str, limits: MediaLimits, budget: list[int]) -> bytes:
    if source.startswith(("http://", "https://")):
        return await _download(client, source, limits, budget)
    if limits.allow_local_media and os.path.isfile(source):
        content = await asyncio.to_thread(Path(source).read_bytes)
    else:
        try:
            content = base64.b64decode("".join(source.rpartition(",")[2].split()), validate=True)
        except ValueError as error:
            raise ValueError(
                f"{source!r:.80} is neither an http(s) URL nor base64 data, nor a file of the server that may be opened "
                "(--allow-local-media). [errors.md#server]"
            ) from error
    _spend(budget, len(content), limits)
    return content


async def _download(client: Any, url: str, limits: MediaLimits, budget: list[int]) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        target = httpx.URL(url)
        if target.scheme not in ("http", "https") or not target.host:
            raise ValueError(f"{url!r:.80} is no http(s) URL. [errors.md#server]")
        # The address that was checked is the one that is asked, whatever the name resolves to a moment later.
        address = await _address_of(target, limits)
        headers = {"Host": target.netloc.decode(), "Accept-Encoding": "identity"}
        where = {"headers": headers, "extensions": {"sni_hostname": target.host}}
        try:
            async with client.stream("GET", target.copy_with(host=address), **where) as response:
                if response.is_redirect:
                    url = str(target.join(response.headers["location"]))
                    continue
                if response.status_code != 200:
                    raise ValueError(f"{url!r:.200} answered with status {response.status_code}. [errors.md#server]")
                content = bytearray()
                async for chunk in response.aiter_raw():
                    _spend(budget, len(chunk), limits)
                    content += chunk
                return bytes(content)
        except httpx.HTTPError as error:
            raise ValueError(f"{url!r:.200} can't be fetched: {error or type(error).__name__}. [errors.md#server]") from error
    raise ValueError(f"{url!r:.200} is redirected more than {_MAX_REDIRECTS} times. [errors.md#server]")


async def _address_of(url: Any, limits: MediaLimits) -> str:
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{str(url)!r:.200} can't be fetched: {error}. [errors.md#server]") from error
    addresses = [str(one[4][0]) for one in infos]
    for address in addresses:
        numbers = ipaddress.ip_address(address.partition("%")[0])
        numbers = getattr(numbers, "ipv4_mapped", None) or numbers
        if not limits.allow_private_addresses and (not numbers.is_global or numbers.is_multicast):
            raise ValueError(
                f"{str(url)!r:.200} lies inside the server's network, which is asked only where the server was started with "
                "--allow-private-addresses. [errors.md#server]"
            )
    return addresses[0]


def _spend(budget: list[int], count: int, limits: MediaLimits) -> None:
    budget[0] -= count
    if budget[0] < 0:
        raise ValueError(
            f"The media of this request hold more than {limits.max_media_bytes:,} bytes (--max-media-bytes)."
            " [errors.md#server]"
        )


def _check_image(content: bytes, source: str) -> None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{source!r:.80} is no image that can be read. [errors.md#server]") from error
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{source!r:.80} has {width} x {height} pixels: at most {Image.MAX_IMAGE_PIXELS:,} are read. [errors.md#server]"
        )


# --------------------------------------------------------------------------------------------------------------- requests


def _refusal(error: Exception) -> JSONResponse:
    """In the form that OpenAI's clients read."""
    message = f"The request lacks {error}." if isinstance(error, KeyError) else str(error) or type(error).__name__
    if isinstance(error, ValidationError):
        message = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} … {message[-_LONGEST_MESSAGE // 2 :]}"
    logger.warning("Refused a request: %s: %s", type(error).__name__, message)
    content = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(json.loads(json.dumps(content).encode("ascii", "replace")), status_code=400)


class CheckRequests:
    """ASGI middleware: a request's fields are checked and its media fetched before the app reads it."""

    def __init__(self, app: Any, limits: MediaLimits, needs_model: bool = True):
        self.app, self.limits, self.needs_model = app, limits, needs_model

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        with tempfile.TemporaryDirectory(prefix="frozen-prefix-") as folder:
            try:
                sent = await self._prepare(scope["path"], await _read_body(receive), Path(folder))
            except asyncio.TimeoutError:
                late = f"The media of this request were not there within {self.limits.media_timeout:g} s (--media-timeout)."
                return await _refusal(TimeoutError(late))(scope, receive, send)
            except _MISTAKES as error:
                return await _refusal(error)(scope, receive, send)
            unread = [{"type": "http.request", "body": sent, "more_body": False}]

            async def replay() -> Any:
                return unread.pop() if unread else await receive()

            headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            headers.append((b"content-length", str(len(sent)).encode()))
            await self.app({**scope, "headers": headers}, replay, send)

    async def _prepare(self, path: str, sent: bytes, folder: Path) -> bytes:
        if path not in _BODIES:
            return sent
        body = json.loads(sent)
        fields = _BODIES[path].model_validate(body)
        if self.needs_model and fields.model is None:
            raise ValueError("The request names no model: give its id under 'model'. [errors.md#server]")
        if media := list(_media_of(body)):
            await _fetch_all(media, self.limits, folder)
            return json.dumps(body).encode()
        return sent


async def _read_body(receive: Any) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ValueError("The client left before its request was whole. [errors.md#server]")
        body += message.get("body", b"")
        if len(body) > _MAX_REQUEST_BYTES:
            raise ValueError(f"The request is longer than {_MAX_REQUEST_BYTES:,} bytes. [errors.md#server]")
        if not message.get("more_body", False):
            return bytes(body)


def check_requests(app: FastAPI, limits: MediaLimits, needs_model: bool = True) -> None:
    """
    Makes an app of transformers' server check what it is sent, and answer a client's mistakes with status 400.

    Args:
        app (`FastAPI`): before it runs.
        limits ([`MediaLimits`]): of what a request may fetch.
        needs_model: whether a request must name a model, which a server of one model answers without.
    """

    async def answer(_: Any, error: Exception) -> JSONResponse:
        return _refusal(error)

    async def no_models(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"object": "list", "data": []})

    for kind in _MISTAKES:
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(CacheNotFound, no_models)  # of `/v1/models`; transformers answers so itself from 5.24 on
    app.add_middleware(CheckRequests, limits=limits, needs_model=needs_model)


__all__ = ["CheckRequests", "MediaLimits", "check_requests"]
