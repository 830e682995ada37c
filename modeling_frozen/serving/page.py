"""A page in the browser: show a picture, ask, watch the words come, see where the model looks and what it sees.

Beside the answer stands that of the same model *blind*, which is asked the same of a plain grey picture. Below: attention
to the picture word by word, how many nats each word loses without the picture, and the words that lie nearest to the prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any

import gradio as gr
from PIL import Image

from ..data.asking import Asking
from ..interpretation import attention_to_image, nearest_words, sightedness
from .answering import NOTHING, stream_answer


def as_image(figure: Any) -> Image.Image:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return Image.open(file)


def blind_picture(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, (128, 128, 128))


def tab(label: str, name: str, alt_text: str) -> gr.Image:
    """A tab with a figure that can be enlarged and kept."""
    with gr.Tab(label):
        return gr.Image(
            show_label=False, interactive=False, buttons=["download", "fullscreen"], elem_id=name, alt_text=alt_text
        )


def build_page(
    model: Any,
    processor: Any,
    title: str,
    *,
    max_new_tokens: int = 40,
    pictures: Sequence[str] = (),
    questions: Sequence[str] = (),
    first_sentence: bool = False,
) -> gr.Blocks:
    """
    The page, to be launched.

    Args:
        model, processor: of a checkpoint.
        title: a line of Markdown under the headline.
        max_new_tokens: of an answer, to begin with.
        pictures, questions: paths and texts that are there to be tried.
        first_sentence: whether an answer ends behind its first full stop, to begin with.
    """
    asking = Asking(processor)

    def written(picture: Any, prompt: str, tokens: float, short: bool) -> Iterator[str]:
        try:
            yield from stream_answer(model, processor, [picture], prompt, max_new_tokens=int(tokens), first_sentence=short)
        except Exception as error:
            raise gr.Error(f"{type(error).__name__}: {error}") from error

    with gr.Blocks(title="frozen-prefix", analytics_enabled=False) as page:
        gr.Markdown(f"# What does a frozen language model see?\n{title}")
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(type="pil", image_mode="RGB", label="Picture", height=320, elem_id="picture")
                question = gr.Textbox(
                    label="Question or beginning", placeholder="empty: describe the picture", elem_id="question"
                )
                if pictures:
                    gr.Examples(list(pictures), image, label="Pictures to try")
                if questions:
                    gr.Examples(list(questions), question, label="Questions to try")
                with gr.Accordion("Options", open=False):
                    longest = gr.Slider(1, 256, max_new_tokens, step=1, label="At most so many tokens")
                    sentence = gr.Checkbox(first_sentence, label="Stop at the first full stop")
                    chat = gr.Checkbox(bool(asking.chat), label="Ask in the language model's chat format")
                    explain = gr.Checkbox(True, label="Show where it looks and what it sees")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    halt = gr.Button("Stop")
            with gr.Column(scale=3):
                with gr.Row():
                    answer = gr.Textbox(label="Sighted: sees your picture", lines=3, elem_id="answer")
                    blind = gr.Textbox(label="Blind: sees a plain grey one", lines=3, elem_id="blind")
                with gr.Tabs():
                    looked = tab("Where it looks", "looked", "Attention of each word, drawn over the picture")
                    colours = "Each word of the answer on the colour of its loss in nats"
                    owed = tab("What each word owes to the picture", "owed", colours)
                    words = tab("What the prefix says", "words", "The nearest words to each prefix vector, as a table")
                note = gr.Markdown(elem_id="note")

        def respond(picture: Any, text: str, tokens: float, short: bool, as_chat: bool, deep: bool) -> Iterator[dict]:
            if picture is None:
                raise gr.Error("Choose a picture first.")
            grey = blind_picture(picture)
            prompt = Asking(processor, chat=as_chat).prompt((text or "").strip())
            said = blindly = ""
            yield {answer: "", blind: "", looked: None, owed: None, words: None, note: ""}
            for said in written(picture, prompt, tokens, short):
                yield {answer: said}
            for blindly in written(grey, prompt, tokens, short):
                yield {blind: blindly}
            yield {answer: said or NOTHING, blind: blindly or NOTHING}
            if not (said and deep):
                return
            parts: dict[Any, Callable[[], Any]] = {
                looked: lambda: attention_to_image(model, processor, picture, prompt, text=said),
                owed: lambda: sightedness(model, processor, picture, said, prompts=prompt, other_images=grey),
                words: lambda: nearest_words(model, processor, picture),
            }
            updates: dict[Any, Any] = {}
            for place, look in parts.items():
                try:
                    updates[place] = as_image(look().plot())
                except ValueError as reason:  # a model without attention, or without a prefix among words
                    updates[note] = "\n\n".join([*filter(None, [updates.get(note)]), str(reason)])
                yield updates  # all so far: what goes to a tab that isn't open is kept from the last one only

        inputs = [image, question, longest, sentence, chat, explain]
        shown = [answer, blind, looked, owed, words, note]
        running = [
            ask.click(respond, inputs, shown, api_name="ask"),
            question.submit(respond, inputs, shown, api_visibility="private"),
        ]
        halt.click(None, cancels=running)
    return page


__all__ = ["blind_picture", "build_page"]
