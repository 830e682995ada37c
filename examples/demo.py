"""A page in the browser: show a picture, ask, watch the words come, see where the model looks and what it sees.

    python examples/demo.py                              (trains the quickstart's little model first, once, in --cache_dir)
    python examples/demo.py --model ID_OR_FOLDER

Beside the answer stands that of the same model *blind*, which is asked the same of a plain grey picture. Below: attention
to the picture word by word, how many nats each word loses without the picture, and the words that lie nearest to the prefix.
Needs `pip install "frozen-prefix[demo]"`.
"""

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import modeling_frozen  # noqa: F401  (registers the model type)
from modeling_frozen.interpretation import attention_to_image, nearest_words, sightedness
from modeling_frozen.processors import DEFAULT_CHAT_TEMPLATE


@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "Checkpoint: Hub id or folder. Default: the quickstart's."})
    cache_dir: Path = field(default=Path("demo_model"), metadata={"help": "Where the quickstart's model is, or is put."})
    max_new_tokens: int = 40
    host: str = "127.0.0.1"
    port: int | None = field(default=None, metadata={"help": "Default: the first free one from 7860."})
    share: bool = field(default=False, metadata={"help": "Make a public link (through Gradio's servers)."})


class Stop(StoppingCriteria):
    """Ends the writing when the reader has gone, or (if asked) behind the first full stop."""

    def __init__(self, tokenizer: Any, first_sentence: bool):
        self.gone, self.first_sentence, self.tokenizer = threading.Event(), first_sentence, tokenizer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        full = [self.first_sentence and "." in self.tokenizer.decode(row[-1:]) for row in input_ids]
        return torch.tensor([self.gone.is_set() or one for one in full], device=input_ids.device)


class Demo:
    """The model behind the page."""

    def __init__(self, name: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForImageTextToText.from_pretrained(name).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(name)

    @property
    def is_chat(self) -> bool:
        """Whether the language model brought a template of its own."""
        template = self.processor.chat_template
        return not any(
            DEFAULT_CHAT_TEMPLATE in one for one in (template.values() if isinstance(template, dict) else [template])
        )

    def prompt(self, question: str, as_chat: bool) -> str:
        if not as_chat:
            return question
        return self.processor.chat_prompt(question or "Describe the photo.")

    def stream(self, image: Image.Image, prompt: str, max_new_tokens: int, first_sentence: bool) -> Iterator[str]:
        """The answer, as far as it has been written."""
        inputs = self.processor(images=[image], text=[prompt], return_tensors="pt").to(self.model.device)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = Stop(self.processor.tokenizer, first_sentence), []

        def write() -> None:
            try:
                options = {"do_sample": False, "max_new_tokens": max_new_tokens, "streamer": streamer}
                self.model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([stop]))
            except Exception as error:  # shown below: nobody sees what a thread raises
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=write)
        thread.start()
        said = ""
        try:
            for piece in streamer:
                said += piece
                yield said.strip()
        finally:
            stop.gone.set()
            thread.join()
        if failed:
            raise gr.Error(f"{type(failed[0]).__name__}: {failed[0]}")


NOTHING = "(nothing: it ended at once)"


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
    demo: Demo, title: str, max_new_tokens: int, pictures: list[str], questions: list[str], first_sentence: bool
) -> gr.Blocks:
    """The page; `pictures` (paths) and `questions` are there to be tried."""
    with gr.Blocks(title="frozen-prefix", analytics_enabled=False) as page:
        gr.Markdown(f"# What does a frozen language model see?\n{title}")
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(type="pil", image_mode="RGB", label="Picture", height=320, elem_id="picture")
                question = gr.Textbox(
                    label="Question or beginning", placeholder="empty: describe the picture", elem_id="question"
                )
                if pictures:
                    gr.Examples(pictures, image, label="Pictures to try")
                if questions:
                    gr.Examples(questions, question, label="Questions to try")
                with gr.Accordion("Options", open=False):
                    longest = gr.Slider(1, 256, max_new_tokens, step=1, label="At most so many tokens")
                    sentence = gr.Checkbox(first_sentence, label="Stop at the first full stop")
                    chat = gr.Checkbox(demo.is_chat, label="Ask in the language model's chat format")
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
            prompt, grey = demo.prompt((text or "").strip(), as_chat), blind_picture(picture)
            said = blindly = ""
            yield {answer: "", blind: "", looked: None, owed: None, words: None, note: ""}
            for said in demo.stream(picture, prompt, int(tokens), short):
                yield {answer: said}
            for blindly in demo.stream(grey, prompt, int(tokens), short):
                yield {blind: blindly}
            yield {answer: said or NOTHING, blind: blindly or NOTHING}
            if not (said and deep):
                return
            parts = {
                looked: lambda: attention_to_image(demo.model, demo.processor, picture, prompt, text=said),
                owed: lambda: sightedness(demo.model, demo.processor, picture, said, prompts=prompt, other_images=grey),
                words: lambda: nearest_words(demo.model, demo.processor, picture),
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


def quickstart_model(folder: Path) -> Path:
    """The quickstart's checkpoint; trained here if it is not there yet."""
    if not (folder / "results.json").is_file():  # written last
        print(f"Training the quickstart's little model into {folder}: a few minutes, once.")
        script = Path(__file__).with_name("quickstart.py")
        subprocess.run([sys.executable, str(script), "--output_dir", str(folder)], check=True)
    return folder / "eyes"


def quickstart_examples(folder: Path, count: int = 10) -> tuple[list[str], list[str]]:
    """Pictures of scenes that the quickstart held out, and what it may be asked of them."""
    from shapes import QUESTIONS, draw, split_scenes

    rng, paths = random.Random(1), []
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(rng.sample(split_scenes()[1], count)):
        paths.append(str(folder / f"{index}.png"))
        draw(scene, rng).resize((256, 256), Image.Resampling.NEAREST).save(paths[-1])
    return paths, list(QUESTIONS)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    cache = args.cache_dir.resolve()  # the checkpoint names its parents by their folders
    if args.model is None:
        demo, (pictures, questions) = Demo(str(quickstart_model(cache))), quickstart_examples(cache / "examples")
        title = (
            "Two tiny parents, trained apart and frozen: one never met a picture, one never met a word. Only the connector "
            "between them learnt, on other scenes than those below."
        )
    else:
        demo, pictures, questions = Demo(args.model), [], []
        title = f"Model: `{args.model}`. Its parents are frozen; a connector between them was trained."
    page = build_page(demo, title, args.max_new_tokens, pictures, questions, first_sentence=args.model is None)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none from the web
    page.launch(server_name=args.host, server_port=args.port, share=args.share, theme=theme)


if __name__ == "__main__":
    main()
