"""Captions of photos, beside ClipCap's own code: the same parents, features, captions, batches, steps and rates of learning.

    python -m benchmarks.clipcap CHECKOUT --vision TOWER --text LM --dataset DATASET --seeds 0 1 2 --output clipcap.json

CHECKOUT is one of github.com/rmokady/CLIP_prefix_caption (arXiv 2111.09734). Its `train.py` runs as it is: `ClipCocoDataset`
reads a pickle of our features and captions, `ClipCaptionPrefix` (the language model frozen) trains by its `train()`, and
`predict.py`'s `generate2` (greedy) and `generate_beam` (5 beams, to the first ".") write the captions. What is given to it,
and nothing more:

- the parents in the place of GPT-2 and CLIP, with the tower's width as `prefix_size`; the language model's weights take no
  gradient, which they never used;
- the names in [`benchmarks.clipcap_checkout.training_code`]: `AdamW` (gone from transformers), the device, no progress bar;
- as arguments the batch size, the epochs, the rate, the warm-up and the layers, which `train()` and its classes take.

Ours are the connectors `mlp` and `transformer`, trained by `Trainer` with the same optimizer (no weight decay, eps 1e-6, no
clipping), the same linear schedule and warm-up, and the last weights, as theirs. The MLPs have the same widths. The
transformers have the same layers, width, heads and feed-forward ratio; ClipCap's spreads the photo over `prefix_length`
positions first, where ours has one and so fewer parameters (both are written down). Neither side sees augmented photos. The
rates stand in `RATES`, chosen on the validation split (`--split validation --rate RATE`, one seed, not one of those here):
for each mapper the one at which *ClipCap's* captions score best; ours takes the same.

`control` is ClipCap's trained mapping, written out by our `generate()`, with "." as its end. `blind` are a side's captions,
each scored against another photo's. A run adds to the figures in `--output` what is not there yet, so that it can be made
piece by piece, and goes on where it was stopped.
"""

import argparse
import contextlib
import io
import json
import pickle
import re
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, logging, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks import timing
from benchmarks.clipcap_checkout import decoding_functions, training_code
from benchmarks.digits import shuffled
from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.data.feature_store import StoredImage
from modeling_frozen.metrics import caption_metrics


MAPPERS = ("mlp", "transformer")
SIDES = ("ours", "clipcap")
# The MLPs' of 1e-3, 2e-3 and 4e-3, the transformers' of 5e-4 and 1e-3, in 190 steps.
RATES = {"mlp": 2e-3, "transformer": 5e-4}
BEAMS = {"greedy": 1, "beams": 5}
SCORES = ("cider", "bleu_4", "rouge_l")


class Data:
    """The photos' features and captions, made once: for ours as a store's rows, for theirs as a pickle."""

    def __init__(self, args: Namespace, folder: Path):
        dataset = load_dataset(args.dataset)
        model = build(args, "mlp")
        self.processor = FrozenPrefixProcessor.from_model(model)
        self.rows, self.captions, self.features = {}, {}, {}
        for split in ("train", args.split):
            rows = dataset[split].filter(bool, input_columns=args.captions_column)
            self.captions[split] = [[one] if isinstance(one, str) else one for one in rows[args.captions_column]]
            photos = rows.select_columns([args.image_column]).rename_columns({args.image_column: "image"})
            store = args.store or str(folder)
            self.rows[split] = cache_vision_features(photos, model, self.processor, cache_dir=store, dtype="float32")
            self.features[split] = StoredImage.stack(list(self.rows[split]["image"]))["vision_features"]
        self.sentences = [
            {"image_id": photo, "clip_embedding": photo, "caption": tidy(one)}
            for photo, several in enumerate(self.captions["train"])
            for one in several
        ]
        self.pickle = str(folder / "train.pkl")
        with open(self.pickle, "wb") as file:  # one vector per photo, as CLIP's
            pickle.dump({"clip_embedding": self.features["train"][:, 0], "captions": self.sentences}, file)


def tidy(caption: str) -> str:
    """A caption as a sentence that continues a text: " a dog runs." Language models know those best."""
    words = re.sub(r"\s+([.,!?;:])", r"\1", " ".join(caption.lower().split()))
    return f" {words.rstrip(' .')}."


def build(args: Namespace, mapper: str) -> FrozenPrefixForConditionalGeneration:
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision, args.text, connector_type="linear", prefix_length=1, vision_feature_select_strategy="pooled"
    )
    width = model.config.embedding_dim
    options: dict[str, Any] = {"hidden_size": width * args.prefix_length // 2}
    if mapper == "transformer":
        options = {"hidden_size": args.width or width, "num_layers": args.layers, "num_heads": 8}
    return FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        args.vision,
        args.text,
        connector_type=mapper,
        connector_config=options,
        prefix_length=args.prefix_length,
        vision_feature_select_strategy="pooled",
    )


@torch.no_grad()
def write(model: Any, processor: Any, args: Namespace, beams: int, stop: int | None = None, **pictures: Any) -> list[str]:
    """Captions by our `generate()`, a batch at a time; `pictures` are inputs whose rows are photos."""
    model.eval()
    name, rows = next(iter(pictures.items()))
    captions: list[str] = []
    for start in range(0, len(rows), 25):
        batch: Any = rows[start : start + 25]
        ids = torch.full((len(batch), args.prefix_length), model.config.image_token_id)
        if name == "mm_encoder_outputs":
            batch = {"image": BaseModelOutputWithPooling(pooler_output=tuple(batch))}
        options = {} if stop is None else {"eos_token_id": stop}
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{name: batch},
            do_sample=False,
            num_beams=beams,
            max_new_tokens=args.max_new_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
            **options,
        )
        captions += processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return captions


def run_ours(mapper: str, seed: int, args: Namespace, data: Data, folder: str) -> dict[str, Any]:
    photos = list(data.rows["train"]["image"])
    rows = [{"image": photos[one["image_id"]], "prompt": "", "answer": one["caption"]} for one in data.sentences]
    set_seed(seed)
    model = build(args, mapper)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            dataloader_drop_last=True,
            learning_rate=args.rates[mapper],
            lr_scheduler_type="linear",
            warmup_steps=args.warm_up,
            weight_decay=0.0,
            adam_epsilon=1e-6,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForFrozenPrefix(data.processor),
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    seconds = (time.perf_counter() - start) / trainer.state.global_step
    seen = data.features[args.split]
    captions = {name: write(model, data.processor, args, BEAMS[name], vision_features=seen) for name in args.decodings}
    size = sum(one.numel() for one in model.model.connector.parameters())
    return {"captions": captions, "steps": trainer.state.global_step, "seconds_per_step": seconds, "parameters": size}


def run_clipcap(mapper: str, seed: int, args: Namespace, data: Data, folder: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(args.text)
    theirs = training_code(
        args.checkout, lambda: AutoModelForCausalLM.from_pretrained(args.text).requires_grad_(False), tokenizer
    )
    set_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = theirs.ClipCocoDataset(data.pickle, args.prefix_length)
        model = theirs.ClipCaptionPrefix(
            args.prefix_length,
            clip_length=args.prefix_length,
            prefix_size=data.features["train"].shape[-1],
            num_layers=args.layers,
            mapping_type=theirs.MappingType(mapper),
        )
        settings = SimpleNamespace(bs=args.batch_size, epochs=args.epochs, save_every=args.epochs)
        start = time.perf_counter()
        theirs.train(dataset, model, settings, args.rates[mapper], args.warm_up, folder, mapper)
    steps = args.epochs * (len(dataset) // args.batch_size)
    seconds = (time.perf_counter() - start) / steps

    decode = decoding_functions(args.checkout)
    with torch.no_grad():
        model.eval()
        prefixes = model.clip_project(data.features[args.split][:, 0]).view(-1, args.prefix_length, model.gpt_embedding_size)
    loops = {
        "greedy": lambda one: decode["generate2"](model, tokenizer, embed=one, entry_length=args.max_new_tokens),
        "beams": lambda one: decode["generate_beam"](model, tokenizer, embed=one, entry_length=args.max_new_tokens)[0],
    }
    captions = {name: [loops[name](one) for one in prefixes[:, None]] for name in args.decodings}
    ours, stop = build(args, "mlp"), tokenizer.encode(".")[0]
    for name in args.decodings:
        captions[f"{name}, control"] = write(ours, data.processor, args, BEAMS[name], stop, mm_encoder_outputs=prefixes)
    size = sum(one.numel() for one in model.parameters())
    return {"captions": captions, "steps": steps, "seconds_per_step": seconds, "parameters": size}


def run(side: str, mapper: str, seed: int, args: Namespace, data: Data) -> dict[str, Any]:
    """One training: scores of every way of writing, and of the same captions against another photo's."""
    with tempfile.TemporaryDirectory() as folder:
        result = (run_ours if side == "ours" else run_clipcap)(mapper, seed, args, data, folder)
    people, result["scores"] = data.captions[args.split], {}
    other = shuffled(len(people), seed).tolist()
    for name, written in result["captions"].items():
        result["scores"][name] = caption_metrics(written, people)
        if "control" not in name:
            result["scores"][f"{name}, blind"] = caption_metrics([written[index] for index in other], people)
    result["same"] = {
        name: statistics.mean(
            a.strip() == b.strip() for a, b in zip(written, result["captions"][f"{name}, control"], strict=True)
        )
        for name, written in result["captions"].items()
        if f"{name}, control" in result["captions"]
    }
    return result


def cells(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(results: dict[str, Any]) -> str:
    lines = ["| | CIDEr-D, by seed | CIDEr-D | BLEU-4 | ROUGE-L |", "|---|---|---|---|---|"]
    for name, runs in results["runs"].items():
        for way in next(iter(runs.values()))["scores"]:
            values = {score: [one["scores"][way][score] for one in runs.values()] for score in SCORES}
            seeds = " ".join(f"{value:.3f}" for value in values["cider"])
            lines.append(f"| {name}, {way} | {seeds} | " + " | ".join(map(cells, values.values())) + " |")
    return "\n".join(lines)


def compare(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours against theirs, on the seeds that both have: the bar is a mean CIDEr-D at least as high."""
    rows = []
    for mapper in MAPPERS:
        ours, theirs = (results["runs"].get(f"{side}, {mapper}", {}) for side in SIDES)
        seeds = [seed for seed in ours if seed in theirs]
        for way in results["settings"]["decodings"] if seeds else ():
            means = [statistics.mean(side[seed]["scores"][way]["cider"] for seed in seeds) for side in (ours, theirs)]
            row = {"mapper": mapper, "decoding": way, "seeds": len(seeds), "ours": means[0], "clipcap": means[1]}
            rows.append({**row, "met": means[0] >= means[1]})
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="of github.com/rmokady/CLIP_prefix_caption")
    parser.add_argument("--vision", required=True, help="vision tower: Hub id or folder")
    parser.add_argument("--text", required=True, help="language model with `.transformer.wte`: Hub id or folder")
    parser.add_argument("--dataset", required=True, help="photos with captions, splits train, validation, test")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--captions-column", default="captions")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="that is scored")
    parser.add_argument("--mappers", nargs="+", choices=MAPPERS, default=list(MAPPERS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=20, help="steps of it")
    parser.add_argument("--rate", type=float, help="of learning, for all mappers (default: RATES)")
    parser.add_argument("--prefix-length", type=int, default=10)
    parser.add_argument("--layers", type=int, default=8, help="of both transformers")
    parser.add_argument("--width", type=int, help="of our transformer (default: the language model's, as theirs)")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--decodings", nargs="+", choices=BEAMS, default=list(BEAMS))
    parser.add_argument("--store", help="folder of the tower's features, to keep them for a further run")
    parser.add_argument("--output", default="clipcap.json")
    args = parser.parse_args(arguments)
    args.rates = {mapper: args.rate or rate for mapper, rate in RATES.items()}

    output, pieces = Path(args.output), ("mappers", "sides", "seeds", "output", "rate", "rates", "store")
    settings = {key: value for key, value in vars(args).items() if key not in pieces}
    results = timing.kept_runs(output, settings)
    with tempfile.TemporaryDirectory() as folder:
        data = Data(args, Path(folder))
        for seed in args.seeds:
            for mapper in args.mappers:
                for side in args.sides:
                    runs = results["runs"].setdefault(f"{side}, {mapper}", {})
                    if runs.get(str(seed), {}).get("rate") == args.rates[mapper]:
                        continue  # of an earlier call
                    result = runs[str(seed)] = {"rate": args.rates[mapper], **run(side, mapper, seed, args, data)}
                    results["compared"] = compare(results)
                    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                    seen = {way: round(scores["cider"], 4) for way, scores in result["scores"].items()}
                    print(side, mapper, seed, seen, f"{result['seconds_per_step']:.3f} s/step", flush=True)
    print(f"\n{len(data.captions['train'])} photos to learn from, {len(data.captions[args.split])} to caption ({args.split})")
    for name, runs in results["runs"].items():
        one = next(iter(runs.values()))
        same = ", ".join(f"{way} {value:.1%}" for way, value in one["same"].items())
        control = f"; our generate() writes the same caption: {same}" if same else ""
        how = f"rate {one['rate']:g}, {one['steps']} steps, {one['seconds_per_step']:.3f} s each"
        print(f"{name}: {one['parameters']:,} parameters, {how}{control}")
    print(f"\n{table(results)}\n")
    for row in results["compared"]:
        verdict = "met" if row["met"] else "MISSED"
        print(f"{row['mapper']}, {row['decoding']}: ours {row['ours']:.3f}, ClipCap's {row['clipcap']:.3f}: {verdict}")
    return results


if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    main()
