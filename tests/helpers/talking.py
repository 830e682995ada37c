"""A saved checkpoint that answers in many words, other ones for other pictures: for tests of what users talk to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from tests.helpers.tiny import COLOURS, WORDS, join, save_parents


QUESTION = "what colour ?"
TOKENS = 6


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (20, 18), COLOURS[colour])


def user(*images: Any, text: str = QUESTION) -> dict[str, Any]:
    """A user's turn with pictures (a colour's name stands for one) as transformers' chats have it."""
    shown = [picture(image) if isinstance(image, str) and image in COLOURS else image for image in images]
    content = [{"type": "image", "image" if isinstance(image, Image.Image) else "url": image} for image in shown]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


@dataclass
class Talking:
    """Model, processor and the folder where both are saved."""

    model: FrozenPrefixForConditionalGeneration
    processor: FrozenPrefixProcessor
    path: str

    def says(self, *messages: dict[str, Any], tokens: int = TOKENS) -> str:
        """The answer to a chat, by hand: chat template, `generate`, decode."""
        inputs = self.processor.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return self.continues(inputs, tokens=tokens)[0]

    def continues(self, inputs: Any, tokens: int = TOKENS) -> list[str]:
        """What `generate` adds to each of the texts that a processor's call gave."""
        out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def talking(folder: Path) -> Talking:
    """Random parents and a random connector, so loud that pictures change the words; all in `folder`, saved in `eyes`."""
    # No spare rows: whatever is said is a word. Random language models repeat themselves unless they are wild.
    save_parents(folder, text={"vocab_size": len(WORDS), "initializer_range": 0.6, "max_position_embeddings": 128})
    torch.manual_seed(1)
    model, processor = join(folder)
    model.model.connector.set_output_norm(3 * model.get_input_embeddings().weight.norm(dim=-1).mean().item())
    path = folder / "eyes"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return Talking(model, processor, str(path))
