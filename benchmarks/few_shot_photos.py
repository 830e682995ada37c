"""Names learnt from photos in the prompt, with a real chat model: Frozen's open-ended two-way naming, and why it fails or not.

    python -m benchmarks.few_shot_photos EYES DATASET --table few_shot_photos.md

The protocol of arXiv 2106.13884, section 4.2, in the language model's own chat: after a sentence that says what the task is,
`--shots` photos of each of two categories, each asked about and named, then one more photo to be named. A category is what at
least four of five captions name ("dog", "child", "man") while no caption names another one. Each episode is asked twice, with
the two names exchanged, so that liking one name more brings nothing: chance is 0.5. A score is the share of answers in which
the right name is likelier than the other.

Each episode is told in five ways: with the *photos*; *blind*, each photo replaced by one drawn at random; in a person's
*captions* in the place of photos, which is what the language model itself can do; in the model's *own captions*, which is
what gets through the prefix into words; and with photos in the examples while the last one is told by a person, *photos,
then caption*. Names are made up ("dax", "blicket"), or the categories' *true names*, where nothing need be bound.

EYES is a checkpoint that was trained on single photos. With `--train captions` its connector goes on to learn chats of
several photos with their captions; with `--train names` chats that name photos of other pairs of categories and names by the
same protocol, which Frozen never does. The photos asked about are of the validation and test splits, those trained on of the
training split; the names asked about are in no training.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.timing import machine
from benchmarks.two_stages import THINGS, mentions
from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
    load_image_text,
)
from modeling_frozen.processors import few_shot_messages


CATEGORIES = {name: THINGS[f"a {name}"] for name in ("dog", "child", "man")}
FURTHER = {  # to train names on
    "water": r"\b(water|pool|ocean|lake|river|sea|surf\w*|swim\w*)\b",
    "snow": THINGS["snow"],
    "bicycle": THINGS["a bicycle"],
    "ball": THINGS["a ball"],
    "grass": THINGS["grass"],
    "street": r"\b(street|road|sidewalk|city)\b",
}
NAMES = ("dax", "blicket")
OTHER_NAMES = "wug toma fep zav gorp mib lorp tiv nuz kebi zorg vash pim rell sof dute jop bem clor yig".split()
WAYS_OF_TELLING = ("photos", "blind", "captions", "own captions", "photos, then caption")
QUESTION = "What is this?"


@dataclass
class Episode:
    """Places of photos with the category of each, in the order shown; the last is to be named."""

    categories: tuple[str, str]
    shown: list[tuple[int, str]]
    query: tuple[int, str]


def members(captions: list[list[str]], categories: dict[str, str]) -> dict[str, list[int]]:
    """Places of the photos that most captions put into a category, and no caption into another."""
    found: dict[str, list[int]] = {name: [] for name in categories}
    for place, several in enumerate(captions):
        counts = mentions(several, categories)
        best = max(counts, key=lambda name: counts[name])
        if counts[best] >= 0.8 * len(several) and sum(counts.values()) == counts[best]:
            found[best].append(place)
    return found


def make_episode(draw: random.Random, places: dict[str, list[int]], shots: int) -> Episode:
    known = [name for name in places if len(places[name]) > shots]
    first, second = draw.sample(known, 2)
    taken = {name: draw.sample(places[name], shots + 1) for name in (first, second)}
    shown = [(taken[name][shot], name) for shot in range(shots) for name in draw.sample((first, second), 2)]
    asked = draw.choice((first, second))
    return Episode((first, second), shown, (taken[asked][-1], asked))


def instruction(names: tuple[str, str]) -> str:
    return f"Answer with {names[0]} or {names[1]}. "


class Photos:
    """Photos of some splits: what the tower saw of them, their captions, and what the model says of them."""

    def __init__(self, model: Any, processor: Any, rows: Any, store: str):
        self.captions = [[one.strip().replace(" .", ".") for one in several] for several in rows["text"]]
        seen = cache_vision_features(rows.select_columns(["image"]), model, processor, cache_dir=store)
        self.images, self.own = list(seen["image"]), [""] * len(seen)

    def describe(self, model: Any, processor: Any, prompt: str) -> None:
        """Writes what the model itself says of each photo, greedily."""
        text = processor.chat_prompt(prompt)
        for start in range(0, len(self.images), 25):
            some = self.images[start : start + 25]
            batch = processor(images=some, text=[text] * len(some), return_tensors="pt")
            ids = model.generate(**batch, max_new_tokens=24, do_sample=False)
            said = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            self.own[start : start + 25] = [one.strip() for one in said]


def tell(
    episode: Episode, names: dict[str, str], photos: Photos, how: str, draw: random.Random
) -> tuple[list[dict[str, Any]], list[Any]]:
    """An episode as a chat, and the images in it."""
    images: list[Any] = []

    def thing(place: int, last: bool = False) -> tuple[Any, str]:
        if how == "captions" or (last and how == "photos, then caption"):
            return [], draw.choice(photos.captions[place])
        if how == "own captions":
            return [], photos.own[place]
        chosen = draw.randrange(len(photos.images)) if how == "blind" else place
        images.append(photos.images[chosen])
        return "image", ""

    support = []
    for place, category in episode.shown:
        image, words = thing(place)
        support.append((image, f"{words} {QUESTION}".strip(), names[category]))
    image, words = thing(episode.query[0], last=True)
    order = (names[episode.categories[0]], names[episode.categories[1]])
    messages = few_shot_messages(support, (image, f"{words} {QUESTION}".strip()), instruction=instruction(order))
    for message in messages:  # the images go in as features, in reading order
        message["content"] = [{"type": "image"} if item["type"] == "image" else item for item in message["content"]]
    return messages, images


@torch.no_grad()
def share_right(
    model: Any, processor: Any, episodes: list[Episode], photos: Photos, how: str, true_names: bool, args: argparse.Namespace
) -> float:
    """Of all episodes, asked with either binding of the names."""
    draw, asked, right = random.Random(args.seed), [], []
    for episode in episodes:
        first, second = episode.categories
        bindings = [{first: NAMES[0], second: NAMES[1]}, {first: NAMES[1], second: NAMES[0]}]
        asked += [(episode, names) for names in ([{first: first, second: second}] if true_names else bindings)]
    model.eval()
    for episode, names in asked:
        messages, images = tell(episode, names, photos, how, draw)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        batch = processor(images=images or None, text=text, return_tensors="pt")
        answers = [names[category] for category in episode.categories]
        scores = model.score(answers, tokenizer=processor.tokenizer, **batch)[0]
        right.append(episode.categories[int(scores.argmax())] == episode.query[1])
    return sum(right) / len(right)


# -------------------------------------------------------------------------------------------------------------- training
class Chats(torch.utils.data.Dataset):
    """Chats of several photos of the training split, with their captions, or with names for two categories."""

    def __init__(self, photos: Photos, kind: str, count: int, seed: int, prompt: str):
        self.photos, self.kind, self.count, self.prompt = photos, kind, count, prompt
        self.draw = random.Random(seed)
        self.places = members(photos.captions, {**CATEGORIES, **FURTHER})

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = self.draw
        if self.kind == "captions":
            places = draw.sample(range(len(self.photos.images)), 4)
            said = [draw.choice(self.photos.captions[place]) for place in places]
            shown = [("image", self.prompt, one) for one in said]
            messages, images = few_shot_messages(shown, ("image", "")), [self.photos.images[place] for place in places]
            messages = messages[:-1]
        else:
            episode = make_episode(draw, self.places, draw.choice((1, 2, 3)))
            names = dict(zip(episode.categories, draw.sample(OTHER_NAMES, 2), strict=True))
            messages, images = tell(episode, names, self.photos, "photos", draw)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": names[episode.query[1]]}]})
        for message in messages:
            message["content"] = [{"type": "image"} if item["type"] == "image" else item for item in message["content"]]
        return {"messages": messages, "images": images}


def train(model: Any, processor: Any, photos: Photos, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=args.steps // 20,
                logging_steps=10,
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                seed=args.seed,
            ),
            train_dataset=Chats(photos, args.train, 4 * args.steps, args.seed, args.prompt),
            data_collator=DataCollatorForFrozenPrefix(processor),
        ).train()


# ---------------------------------------------------------------------------------------------------------------- tables
def _rows(results: dict[str, Any]) -> Iterator[str]:
    shots = results["settings"]["shots"]
    yield f"| right out of two | {' | '.join(f'{one} of each' for one in shots)} |"
    yield "|---" * (len(shots) + 1) + "|"
    for training, scores in results["runs"].items():
        for name in dict.fromkeys(key.rpartition(", ")[0] for key in scores):
            cells = [f"{scores[f'{name}, {one}']:.2f}" for one in shots]
            yield f"| {training}: {name} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint that describes photos, over a chat model")
    parser.add_argument("dataset", help="photos with several captions each, splits train, validation, test")
    parser.add_argument("--train", nargs="+", choices=["none", "captions", "names"], default=["none", "captions", "names"])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--episodes", type=int, default=100, help="of each score; those with made-up names are asked twice")
    parser.add_argument("--steps", type=int, default=150, help="of a further training, four chats each")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--prompt", default="Describe the photo.", help="that the checkpoint was trained with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", default="build/few_shot_photos", help="folder of features")
    parser.add_argument("--output", type=Path, default=Path("few_shot_photos.json"))
    parser.add_argument("--table", type=Path, help="a Markdown file that gets the table too")
    args = parser.parse_args(arguments)
    trainings = args.train

    splits = {split: load_image_text(args.dataset, split=split) for split in ("train", "validation", "test")}
    rows = {"train": splits["train"], "test": concatenate_datasets([splits["validation"], splits["test"]])}
    settings = {name: value for name, value in vars(args).items() if name not in ("store", "output", "table", "train")}
    results: dict[str, Any] = {"settings": settings, "machine": machine(), "runs": {}}
    for training in trainings:
        args.train = training
        set_seed(args.seed)
        model = FrozenPrefixForConditionalGeneration.from_pretrained(args.model)
        processor = FrozenPrefixProcessor.from_pretrained(args.model)
        test = Photos(model, processor, rows["test"], args.store)
        if training != "none":
            train(model, processor, Photos(model, processor, rows["train"], args.store), args)
        test.describe(model, processor, args.prompt)
        places, draw = members(test.captions, CATEGORIES), random.Random(args.seed)
        print({name: len(some) for name, some in places.items()}, flush=True)
        scores = results["runs"][{"none": "single photos"}.get(training, f"then {training}")] = {}
        for shots in tqdm(args.shots):
            episodes = [make_episode(draw, places, shots) for _ in range(args.episodes)]
            for true_names in (False, True):
                for how in WAYS_OF_TELLING:
                    name = f"{how}{', true names' * true_names}, {shots}"
                    scores[name] = share_right(model, processor, episodes, test, how, true_names, args)
        results["said"] = test.own[:5]
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = "\n".join(_rows(results))
    if args.table is not None:
        args.table.write_text(table + "\n", encoding="utf-8")
    print(table)
    return results


if __name__ == "__main__":
    main()
