"""The command `frozen-prefix`: its help needs neither torch nor transformers, all else is handed on."""

import argparse

from . import __version__


def main() -> None:
    """Entry point of the console script `frozen-prefix`."""
    parser = argparse.ArgumentParser(
        "frozen-prefix",
        description="The commands of transformers, for frozen-prefix models. `frozen-prefix COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=["serve", "chat"], help="run a server of OpenAI's form, or talk to one")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the command")
    parser.parse_args()
    from .serving.server import main as run  # which imports transformers' own command line, in seconds

    run()


if __name__ == "__main__":
    main()
