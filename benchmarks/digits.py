"""Handwritten digits classified by the fused classifier: image, text and both, beside probes and beside blind.

    python -m benchmarks.digits                                       (tiny random parents: three minutes on one core)
    python -m benchmarks.digits --vision FOLDER_OR_ID --text FOLDER_OR_ID         (real parents)

The pictures are the 1,797 digits that come with scikit-learn, in its order: the first 1,000 to train, the rest to test.
Each comes with a text that tells a half of the truth, drawn by chance: whether the digit is even, or whether it is small. By
the text alone nobody can be right more often than once in five. Both parents are frozen; connector and head learn.

Beside the classifier of each input stand: *blind*, the same model on the same texts with the pictures shuffled; *random
connector*, of which only the head learnt; a *linear probe* (scikit-learn's logistic regression) on the tower's features; and
*nearest prompt*, FrozenPrefixForImageTextRetrieval trained on "a handwritten three" and its like, without any head: the
digit is the one whose prompt is nearest. *Held-out digits* is the same, trained without two digits and asked to tell these
two apart: zero-shot in the strict sense, where chance is one half.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessorPil,
    set_seed,
)

from benchmarks.timing import machine
from modeling_frozen import (
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixForSequenceClassification,
    FrozenPrefixProcessor,
)
from modeling_frozen.metrics import accuracy, f1


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HINTS = (lambda digit: "even" if digit % 2 == 0 else "odd", lambda digit: "small" if digit < 5 else "large")
TRAINED = 1000
INPUTS = {"image": ("image",), "text": ("text",), "both": ("image", "text")}


def read_digits() -> tuple[list[Image.Image], torch.Tensor, list[str]]:
    """Pictures, labels, and a half-true text for each."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: pip install scikit-learn") from error
    dataset = load_digits()
    images = [Image.fromarray((255 - pixels / 16 * 255).astype(np.uint8)).convert("RGB") for pixels in dataset.images]
    rng = random.Random(0)
    texts = [f"a handwritten digit that is {rng.choice(HINTS)(digit)}" for digit in dataset.target.tolist()]
    return images, torch.tensor(dataset.target), texts


def prompt(digit: int) -> str:
    return f"a handwritten {NAMES[digit]}"


def save_random_parents(folder: Path) -> tuple[str, str]:
    """A tiny random tower and a tiny random language model: nothing in them was ever trained."""
    torch.manual_seed(0)
    tower, words = folder / "tower", folder / "words"
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes, downsample_in_first_stage=False)).save_pretrained(tower)
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tower)
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *"a handwritten digit that is even odd small large".split(), *NAMES]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(words)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(vocabulary) + 1}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**ids, **layers, initializer_range=0.1)).save_pretrained(words)
    return str(tower), str(words)


@torch.no_grad()
def tower_features(model: Any, processor: FrozenPrefixProcessor, images: list[Image.Image]) -> torch.Tensor:
    """(images, positions, width): what the frozen tower gives the connector, once for all that follows."""
    batches = []
    for start in range(0, len(images), 32):
        pixels = processor(images=images[start : start + 32], return_tensors="pt")["pixel_values"]
        batches.append(model.model._encode_pixels(pixels, {}, {})[0])
    return torch.cat(batches).float()


def train(model: nn.Module, batch: Any, rows: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW on what trains, over batches of `rows`, with a cosine schedule; `batch` makes inputs of some rows."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    steps = args.epochs * -(-len(rows) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, steps, pct_start=0.1)
    for _ in range(args.epochs):
        for chosen in rows[torch.randperm(len(rows))].split(args.batch_size):
            optimizer.zero_grad()
            model(**batch(chosen)).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def scores(model: nn.Module, batch: Any, rows: torch.Tensor, labels: torch.Tensor, seen: torch.Tensor) -> dict[str, float]:
    """Accuracy and macro F1 on `rows`, each with the picture of the row that `seen` names."""
    said = torch.cat([model(**batch(a, b)).logits.argmax(-1) for a, b in zip(rows.split(256), seen.split(256), strict=True)])
    return {"accuracy": accuracy(said, labels[rows]), "f1": f1(said, labels[rows])}


def shuffled(count: int, seed: int) -> torch.Tensor:
    """A shuffle in which nothing keeps its place: one cycle through all."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    place[order] = order.roll(1)
    return place


def classify(args: argparse.Namespace, data: dict[str, Any], inputs: str, seed: int, learns: bool) -> dict[str, Any]:
    """Trains a classifier of some inputs; its scores on the test digits, sighted and blind."""
    set_seed(seed)
    model = FrozenPrefixForSequenceClassification.from_vision_text_pretrained(
        args.vision, args.text, id2label=dict(enumerate(NAMES)), fused_inputs=INPUTS[inputs], **data["connector"]
    )
    if not learns:
        model.model.connector.requires_grad_(False)

    def batch(rows: torch.Tensor, seen: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        media = {"labels": data["labels"][rows]}
        if "image" in INPUTS[inputs]:
            media["vision_features"] = data["features"][rows if seen is None else seen]
        if "text" in INPUTS[inputs]:
            media |= {name: value[rows] for name, value in data["texts"].items()}
        return media

    train(model, batch, data["train"], args)
    test, labels = data["test"], data["labels"]
    blind = test[shuffled(len(test), seed)]
    return {"sighted": scores(model, batch, test, labels, test), "blind": scores(model, batch, test, labels, blind)}


def nearest_prompt(args: argparse.Namespace, data: dict[str, Any], seed: int, unseen: tuple[int, ...] = ()) -> dict[str, Any]:
    """Trains pictures and prompts into one space and classifies test digits (of `unseen` alone, where named, on which it
    then is not trained) by the nearest prompt."""
    set_seed(seed)
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
        args.vision, args.text, projection_dim=64, **data["connector"]
    )
    prompts, labels = data["prompts"], data["labels"]

    def batch(rows: torch.Tensor) -> dict[str, Any]:
        # Pictures of one digit are no negatives of each other's prompts.
        inputs = {name: value[labels[rows]] for name, value in prompts.items()}
        return {**inputs, "vision_features": data["features"][rows], "image_ids": labels[rows], "return_loss": True}

    fits = ~torch.isin(labels, torch.tensor(unseen)) if unseen else torch.ones_like(labels, dtype=torch.bool)
    train(model, batch, data["train"][fits[data["train"]]], args)
    offered = torch.tensor(unseen or range(10))
    test = data["test"][torch.isin(labels[data["test"]], offered)]
    with torch.no_grad():
        texts = {name: value[offered] for name, value in prompts.items()}
        results = {}
        for kind, seen in (("sighted", test), ("blind", test[shuffled(len(test), seed)])):
            logits = model(**texts, vision_features=data["features"][seen]).logits_per_image
            said = offered[logits.argmax(-1)]
            results[kind] = {"accuracy": accuracy(said, labels[test]), "f1": f1(said, labels[test])}
    return results


def linear_probe(features: torch.Tensor, data: dict[str, Any]) -> dict[str, float]:
    """Logistic regression on standardised features of the training digits."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test, labels = data["train"], data["test"], data["labels"].numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    said = probe.fit(features[train].numpy(), labels[train]).predict(features[test].numpy())
    return {"accuracy": accuracy(said, labels[test]), "f1": f1(said, labels[test])}


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is computed once: features of all pictures, ids of all texts."""
    images, labels, texts = read_digits()
    connector = {"connector_type": "mlp", "vision_feature_select_strategy": "pooled", "prefix_length": 1}
    if args.vision is None:
        # Of a random tower the mean tells little: the connector learns where to look.
        small = {"num_layers": 1, "num_heads": 4, "hidden_size": 64, "position_embedding": True}
        connector = {"connector_type": "resampler", "connector_config": small, "prefix_length": 4}
    folder = Path(tempfile.mkdtemp())
    tower, words = save_random_parents(folder) if None in (args.vision, args.text) else ("", "")
    args.vision, args.text = args.vision or tower, args.text or words
    model = FrozenPrefixForSequenceClassification.from_vision_text_pretrained(args.vision, args.text, **connector)
    processor = FrozenPrefixProcessor.from_model(model)

    def ids(lines: list[str]) -> dict[str, torch.Tensor]:
        return dict(processor.tokenizer(lines, return_tensors="pt", padding=True, return_token_type_ids=False))

    return {
        "features": tower_features(model, processor, images),
        "labels": labels,
        "texts": ids(texts),
        "prompts": ids([prompt(digit) for digit in range(10)]),
        "connector": connector,
        "train": torch.arange(TRAINED),
        "test": torch.arange(TRAINED, len(labels)),
    }


def over_seeds(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each score."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    return {
        name: {"mean": statistics.mean(of), "std": statistics.stdev(of) if len(of) > 1 else 0.0, "seeds": of}
        for name, of in values.items()
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", help="vision tower, id or folder (default: a tiny random one)")
    parser.add_argument("--text", help="language model, id or folder (default: a tiny random one)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--output", help="file that the figures are written to, as JSON")
    args = parser.parse_args(arguments)
    begin = time.time()
    settings = {**vars(args), "vision": args.vision or "tiny, random", "text": args.text or "tiny, random"}
    data = prepare(args)

    title = (
        f"Digits: {len(data['train'])} to train, {len(data['test'])} to test; mean ± deviation over {len(args.seeds)} seeds"
    )
    print(title)
    print("  " + ", ".join(f"{key} {value}" for key, value in settings.items() if key != "output"))
    result: dict[str, Any] = {"title": title, "settings": settings, "machine": machine(), "rows": {}}

    def add(name: str, runs: list[dict[str, float]]) -> None:
        row = result["rows"][name] = over_seeds(runs)
        cells = [f"{key} {one['mean']:.3f} ± {one['std']:.3f}" for key, one in row.items()]
        print(f"  {name:<40}  " + "  ".join(cells), flush=True)
        result["seconds"] = round(time.time() - begin, 1)
        if args.output:  # at once: a run that is cut short leaves what it measured
            Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    add("linear probe, mean of positions", [linear_probe(data["features"].mean(1), data)])
    add("linear probe, all positions", [linear_probe(data["features"].flatten(1), data)])
    for inputs in INPUTS:
        runs = [classify(args, data, inputs, seed, learns=True) for seed in args.seeds]
        add(f"classifier, {inputs}", [run["sighted"] for run in runs])
        if inputs != "text":
            add(f"classifier, {inputs}, blind", [run["blind"] for run in runs])
            runs = [classify(args, data, inputs, seed, learns=False) for seed in args.seeds]
            add(f"classifier, {inputs}, random connector", [run["sighted"] for run in runs])
    runs = [nearest_prompt(args, data, seed) for seed in args.seeds]
    add("nearest prompt", [run["sighted"] for run in runs])
    add("nearest prompt, blind", [run["blind"] for run in runs])
    result["held_out"] = [random.Random(seed).sample(range(10), 2) for seed in args.seeds]
    runs = [nearest_prompt(args, data, seed, tuple(pair)) for seed, pair in zip(args.seeds, result["held_out"], strict=True)]
    add("nearest prompt, held-out digits (of two)", [run["sighted"] for run in runs])
    print(f"  {result['seconds']} seconds")
    return result


if __name__ == "__main__":
    main()
