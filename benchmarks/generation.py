"""Answering, side by side with the bare language model: 20 tokens, a further question on a picture, and ClipCap's loops.

    python -m benchmarks.generation --output generation.json
    python -m benchmarks.generation --text-type gpt2 --clipcap path/to/CLIP_prefix_caption

The limit is the frozen language model itself, reading as many words as prefix and text have together. `--clipcap` takes a
checkout of github.com/rmokady/CLIP_prefix_caption; its own `generate2` and `generate_beam` then run on the same GPT-2, from
the same prefix, for the same number of tokens: for one caption, and for those of a set of `--set-size` pictures, which they
can only write one by one, and ours in one batch.
"""

import argparse
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from transformers import logging
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.clipcap_checkout import decoding_functions
from benchmarks.parents import Sizes, add_arguments, join, pictures, prompt, sizes_of, words
from benchmarks.timing import Report, Timing, alternate
from benchmarks.timing import add_arguments as add_timing_arguments


def added(name: str, first: Timing, second: Timing) -> Timing:
    return Timing(name, [a + b for a, b in zip(first.rounds, second.rounds, strict=True)])


def main(arguments: argparse.Namespace) -> Report:
    sizes = sizes_of(arguments)
    report = Report(f"generate, {arguments.new_tokens} tokens", clock=arguments.clock, **sizes.as_dict())
    with tempfile.TemporaryDirectory() as folder:
        model = join(folder, sizes).to(arguments.device)
        with torch.inference_mode():
            compare(model, sizes, arguments, report)
    report.print()
    report.save(arguments.output)
    return report


def compare(model: Any, sizes: Sizes, arguments: argparse.Namespace, report: Report) -> None:
    bare, device = model.model.language_model, arguments.device
    question = words(sizes, device=device)
    asked = prompt(model, question)
    image = pictures(sizes, device=device).to(model.model.vision_tower.dtype)
    plain = words(sizes, asked.shape[1], device=device)
    length = arguments.new_tokens
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    encoded = {"image": model.get_image_features(image)}
    prefix = model.encode_prefix(prompt(model, question[:, :0]), pixel_values=image)
    beams = {**options, "num_beams": 5}
    timings = alternate(
        {
            "from the picture": lambda: model.generate(asked, pixel_values=image, **options),
            "encoded before": lambda: model.generate(asked, mm_encoder_outputs=encoded, **options),
            "words alone": lambda: model.generate(plain, **options),
            "bare": lambda: bare.generate(plain, **options),
            "picture": lambda: model.get_image_features(image),
            "beams": lambda: model.generate(asked, mm_encoder_outputs=encoded, **beams),
            "bare beams": lambda: bare.generate(plain, **beams),
            "further question": lambda: model.generate(question, prefix_cache=prefix, **options),
            "text question": lambda: model.generate(question, **options),
            "bare question": lambda: bare.generate(question, **options),
        },
        rounds=arguments.rounds,
        clock=arguments.clock,
    )
    limit = timings["bare"]
    report.compare("prefix encoded before, to the bare model", timings["encoded before"], limit, bar=1.03)
    report.compare("words alone, to the bare model", timings["words alone"], limit, bar=1.03)
    both = added("tower and bare", timings["picture"], limit)
    report.compare("from the picture, to encoding it and the bare model", timings["from the picture"], both, bar=1.03)
    report.compare("5 beams, to the bare model's", timings["beams"], timings["bare beams"], bar=1.03)
    report.compare("further question, to the text alone", timings["further question"], timings["text question"], bar=1.1)
    report.compare("further question, to the bare model", timings["further question"], timings["bare question"], bar=1.1)
    report.compare("further question, to asking afresh", timings["further question"], timings["from the picture"])
    if arguments.clipcap is None:
        print("no --clipcap: its loops are left out")
    elif not hasattr(bare, "transformer"):
        print(f"--clipcap needs --text-type gpt2, and not {sizes.text_type}: its loops are left out")
    else:
        compare_clipcap(model, sizes, arguments, report, encoded, question)


def compare_clipcap(
    model: Any,
    sizes: Sizes,
    arguments: argparse.Namespace,
    report: Report,
    encoded: dict[str, Any],
    question: torch.LongTensor,
) -> None:
    """The same prefixes through the same GPT-2, by ClipCap's loops and by ours: of one picture, and of a set."""
    loops = decoding_functions(arguments.clipcap)
    bare, length, size = model.model.language_model, arguments.new_tokens, arguments.set_size
    asked = prompt(model, question[:, :0])
    # What their loops read of a model and a tokenizer; the stop word is one that never comes.
    theirs = SimpleNamespace(gpt=bare, eval=bare.eval, parameters=bare.parameters)
    stop = sizes.vocab_size - 1
    reader = SimpleNamespace(encode=lambda _: [stop], decode=lambda ids: list(ids))
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}

    def ours(prefixes: Any, beams: int = 1) -> torch.Tensor:
        pictures = {"image": BaseModelOutputWithPooling(pooler_output=tuple(prefixes))}
        ids = asked.expand(len(prefixes), -1)
        return model.generate(ids, mm_encoder_outputs=pictures, **options, num_beams=beams)[:, asked.shape[1] :]

    def one_by_one(loop: str, prefixes: Any) -> list[Any]:
        return [loops[loop](theirs, reader, embed=prefix[None], entry_length=length) for prefix in prefixes]

    one = torch.stack(tuple(encoded["image"].pooler_output)).to(bare.dtype)
    several = model.get_image_features(pictures(sizes, size, arguments.device).to(model.model.vision_tower.dtype))
    several = torch.stack(tuple(several.pooler_output)).to(bare.dtype)
    plain = words(sizes, asked.shape[1], device=arguments.device)
    for what, beams, prefixes, bar, rounds, warmup in (
        ("caption", "5 beams", one, None, arguments.rounds, 2),
        (f"{size} captions", f"{size} captions, 5 beams", several, 0.1, arguments.set_rounds, 0),
    ):
        pairs = [list(a) == b.tolist() for a, b in zip(one_by_one("generate2", prefixes), ours(prefixes), strict=True)]
        print(f"{what}: ClipCap's generate2 and our greedy search write the same tokens: {sum(pairs)} of {len(pairs)}")
        timings = alternate(
            {
                "ours": lambda prefixes=prefixes: ours(prefixes),
                "generate2": lambda prefixes=prefixes: one_by_one("generate2", prefixes),
                "our beams": lambda prefixes=prefixes: ours(prefixes, 5),
                "generate_beam": lambda prefixes=prefixes: one_by_one("generate_beam", prefixes),
                "bare beams": lambda prefixes=prefixes: bare.generate(plain.expand(len(prefixes), -1), **options, num_beams=5),
            },
            rounds=rounds,
            warmup=warmup,
            clock=arguments.clock,
        )
        report.compare(f"{what}, to ClipCap's generate2", timings["ours"], timings["generate2"], bar=bar)
        report.compare(f"{beams}, to ClipCap's generate_beam", timings["our beams"], timings["generate_beam"], bar=bar)
        report.compare(f"{beams}, to the bare model's from as many words", timings["our beams"], timings["bare beams"])


if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_timing_arguments(parser)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--clipcap", help="checkout of github.com/rmokady/CLIP_prefix_caption")
    parser.add_argument("--set-size", type=int, default=32, help="pictures of the set that ClipCap's loops caption")
    parser.add_argument("--set-rounds", type=int, default=2, help="timings of the set: each takes as long as all its captions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(parser.parse_args())
