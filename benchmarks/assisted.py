"""Speculative decoding of captions by what never sees the image: how many candidates are accepted, and what that gains.

    python -m benchmarks.assisted quickstart_real_output/eyes jxie/flickr8k --split test --assistant ID_OR_FOLDER

Each image is captioned greedily by the checkpoint alone, with `prompt_lookup_num_tokens`, and with the text-only
`assistant_model`, each of which is to write the same words. An assistant with another tokenizer is given both tokenizers, as
transformers' universal assisted generation wants. *Tokens a call* counts the calls of the whole model that wrote the captions
(1 without candidates): what is above 1 was accepted. Images are encoded before, so that time is of writing alone; a ratio
below 1 is a gain.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks import timing
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor, load_image_text
from modeling_frozen.data.columns import images_of


class Calls:
    """Counts calls of a module while it is open."""

    def __init__(self, module: torch.nn.Module):
        self.count, self._module = 0, module

    def __enter__(self) -> "Calls":
        def count(*_: Any) -> None:
            self.count += 1

        self._handle = self._module.register_forward_pre_hook(count)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("dataset")
    parser.add_argument("--split")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--prompt", default="Describe the photo.")
    parser.add_argument("--assistant", help="a small text-only language model; without it prompt lookup alone is measured")
    parser.add_argument("--candidates", type=int, nargs="+", default=[2, 5], help="tokens foretold at a time")
    parser.add_argument("--new-tokens", type=int, default=24)
    timing.add_arguments(parser, rounds=3)
    args = parser.parse_args(arguments)
    model = FrozenPrefixForConditionalGeneration.from_pretrained(args.checkpoint).eval()
    processor = FrozenPrefixProcessor.from_pretrained(args.checkpoint)
    prompt = processor.chat_prompt(args.prompt) if processor.chat_template else processor.image_token + args.prompt
    rows = load_image_text(args.dataset, split=args.split)
    rows = rows.select(range(min(args.images, len(rows))))
    report = timing.Report("captions written with candidates of what never sees the image", **vars(args))
    inputs = [processor(images=images_of(row), text=prompt, return_tensors="pt") for row in rows]
    with torch.inference_mode():
        encoded = [{"image": model.get_image_features(one.pop("pixel_values"))} for one in inputs]

    def writes(**options: Any) -> Callable[[], list[torch.Tensor]]:
        def write() -> list[torch.Tensor]:
            return [
                model.generate(**one, mm_encoder_outputs=image, do_sample=False, max_new_tokens=args.new_tokens, **options)[
                    0, one["input_ids"].shape[1] :
                ]
                for one, image in zip(inputs, encoded, strict=True)
            ]

        return write

    candidates = {"alone": writes()}
    for count in args.candidates:
        candidates[f"prompt lookup, {count} at a time"] = writes(prompt_lookup_num_tokens=count)
    if args.assistant:
        assistant = AutoModelForCausalLM.from_pretrained(args.assistant).eval()
        both: dict[str, Any] = {"assistant_model": assistant}
        if assistant.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:  # transformers' rule
            tokenizers = processor.tokenizer, AutoTokenizer.from_pretrained(args.assistant)
            both |= dict(zip(("tokenizer", "assistant_tokenizer"), tokenizers, strict=True))
        for count in args.candidates:
            candidates[f"assistant, {count} at a time"] = assisted(assistant, count, writes(**both))
    with torch.inference_mode():
        alone = candidates["alone"]()
        tokens = sum(map(len, alone))
        for name, write in candidates.items():
            with Calls(model) as calls:
                written = write()
            same = sum(torch.equal(a, b) for a, b in zip(alone, written, strict=True))
            report.figure(f"{name}: tokens a call", tokens / calls.count, "")
            report.figure(f"{name}: captions that are the same", same, f"of {len(alone)}")
        timings = timing.alternate(candidates, rounds=args.rounds, warmup=0, clock=args.clock)
    for name in list(candidates)[1:]:
        report.compare(f"{name}, to writing alone", timings[name], timings["alone"], unit="s", scale=1)
    report.print()
    report.save(args.output)
    return {"rows": report.rows}


def assisted(assistant: Any, count: int, write: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    """`write` with an assistant that foretells so many tokens at a time, whatever its confidence."""

    def run() -> list[torch.Tensor]:
        assistant.generation_config.update(
            num_assistant_tokens=count, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
        return write()

    return run


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
