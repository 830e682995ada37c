"""A frozen language model learns to see, from nothing, without a network, in a few minutes on two cores.

    python examples/quickstart.py --output_dir quickstart_output
    python examples/quickstart.py --vision ID_OR_FOLDER --text ID_OR_FOLDER      (real parents instead of the tiny ones)

Two tiny parents are trained apart (`shapes.py`): a language model on sentences, which never meets a picture, and a tower
on pictures, which never meets a word. Both are saved as ordinary folders and frozen. Then only a connector is trained,
with `Trainer`, and describes pictures of scenes that nobody met in training, neither drawn nor described. Beside the score
stand those of the same model *blind* (pictures shuffled) and of a *random connector*. Written to `--output_dir`: the parents,
the checkpoint, `results.json`, `training.png` and `pictures.png`.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.evaluation.plots import plot_sheet, plot_training
from modeling_frozen.metrics import caption_metrics, caption_scores
from modeling_frozen.shapes.parents import train_language_model, train_tower
from modeling_frozen.shapes.scenes import QUESTIONS, Scene, draw, split_scenes


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("quickstart_output"), metadata={"help": "Where everything is written."})
    vision: str | None = field(default=None, metadata={"help": "A real vision tower: Hub id or folder."})
    text: str | None = field(default=None, metadata={"help": "A real language model: Hub id or folder."})
    connector_type: str = "mlp"
    prefix_length: int | None = field(default=None, metadata={"help": "For connectors that choose their own length."})
    tower_steps: int = field(default=1000, metadata={"help": "Steps of training for the tiny tower."})
    language_model_steps: int = field(default=110, metadata={"help": "Steps of training for the tiny language model."})
    steps: int = field(default=1800, metadata={"help": "Steps of training for the connector."})
    batch_size: int = 32
    learning_rate: float = 3e-3
    held_out: int = field(default=96, metadata={"help": "How many held-out pictures are described."})
    seed: int = 0


def make_rows(scenes: list[Scene], count: int, rng: random.Random, questions: bool = True) -> list[dict]:
    """Pictures, each with its description, or (every other one) with a question and its answer."""
    rows = []
    for i in range(count):
        scene = rng.choice(scenes) if questions else scenes[i % len(scenes)]
        question = rng.choice(list(QUESTIONS)) if questions and i % 2 else None
        answer = scene.sentence if question is None else scene.answer(question)
        rows.append({"image": draw(scene, rng), "prompt": question or "", "answer": answer, "scene": scene})
    return rows


@torch.no_grad()
def answer(model, processor, images: list[Image.Image], prompts: list[str], title: str) -> list[str]:
    """What the model says of each picture, up to its first full stop."""
    said = []
    for at in tqdm(range(0, len(images), 30), desc=title):
        inputs = processor(images=images[at : at + 30], text=prompts[at : at + 30], return_tensors="pt", padding=True)
        ids = model.generate(**inputs.to(model.device), max_new_tokens=16, do_sample=False)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        said += [text.split(".")[0].strip() + " ." for text in texts]
    return said


def shuffled(images: list[Image.Image], rows: list[dict]) -> list[Image.Image]:
    """Every row gets a picture of another scene than its own."""
    rng, order = random.Random(0), list(range(len(images)))
    while any(rows[i]["scene"] == rows[j]["scene"] for i, j in enumerate(order)):
        for i, j in enumerate(order):
            if rows[i]["scene"] == rows[j]["scene"]:
                other = rng.randrange(len(order))
                order[i], order[other] = order[other], order[i]
    return [images[j] for j in order]


def score(said: list[str], rows: list[dict]) -> dict[str, float]:
    right = [row["answer"] for row in rows]
    exact = sum(a == b for a, b in zip(said, right, strict=True)) / len(right)
    return {"exact_match": exact, "cider": caption_metrics(said, [[text] for text in right])["cider"]}


def folder_bytes(folder: str | Path, pattern: str = "*.safetensors") -> int:
    return sum(file.stat().st_size for file in Path(folder).glob(pattern))


def draw_sheet(path: Path, images: list[Image.Image], rows: list[dict], said: list[str], colours: list[str]) -> None:
    """Held-out pictures, the best, the middle and the worst, with what the model said of them and of their colour."""
    right = [row["answer"] for row in rows]
    scores = caption_scores(said, [[text] for text in right])["cider"]
    outputs = [f"{text}  what colour ?  {reply}" for text, reply in zip(said, colours, strict=True)]
    title = "Held-out scenes: nobody met them in training, neither drawn nor described"
    plot_sheet(images, outputs, right, scores, path, each=4, score_name="CIDEr", title=title)


FRESH = """
import json, sys
import modeling_frozen
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
images = [Image.open(path) for path in sys.argv[2:]]
inputs = processor(images=images, text=[""] * len(images), return_tensors="pt", padding=True)
ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps([text.split(".")[0].strip() + " ." for text in texts]))
"""


def said_in_a_fresh_process(checkpoint: Path, images: list[Image.Image], folder: Path) -> list[str]:
    """Reloads by the Auto classes, as somebody else would."""
    files = []
    for i, image in enumerate(images):
        files.append(str(folder / f"picture_{i}.png"))
        image.save(files[-1])
    command = [sys.executable, "-c", FRESH, str(checkpoint), *files]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> dict:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    begin, out = time.time(), args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    tower, words = args.vision or str(out / "tower"), args.text or str(out / "language_model")
    if args.vision is None:
        train_tower(Path(tower), args.tower_steps, args.seed)
    if args.text is None:
        train_language_model(Path(words), args.language_model_steps, args.seed)

    def join() -> FrozenPrefixForConditionalGeneration:
        return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
            tower, words, connector_type=args.connector_type, prefix_length=args.prefix_length
        )

    set_seed(args.seed)
    model = join()
    processor = FrozenPrefixProcessor.from_model(model)
    known, held_out = split_scenes()
    rng = random.Random(args.seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(out / "training"), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=20, logging_steps=20,
            logging_first_step=True, remove_unused_columns=False, save_strategy="no", report_to="none", seed=args.seed,
        ),
        train_dataset=make_rows(known, args.steps * args.batch_size // 4, rng),
        data_collator=DataCollatorForFrozenPrefix(processor),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    plot_training(trainer, out / "training.png")
    model.eval()

    rng = random.Random(args.seed + 1)
    rows = make_rows(rng.sample(held_out, len(held_out)), args.held_out, rng, questions=False)
    images, prompts = [row["image"] for row in rows], [""] * len(rows)
    said = answer(model, processor, images, prompts, "describing held-out pictures")
    set_seed(args.seed + 1)
    results = {
        "sighted": score(said, rows),
        "blind": score(answer(model, processor, shuffled(images, rows), prompts, "blind"), rows),
        "random_connector": score(answer(join(), processor, images, prompts, "random connector"), rows),
    }
    colours = answer(model, processor, images, ["what colour ?"] * len(images), "asking for colours")

    checkpoint = out / "eyes"
    shutil.rmtree(checkpoint, ignore_errors=True)
    model.save_pretrained(checkpoint)
    results["checkpoint_bytes"] = folder_bytes(checkpoint, "*")
    results["parents_bytes"] = folder_bytes(tower) + folder_bytes(words)
    processor.save_pretrained(checkpoint)
    again = said_in_a_fresh_process(checkpoint, images[:10], out)
    if again != said[:10]:
        raise RuntimeError(f"Reloaded, the model says {again} where it said {said[:10]}.")
    draw_sheet(out / "pictures.png", images, rows, said, colours)
    results["seconds"] = round(time.time() - begin, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    print(f"\n{f'{len(rows)} images of scenes that nobody met in training':<53} exact match   CIDEr")
    for name in ("sighted", "blind", "random_connector"):
        print(f"{name:<53} {results[name]['exact_match']:>11.3f} {results[name]['cider']:>7.3f}")
    print(
        f"\ncheckpoint {results['checkpoint_bytes']:,} bytes (config included), its parents {results['parents_bytes']:,}; "
        f"reloaded in a fresh process it says the same.\n{results['seconds']} seconds. "
        f"See {out / 'pictures.png'} and {out / 'results.json'}, and ask it yourself:\n"
        f"    frozen-prefix demo {checkpoint} --first_sentence --pictures {out}/picture_*.png"
    )
    return results


if __name__ == "__main__":
    main()
