"""`frozen-prefix serve`: transformers' own server, with checks of what it is sent; its arguments go on to it as they are. With
`--upstream` it is the gateway, many connectors over a server of the language model."""

import argparse


TAKES_OTHERS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "frozen-prefix serve [MODEL] [--port PORT] [options of transformers serve]\n"
        "       frozen-prefix serve --upstream URL --connector [NAME=]PLACE [--connector …] [options of the gateway]"
    )
    parser.epilog = (
        "Beside all options of `transformers serve`: --allow-local-media, --allow-private-addresses, --media-timeout SECONDS, "
        "--max-media-bytes BYTES.\n`frozen-prefix serve --help-all` lists every one, which takes seconds; "
        "`frozen-prefix serve --upstream URL --help-all` those of the gateway, which serves many connectors over one server "
        "of the language model."
    )
    parser.add_argument("--help-all", action="store_true", help="every option, those of transformers' server too")


def run(args: argparse.Namespace) -> None:
    if any(one.partition("=")[0] == "--upstream" for one in args.others):
        from ..serving.gateway import main

        return main(["--help"] if args.help_all else args.others)
    from ..serving.server import build_app

    build_app()(["--help"] if args.help_all else args.others, prog_name="frozen-prefix serve")


__all__ = ["TAKES_OTHERS", "add_arguments", "run"]
