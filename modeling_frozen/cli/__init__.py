"""The command `frozen-prefix`: a table of commands, each in a module of its own that is imported when it is called.

Such a module has `add_arguments(parser)`, which imports neither torch nor transformers so that help comes at once, and
`run(args)`, which does the work and returns an exit code, or None for 0. With `TAKES_OTHERS = True` its parser need
not know all arguments: `args.others` are the others, `args.arguments` all as they came, and `args.parser` is the parser.

    frozen-prefix train --help            # the same as: python -m modeling_frozen.cli train --help
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..torch_builds import explain


# Command -> module, and what the help says of it.
COMMANDS = {
    "check": ("cli.check", "say what is wrong with image-text data, before training on it"),
    "train": ("cli.train", "train a connector between a frozen vision tower and a frozen language model"),
    "caption": ("cli.caption", "say what photos show"),
    "chat": ("cli.chat", "ask about an image, in the terminal"),
    "evaluate": ("cli.evaluate", "score a checkpoint beside the same model blind"),
    "info": ("cli.info", "say what a checkpoint is made of"),
    "export": ("export.command", "write a checkpoint for another runtime"),
    "serve": ("cli.serve", "run a server of OpenAI's form"),
    "demo": ("cli.demo", "open a page in the browser: ask, and see where the model looks"),
}

# What a user's mistake raises. `--traceback` shows where.
_MISTAKES = (ValueError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0; 1 for what can't be done, which is said in a sentence on stderr; 2 for arguments that are
    not understood; 130 where it was stopped by Ctrl-C."""
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        "frozen-prefix",
        description="Images for any frozen language model.\n\ncommands:\n" + "\n".join(lines),
        epilog="`frozen-prefix COMMAND --help` says more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of these")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the command")
    asked = parser.parse_args(arguments)
    return run_command(asked.command, asked.arguments, asked.traceback)


def run_command(name: str, arguments: Sequence[str], traceback: bool = False) -> int:
    """Parses the arguments of one command and runs it; returns the exit code."""
    module, text = COMMANDS[name]
    try:
        command = importlib.import_module(f"..{module}", __name__)
        takes_others = getattr(command, "TAKES_OTHERS", False)
        parser = argparse.ArgumentParser(
            f"frozen-prefix {name}",
            description=f"{text[0].upper()}{text[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=not takes_others,
        )
        command.add_arguments(parser)
        args, others = parser.parse_known_args(arguments)
        if takes_others:
            args.others, args.arguments, args.parser = others, list(arguments), parser
        elif others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        return command.run(args) or 0
    except KeyboardInterrupt:
        print(f"frozen-prefix {name}: stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        explained = explain(error)
        if traceback or (explained is None and not isinstance(error, _MISTAKES)):
            raise
        said = explained or error
        print(f"frozen-prefix {name}: {str(said) or type(said).__name__}", file=sys.stderr)
        return 1


__all__ = ["COMMANDS", "main", "run_command"]
