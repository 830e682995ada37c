"""What a card says of a model by its class and by what it takes: its task, how to use it, its limits.

The words are asked of the model: which media it takes, which Auto class serves it, what its head predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..connectors import CONNECTORS
from ..hub import AUTO_MAP


# By medium: one, several, and what is done to it.
_MEDIA = {"image": ("image", "images"), "video": ("video", "videos"), "audio": ("audio clip", "audio clips")}
_GENERATION, _CLASSIFICATION = "AutoModelForImageTextToText", "AutoModelForSequenceClassification"
_RETRIEVAL = "AutoModelForZeroShotImageClassification"


@dataclass(frozen=True)
class CardUsage:
    """
    Args:
        auto_class: the Auto class that loads it; None for a model that only this package's own class loads.
        pipeline_tag: the Hub's task by which it is filed; None where none of transformers' pipelines serves it.
        task_type, task_name: the same for its scores, which need one.
        medium, media: "image" and "images", of what it takes beside text.
        summary: the card's first sentence, without the connector's part.
        limits: the card's first limit.
        head: rows (name, value) about a head behind connector and language model.
        answers_text: whether calls without media are the language model's own.
    """

    auto_class: str | None
    pipeline_tag: str | None
    task_type: str
    task_name: str
    medium: str
    media: str
    summary: str
    limits: str
    head: tuple[tuple[str, str], ...] = ()
    answers_text: bool = False


def _listed(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def media_inputs(config: Any) -> str:
    """What a model takes beside text: "image", "audio" or "image and audio"."""
    return _listed([medium for medium in ("image", "audio") if medium in config.media])


def media_written(config: Any) -> list[tuple[str, str]]:
    """(medium, what stands for it) for every medium that a model takes: ("image", "4 prefix vectors")."""
    written = []
    for medium in config.media:
        count = config.audio_prefix_length if medium == "audio" else config.prefix_length
        if medium == "video" and config.fusion == "prefix":
            count = config.num_video_tokens
        vector = "vector" if config.fusion == "cross_attention" else "prefix vector"
        plural = "" if count in (1, None) else "s"
        written.append((_MEDIA[medium][0], f"{count or 'one'} {vector}{plural}{'' if count else ' per position'}"))
    return written


def connector_rows(config: Any, describe: Any) -> list[tuple[str, list[tuple[str, Any]]]]:
    """For each connector its title and the rows about it, in the order of the card. `describe` gives a connector type's own
    words."""
    tables = []
    written = dict(media_written(config))
    for title, medium, prefix, arguments in (
        ("Connector", "image", "vision", config.connector_arguments if config.vision_config is not None else None),
        (
            "Connector of audio",
            "audio clip",
            "audio",
            config.audio_connector_arguments if config.audio_config is not None else None,
        ),
    ):
        if arguments is None:
            continue
        pooled = getattr(config, f"{prefix}_feature_select_strategy") == "pooled"
        count = arguments["num_positions"]
        positions = "one pooled vector" if pooled else f"{count} positions" if count else "a varying number of positions"
        parts = config.vision_parts if prefix == "vision" else (prefix,)
        layer = ", ".join(f"`{part}_feature_layer={getattr(config, f'{part}_feature_layer')}`" for part in parts)
        options = {**CONNECTORS[arguments["connector_type"]].options(), **(arguments["connector_config"] or {})}
        rows = [
            ("type", f"`{arguments['connector_type']}`"),
            ("how it works", describe(arguments["connector_type"])),
            ("reads", f"{positions} of width {arguments['vision_width']} ({layer})"),
            ("writes", f"{written[medium]} of width {config.embedding_dim}"),
            ("options", ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "none"),
        ]
        tables.append((title if len(config.media) > 1 or prefix == "vision" else "Connector", rows))
    return tables


def _classes(config: Any) -> str:
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    shown = ", ".join(f"`{name}`" for name in names[:20])
    return f"{len(names)}: {shown}{' …' if len(names) > 20 else ''}"


def _classification(model: Any, served: list[str]) -> CardUsage:
    config = model.config
    fused = config.resolved_fused_inputs
    only = fused[0] if len(fused) == 1 else None
    # transformers' pipelines call with one input; what needs two is filed under none of them.
    tag = f"{only}-classification" if only in ("image", "text") else None
    task = tag or f"{'audio' if 'audio' in fused else 'image'}-classification"
    first = fused[0] if fused[0] != "text" else config.media[0]
    auto_class = "AutoModelForImageClassification" if only == "image" else _CLASSIFICATION
    kind = (config.problem_type or "single_label_classification").replace("_", " ")
    predicted = "numbers" if config.problem_type == "regression" else f"one of {config.num_labels} classes"
    predicted = f"which of {config.num_labels} classes apply" if kind.startswith("multi") else predicted
    reading = (
        f"the embeddings of {_listed(fused)}, each of norm 1, joined and put to norm 1"
        if len(fused) > 1
        else (f"the embedding of the {fused[0]}, of norm 1")
    )
    head = [("reads", reading)]
    if "image" in fused and config.image_embedding == "tower":
        head.append(("image embedding", "the mean of the tower's features; the connector has no part in it"))
    elif fused != ("text",):
        head.append(("other embeddings" if "text" in fused else "embedding", "the mean over the prefix"))
    if "text" in fused:
        sees = "; it reads the prefix among the words" if config.prompt_sees_media else ""
        pooled = f"hidden states of the language model, pooled by `{config.resolved_text_pooling}`{sees}"
        head.append(("text embedding", pooled))
    head.append(("options", ", ".join(f"`{key}={value!r}`" for key, value in config.classifier_config.items()) or "defaults"))
    head.append(("predicts", f"{_classes(config)} ({kind})"))
    if config.class_weights is not None:
        head.append(("class weights", ", ".join(f"{weight:g}" for weight in config.class_weights)))
    guess = "the text alone" if "text" in fused and len(fused) > 1 else "how often each class stood in its training data"
    return CardUsage(
        auto_class=auto_class if auto_class in served else None,
        pipeline_tag=tag,
        task_type=task,
        task_name=task.replace("-", " ").title(),
        medium=_MEDIA[first][0],
        media=_MEDIA[first][1],
        summary=f"A classifier that predicts {predicted} from {_listed(fused)}, on a frozen vision tower and language model.",
        limits=f"A class may be wrong, or guessed from {guess}: read every score beside its blind baseline, and do not "
        "rely on a decision that nobody can check.",
        head=tuple(head),
    )


def _retrieval(model: Any, served: list[str]) -> CardUsage:
    config = model.config
    embedded = "the tower's features" if config.image_embedding == "tower" else "the prefix"
    return CardUsage(
        auto_class=_RETRIEVAL if _RETRIEVAL in served else None,
        pipeline_tag="zero-shot-image-classification",
        task_type="zero-shot-image-classification",
        task_name="Zero-Shot Image Classification",
        medium="image",
        media="images",
        summary="Finds images by words and words by images: a frozen tower and a text model in one space.",
        limits="The nearest text need not be a true one: likeness orders what it is offered, and what is true may not be "
        "among it. Read every score beside its blind baseline.",
        head=(
            ("space", f"{config.projection_dim} numbers, compared by cosine"),
            ("image embedding", f"the mean over {embedded}, projected"),
            ("text embedding", f"hidden states pooled by `{config.resolved_text_pooling}`, projected"),
            ("loss", f"`{config.contrastive_loss_type}`"),
        ),
    )


def _generation(model: Any, served: list[str]) -> CardUsage:
    config = model.config
    medium = "image" if "image" in config.media else "audio"
    generates = _GENERATION in served
    auto_class = ("AutoModelForMultimodalLM" if medium == "audio" else _GENERATION) if generates else next(iter(served), None)
    return CardUsage(
        auto_class=auto_class,
        pipeline_tag=f"{medium}-text-to-text" if generates else None,
        task_type=f"{medium}-text-to-text",
        task_name=f"{medium.title()}-Text-to-Text",
        medium=_MEDIA[medium][0],
        media=_MEDIA[medium][1],
        summary=f"{media_inputs(config).capitalize()} input for a frozen language model.",
        limits=f"What it says of an {_MEDIA[medium][0]} may be wrong, or guessed from the words of "
        "the question alone: read every score beside its blind baseline, and do not rely on an answer that nobody can check.",
        answers_text=generates,
    )


def card_usage(model: Any) -> CardUsage:
    """What a card says of `model`, a frozen-prefix model without wrappers."""
    served = [auto for auto, target in AUTO_MAP.items() if target.endswith(f".{type(model).__name__}")]
    if hasattr(model, "classifier"):
        return _classification(model, served)
    if hasattr(model, "contrastive_head"):
        return _retrieval(model, served)
    return _generation(model, served)


def use_block(model: Any, usage: CardUsage, source: str, first: str, options: str) -> str:
    """Code that loads a model by its Auto class and calls it once. `first` is a line to begin with, `options` are further
    arguments of `from_pretrained`."""
    config, auto_class = model.config, usage.auto_class
    calls = bool(usage.pipeline_tag or usage.head)
    fused = config.resolved_fused_inputs if hasattr(model, "classifier") else config.media
    takes_image = calls and "image" in fused
    takes_audio = calls and "audio" in fused and not takes_image
    lines = ["from PIL import Image"] if takes_image else []
    lines += [f"from transformers import {auto_class}, AutoProcessor", "", *([first, ""] if first else [])]
    lines.append(f'model = {auto_class}.from_pretrained("{source}"{options})')
    lines.append(f'processor = AutoProcessor.from_pretrained("{source}"{options})')
    if not calls:
        return "\n".join(lines)
    media, token = "", ""
    if takes_image:
        lines.append('image = Image.open("photo.jpg")  # any image')
        media, token = "images=image, ", "<image>"
    elif takes_audio:
        media, token = 'audio="audio.wav", ', "<audio>"
    if hasattr(model, "classifier"):
        arguments = media + ('text="what goes with it", ' if "text" in fused else "")
        lines.append(f'logits = model(**processor({arguments}return_tensors="pt")).logits[0]')
        if config.problem_type == "regression":
            lines.append("print(logits.tolist())")
        elif config.problem_type == "multi_label_classification":
            lines.append("print([model.config.id2label[i] for i, score in enumerate(logits.sigmoid()) if score > 0.5])")
        else:
            lines.append("print(model.config.id2label[logits.argmax().item()], logits.softmax(-1).max().item())")
    elif hasattr(model, "contrastive_head"):
        lines += [
            'texts = ["a photo of a cat", "a photo of a dog"]',
            'inputs = dict(processor.tokenizer(texts, padding=True, return_tensors="pt"))',
            'pixels = processor(images=image, return_tensors="pt")["pixel_values"]',
            "print(model(**inputs, pixel_values=pixels).logits_per_image)  # the larger, the likelier",
        ]
    else:
        lines += [
            f'inputs = processor({media}text="{token}\\nQuestion: what is it? Answer:", return_tensors="pt")',
            "print(processor.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))",
        ]
    return "\n".join(lines)


__all__ = ["CardUsage", "card_usage", "connector_rows", "media_inputs", "media_written", "use_block"]
