"""`frozen-prefix serve` and `frozen-prefix chat`: transformers' own commands, run where our model type is known.

`transformers serve` looks a checkpoint's class up among those it knows, and has no place where a package could announce
more of them. Here this package is imported first, so the model type is registered, and every argument goes on to
transformers' command as it is. One thing is mended on the way: what a client did wrong (an image that can't be fetched, a
broken data URL, an unknown model) is answered with status 400 and says what it was; transformers' server answers 500.

    frozen-prefix serve me/eyes --port 8000        # the same as: python -m modeling_frozen.serving.server serve me/eyes …
    frozen-prefix chat me/eyes localhost:8000
"""

import functools
import logging
from typing import Any


logger = logging.getLogger(__name__)

_MISSING = "Serving needs {package}, which is not installed here: pip install 'frozen-prefix[serving]'."
# A data URL that can't be read is repeated in transformers' message, all of it.
_LONGEST_MESSAGE = 500


def _explain(error: Exception) -> dict[str, Any]:
    message = str(error) or type(error).__name__
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} … {message[-_LONGEST_MESSAGE // 2 :]}"
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def answer_mistakes(app: Any) -> Any:
    """Makes a FastAPI app answer a client's mistakes in the form that OpenAI's clients read, and returns it."""
    from fastapi.responses import JSONResponse
    from huggingface_hub.utils import httpx

    async def answer(_: Any, error: Exception) -> JSONResponse:
        logger.warning("Refused a request: %s: %s", type(error).__name__, _explain(error)["error"]["message"])
        return JSONResponse(_explain(error), status_code=400)

    # Texts and images that don't fit; files and repositories that aren't there; addresses that don't answer.
    for kind in (ValueError, OSError, httpx.HTTPError, httpx.InvalidURL):
        app.add_exception_handler(kind, answer)
    return app


def _wrap_server() -> None:
    """Hooks `answer_mistakes` into the server that transformers is about to build; doing it twice changes nothing."""
    from transformers.cli.serving import server

    build = server.build_server
    if getattr(build, "_answers_mistakes", False):
        return

    @functools.wraps(build)
    def build_server(*args: Any, **kwargs: Any) -> Any:
        return answer_mistakes(build(*args, **kwargs))

    build_server._answers_mistakes = True
    server.build_server = build_server


def build_app() -> Any:
    """The command line as a `typer.Typer` with transformers' own `serve` and `chat`.

    Raises:
        ImportError: without the extra `serving`.
    """
    try:
        import typer
        from transformers.cli.chat import Chat
        from transformers.cli.serve import Serve
    except ImportError as error:
        raise ImportError(_MISSING.format(package=error.name)) from error

    app = typer.Typer(
        help="The commands of transformers, for models of frozen-prefix.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    class FrozenPrefixServe(Serve):
        @functools.wraps(Serve.__init__)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                import fastapi  # noqa: F401
                import openai  # noqa: F401
                import uvicorn  # noqa: F401
            except ImportError as error:
                raise ImportError(_MISSING.format(package=error.name)) from error
            _wrap_server()
            super().__init__(*args, **kwargs)

    FrozenPrefixServe.__doc__ = Serve.__doc__
    app.command(name="serve")(FrozenPrefixServe)
    app.command(name="chat")(Chat)
    return app


def main() -> None:
    """Entry point of the console script `frozen-prefix`."""
    build_app()()


if __name__ == "__main__":
    main()
