"""Instructions about real images for a second stage (LLaVA's), made from captions and questions that people have written.

    python -m benchmarks.instructions assets --output_dir instructions
    frozen-prefix train --model EYES --lora 8 --dataset instructions/train.json --cache_features --output_dir assistant
    frozen-prefix evaluate --model assistant --dataset instructions/test_photos.json --task vqa
    frozen-prefix evaluate --model assistant --dataset instructions/test_shapes.json --task vqa

`assets` is the folder that `python -m benchmarks.results` calls so. Photos of Flickr8k and COCO get a chat each: to describe
the photo, which a caption answers, and whether this or that is in it: yes where at least three of five captions name it, no
where none does (as many of each as can be had). easy-VQA's small pictures get three of their own questions. Written are
`train.json` in LLaVA's form, of the training splits alone, and of the test splits `test_photos.json` (yes or no, one question
a row, as many of each) and `test_shapes.json`, with the images beside them. What EYES, of the first stage, makes of the same
tests is what the second stage adds to.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from datasets import load_dataset


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


def asked_about(thing: str) -> str:
    return f"Is there {thing} in the photo?"


def present(captions: list[str]) -> tuple[list[str], list[str]]:
    """Things that are in a photo, and things that are not, as far as its captions tell."""
    counts = {thing: sum(bool(re.search(word, one.lower())) for one in captions) for thing, word in THINGS.items()}
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
        draw.shuffle(questions)
        pairs = [(DESCRIBE, tidy(draw.choice(photo[column]))), *questions]
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


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="folder with captions/flickr8k_1k, captions/coco_open and vqa/easy_vqa")
    parser.add_argument("--output_dir", type=Path, default=Path("instructions"))
    parser.add_argument("--pictures", type=int, default=800, help="of easy-VQA to learn from")
    parser.add_argument("--test_pictures", type=int, default=250, help="of easy-VQA to ask about, one question each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
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


if __name__ == "__main__":
    main()
