"""`frozen-prefix serve`: transformers' own server, run where our model type is known.

`transformers serve` looks a checkpoint's class up among those it knows, and has no place where a package could announce
more of them. Here this package is imported first, so the model type is registered, and every argument goes on to
transformers' command as it is. Before its server runs, it is made to check what it is sent (see `requests`): what a client
did wrong is answered with status 400, where transformers' server answers 500 or stands still.

    frozen-prefix serve me/eyes --port 8000
"""

import inspect
from typing import Annotated, Any


_MISSING = "Serving needs {package}, which is not installed here: pip install 'frozen-prefix[serving]'."


def build_app() -> Any:
    """A `typer.Typer` of one command: transformers' own `serve`, which has our options beside its own.

    Raises:
        ImportError: without the extra `serving`.
    """
    try:
        import typer
        from transformers.cli.serve import Serve
    except ImportError as error:
        raise ImportError(_MISSING.format(package=error.name) + " [errors.md#extra]") from error

    def serve(
        *,
        allow_local_media: Annotated[bool, typer.Option(help="Open paths on this machine that a request names.")] = False,
        allow_private_addresses: Annotated[
            bool, typer.Option(help="Fetch URLs inside this machine's network, itself included.")
        ] = False,
        media_timeout: Annotated[float, typer.Option(help="Seconds until all media of a request must be fetched.")] = 20.0,
        max_media_bytes: Annotated[int, typer.Option(help="Most bytes of all media of a request.")] = 64 * 2**20,
        **options: Any,
    ) -> None:
        try:
            import fastapi  # noqa: F401
            import openai  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise ImportError(_MISSING.format(package=error.name) + " [errors.md#extra]") from error
        from .generation import FrozenPrefixGenerationState
        from .requests import MediaLimits, check_requests

        limits = MediaLimits(allow_local_media, allow_private_addresses, media_timeout, max_media_bytes)

        class FrozenPrefixServe(Serve):
            def start_server(self) -> None:
                """Called with the app built and not yet running, where `non_blocking` is asked for; runs it to its end."""
                check_requests(self.server.config.app, limits, needs_model=options.get("force_model") is None)
                # Private: transformers builds its handlers in the constructor, and names them nowhere else.
                handlers: tuple[Any, ...] = (self._chat_handler, self._completion_handler, self._response_handler)
                for handler in handlers:
                    handler.generation_state = FrozenPrefixGenerationState(handler.generation_state)
                self.server.run()

        FrozenPrefixServe(**{**options, "non_blocking": True})

    signature, own = inspect.signature(Serve), inspect.signature(serve)
    added = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    # typer reads a command's options off its signature.
    serve.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    serve.__doc__ = Serve.__doc__
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command(name="serve")(serve)
    return app


__all__ = ["build_app"]
