"""`frozen-prefix chat`: an image and questions about it, in the terminal. Nothing is served."""

import argparse
from collections.abc import Iterator
from typing import Any


_HELP = "/image FILE shows another image; /image alone none; /new forgets what was said; /exit or Ctrl-D ends."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"In it: {_HELP}"
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: folder or Hub id")
    add("--image", metavar="FILE", help="file or address of the image to begin with")
    add("--no_chat", action="store_true", help="ask outside of the language model's own turns, each question by itself")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    add("--first_sentence", action="store_true", help="end each answer at its first full stop")
    add("--device", help="default: the GPU where there is one")


def run(args: argparse.Namespace) -> None:
    from ..data.asking import Asking
    from ..serving.answering import NOTHING, load

    image = _opened(args.image) if args.image else None
    model, processor = load(args.model, args.device)
    talk = Conversation(model, processor, Asking(processor, chat=False if args.no_chat else None), image)
    print(_HELP)
    while (line := _line()) is not None:
        command, _, name = line.strip().partition(" ")
        try:
            if command in ("/exit", "/quit"):
                return
            if command == "/new":
                talk.start(talk.image)
            elif command == "/image":
                talk.start(_opened(name.strip()) if name.strip() else None)
            elif command.startswith("/"):
                print(_HELP)
            elif line.strip() or talk.image is not None:
                said = ""
                for said_so_far in talk.ask(line.strip(), args.max_new_tokens, args.first_sentence):
                    print(said_so_far[len(said) :], end="", flush=True)
                    said = said_so_far
                print("" if said else NOTHING)
        except (ValueError, OSError) as error:  # the talk goes on
            print(error)


def _line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _opened(name: str) -> Any:
    from ..processors import load_rgb_image

    return load_rgb_image(name, name)


class Conversation:
    """Turns about one image, or none. A language model without turns of its own is asked each question by itself."""

    def __init__(self, model: Any, processor: Any, asking: Any, image: Any = None):
        self.model, self.processor, self.asking = model, processor, asking
        self.start(image)

    def start(self, image: Any) -> None:
        self.image = image
        self.turns: list[dict[str, Any]] = []

    def ask(self, question: str, max_new_tokens: int, first_sentence: bool = False) -> Iterator[str]:
        """The answer, each time as far as it has been written."""
        from ..serving.answering import stream_answer

        images = [] if self.image is None else [self.image]
        if self.asking.chat:
            shown = [{"type": "image"}] * len(images) if not self.turns else []
            text = {"type": "text", "text": question or self.asking.question}
            turns = [*self.turns, {"role": "user", "content": [*shown, text]}]
            prompt = self.processor.chat_prompt(turns)
        else:
            turns, prompt = [], self.asking.prompt(question, len(images))
        said = ""
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "first_sentence": first_sentence}
        for said in stream_answer(self.model, self.processor, images, prompt, **options):
            yield said
        if turns:
            self.turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": said}]}]


__all__ = ["Conversation", "add_arguments", "run"]
