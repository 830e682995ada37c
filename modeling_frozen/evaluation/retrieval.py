"""What is done with a trained FrozenPrefixForImageTextRetrieval: embeddings in batches, recall, zero-shot classification."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..connectors import in_eval_mode
from ..metrics.scores import recall_at_k


# The seven that CLIP's authors chose out of their eighty (their notebook on prompts for ImageNet).
CLIP_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def _device(model: Any) -> torch.device:
    return model.visual_projection.weight.device


def embed_images(model: Any, processor: Any, images: Sequence[Any], *, batch_size: int = 32) -> torch.Tensor:
    """
    Embeddings of images.

    Args:
        model ([`FrozenPrefixForImageTextRetrieval`]).
        processor ([`FrozenPrefixProcessor`]).
        images (`list`): images, paths, or rows of [`cache_vision_features`], for which no tower is run.
        batch_size (`int`, defaults to 32).

    Returns:
        `torch.FloatTensor` of shape `(images, projection_dim)`, each of length 1, on the CPU.
    """
    if len(images) == 0:
        raise ValueError("There are no images to embed. [errors.md#search]")
    if processor.crop_to_patches:
        raise ValueError(
            "crop_to_patches=True makes several tiles of an image, and an image is matched by one embedding: take a processor "
            "that does not. [errors.md#processor]"
        )
    embeds = []
    with torch.no_grad(), in_eval_mode(model):
        for start in range(0, len(images), batch_size):
            batch = list(images[start : start + batch_size])
            inputs = processor(images=batch, return_tensors="pt")
            inputs = {name: value.to(_device(model)) for name, value in inputs.items()}
            embeds.append(model.get_image_features(**inputs).pooler_output.float().cpu())
    return nn.functional.normalize(torch.cat(embeds), dim=-1)


def embed_texts(model: Any, processor: Any, texts: Sequence[str], *, batch_size: int = 64) -> torch.Tensor:
    """Embeddings of texts: `(texts, projection_dim)`, each of length 1, on the CPU. Arguments as [`embed_images`]. A text
    without a token is a ValueError."""
    if len(texts) == 0:
        raise ValueError("There are no texts to embed. [errors.md#search]")
    truncation = processor.tokenizer.model_max_length < int(1e20)
    embeds = []
    with torch.no_grad(), in_eval_mode(model):
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            inputs = processor.tokenizer(batch, padding=True, truncation=truncation, return_tensors="pt").to(_device(model))
            for index, tokens in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
                if not tokens:
                    raise ValueError(
                        f"Text {start + index} ({batch[index]!r:.40}) holds no token to embed: leave it out."
                        " [errors.md#padding]"
                    )
            embeds.append(model.get_text_features(**inputs).pooler_output.float().cpu())
    return nn.functional.normalize(torch.cat(embeds), dim=-1)


def class_embeddings(
    model: Any, processor: Any, class_names: Sequence[str], templates: Sequence[str] = CLIP_TEMPLATES
) -> torch.Tensor:
    """
    One vector per class: the mean of its name's embeddings in all templates (CLIP, arXiv 2103.00020, section 3.1.4; LiT's
    protocol too).

    Args:
        model, processor: as [`embed_images`].
        class_names (`list[str]`).
        templates (`list[str]`): with `{}` where the name goes; `["{}"]` for the bare name.

    Returns:
        `torch.FloatTensor` of shape `(classes, projection_dim)`, each of length 1.
    """
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise ValueError(
            f"Templates {wrong} lack `{{}}`, where the class's name goes; there must be at least one template."
            " [errors.md#range]"
        )
    prompts = [template.format(name) for name in class_names for template in templates]
    embeds = embed_texts(model, processor, prompts).unflatten(0, (len(class_names), len(templates)))
    return nn.functional.normalize(embeds.mean(1), dim=-1)


def zero_shot_classify(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    class_names: Sequence[str] | torch.Tensor,
    templates: Sequence[str] = CLIP_TEMPLATES,
    *,
    batch_size: int = 32,
) -> torch.Tensor:
    """
    Probabilities of classes that the model was never trained on.

    Args:
        model, processor, images, batch_size: as [`embed_images`].
        class_names (`list[str]` or `torch.Tensor`): names, or what [`class_embeddings`] gave for them before.
        templates (`list[str]`): as of [`class_embeddings`].

    Returns:
        `torch.FloatTensor` of shape `(images, classes)`. Rows sum to 1; with the sigmoid loss each class is a question of
        its own, and they don't.
    """
    if not isinstance(class_names, torch.Tensor):
        class_names = class_embeddings(model, processor, class_names, templates)
    likeness = embed_images(model, processor, images, batch_size=batch_size) @ class_names.T
    logits = likeness * model.logit_scale.detach().float().exp().clamp(max=100.0).cpu()
    if model.logit_bias is None:
        return logits.softmax(-1)
    return (logits + model.logit_bias.detach().float().cpu()).sigmoid()


def evaluate_retrieval(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    captions: Sequence[str | Sequence[str]],
    *,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 32,
) -> dict[str, float]:
    """
    Recall both ways (see [`recall_at_k`]) over all images and all their captions together.

    Args:
        model, processor, images, batch_size: as [`embed_images`].
        captions (`list`): of each image its caption, or all of them.
        ks (`list[int]`): the cut-offs.
    """
    if len(captions) != len(images):
        raise ValueError(
            f"{len(images)} images and captions of {len(captions)}: give a caption, or a list, for each image."
            " [errors.md#search]"
        )
    each = [[one] if isinstance(one, str) else list(one) for one in captions]
    owner = [index for index, several in enumerate(each) for _ in several]
    texts = embed_texts(model, processor, [text for several in each for text in several])
    return recall_at_k(embed_images(model, processor, images, batch_size=batch_size) @ texts.T, owner, ks)


__all__ = [
    "CLIP_TEMPLATES",
    "class_embeddings",
    "embed_images",
    "embed_texts",
    "evaluate_retrieval",
    "zero_shot_classify",
]
