"""Do photos bring back words that a sentence hides? An encoder-decoder that read Multi30k's texts alone is given eyes.

    python -m benchmarks.masked_words assets --vision TOWER --output_dir masked_words --table masked_words.md

Words of colour and number are masked, as in Caglayan et al. 2019 (arXiv 1903.08678), whose models train with photos from the
start; here the language model is frozen before it sees any. `assets` is the folder that `python -m benchmarks.results` calls
so, with `multi30k` and `captions/flickr8k_1k`, whose photos belong to 937 rows of it.

- *The language model*, a small T5 of its own, learns from the English sentences of all other rows what T5 learns: to tell the
  words behind sentinels, here those of colour and number, and one in ten of the others. It is written to `--output_dir` as a
  plain checkpoint; one that stands there is taken.
- *The eyes*: the 937 rows are cut into `--folds` by photo. For each fold a connector learns from the others: their sentences,
  with words of colour and number masked. Tower and language model stay frozen.
- *The score* is the share of a sentence's masked words that come back: with its photo, blind (with another's), and by words
  alone. Every photo is asked about by the connector that never saw it. Intervals are of 95 %, over rows.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, concatenate_datasets, load_dataset
from transformers import (
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.timing import machine
from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
)
from modeling_frozen.evaluation import evaluate
from modeling_frozen.evaluation.evaluator import bootstrap


COLOURS = ("red", "blue", "green", "yellow", "orange", "black", "white", "brown", "pink", "purple", "gray", "grey", "tan")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
WORD = re.compile(r"[a-z]+")
CONDITIONS = {"sighted": "with its photo", "blind": "with another photo", "language_model": "by words alone"}


def words_of(sentence: str) -> str:
    """In small letters, punctuation apart."""
    return " ".join(re.findall(r"[a-z0-9'-]+|[.,]", sentence.lower()))


def mask(sentence: str, draw: random.Random | None = None, share: float = 0.0) -> tuple[str, list[str]]:
    """A sentence without its words of colour and number (and a share of the others), and those, as T5 has them."""
    kept, hidden = [], []
    for word in words_of(sentence).split():
        chosen = word in COLOURS or word in NUMBERS or (draw is not None and WORD.match(word) and draw.random() < share)
        kept.append(f"<extra_id_{len(hidden)}>" if chosen else word)
        hidden += [word] if chosen else []
    return " ".join(kept), hidden


def answer(hidden: list[str]) -> str:
    return " ".join(f"<extra_id_{number}> {word}" for number, word in enumerate(hidden))


def restored(said: str, hidden: list[str]) -> list[bool]:
    """Of each masked word whether it came back; sentinels are gone from what was said."""
    words = said.split()
    return [words[number : number + 1] == [word] for number, word in enumerate(hidden)]


def read(assets: Path) -> tuple[list[str], Dataset]:
    """Sentences of rows without a photo here; photos, and the sentences about each."""
    table = concatenate_datasets(list(load_dataset(str(assets / "multi30k")).values()))
    photos = concatenate_datasets(list(load_dataset(str(assets / "captions" / "flickr8k_1k")).values()))
    place = {name: index for index, name in enumerate(photos["image_id"])}
    names, english, others = table["flickr8k_image"], table["en"], table["en_captions"]
    seen = [index for index, name in enumerate(names) if name in place]
    known = set(seen)
    texts = [text for index in range(len(table)) if index not in known for text in {english[index], *(others[index] or ())}]
    chosen = photos.cast_column("image", Image(decode=False)).select([place[names[index]] for index in seen])
    told = [sorted({english[index], *photos_of}) for index, photos_of in zip(seen, chosen["captions"], strict=True)]
    return sorted(texts), chosen.select_columns(["image"]).add_column("sentences", told).cast_column("image", Image())


# -------------------------------------------------------------------------------------------------------- language model
def train_language_model(texts: list[str], folder: Path, args: argparse.Namespace) -> None:
    draw = random.Random(args.seed)
    pairs = [mask(text, draw, 0.1) for text in draw.sample(texts, min(len(texts), args.lm_steps * 64))]
    pairs = [(source, hidden) for source, hidden in pairs if hidden]
    tokenizer = T5Tokenizer().train_new_from_iterator([words_of(text) for text in texts], args.vocab_size)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=args.width, d_kv=args.width // 4, d_ff=4 * args.width, num_heads=4,
        num_layers=args.layers, num_decoder_layers=min(2, args.layers), dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    encoded = tokenizer([source for source, _ in pairs], text_target=[answer(hidden) for _, hidden in pairs])
    Trainer(
        model=model,
        args=TrainingArguments(
            str(folder.parent / "training"), max_steps=args.lm_steps, per_device_train_batch_size=64,
            learning_rate=args.lm_learning_rate, lr_scheduler_type="cosine", warmup_steps=args.lm_steps // 20,
            train_sampling_strategy="group_by_length", logging_steps=100, save_strategy="no", report_to="none", use_cpu=True,
            seed=args.seed,
        ),
        train_dataset=Dataset.from_dict({name: encoded[name] for name in ("input_ids", "attention_mask", "labels")}),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    ).train()  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------------ eyes
def questions(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All sentences about a photo in which something is masked."""
    for sentence in row["sentences"]:
        source, hidden = mask(sentence)
        if hidden:
            yield {"image": row["image"], "prompt": source, "answer": answer(hidden), "hidden": hidden}


def train_eyes(model: Any, processor: Any, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    Trainer(
        model=model,
        args=TrainingArguments(
            str(args.output_dir / "training"), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=args.steps // 20, weight_decay=0.05,
            logging_steps=50, remove_unused_columns=False, save_strategy="no", report_to="none", use_cpu=True, seed=args.seed,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForFrozenPrefix(processor),
    ).train()  # fmt: skip


def ask(photos: Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each sentence with masked words once, by the connector of its fold: what was said under each condition."""
    said: list[dict[str, Any]] = []
    order = random.Random(args.seed).sample(range(len(photos)), len(photos))
    for fold in range(args.folds):
        set_seed(args.seed)
        model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
            args.vision, str(args.output_dir / "language_model"), connector_type="mlp",
            connector_config={"input_dropout": args.input_dropout}, vision_feature_select_strategy="pooled",
            prefix_length=args.prefix_length,
        )  # fmt: skip
        processor = FrozenPrefixProcessor.from_model(model)
        stored = cache_vision_features(photos, model, processor, cache_dir=args.output_dir / "features")
        learnt = stored.select([place for at, place in enumerate(order) if at % args.folds != fold])
        train_eyes(model, processor, [question for row in learnt for question in questions(row)], args)
        asked = [question for row in stored.select(order[fold :: args.folds]) for question in questions(row)]
        options: dict[str, Any] = {"seed": args.seed, "num_resamples": 0, "batch_size": 64, "max_new_tokens": 32}
        found = evaluate(model, processor, asked, kinds=tuple(CONDITIONS), **options).predictions
        for at, row in enumerate(asked):
            answers = {kind: texts[at] for kind, texts in found.items()}
            said.append({"source": row["prompt"], "hidden": row["hidden"], "fold": fold, **answers})
        print(f"fold {fold}: {len(learnt)} photos learnt, {len(asked)} sentences asked", flush=True)
    return said


def table(said: list[dict[str, Any]]) -> str:
    heads = ["masked words that come back", "sentences", *CONDITIONS.values(), "its photo less another"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, some in (("all", (*COLOURS, *NUMBERS)), ("colours", COLOURS), ("numbers", NUMBERS)):
        single: dict[str, list[float]] = {kind: [] for kind in CONDITIONS}
        for row in said:
            places = [at for at, word in enumerate(row["hidden"]) if word in some]
            for kind in CONDITIONS if places else ():
                right = restored(row[kind], row["hidden"])
                single[kind].append(sum(right[at] for at in places) / len(places))
        count = len(single["sighted"])
        if count:
            gain = [sighted - blind for sighted, blind in zip(single["sighted"], single["blind"], strict=True)]
            low, high = bootstrap({"gain": {"share": gain}})["gain"]["share"]
            cells = [f"{sum(values) / count:.3f}" for values in single.values()]
            lines.append(f"| {' | '.join([name, str(count), *cells])} | {sum(gain) / count:.3f} [{low:.3f}, {high:.3f}] |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="folder with multi30k and captions/flickr8k_1k")
    parser.add_argument("--vision", required=True, help="vision tower: Hub id or folder")
    parser.add_argument("--output_dir", type=Path, default=Path("masked_words"))
    parser.add_argument("--vocab_size", type=int, default=4000, help="of the language model")
    parser.add_argument("--width", type=int, default=192, help="of the language model")
    parser.add_argument("--layers", type=int, default=3, help="of its encoder; its decoder has two at most")
    parser.add_argument("--lm_steps", type=int, default=2500, help="of 64 sentences")
    parser.add_argument("--lm_learning_rate", type=float, default=1e-3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="of a connector")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--prefix_length", type=int, default=8, help="vectors, from the tower's pooled feature")
    parser.add_argument("--input_dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="a Markdown file that gets the table too")
    args = parser.parse_args(arguments)

    texts, photos = read(args.assets)
    set_seed(args.seed)
    if not (args.output_dir / "language_model" / "config.json").is_file():
        train_language_model(texts, args.output_dir / "language_model", args)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("output_dir", "table")}
    results = {"settings": settings, "machine": machine(), "said": ask(photos, args)}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.table is not None:
        args.table.write_text(table(results["said"]) + "\n", encoding="utf-8")
    print(table(results["said"]))
    return results


if __name__ == "__main__":
    main()
