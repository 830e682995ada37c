"""Lengths are those of the batches that the collator makes, and Trainer groups by them."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pictures
from transformers import Trainer

from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.data.lengths import add_lengths
from tests.helpers.tiny import join, rows
from tests.helpers.training import arguments


def length_of(row: dict, collator: DataCollatorForFrozenPrefix) -> int:
    """By way of a dataset of one row, unless its image is an object, which only a list holds."""
    return add_lengths(Dataset.from_list([row]), collator)["length"][0]


def test_a_length_is_that_of_the_row_alone_in_a_batch(tmp_path: Path) -> None:
    _, processor = join(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor, max_length=16)
    picture = rows(1)[0]["image"]
    several = [
        {"image": picture, "text": "a red square ."},
        {"image": None, "text": "a red square ."},
        {"images": [picture, picture], "prompt": "what colour ?", "answer": "red"},
        {"image": picture, "text": "a " * 30},
        {"messages": [{"role": "user", "content": "what is that ?"}, {"role": "assistant", "content": "a square"}]},
    ]
    processor.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    lengths = [length_of(row, collator) for row in several]
    assert lengths == [collator([row])["attention_mask"].sum().item() for row in several]
    assert lengths[3] == 16 and len(set(lengths)) > 3
    state = torch.get_rng_state()
    texts = ["a square .", "a red square that is red ."]
    both = [length_of({"image": picture, "text": text}, collator) for text in texts]
    assert length_of({"image": picture, "text": texts}, collator) == sum(both) / 2
    assert torch.equal(state, torch.get_rng_state())


def test_of_encoder_decoders_both_sides_count(tmp_path: Path) -> None:
    _, processor = join(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor, is_encoder_decoder=True)
    for row in ({"image": rows(1)[0]["image"], "prompt": "what ?", "answer": text} for text in ("red", "a red square .")):
        batch = collator([row])
        assert length_of(row, collator) == batch["input_ids"].numel() + batch["labels"].numel()


def test_pictures_stay_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = join(tmp_path)
    data = [{**row, "images": [row["image"]]} for row in rows(3)]
    features = Features({"image": Image(), "images": Sequence(Image()), "text": Value("string")})
    dataset = Dataset.from_list(data, features=features)
    collator = DataCollatorForFrozenPrefix(processor)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a picture was opened")

    with monkeypatch.context() as patched:
        patched.setattr(Pictures, "open", refuse)
        with_lengths = add_lengths(dataset, collator, batch_size=2)
    assert list(with_lengths["length"]) == [length_of(row, collator) for row in data]
    assert with_lengths.features["image"].decode and with_lengths[0]["image"].size == (20, 18)


def test_trainer_groups_by_them(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    data = [{**row, "text": " ".join(["a"] * (1 + 7 * i % 32))} for i, row in enumerate(rows(32))]
    collator, padding = DataCollatorForFrozenPrefix(processor), {}
    dataset = add_lengths(Dataset.from_list(data, features=Features({"image": Image(), "text": Value("string")})), collator)
    for strategy in ("random", "group_by_length"):
        masks = []

        def noting(batch: list, masks: list = masks) -> dict[str, torch.Tensor]:
            batch = collator(batch)
            masks.append(batch["attention_mask"])
            return batch

        Trainer(
            model=model,
            args=arguments(tmp_path / strategy, train_sampling_strategy=strategy, max_steps=8),
            train_dataset=dataset,
            data_collator=noting,
        ).train()
        padding[strategy] = sum((mask == 0).sum().item() for mask in masks)
        assert len(masks) == 8
    assert padding["group_by_length"] < 0.6 * padding["random"]


def test_what_cannot_be_grouped_is_said(tmp_path: Path) -> None:
    _, processor = join(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor)
    dataset = Dataset.from_list([{"image": None, "text": "a", "length": 1}])
    with pytest.raises(ValueError, match="length_column_name"):
        add_lengths(dataset, collator)
    with pytest.raises(TypeError, match="stream"):
        add_lengths(dataset.to_iterable_dataset(), collator)
    with pytest.raises(TypeError, match="from_list"):
        add_lengths(rows(2), collator)
