"""Do photos bring back words that a translator can't know? An encoder-decoder that read texts alone is given eyes on Multi30k.

    python -m benchmarks.masked_words assets --vision TOWER --output_dir masked_words --table masked_words.md

The question is that of Caglayan et al. 2019 (arXiv 1903.08678), whose translators train with photos from the start; here the
translator is frozen before it sees any. `assets` is the folder that `python -m benchmarks.results` calls so, with `multi30k`
and `captions/flickr8k_1k`, whose photos belong to 937 rows of it.

- *The translator*, a small T5 of its own, learns from all other rows two tasks: "German:" before an English sentence to
  translate, "English:" before one to repeat. In half of the sentences the words of colour and number are masked by T5's own
  sentinel, and it learns to guess them. It is written to `--output_dir` as a plain checkpoint; one that stands there is taken.
- *The eyes*: its 937 rows are cut into `--folds` by photo. For each fold a connector learns from the others: their masked
  sentences in German, and the English captions of their photos, masked, to be repeated. Tower and translator stay frozen.
- *The score* is the share of masked words told by the German translation, of those that the reference tells, a sentence's
  mean: with the sentence's photo, blind (with another's), by words alone, and where nothing was masked.

Every photo is asked about once, by the connector that never saw it. Intervals are of 95 %, over rows.
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


COLOURS = {
    "red": "rot", "blue": "blau", "green": "grün", "yellow": "gelb", "orange": "orange", "black": "schwarz", "white": "weiß",
    "brown": "braun", "pink": "rosa|pink", "purple": "lila|violett", "gray": "grau", "grey": "grau",
}  # fmt: skip
NUMBERS = {"two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
GERMAN = {word: re.compile(rf"\b(dunkel|hell)?({stem})(e[mnrs]?|farben\w*)?\b") for word, stem in (COLOURS | NUMBERS).items()}
MASKED = re.compile(rf"\b({'|'.join(GERMAN)})\b", re.IGNORECASE)
MASK = "<extra_id_0>"
CONDITIONS = {
    "sighted": "with its photo",
    "blind": "with another photo",
    "language_model": "by words alone",
    "sighted, unmasked": "with its photo, nothing masked",
    "language_model, unmasked": "by words alone, nothing masked",
}


def mask(sentence: str) -> str:
    return MASKED.sub(MASK, sentence)


def hidden_words(english: str, german: str) -> list[str]:
    """Words of colour and number that are masked in the source and that its translation tells."""
    found = dict.fromkeys(word.lower() for word in MASKED.findall(english))
    return [word for word in found if GERMAN[word].search(german.lower())]


def share_told(german: str, words: list[str]) -> float:
    return sum(bool(GERMAN[word].search(german.lower())) for word in words) / len(words)


def prompt(language: str, sentence: str) -> str:
    return f"{language}: {sentence}"


def read(assets: Path) -> tuple[list[dict[str, str]], Dataset]:
    """Translations without a photo here, and those with one: their photos and English captions beside."""
    table = concatenate_datasets(list(load_dataset(str(assets / "multi30k")).values()))
    photos = concatenate_datasets(list(load_dataset(str(assets / "captions" / "flickr8k_1k")).values()))
    place = {name: index for index, name in enumerate(photos["image_id"])}
    wanted = ("en", "de", "flickr8k_image")
    rows = [dict(zip(wanted, values, strict=True)) for values in zip(*(table[name] for name in wanted), strict=True)]
    seen = [row for row in rows if row["flickr8k_image"] in place]
    chosen = photos.cast_column("image", Image(decode=False)).select([place[row["flickr8k_image"]] for row in seen])
    chosen = chosen.select_columns(["image", "captions"])
    for name in ("en", "de"):
        chosen = chosen.add_column(name, [row[name] for row in seen])
    return [row for row in rows if row["flickr8k_image"] not in place], chosen.cast_column("image", Image())


# ------------------------------------------------------------------------------------------------------------ translator
def sentences(rows: list[dict[str, str]], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Each row once in either task, half of them masked."""
    for row in rows:
        for language, answer in (("German", row["de"]), ("English", row["en"])):
            yield prompt(language, mask(row["en"]) if draw.random() < 0.5 else row["en"]), answer


def train_translator(rows: list[dict[str, str]], folder: Path, args: argparse.Namespace) -> None:
    draw = random.Random(args.seed)
    texts = [text for row in rows for text in (row["en"], row["de"])]
    tokenizer = T5Tokenizer().train_new_from_iterator([*texts, "German:", "English:"], args.vocab_size)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=args.width, d_kv=args.width // 4, d_ff=4 * args.width, num_heads=4,
        num_layers=args.layers, dropout_rate=0.0, decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    pairs = list(sentences(rows, draw))
    encoded = tokenizer([source for source, _ in pairs], text_target=[target for _, target in pairs])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder.parent / "training"), max_steps=args.translator_steps, per_device_train_batch_size=32,
            learning_rate=args.translator_learning_rate, lr_scheduler_type="cosine", warmup_steps=args.translator_steps // 20,
            logging_steps=100, bf16=args.bf16,
            train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", use_cpu=True, seed=args.seed,
        ),
        train_dataset=Dataset.from_dict({name: encoded[name] for name in ("input_ids", "attention_mask", "labels")}),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------------ eyes
def lessons(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    """What the connector learns of a photo: all sentences about it in which something is masked."""
    if MASKED.search(row["en"]):
        yield {"prompt": prompt("German", mask(row["en"])), "answer": row["de"]}
    for caption in row["captions"]:
        if MASKED.search(caption):
            sentence = caption.replace(" .", ".")
            yield {"prompt": prompt("English", mask(sentence)), "answer": sentence}


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


def translations(model: Any, processor: Any, rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, list[str]]:
    """What is said of each sentence, by condition."""
    said = {}
    for masked, kinds in ((True, ("sighted", "blind", "language_model")), (False, ("sighted", "language_model"))):
        asked = []
        for row in rows:
            source = mask(row["en"]) if masked else row["en"]
            asked.append({"image": row["image"], "prompt": prompt("German", source), "answer": row["de"]})
        options: dict[str, Any] = {"seed": args.seed, "num_resamples": 0, "batch_size": 64, "max_new_tokens": 40}
        found = evaluate(model, processor, asked, kinds=kinds, **options)
        said |= {kind if masked else f"{kind}, unmasked": texts for kind, texts in found.predictions.items()}
    return said


def ask(photos: Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each sentence with masked words once, by the connector of its fold: what was said under each condition."""
    said: list[dict[str, Any]] = []
    order = random.Random(args.seed).sample(range(len(photos)), len(photos))
    for fold in range(args.folds):
        set_seed(args.seed)
        model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
            args.vision, str(args.output_dir / "translator"), connector_type="mlp",
            connector_config={"input_dropout": args.input_dropout},
        )  # fmt: skip
        processor = FrozenPrefixProcessor.from_model(model)
        stored = cache_vision_features(photos, model, processor, cache_dir=args.output_dir / "features")
        learnt = stored.select([place for at, place in enumerate(order) if at % args.folds != fold])
        train_eyes(model, processor, [{"image": row["image"], **one} for row in learnt for one in lessons(row)], args)
        rows = [row for row in photos.select(order[fold :: args.folds]) if hidden_words(row["en"], row["de"])]
        told = translations(model, processor, rows, args)
        for at, row in enumerate(rows):
            answers = {kind: texts[at] for kind, texts in told.items()}
            said.append({"en": row["en"], "de": row["de"], "fold": fold, **answers})
        print(f"fold {fold}: {len(learnt)} photos learnt, {len(rows)} sentences asked", flush=True)
    return said


def table(said: list[dict[str, Any]]) -> str:
    heads = ["masked words told", "sentences", *CONDITIONS.values(), "its photo less another"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, some in (("all", GERMAN), ("colours", COLOURS), ("numbers", NUMBERS)):
        single: dict[str, list[float]] = {kind: [] for kind in CONDITIONS}
        for row in said:
            words = [word for word in hidden_words(row["en"], row["de"]) if word in some]
            for kind in CONDITIONS if words else ():
                single[kind].append(share_told(row[kind], words))
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
    parser.add_argument("--vocab_size", type=int, default=6000, help="of the translator")
    parser.add_argument("--width", type=int, default=192, help="of the translator")
    parser.add_argument("--layers", type=int, default=3, help="of its encoder, and of its decoder")
    parser.add_argument("--translator_steps", type=int, default=4000, help="of 32 sentences")
    parser.add_argument("--translator_learning_rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="in the translator's training: where the processor has it")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of a connector")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--input_dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="a Markdown file that gets the table too")
    args = parser.parse_args(arguments)

    texts, photos = read(args.assets)
    set_seed(args.seed)
    if not (args.output_dir / "translator" / "config.json").is_file():
        train_translator(texts, args.output_dir / "translator", args)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("output_dir", "table")}
    results = {"settings": settings, "machine": machine(), "said": ask(photos, args)}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.table is not None:
        args.table.write_text(table(results["said"]) + "\n", encoding="utf-8")
    print(table(results["said"]))
    return results


if __name__ == "__main__":
    main()
