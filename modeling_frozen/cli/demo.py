"""`frozen-prefix demo`: a page in the browser for one checkpoint."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'Needs `pip install "frozen-prefix[demo]"`.'
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: folder or Hub id")
    add("--pictures", nargs="+", default=[], metavar="FILE", help="images and folders of images that are there to be tried")
    add("--questions", nargs="+", default=[], metavar="TEXT", help="questions that are there to be tried")
    add("--first_sentence", action="store_true", help="end each answer at its first full stop")
    add("--max_new_tokens", type=int, default=40, metavar="N", help="longest answer (default: 40)")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    add("--port", type=int, help="default: the first free one from 7860")
    add("--share", action="store_true", help="make a public link (through Gradio's servers)")
    add("--device", help="default: the GPU where there is one")


def run(args: argparse.Namespace) -> None:
    from ..serving.answering import load
    from .images import files_of_images

    pictures = files_of_images(args.pictures)
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The page needs gradio: pip install "frozen-prefix[demo]". [errors.md#extra]') from error
    from ..serving.page import CSS, build_page

    page = build_page(
        *load(args.model, args.device), args.model, max_new_tokens=args.max_new_tokens, pictures=pictures,
        questions=args.questions, first_sentence=args.first_sentence,
    )  # fmt: skip
    # No font from the web.
    theme = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(server_name=args.host, server_port=args.port, share=args.share, theme=theme, css=CSS)


__all__ = ["add_arguments", "run"]
