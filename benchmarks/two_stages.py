"""A second stage, LLaVA's, on real images: what eyes that learnt captions answer before and after they learn instructions.

    python -m benchmarks.two_stages EYES assets --output_dir two_stages --table two_stages.md

EYES is a checkpoint that describes photos; `assets` is the folder that `python -m benchmarks.results` calls so. Instructions
are made from captions and questions that people have written. Photos of Flickr8k and COCO get a chat each: to describe the
photo, which a caption answers, and whether this or that is in it: yes where at least three of five captions name it, no where
none does (as many of each as can be had). easy-VQA's small pictures get three of their own questions. They are written in
LLaVA's form, `train.json`, of the training splits alone; and of the test splits `test_photos.json` (yes or no, one question a
row, as many of each) and `test_shapes.json`. Then

    frozen-prefix train --model EYES --lora 8 --dataset two_stages/train.json --cache_features --held_out 0 …

trains LoRA in the language model beside the connector, and both checkpoints answer both tests, and describe the test photos
of Flickr8k, sighted and blind. A folder `assistant` that stands there already is taken as it is, so that a run goes on where
it was stopped.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset

from modeling_frozen import load_image_text
from modeling_frozen.data.asking import Asking
from modeling_frozen.evaluation import evaluate
from modeling_frozen.serving.answering import load


THINGS = {
    "a dog": r"\bdogs?\b",
    "a child": r"\b(boy|girl|child|children|kid|baby|toddler)s?\b",
    "a man": r"\b(man|men|guy)\b",
    "a woman": r"\b(woman|women|lady)\b",
    "water": r"\b(water|pool|ocean|lake|river|sea|surf\w*|swim\w*|wave\w*)\b",
    "snow": r"\b(snow\w*|ski\w*|sled\w*)\b",
    "a bicycle": r"\b(bike|bicycle|biker|bicyclist|cyclist)s?\b",
    "a ball": r"\b(\w*ball|soccer|tennis)\b",
    "grass": r"\b(grass\w*|field|lawn)\b",
}
DESCRIBE = "Describe the photo."
TESTS = {"test_photos": "is there … in the photo, right", "test_shapes": "questions of easy-VQA, right"}


def asked_about(thing: str) -> str:
    return f"Is there {thing} in the photo?"


def mentions(captions: list[str], words: dict[str, str]) -> dict[str, int]:
    """How many captions of a photo name each of these things, told by a pattern each."""
    return {thing: sum(bool(re.search(word, one.lower())) for one in captions) for thing, word in words.items()}


def present(captions: list[str]) -> tuple[list[str], list[str]]:
    """Things that are in a photo, and things that are not, as far as its captions tell."""
    counts = mentions(captions, THINGS)
    there = [thing for thing, count in counts.items() if count >= 0.6 * len(captions)]
    return there, [thing for thing, count in counts.items() if count == 0]


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    chat = []
    for number, (question, answer) in enumerate(pairs):
        chat += [{"from": "human", "value": question if number else f"<image>{question}"}, {"from": "gpt", "value": answer}]
    return chat


def tidy(caption: str) -> str:
    return re.sub(r"\s+([.,!?;:])", r"\1", " ".join(caption.split())).rstrip(" .") + "."


class Writer:
    """Images into the folder, each once, and rows of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "images").mkdir(parents=True, exist_ok=True)

    def image(self, name: str, picture: Any) -> str:
        picture.convert("RGB").save(self.folder / "images" / f"{name}.jpg", quality=95)
        return f"images/{name}.jpg"

    def rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"{self.folder / name}.json: {len(rows)} rows, {sum(len(row['conversations']) // 2 for row in rows)} answers")


def photo_rows(writer: Writer, name: str, photos: Any, draw: random.Random) -> list[dict[str, Any]]:
    """A chat a photo, to learn from."""
    column, rows = "captions" if "captions" in photos.column_names else "text", []
    for number, photo in enumerate(photos):
        there, absent = present(photo[column])
        count = min(2, len(there), len(absent))
        questions = [(asked_about(thing), "Yes.") for thing in draw.sample(there, count)]
        questions += [(asked_about(thing), "No.") for thing in draw.sample(absent, count)]
        pairs = [(DESCRIBE, tidy(draw.choice(photo[column]))), *questions]
        draw.shuffle(pairs)  # else whatever is asked first is answered by a description
        image = writer.image(f"{name}_{number}", photo["image"])
        rows.append({"id": f"{name}_{number}", "image": image, "conversations": turns(pairs)})
    return rows


def photo_questions(writer: Writer, name: str, photos: Any, draw: random.Random) -> list[dict[str, Any]]:
    """One question a row: of each photo one that is to be answered by yes, and one by no."""
    column, rows = "captions" if "captions" in photos.column_names else "text", []
    for number, photo in enumerate(photos):
        there, absent = present(photo[column])
        if there and absent:
            image = writer.image(f"{name}_{number}", photo["image"])
            for things, answer in ((there, "Yes."), (absent, "No.")):
                chat = turns([(asked_about(draw.choice(things)), answer)])
                rows.append({"id": f"{name}_{number}_{answer[:-1].lower()}", "image": image, "conversations": chat})
    return rows


def shape_rows(
    writer: Writer, name: str, pictures: Any, each: int, together: bool, draw: random.Random
) -> list[dict[str, Any]]:
    rows = []
    for number, picture in enumerate(pictures):
        asked = list(zip(picture["questions"], picture["answers"], strict=True))
        pairs = [
            (f"{question[0].upper()}{question[1:]}", answer) for question, answer in draw.sample(asked, min(each, len(asked)))
        ]
        image = writer.image(f"{name}_{number}", picture["image"])
        for place, some in enumerate([pairs] if together else [[pair] for pair in pairs]):
            rows.append({"id": f"{name}_{number}_{place}", "image": image, "conversations": turns(some)})
    return rows


def write_instructions(args: argparse.Namespace) -> dict[str, int]:
    """All rows, as files of `--output_dir`; how many of each."""
    draw, writer = random.Random(args.seed), Writer(args.output_dir)
    flickr, coco = (load_dataset(str(args.assets / "captions" / name)) for name in ("flickr8k_1k", "coco_open"))
    shapes = load_dataset(str(args.assets / "vqa" / "easy_vqa"))
    count = {
        split: min(limit, len(shapes[split])) for split, limit in (("train", args.pictures), ("test", args.test_pictures))
    }
    some = {split: shapes[split].shuffle(seed=args.seed).select(range(number)) for split, number in count.items()}
    train = [
        *photo_rows(writer, "flickr", flickr["train"], draw),
        *photo_rows(writer, "coco", coco["train"], draw),
        *shape_rows(writer, "shapes", some["train"], 3, True, draw),
    ]
    draw.shuffle(train)
    tests = {
        "test_photos": photo_questions(writer, "flickr_test", flickr["test"], draw),
        "test_shapes": shape_rows(writer, "shapes_test", some["test"], 1, False, draw),
    }
    written = {"train": train, **tests}
    for name, rows in written.items():
        writer.rows(name, rows)
    return {name: len(rows) for name, rows in written.items()}


def train(args: argparse.Namespace) -> None:
    """The second stage, by the command that users have."""
    settings = {
        "--model": args.model, "--lora": args.lora, "--dataset": args.output_dir / "train.json", "--max_steps": args.steps,
        "--per_device_train_batch_size": args.batch_size, "--gradient_accumulation_steps": 1,
        "--learning_rate": args.learning_rate, "--seed": args.seed, "--output_dir": args.output_dir / "assistant",
    }  # fmt: skip
    words = [str(word) for setting in settings.items() for word in setting]
    command = [sys.executable, "-m", "modeling_frozen.cli", "train", *words, "--cache_features", "--held_out", "0"]
    subprocess.run(command, check=True)


def answer(model: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A checkpoint's scores of each test, by condition, with intervals of 95 % of the gain."""
    eyes, processor = load(model)
    asking, scores = Asking(processor), {}
    tests = {name: load_image_text(str(args.output_dir / f"{name}.json")) for name in TESTS}
    photos = load_image_text(str(args.assets / "captions" / "flickr8k_1k"), split="test")
    tests["captions"] = photos.select(range(min(args.test_photos, len(photos))))
    for name, rows in tests.items():
        options: dict[str, Any] = {"kinds": ("sighted", "blind"), "seed": args.seed}
        if name == "captions":
            found = evaluate(eyes, processor, rows, prompt=asking.prompt(), max_new_tokens=24, **options)
        else:
            asked = [asking.row(row) for row in rows]
            found = evaluate(eyes, processor, asked, task="vqa", max_new_tokens=8, **options)
        score = "cider" if name == "captions" else "exact_match"
        scores[name] = {kind: found.scores[kind][score] for kind in ("sighted", "blind")}
        scores[name]["interval"] = list(found.intervals["gain"][score])
        scores[name]["said"] = found.predictions["sighted"][:5]
    return scores


def table(results: dict[str, Any]) -> str:
    lines = ["| answered | stage | sighted | blind | sighted - blind |", "|---|---|---|---|---|"]
    for test, said in {**TESTS, "captions": "captions of photos, CIDEr"}.items():
        for stage, scores in results["stages"].items():
            one = scores[test]
            low, high = one["interval"]
            gain = f"{one['sighted'] - one['blind']:.3f} [{low:.3f}, {high:.3f}]"
            lines.append(f"| {said} | {stage} | {one['sighted']:.3f} | {one['blind']:.3f} | {gain} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="EYES: a checkpoint over a chat model that describes photos")
    parser.add_argument("assets", type=Path, help="folder with captions/flickr8k_1k, captions/coco_open and vqa/easy_vqa")
    parser.add_argument("--output_dir", type=Path, default=Path("two_stages"))
    parser.add_argument("--pictures", type=int, default=800, help="of easy-VQA to learn from")
    parser.add_argument("--test_pictures", type=int, default=250, help="of easy-VQA to ask about, one question each")
    parser.add_argument("--test_photos", type=int, default=125, help="to describe")
    parser.add_argument("--lora", type=int, default=8, help="its rank")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="a Markdown file that gets the table too")
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {"rows": write_instructions(args), "stages": {}}
    if not (args.output_dir / "assistant" / "config.json").is_file():
        train(args)
    for stage, model in (("captions alone", args.model), ("then instructions", str(args.output_dir / "assistant"))):
        results["stages"][stage] = answer(model, args)
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.table is not None:
        args.table.write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
