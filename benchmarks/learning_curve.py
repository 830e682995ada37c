"""CIDEr over the processor seconds of training: ours, ClipCap's code and transformers' LLaVA; and what changes of ours bring.

    python -m benchmarks.learning_curve --only peers --vision TOWER --text LM --dataset DATASET --clipcap CHECKOUT
    python -m benchmarks.learning_curve --only changes --vision TOWER --text LM --dataset DATASET --no_chat

All train a two-layer MLP between the same frozen parents, on the same stored features, captions and number of captions a
step, each by its own code and recipe (`CANDIDATES`), for about as many seconds (`--our_epochs`: a step of ours takes less).
They are stopped now and then to write the captions of the test photos, greedily; that time doesn't count. *The gap* is CIDEr
less that of the same captions, each beside another photo's: what is had without seeing. The peers:

- *ours* is what `examples/quickstart_real.py` trains: ten vectors of the pooled feature, one caption of each of twenty
  photos a step; or five captions of each of four, behind one reading of it;
- *ClipCap's* `train.py` runs as it is, from a checkout ([`benchmarks.clipcap_checkout`]): ten vectors of the pooled feature,
  captions without a prompt, padded to the longest of all. A language model without `.transformer.wte` is given one by
  `AsGPT2`. Its captions are written from its prefixes by our `generate()`, to the first ".";
- *LLaVA* is transformers' class, with the stored grid in the place of its tower, by `Trainer`, a caption a row, with our
  prompt.

*Changes* are of ours, one at a time. Of those stands beside CIDEr the loss in nats a token of the test captions, which tells
smaller differences, with the photo and with another. Runs are written to `--output` one by one; those that stand there are
not made again.
"""

import argparse
import contextlib
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from benchmarks.clipcap import tidy
from benchmarks.clipcap_checkout import training_code
from benchmarks.connectors import cell, shuffled
from benchmarks.timing import kept_runs
from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
    load_image_text,
)
from modeling_frozen.backbones import word_embedding_norm
from modeling_frozen.data.augmentation import PhotoAugmentation
from modeling_frozen.data.feature_store import StoredImage
from modeling_frozen.metrics import caption_metrics
from modeling_frozen.training.starting import start_as_words


CAPTIONS = 20  # of a step
CLIPCAPS = -1  # a hidden layer as wide as ClipCap's MLP has it: half of the whole prefix
OURS = {"weight_decay": 0.05, "adam_beta2": 0.98, "lr_scheduler_type": "cosine"}


@dataclass(frozen=True)
class Candidate:
    """
    Args:
        table: "peers" or "changes".
        name: its row.
        code: whose: "ours", "clipcap" or "llava".
        rate, warm_up: of learning, and the share of the steps at which it rises.
        texts: captions of a photo in a step.
        options: of the connector.
        start: what is done to the connector before it trains.
        views: of each photo in the store, the photo itself and random crops.
        layers: the share of the language model's layers that is trained through in the first half of the steps.
        epochs: a factor of `--epochs`.
        longer: whether it takes `--our_epochs` in its place.
    """

    table: str
    name: str
    code: str = "ours"
    rate: float = 3e-3
    warm_up: float = 0.05
    texts: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    start: Callable[..., Any] | None = None
    views: int = 1
    layers: float = 1.0
    epochs: float = 1.0
    longer: bool = False


# ------------------------------------------------------------------------------------------------------- changes of ours
def words(model: Any, processor: Any, data: "Data") -> None:
    """Starts the constant part as words: [`start_as_words`]."""
    start_as_words(model, processor, [captions[0] for captions in data.answers("train")])


@torch.no_grad()
def _targets(model: Any, processor: Any, data: "Data") -> tuple[torch.Tensor, torch.Tensor]:
    """For each photo the mean embeddings of its captions' first words, and what its feature is behind the hidden layer."""
    length, connector = model.config.prefix_length, model.model.connector
    means = []
    for captions in data.answers("train"):
        ids = processor.tokenizer(captions, add_special_tokens=False)["input_ids"]
        repeated = torch.tensor([(one * length)[:length] for one in ids])  # a short caption begins again
        means.append(model.model.embed_words(repeated).float().mean(0).flatten())
    features = data.features("pooled", "train")
    return torch.stack(means), connector.hidden(connector.input_norm(features))[:, 0]


@torch.no_grad()
def regression(model: Any, processor: Any, data: "Data", to_norm: bool = False) -> None:
    """Starts the output layer where ridge regression from the features to the captions' mean first words has it, in closed
    form; scaled to the norm of words where `to_norm`."""
    targets, hidden = _targets(model, processor, data)
    output: Any = model.model.connector.output
    norm = output(hidden).unflatten(-1, (model.config.prefix_length, -1)).norm(dim=-1).mean()
    mean_hidden, mean = hidden.mean(0), targets.mean(0)
    x, y = hidden - mean_hidden, targets - mean
    ridge = x.T @ x + x.pow(2).sum() / x.shape[1] * torch.eye(x.shape[1])  # as strong as the mean eigenvalue
    weight = torch.linalg.solve(ridge, x.T @ y).T
    output.weight.copy_(weight)
    output.bias.copy_(mean - weight @ mean_hidden)
    if to_norm:
        factor = norm / output(hidden).unflatten(-1, (model.config.prefix_length, -1)).norm(dim=-1).mean()
        output.weight.mul_(factor)
        output.bias.mul_(factor)


def regression_to_norm(model: Any, processor: Any, data: "Data") -> None:
    regression(model, processor, data, to_norm=True)


class ConvexWords(nn.Module):
    """AlignVLM's output (arXiv 2502.01341): each prefix vector is a convex combination of word embeddings, the map to the
    vocabulary is the language model's own; here both stay frozen."""

    def __init__(self, inner: nn.Linear, model: Any):
        super().__init__()
        self.inner, self.width = inner, model.config.embedding_dim
        self.lm = [model]  # in a list, so that it is no submodule

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        model = self.lm[0]
        queries = self.inner(hidden).unflatten(-1, (-1, self.width))
        head = model.get_output_embeddings().weight.float()
        embeddings = model.model.get_input_embeddings().weight.float()
        shares = (nn.functional.layer_norm(queries, queries.shape[-1:]) @ head.T).softmax(-1)
        return (shares[..., : len(embeddings)] @ embeddings).flatten(-2)


def convex(model: Any, processor: Any, data: "Data") -> None:
    connector = model.model.connector
    connector.output = ConvexWords(connector.output, model)


def far_too_large(model: Any, processor: Any, data: "Data") -> None:
    """Starts at twenty times the norm of words, as a plain initialisation does at some language models."""
    with torch.no_grad():
        model.model.connector.output.weight.mul_(20)


def ids_by_text(model: Any, tokenizer: Any) -> dict[str, int]:
    """Of each ordinary token that has an embedding, by how it is written after another one, with its space."""
    start = tokenizer("a", add_special_tokens=False).input_ids
    before = tokenizer.decode(start, clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    ids = [one for one in range(min(len(tokenizer), len(model.get_input_embeddings().weight))) if one not in special]
    texts = tokenizer.batch_decode([[*start, one] for one in ids], clean_up_tokenization_spaces=False)
    return {
        text.removeprefix(before): one
        for text, one in zip(texts, ids, strict=True)
        if text.startswith(before) and text != before and "\ufffd" not in text  # that is part of a letter
    }


@torch.no_grad()
def take_over(model: Any, processor: Any, source: Any, source_processor: Any) -> None:
    """Starts an MLP on pooled features as one that was trained before another language model. The linear map, with a
    constant, that takes word embeddings of the one nearest to those of the other, by least squares over the words that both
    have (Mikolov et al. 2013, arXiv 1309.4168, between two languages and without the constant), goes behind its output, which
    is scaled to the norm of words."""
    own, learnt = model.model.connector, source.model.connector
    places, ids = ids_by_text(model, processor.tokenizer), ids_by_text(source, source_processor.tokenizer)
    shared = sorted(places.keys() & ids.keys())
    x, y = (
        one.model.embed_words(torch.tensor([[of[text] for text in shared]]))[0].double()
        for one, of in ((source, ids), (model, places))
    )
    weight = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution.T
    constant = y.mean(0) - weight @ x.mean(0)
    own.hidden.load_state_dict(learnt.hidden.state_dict())
    own.input_norm.load_state_dict(learnt.input_norm.state_dict())
    each = (-1, learnt.embedding_dim)
    own.output.weight.copy_((weight @ learnt.output.weight.double().unflatten(0, each)).flatten(0, 1))
    own.output.bias.copy_((learnt.output.bias.double().unflatten(0, each) @ weight.T + constant).flatten())
    own.set_output_norm(word_embedding_norm(model.model.language_model) * model.model.embed_scale)


def moved(model: Any, processor: Any, data: "Data") -> None:
    """Starts as a connector that was trained before a smaller language model: [`take_over`]."""
    begin = time.process_time()
    hidden_size = model.model.connector.output.in_features
    small, its_processor = data.build("pooled", hidden_size=hidden_size, text=data.args.from_text)
    learn, steps = Candidate("changes", "the smaller language model's"), data.steps(data.args.epochs)
    run_trainer(small, Rows(data, "pooled", its_processor, learn.texts), its_processor, steps, 0, learn, TrainerCallback())
    take_over(model, processor, small, its_processor)
    print(f"  {time.process_time() - begin:.0f} seconds for the connector of {data.args.from_text}", flush=True)


def _candidates() -> Iterator[Candidate]:
    yield Candidate("peers", "ours", longer=True)
    yield Candidate("peers", "ours, five of a photo", texts=5, longer=True)
    for rate in (1e-3, 2e-3):
        yield Candidate("peers", f"ClipCap's code, rate {rate:g}", "clipcap", rate)
    for rate in (1e-3, 3e-3):
        yield Candidate("peers", f"transformers' LLaVA, rate {rate:g}", "llava", rate, warm_up=0.03, epochs=0.5)
    table = "changes"
    yield Candidate(table, "as it is")
    yield Candidate(table, "two captions of each of ten photos in a step", texts=2)
    yield Candidate(table, "five captions of each of four photos in a step", texts=5)
    yield Candidate(table, "rate 1e-3", rate=1e-3)
    yield Candidate(table, "rate 6e-3", rate=6e-3)
    yield Candidate(table, "no warm-up", warm_up=0.0)
    yield Candidate(table, "features not normalised", options={"input_norm": False})
    yield Candidate(table, "a hidden layer of half the prefix's width, as ClipCap's", options={"hidden_size": CLIPCAPS})
    yield Candidate(table, "started at 20 times the words' norm", start=far_too_large)
    yield Candidate(table, "started as words", start=words)
    yield Candidate(table, "started by ridge regression", start=regression)
    yield Candidate(table, "started by ridge regression, at the words' norm", start=regression_to_norm)
    yield Candidate(table, "moved from a smaller language model", start=moved)
    yield Candidate(table, "convex combinations of words", start=convex)
    yield Candidate(table, "input dropout 0.3", options={"input_dropout": 0.3})
    yield Candidate(table, "three crops of each photo beside it", views=4)
    yield Candidate(table, "half the layers for half the steps", layers=0.5)


CANDIDATES = {f"{candidate.table}: {candidate.name}": candidate for candidate in _candidates()}


# ------------------------------------------------------------------------------------------------------------------ data
class Data:
    """Captions, and the features of their photos: pooled, and as a grid."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.stores = args, {}
        self.photos, self.captions = {}, {}
        for split, count in (("train", args.photos), (args.split, args.test_photos)):
            rows = load_image_text(args.dataset, split=split)
            rows = rows.filter(bool, input_columns="text")
            rows = rows.select(range(min(len(rows), count or len(rows))))
            self.photos[split] = rows.select_columns(["image"])
            said = [[one] if isinstance(one, str) else one for one in rows["text"]]
            self.captions[split] = [[tidy(one) for one in captions] for captions in said]

    def steps(self, epochs: float) -> int:
        """So many pass so often over all captions of training."""
        return max(1, round(epochs * sum(map(len, self.captions["train"])) / CAPTIONS))

    def answers(self, split: str) -> list[list[str]]:
        """Captions as ours and LLaVA learn them: behind a chat's prompt as a sentence, else as ClipCap's."""
        if self.args.no_chat:
            return self.captions[split]
        return [[one.strip().capitalize() for one in captions] for captions in self.captions[split]]

    def build(
        self, strategy: str, hidden_size: int | None = None, text: str | None = None, **options: Any
    ) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
        if hidden_size == CLIPCAPS:
            hidden_size = AutoConfig.from_pretrained(self.args.text).hidden_size * self.args.prefix_length // 2
        model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
            self.args.vision,
            text or self.args.text,
            connector_type="mlp",
            connector_config={**options, "hidden_size": hidden_size},
            prefix_length=self.args.prefix_length if strategy == "pooled" else None,
            vision_feature_select_strategy=strategy,
        )
        return model, FrozenPrefixProcessor.from_model(model)

    def stored(self, strategy: str, split: str, views: int = 1) -> Dataset:
        key = (strategy, split, views)
        if key not in self.stores:
            model, processor = self.build(strategy)
            crops = {"views": views, "augment": PhotoAugmentation(), "plain_view": True} if views > 1 else {}
            self.stores[key] = cache_vision_features(
                self.photos[split], model, processor, cache_dir=self.args.store, dtype="float32", **crops
            )
        return self.stores[key]

    def features(self, strategy: str, split: str) -> torch.Tensor:
        """(photos, positions, width)."""
        return StoredImage.stack(list(self.stored(strategy, split)["image"]))["vision_features"]

    def prompt(self, processor: Any) -> str:
        return "" if self.args.no_chat else processor.chat_prompt(self.args.prompt)


class Rows(torch.utils.data.Dataset):
    """Photos with so many of their captions: a photo `repeats` times an epoch, with other captions each time."""

    def __init__(self, data: Data, strategy: str, processor: Any, texts: int, views: int = 1):
        self.images = data.stored(strategy, "train", views)
        self.captions, self.prompt, self.texts = data.answers("train"), data.prompt(processor), texts
        self.repeats = max(1, max(map(len, self.captions)) // texts)

    def __len__(self) -> int:
        return len(self.captions) * self.repeats

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo, turn = index % len(self.captions), index // len(self.captions)
        captions = self.captions[photo]
        some = [captions[(turn * self.texts + number) % len(captions)] for number in range(min(self.texts, len(captions)))]
        return {"image": self.images[photo]["image"], "prompt": self.prompt, "answer": some}


class Clock:
    """Processor seconds of a training, without those that `measure` takes at these steps."""

    def __init__(self, steps: int, points: list[float], measure: Callable[[], dict[str, Any]]):
        self.at, self.measure = {max(1, round(steps * point)) for point in points}, measure
        self.step, self.seconds, self.points = 0, 0.0, []
        self.begin = time.process_time()

    def tick(self) -> None:
        self.step += 1
        if self.step not in self.at:
            return
        self.seconds += time.process_time() - self.begin
        point = {"step": self.step, "seconds": round(self.seconds, 2), **self.measure()}
        said = {name: round(value, 3) for name, value in point.items() if isinstance(value, int | float)}
        print(f"  {said}  {point['said'][0]!r}", flush=True)
        self.points.append({**point, "said": point["said"][:3]})
        self.begin = time.process_time()


class ClockCallback(TrainerCallback):
    def __init__(self, clock: Clock, after: dict[int, Callable[[], None]] | None = None):
        self.clock, self.after = clock, after or {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.begin = time.process_time()  # what Trainer imports belongs to no step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.tick()
        if state.global_step in self.after:
            self.after[state.global_step]()


@contextlib.contextmanager
def first_layers(language_model: nn.Module, share: float) -> Iterator[None]:
    """The language model without its last layers (a surrogate: arXiv 2505.22664)."""
    holder, name, layers = next(
        (holder, name, part)
        for holder in language_model.modules()
        for name, part in holder.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == language_model.config.num_hidden_layers
    )
    setattr(holder, name, layers[: max(1, round(share * len(layers)))])
    number, language_model.config.num_hidden_layers = language_model.config.num_hidden_layers, len(getattr(holder, name))
    try:
        yield
    finally:
        setattr(holder, name, layers)
        language_model.config.num_hidden_layers = number


# -------------------------------------------------------------------------------------------------------------- training
def scores(said: list[str], data: Data) -> dict[str, Any]:
    people = data.captions[data.args.split]
    other = shuffled(len(people), 7)
    cider = caption_metrics(said, people)["cider"]
    return {"cider": cider, "gap": cider - caption_metrics([said[index] for index in other], people)["cider"], "said": said}


def run_trainer(
    model: Any, rows: Rows, processor: Any, steps: int, seed: int, one: Candidate, callback: TrainerCallback
) -> None:
    recipe = OURS if one.code == "ours" else {"weight_decay": 0.0, "lr_scheduler_type": "cosine"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=CAPTIONS // one.texts,
                learning_rate=one.rate,
                warmup_steps=round(one.warm_up * steps),
                remove_unused_columns=False,
                dataloader_drop_last=True,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
                **recipe,
            ),
            train_dataset=rows,
            # LLaVA reads an image as often as it occurs.
            data_collator=DataCollatorForFrozenPrefix(processor, all_texts=True, share_images=one.code == "ours"),
            callbacks=[callback],
        )
        trainer.train()


@contextlib.contextmanager
def generating(model: Any) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def write(model: Any, processor: Any, inputs: Callable[[slice], dict[str, Any]], count: int, **options: Any) -> list[str]:
    """Captions by `generate()`, greedily, a batch at a time."""
    said: list[str] = []
    for start in range(0, count, 25):
        batch = inputs(slice(start, min(start + 25, count)))
        ids = model.generate(
            **batch,
            attention_mask=torch.ones_like(batch["input_ids"]),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=processor.tokenizer.pad_token_id,
            **options,
        )
        said += processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [one.strip() for one in said]


def prompt_ids(processor: Any, data: Data, strategy: str) -> torch.Tensor:
    """What stands before a caption, with the image's placeholders: (1, tokens)."""
    image = data.stored(strategy, data.args.split)[0]["image"]
    return processor(images=image, text=data.prompt(processor), return_tensors="pt")["input_ids"]


@torch.no_grad()
def nats(model: Any, processor: Any, data: Data) -> dict[str, float]:
    """Nats a token of the test captions, with their photo and with another."""
    collator, split = DataCollatorForFrozenPrefix(processor, all_texts=True), data.args.split
    images, captions, prompt = list(data.stored("pooled", split)["image"]), data.answers(split), data.prompt(processor)
    found = {}
    for name, order in (("nats", list(range(len(images)))), ("nats_of_another", shuffled(len(images), 7))):
        loss, tokens = 0.0, 0
        for start in range(0, len(images), 10):
            some = range(start, min(start + 10, len(images)))
            batch = collator([{"image": images[order[i]], "prompt": prompt, "answer": captions[i]} for i in some])
            count = int((batch["labels"] != -100).sum())
            loss, tokens = loss + model(**batch).loss.item() * count, tokens + count
        found[name] = loss / tokens
    return found


def run_ours(one: Candidate, seed: int, steps: int, data: Data) -> Clock:
    set_seed(seed)
    model, processor = data.build("pooled", **one.options)
    if one.start is not None:
        one.start(model, processor, data)
    test, ids = data.features("pooled", data.args.split), prompt_ids(processor, data, "pooled")

    def measure() -> dict[str, Any]:
        with generating(model):
            said = write(
                model,
                processor,
                lambda some: {"input_ids": ids.expand(len(test[some]), -1), "vision_features": test[some]},
                len(test),
            )
            return {**scores(said, data), **(nats(model, processor, data) if one.table == "changes" else {})}

    half = steps // 2
    points = [point for point in data.args.points if one.layers == 1.0 or round(point * steps) > half]
    clock = Clock(steps, points, measure)
    rows = Rows(data, "pooled", processor, one.texts, one.views)
    with contextlib.ExitStack() as stack:
        if one.layers < 1.0:
            stack.enter_context(first_layers(model.model.language_model, one.layers))
        run_trainer(model, rows, processor, steps, seed, one, ClockCallback(clock, {half: stack.close}))
    return clock


class AsGPT2(nn.Module):
    """Any causal language model as ClipCap's code calls GPT-2: `.transformer.wte`, and inputs and logits of float32."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.transformer = SimpleNamespace(wte=model.get_input_embeddings())

    def forward(self, inputs_embeds: torch.Tensor, labels: Any = None, attention_mask: Any = None) -> SimpleNamespace:
        inputs = inputs_embeds.to(self.model.dtype)
        return SimpleNamespace(logits=self.model(inputs_embeds=inputs, attention_mask=attention_mask).logits.float())


def run_clipcap(one: Candidate, seed: int, steps: int, data: Data) -> Clock:
    args = data.args
    tokenizer = AutoTokenizer.from_pretrained(args.text)
    ours, processor = data.build("pooled")
    ids = torch.full((1, args.prefix_length), ours.config.image_token_id)
    test, state = data.features("pooled", args.split)[:, 0], {}

    def measure() -> dict[str, Any]:
        mapper = state["model"].clip_project
        with generating(ours):
            prefixes = mapper(test).view(len(test), args.prefix_length, -1)
            said = write(
                ours,
                processor,
                lambda some: {
                    "input_ids": ids.expand(len(test[some]), -1),
                    "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tuple(prefixes[some]))},
                },
                len(test),
                eos_token_id=tokenizer.encode(".", add_special_tokens=False)[0],
            )
        return scores(said, data)

    def tick() -> None:
        state["clock"].tick()

    theirs = training_code(
        args.clipcap, lambda: AsGPT2(AutoModelForCausalLM.from_pretrained(args.text)), tokenizer, after=tick
    )
    sentences = [
        {"image_id": photo, "clip_embedding": photo, "caption": caption}
        for photo, captions in enumerate(data.captions["train"])
        for caption in captions
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/train.pkl"
        with open(path, "wb") as file:  # one vector a photo, as CLIP's
            pickle.dump({"clip_embedding": data.features("pooled", "train")[:, 0], "captions": sentences}, file)
        set_seed(seed)
        dataset = theirs.ClipCocoDataset(path, args.prefix_length)
        state["model"] = theirs.ClipCaptionPrefix(
            args.prefix_length, prefix_size=test.shape[-1], mapping_type=theirs.MappingType("mlp")
        )
        epochs = max(1, round(steps * CAPTIONS / len(dataset)))
        state["clock"] = clock = Clock(epochs * (len(dataset) // CAPTIONS), args.points, measure)
        settings = SimpleNamespace(bs=CAPTIONS, epochs=epochs, save_every=epochs)
        theirs.train(dataset, state["model"], settings, one.rate, round(one.warm_up * steps), folder, "mlp")
    return clock


class StoredTower(nn.Module):
    """Stands for LLaVA's tower: what is given as pixels are its features already."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,))


class LlavaOverFeatures(nn.Module):
    """transformers' LLaVA as Trainer calls it with our collator's batches."""

    def __init__(self, llava: LlavaForConditionalGeneration, placeholder: int):
        super().__init__()
        self.llava, self.placeholder = llava, placeholder

    def own_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """With a placeholder that can be looked up, as LLaVA does: ours stands behind the vocabulary."""
        return input_ids.masked_fill(input_ids == self.placeholder, self.llava.config.image_token_id)

    def forward(self, input_ids: torch.Tensor, vision_features: torch.Tensor, **batch: Any) -> Any:
        options = {name: batch[name] for name in ("attention_mask", "labels")}
        return self.llava(input_ids=self.own_ids(input_ids), pixel_values=vision_features, **options)


def unused_token(processor: Any, data: Data) -> int:
    """The last token of the vocabulary that is neither in a caption or the prompt nor has a task."""
    texts = [data.prompt(processor), *(one for captions in data.answers("train") for one in captions)]
    used = set(sum(processor.tokenizer(texts, add_special_tokens=False)["input_ids"], processor.tokenizer.all_special_ids))
    return max(set(processor.tokenizer.get_vocab().values()) - used - {processor.image_token_id})


def run_llava(one: Candidate, seed: int, steps: int, data: Data) -> Clock:
    set_seed(seed)
    ours, processor = data.build("default")
    text = AutoModelForCausalLM.from_pretrained(data.args.text)
    config = LlavaConfig(
        text_config=LlamaConfig(hidden_size=text.config.hidden_size),  # stands in: some can't be built inside LLaVA
        image_token_id=unused_token(processor, data),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    config.vision_config.hidden_size = ours.model.connector.vision_width
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    config.text_config = text.config
    llava.model.vision_tower, llava.model.language_model = StoredTower(), text.base_model
    llava.lm_head = text.get_output_embeddings()
    projector = llava.model.multi_modal_projector.to_empty(device="cpu")
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()  # torch's own, as in LLaVA's builder
    llava.generation_config = text.generation_config
    llava.requires_grad_(False)
    projector.float().requires_grad_(True)
    model = LlavaOverFeatures(llava, ours.config.image_token_id)
    test, ids = data.features("default", data.args.split), model.own_ids(prompt_ids(processor, data, "default"))

    def measure() -> dict[str, Any]:
        with generating(llava):
            said = write(
                llava,
                processor,
                lambda some: {"input_ids": ids.expand(len(test[some]), -1), "pixel_values": test[some]},
                len(test),
            )
        return scores(said, data)

    clock = Clock(steps, data.args.points, measure)
    rows = Rows(data, "default", processor, one.texts)
    run_trainer(model, rows, processor, steps, seed, one, ClockCallback(clock))
    return clock


RUNS = {"ours": run_ours, "clipcap": run_clipcap, "llava": run_llava}


# ---------------------------------------------------------------------------------------------------------------- tables
def tables(results: dict[str, Any]) -> str:
    """For each point of each candidate its processor seconds and scores: the mean and deviation over the seeds."""
    pieces = []
    for title in dict.fromkeys(candidate.table for candidate in CANDIDATES.values()):
        lines, losses = [], title == "changes"
        for key, candidate in CANDIDATES.items():
            runs = list(results["runs"].get(key, {}).values())
            if candidate.table != title or not runs:
                continue
            for points in zip(*(run["points"] for run in runs), strict=True):
                seconds = f"{statistics.mean(point['seconds'] for point in points):.1f}"
                names = ("nats", "nats_of_another") if losses else ()
                cells = [cell([point[name] for point in points]) for name in ("cider", "gap", *names)]
                captions = str(points[0]["step"] * CAPTIONS)
                lines.append(f"| {' | '.join([candidate.name, str(len(runs)), captions, seconds, *cells])} |")
        if lines:
            heads = [title, "seeds", "captions read", "processor seconds", "CIDEr", "gap to another photo's"]
            heads += ["nats a token", "with another photo"] if losses else []
            pieces.append("\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]))
    return "\n\n".join(pieces)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True, help="vision tower with a pooled output: Hub id or folder")
    parser.add_argument("--text", required=True, help="language model: Hub id or folder")
    parser.add_argument("--dataset", required=True, help="photos with captions, splits train and test")
    parser.add_argument("--clipcap", help="checkout of github.com/rmokady/CLIP_prefix_caption; without it that is left out")
    parser.add_argument("--from_text", help="a smaller language model, whose connector is moved; without it that is left out")
    parser.add_argument("--only", nargs="+", help="tables, or candidates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=2.0, help="over all captions; LLaVA, which takes longer, half of it")
    parser.add_argument("--our_epochs", type=float, help="of ours beside peers, whose steps take longer (default: --epochs)")
    parser.add_argument("--points", type=float, nargs="+", default=[0.125, 0.25, 0.5, 0.75, 1.0], help="shares of the steps")
    parser.add_argument("--prompt", default="Describe the photo.", help="of ours and LLaVA, in the chat template")
    parser.add_argument("--no_chat", action="store_true", help="captions alone, without a prompt")
    parser.add_argument("--prefix_length", type=int, default=10)
    parser.add_argument("--photos", type=int, help="to train on (default: all)")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="that is scored")
    parser.add_argument("--test_photos", type=int, default=125)
    parser.add_argument("--store", default="build/learning_curve", help="folder of features, which a second run finds there")
    parser.add_argument("--output", type=Path, default=Path("learning_curve.json"))
    parser.add_argument("--table", type=Path, help="a Markdown file that gets the tables too")
    args = parser.parse_args(arguments)

    said = ("only", "seeds", "store", "output", "table", "clipcap", "from_text")
    settings = {name: value for name, value in vars(args).items() if name not in said}
    results = kept_runs(args.output, settings)
    data = Data(args)
    for seed in args.seeds:
        for key, candidate in CANDIDATES.items():
            known = results["runs"].setdefault(key, {})
            wanted = not args.only or candidate.table in args.only or candidate.name in args.only
            lacks = (candidate.code == "clipcap" and not args.clipcap) or (candidate.start is moved and not args.from_text)
            if str(seed) in known or not wanted or lacks:
                continue
            print(f"{key}, seed {seed}", flush=True)
            epochs = (args.our_epochs if candidate.longer else None) or args.epochs * candidate.epochs
            steps = data.steps(epochs)
            known[str(seed)] = {"rate": candidate.rate, "points": RUNS[candidate.code](candidate, seed, steps, data).points}
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.table is not None:
        args.table.write_text(tables(results) + "\n", encoding="utf-8")
    print(tables(results))
    return results


if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    main()
