"""A frozen language model learns to see, from nothing, without a network, in about two minutes on two cores.

    python examples/quickstart.py --output_dir quickstart_output

Two tiny parents are trained apart (`modeling_frozen.shapes`): a language model on sentences, which meets no picture, and a
tower on pictures, which never meets a word. Both are saved as ordinary folders and frozen. Then only a connector is trained,
with `Trainer`, and describes pictures of scenes that nobody met in training, neither drawn nor described. Beside the score
stand those of the same model *blind* (pictures shuffled) and of a *random connector*. Written to `--output_dir`: the parents,
the checkpoint, `results.json`, `training.png` and `pictures.png`. With real parents and photos: `quickstart_real.py`.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from modeling_frozen.shapes.scenes import QUESTIONS, draw, split_scenes


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart_output"), help="where everything is written")
    parser.add_argument("--tower_steps", type=int, default=1000, help="of training the tiny tower")
    parser.add_argument("--language_model_steps", type=int, default=110, help="of training the tiny language model")
    parser.add_argument("--steps", type=int, default=1800, help="of training the connector")
    parser.add_argument("--held_out", type=int, default=96, help="how many held-out pictures are described")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Pictures, each with its description, or (every other one) with a question and its answer."""
    rng, (known, _) = random.Random(seed), split_scenes()
    rows = []
    for i in range(count):
        scene = rng.choice(known)
        question = rng.choice(list(QUESTIONS)) if i % 2 else None
        answer = scene.sentence if question is None else scene.answer(question)
        rows.append({"image": draw(scene, rng), "prompt": question or "", "answer": answer})
    return rows


def make_held_out(count: int, seed: int) -> list[dict[str, Any]]:
    rng, (_, held_out) = random.Random(seed), split_scenes()
    scenes = rng.sample(held_out, len(held_out))[:count]  # each once
    return [{"image": draw(scene, rng), "prompt": "", "answer": scene.sentence} for scene in scenes]


def first_sentence(text: str) -> str:
    return text.split(".")[0].strip() + " ."


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)  # before torch is imported, so that --help comes at once
    from transformers import Trainer, TrainingArguments, set_seed

    from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
    from modeling_frozen.evaluation import evaluate
    from modeling_frozen.evaluation.plots import plot_sheet, plot_training
    from modeling_frozen.metrics import caption_scores, exact_match
    from modeling_frozen.shapes.folders import write_parents
    from modeling_frozen.training.sight import SightCallback

    begin, out = time.time(), args.output_dir
    write_parents(out, tower_steps=args.tower_steps, language_model_steps=args.language_model_steps, seed=args.seed)
    set_seed(args.seed)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        str(out / "tower"), str(out / "language_model"), connector_type="mlp"
    )
    processor = FrozenPrefixProcessor.from_model(model)
    collator, rows = DataCollatorForFrozenPrefix(processor), make_held_out(args.held_out, args.seed + 1)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(out / "training"), max_steps=args.steps, per_device_train_batch_size=32, learning_rate=3e-3,
            lr_scheduler_type="cosine", warmup_steps=20, logging_steps=20, logging_first_step=True,
            remove_unused_columns=False, save_strategy="no", report_to="none", seed=args.seed,
        ),
        train_dataset=make_rows(args.steps * 8, args.seed), data_collator=collator, processing_class=processor,
        callbacks=[SightCallback(rows, collator, every=60)],  # does the loss depend on the picture?
    )  # fmt: skip
    trainer.train()
    plot_training(trainer, out / "training.png")
    trainer.save_model(str(out / "eyes"))  # the connector, its config and the processor

    options, kinds = {"batch_size": 30, "postprocess": first_sentence}, ("sighted", "blind", "random_connector")
    result = evaluate(model, processor, rows, kinds=kinds, seed=args.seed, max_new_tokens=16, **options)
    asked = [{**row, "prompt": "what colour ?"} for row in rows]
    colours = evaluate(model, processor, asked, kinds=("sighted",), num_resamples=0, max_new_tokens=4, **options)
    said = result.predictions["sighted"]
    lines = [f"{text}  what colour ?  {reply}" for text, reply in zip(said, colours.predictions["sighted"], strict=True)]
    score, images = caption_scores(said, result.references)["cider"], [row["image"] for row in rows]
    plot_sheet(images, lines, result.references, score, out / "pictures.png", each=4, score_name="CIDEr")

    # What was saved, read as somebody else would read it: by a command, in a process of its own.
    shown = [str(out / f"picture_{i}.png") for i in range(min(10, len(images)))]
    for image, path in zip(images, shown, strict=False):
        image.save(path)
    command = [sys.executable, "-m", "modeling_frozen.cli", "caption", *shown, "--model", str(out / "eyes"), "--json"]
    again = subprocess.run([*command, "--no_chat", "--max_new_tokens", "16"], check=True, stdout=subprocess.PIPE, text=True)
    if [first_sentence(json.loads(line)["text"]) for line in again.stdout.splitlines()] != said[: len(shown)]:
        raise RuntimeError(f"Reloaded, the model says\n{again.stdout}where it said {said[: len(shown)]}.")

    scores = {k: {"exact_match": exact_match(result.predictions[k], result.references), **result.scores[k]} for k in kinds}
    size = sum(file.stat().st_size for file in (out / "eyes").glob("*.safetensors"))
    parents = sum(file.stat().st_size for file in out.glob("*/*.safetensors")) - size
    facts = {"checkpoint_bytes": size, "parents_bytes": parents, "seconds": round(time.time() - begin, 1)}
    (out / "results.json").write_text(json.dumps({**scores, **facts}, indent=2) + "\n")
    print(f"\n{f'{len(rows)} images of scenes that nobody met in training':<53} exact match   CIDEr")
    print("\n".join(f"{name:<53} {one['exact_match']:>11.3f} {one['cider']:>7.3f}" for name, one in scores.items()))
    print(f"\nThe connector has {size:,} bytes, its parents {parents:,}. {facts['seconds']} seconds: {out}/pictures.png")
    print(f"    frozen-prefix demo {out / 'eyes'} --first_sentence --pictures {out}/picture_*.png")


if __name__ == "__main__":
    main()
