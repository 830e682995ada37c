"""One connector, four languages: captions with the language named in the prompt, and translation helped by the picture.

    python examples/train_multilingual.py                          (pictures, sentences and parents made here: `languages.py`)
    python examples/train_multilingual.py --vision TOWER --text MODEL --dataset TEXTS --images PHOTOS --image_key COLUMN

In the second form TEXTS has a column per language (`--columns en de fr cs`) and one, COLUMN, that names the photo by PHOTOS'
`image_id`, as Multi30k (Elliott et al. 2016, arXiv 1605.00459) does; its splits train and test are used. Translations of the
world made here lack the colour in the source, so that only the picture tells it (the protocol of Caglayan et al. 2019, arXiv
1903.08678). Each language is scored sighted and blind.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value, load_dataset
from own_data import ExampleTrainingArguments, first_sentence
from transformers import HfArgumentParser, Trainer, set_seed

from benchmarks.shapes.languages import LANGUAGES, tell, words, write
from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
)
from modeling_frozen.evaluation import evaluate
from modeling_frozen.evaluation.plots import plot_training
from modeling_frozen.shapes.parents import train_language_model, train_tower
from modeling_frozen.shapes.scenes import draw, split_scenes


FEATURES = Features({name: Value("string") for name in ("prompt", "answer", "language", "task")} | {"image": Image()})


@dataclass
class Arguments:
    vision: str | None = field(default=None, metadata={"help": "Vision tower: Hub id or folder; made here by default."})
    text: str | None = field(default=None, metadata={"help": "Language model: Hub id or folder; made here by default."})
    dataset: str | None = field(default=None, metadata={"help": "Texts of several languages; made here by default."})
    columns: list[str] = field(default_factory=lambda: ["en", "de", "fr", "cs"])
    images: str | None = field(default=None, metadata={"help": "Photos, with the columns image and image_id."})
    image_key: str = field(default="flickr8k_image", metadata={"help": "Column of the texts that names the photo."})
    pictures: int = field(default=1200, metadata={"help": "Pictures to train on, at most."})
    test_pictures: int = field(default=100, metadata={"help": "Pictures to be scored, at most."})
    language_model_steps: int = field(default=400, metadata={"help": "For the one that is made here."})
    connector: str = "mlp"
    connector_config: str = field(default="{}", metadata={"help": "Options of the connector, as JSON."})
    prefix_length: int | None = None
    vision_features: str = field(default="default", metadata={"help": "'default' (every position) or 'pooled'."})
    max_new_tokens: int = 24


@dataclass
class MultilingualTrainingArguments(ExampleTrainingArguments):
    output_dir: str = "multilingual"


def rows_of(image: Any, sentences: dict[str, str], hidden: dict[str, str], rng: random.Random) -> list[dict[str, Any]]:
    """A caption in each language, and a translation into each from another; `hidden` are the sources."""
    rows = []
    for language, sentence in sentences.items():
        source = rng.choice([other for other in sentences if other != language])
        common = {"image": image, "answer": sentence, "language": language}
        rows.append({**common, "task": "caption", "prompt": f"{language} :"})
        rows.append({**common, "task": "translation", "prompt": f"{source} : {hidden[source]} {language} :"})
    return rows


def read(args: Arguments, split: str, limit: int, seed: int) -> Dataset:
    rng, rows = random.Random(f"{seed} {split}"), []
    if args.dataset is None:
        scenes = split_scenes()[split == "test"]
        for _ in range(limit):
            scene = rng.choice(scenes)
            sentences = {language: tell(scene, language) for language in LANGUAGES}
            hidden = {language: tell(scene, language, hide_colour=True) for language in LANGUAGES}
            rows += rows_of(draw(scene, rng), sentences, hidden, rng)
        return Dataset.from_list(rows, features=FEATURES)
    photos = {}
    for part in load_dataset(args.images).values():
        photos.update({name: (part, index) for index, name in enumerate(part["image_id"])})
    for row in load_dataset(args.dataset, split=split):
        if row[args.image_key] in photos and len(rows) < limit * 2 * len(args.columns):
            part, index = photos[row[args.image_key]]
            sentences = dict(zip(LANGUAGES, (row[column] for column in args.columns), strict=False))
            sentences = {language: text for language, text in sentences.items() if text}
            rows += rows_of(part[index]["image"], sentences, sentences, rng)
    return Dataset.from_list(rows, features=FEATURES)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, training = HfArgumentParser((Arguments, MultilingualTrainingArguments)).parse_args_into_dataclasses(arguments)
    folder = Path(training.output_dir)
    set_seed(training.seed)
    tower, text = args.vision or str(folder / "tower"), args.text or str(folder / "language_model")
    if args.vision is None and not (Path(tower) / "config.json").is_file():
        train_tower(Path(tower), 1000, training.seed)
    if args.text is None and not (Path(text) / "config.json").is_file():
        train_language_model(Path(text), args.language_model_steps, training.seed, write, words())
    limits = {"train": args.pictures, "test": args.test_pictures}
    data = {split: read(args, split, limit, training.seed) for split, limit in limits.items()}
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tower,
        text,
        connector_type=args.connector,
        connector_config=json.loads(args.connector_config),
        prefix_length=args.prefix_length,
        vision_feature_select_strategy=args.vision_features,
    )
    processor = FrozenPrefixProcessor.from_model(model)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=cache_vision_features(data["train"], model, processor, cache_dir=folder / "features"),
        data_collator=DataCollatorForFrozenPrefix(processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(str(folder / "eyes"))
    plot_training(trainer, folder / "training.png")

    results: dict[str, Any] = {}
    columns = ("bleu_4", "cider", "exact_match")
    print(f"\n{'':24}" + "".join(f"{name + ' ' + kind:>20}" for name in columns for kind in ("sighted", "blind")))
    for task in ("caption", "translation"):
        for language in dict.fromkeys(data["test"]["language"]):
            rows = data["test"].filter(lambda one, key=(task, language): (one["task"], one["language"]) == key)
            options = {"kinds": ("sighted", "blind"), "batch_size": 64, "max_new_tokens": args.max_new_tokens}
            place = folder / f"{task}-{language}"
            result = evaluate(model, processor, rows, output_dir=place, postprocess=first_sentence, **options)
            exact = {kind: _share_right(said, result.references) for kind, said in result.predictions.items()}
            scores = {kind: {**result.scores[kind], "exact_match": exact[kind]} for kind in result.scores}
            results[f"{task} {language}"] = scores
            cells = [f"{scores[kind][name]:>20.3f}" for name in columns for kind in ("sighted", "blind")]
            print(f"{task + ', ' + language:24}" + "".join(cells))
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _share_right(said: list[str], references: list[list[str]]) -> float:
    return sum(one in some for one, some in zip(said, references, strict=True)) / len(said)


if __name__ == "__main__":
    main()
