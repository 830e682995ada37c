"""A page in the browser: show a picture, ask, watch the words come, see where the model looks and what it sees.

Beside the answer stands that of the same model *blind*, which is asked the same of a plain grey picture. Below: attention
to the picture word by word, how many nats each word loses without the picture, the words that lie nearest to the prefix, and
the code that asks the same. Figures are drawn for the width of the window.
"""

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any

import gradio as gr
from PIL import Image

from ..data.asking import Asking
from ..interpretation import attention_to_image, nearest_words, sightedness
from .answering import NOTHING, stream_answer


# The buttons stand above figures and code, not over them.
CSS = """
#looked .image-container, #owed .image-container, #words .image-container {padding-top: 2.2rem; background: white}
#code .cm-editor {padding-top: 1.8rem}
"""
# The last input is the width of the window, which the browser alone knows.
_WITH_WIDTH = "(...inputs) => { inputs[inputs.length - 1] = window.innerWidth; return inputs }"
DPI = 160  # of figures
_NARROW = 760  # pixels, below which the page is one column

_CODE = """\
import modeling_frozen  # registers the model
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({name!r})
processor = AutoProcessor.from_pretrained({name!r})
inputs = processor(
    images="photo.jpg",
    text={prompt!r},
    return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
said = processor.decode(
    ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
)
print(said.strip())
"""


def as_image(figure: Any) -> Image.Image:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return Image.open(file)


def code_of(name: str, prompt: str, max_new_tokens: int, first_sentence: bool) -> str:
    """What asks the same in Python, to be copied."""
    code = _CODE.format(name=name, prompt=prompt, tokens=max_new_tokens)
    return code.replace("said.strip()", 'said.partition(".")[0].strip() + "."') if first_sentence else code


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
    name: str,
    *,
    max_new_tokens: int = 40,
    pictures: Sequence[str] = (),
    questions: Sequence[str] = (),
    first_sentence: bool = False,
) -> gr.Blocks:
    """
    The page, to be launched with [`CSS`].

    Args:
        model, processor: of a checkpoint.
        name: where it was loaded from: folder or Hub id.
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
        about = f"Model: `{name}`. Its parents are frozen; a connector between them was trained."
        gr.Markdown(f"# What does a frozen language model see?\n{about}")
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
                with gr.Tabs():  # with names so short that all four stand in a narrow window
                    looked = tab("Looks", "looked", "Attention of each word, drawn over the picture")
                    colours = "Each word of the answer on the colour of its loss in nats"
                    owed = tab("Owes", "owed", colours)
                    words = tab("Prefix", "words", "The nearest words to each prefix vector, as a table")
                    with gr.Tab("Code"):
                        first = code_of(name, asking.prompt(), max_new_tokens, first_sentence)
                        code = gr.Code(
                            first, language="python", show_label=False, show_line_numbers=False, wrap_lines=True,
                            interactive=False, elem_id="code",
                        )  # fmt: skip
                note = gr.Markdown(elem_id="note")

        width = gr.Number(1280, visible=False)

        def respond(
            picture: Any, text: str, tokens: float, short: bool, as_chat: bool, deep: bool, pixels: float
        ) -> Iterator[dict]:
            if picture is None:
                raise gr.Error("Choose a picture first.")
            grey = blind_picture(picture)
            prompt = Asking(processor, chat=as_chat).prompt((text or "").strip())
            said = blindly = ""
            asked = code_of(name, prompt, int(tokens), short)
            yield {answer: "", blind: "", looked: None, owed: None, words: None, note: "", code: asked}
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
                    updates[place] = as_image(look().plot(width=max(3.6, pixels / 96) if pixels < _NARROW else 7.5))
                except ValueError as reason:  # a model without attention, or without a prefix among words
                    updates[note] = "\n\n".join([*filter(None, [updates.get(note)]), str(reason)])
                yield updates  # all so far: what goes to a tab that isn't open is kept from the last one only

        inputs = [image, question, longest, sentence, chat, explain, width]
        shown = [answer, blind, looked, owed, words, note, code]
        running = [
            ask.click(respond, inputs, shown, api_name="ask", js=_WITH_WIDTH),
            question.submit(respond, inputs, shown, api_visibility="private", js=_WITH_WIDTH),
        ]
        halt.click(None, cancels=running)
    return page


__all__ = ["CSS", "DPI", "blind_picture", "build_page", "code_of"]
