"""A checkpoint that answers questions about images, word by word: for the terminal and for the page in the browser."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)


NOTHING = "(nothing: it ended at once)"


class StopWriting(StoppingCriteria):
    """Ends the writing when the reader has gone, or (if asked) behind the first full stop."""

    def __init__(self, tokenizer: Any, first_sentence: bool):
        self.gone, self.first_sentence, self.tokenizer = threading.Event(), first_sentence, tokenizer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        full = [self.first_sentence and "." in self.tokenizer.decode(row[-1:]) for row in input_ids]
        return torch.tensor([self.gone.is_set() or one for one in full], device=input_ids.device)  # type: ignore[return-value]


def load(name: str | Path, device: str | None = None) -> tuple[Any, Any]:
    """A checkpoint in eval mode, on `device` (default: the GPU where there is one), and its processor."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForImageTextToText.from_pretrained(name)
    return model.to(device).eval(), AutoProcessor.from_pretrained(name)


def stream_answer(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    prompt: str,
    *,
    max_new_tokens: int = 40,
    first_sentence: bool = False,
    **generate_kwargs: Any,
) -> Iterator[str]:
    """
    The answer, each time as far as it has been written. Where the reader stops reading, the writing ends.

    Args:
        model, processor: of a checkpoint.
        images: paths, addresses or PIL images, one for each `<image>` of the prompt, or none.
        prompt: as the processor takes it; see [`~modeling_frozen.data.asking.Asking`].
        first_sentence: whether to end behind the first full stop.
        generate_kwargs: as for `generate`; greedy by default.

    Raises: what `generate` raises.
    """
    inputs = processor(images=list(images) or None, text=[prompt], return_tensors="pt").to(model.device)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failed = StopWriting(processor.tokenizer, first_sentence), []

    def write() -> None:
        try:
            options = {"do_sample": False, "max_new_tokens": max_new_tokens, "streamer": streamer, **generate_kwargs}
            model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([stop]))
        except Exception as error:  # raised below: nobody sees what a thread raises
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
        raise failed[0]


__all__ = ["NOTHING", "StopWriting", "load", "stream_answer"]
