"""One checkpoint that writes prefixes of several lengths: each as a model of that length, followed by the placeholders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from modeling_frozen.data.feature_cache import cache_vision_features
from tests.helpers.families_joined import CONNECTOR_SIZES
from tests.helpers.tiny import join, rows, save_parents


datasets = pytest.importorskip("datasets")
Model = FrozenPrefixForConditionalGeneration
QUERIES, GRIDS = ["resampler", "transformer", "qformer", "lstm"], ["avg_pool", "c_abstractor"]
LENGTHS = {**dict.fromkeys(QUERIES, [1, 2, 5]), **dict.fromkeys(GRIDS, [1, 4])}


def several(folder: Path, connector: str = "resampler", **options: Any) -> tuple[Model, FrozenPrefixProcessor]:
    sizes = {"connector_config": CONNECTOR_SIZES.get(connector, {}), "prefix_lengths": LENGTHS[connector]}
    model, processor = join(folder, connector_type=connector, **{**sizes, **options})
    return model.eval(), processor


def asked(processor: FrozenPrefixProcessor, length: int | None, texts: Any = "a <image> square", images: int = 1) -> Any:
    own = [row["image"] for row in rows(images)]
    return processor(images=own, text=texts, prefix_length=length, padding=True, return_tensors="pt")


@pytest.mark.parametrize("connector", [*QUERIES, *GRIDS])
@torch.no_grad()
def test_each_length_is_that_of_a_model_built_so(connector: str, tmp_path: Path) -> None:
    model, processor = several(tmp_path, connector)
    assert model.config.prefix_length == processor.prefix_length == max(LENGTHS[connector])
    for length in LENGTHS[connector]:
        config = {"connector_config": CONNECTOR_SIZES.get(connector, {}), "prefix_length": length}
        alone, its_processor = join(tmp_path, connector_type=connector, **config)
        weights = model.model.connector.state_dict()
        if "queries" in weights:
            weights["queries"] = weights["queries"][:length]
        alone.eval().model.connector.load_state_dict(weights)
        inputs, its_inputs = (
            asked(processor, length),
            its_processor(images=rows(1)[0]["image"], text="a <image> square", return_tensors="pt"),
        )
        assert torch.equal(inputs["input_ids"], its_inputs["input_ids"])
        torch.testing.assert_close(model(**inputs).logits, alone(**its_inputs).logits)
        answers = [one.generate(**inputs, max_new_tokens=4, do_sample=False) for one in (model, alone)]
        assert torch.equal(*answers)
    assert torch.equal(asked(processor, None)["input_ids"], asked(processor, max(LENGTHS[connector]))["input_ids"])


@torch.no_grad()
def test_beams_batches_caches_and_stored_features_follow_the_placeholders(tmp_path: Path) -> None:
    model, processor = several(tmp_path)
    texts = ["a <image> square", "that <image> is <image> what"]
    inputs = asked(processor, 2, texts, images=3)
    alone = [
        asked(processor, 2),
        processor(images=[r["image"] for r in rows(3)[1:]], text=texts[1], prefix_length=2, return_tensors="pt"),
    ]
    logits = [model(**one).logits[0, -1] for one in alone]
    torch.testing.assert_close(model(**inputs).logits[:, -1], torch.stack(logits), atol=1e-5, rtol=1e-4)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    assert model.generate(**inputs, **options).shape[0] == 4
    question = torch.tensor([[7]])
    ids = torch.cat([alone[0]["input_ids"], question], dim=1)
    whole = model.generate(ids, pixel_values=alone[0]["pixel_values"], max_new_tokens=3, do_sample=False)
    prefix = model.encode_prefix(**alone[0])
    continued = model.generate(input_ids=question, prefix_cache=prefix, max_new_tokens=3, do_sample=False)
    assert torch.equal(continued[:, -3:], whole[:, -3:])
    stored = cache_vision_features(
        datasets.Dataset.from_list(rows(3)), model, processor, cache_dir=tmp_path / "store", num_workers=0, dtype="float32"
    )
    for length in (1, 5):
        collators = [DataCollatorForFrozenPrefix(processor, prefix_length=length) for _ in range(2)]
        batches = [collator(list(kind)) for collator, kind in zip(collators, (stored, rows(3)), strict=True)]
        assert (batches[0]["input_ids"] == processor.image_token_id).sum() == 3 * length
        torch.testing.assert_close(*(model(**batch).loss for batch in batches))


def test_it_comes_back_and_goes_elsewhere(tmp_path: Path) -> None:
    model, processor = several(tmp_path)
    model.save_pretrained(tmp_path / "eyes"), processor.save_pretrained(tmp_path / "eyes")
    assert json.loads((tmp_path / "eyes" / "config.json").read_text())["prefix_lengths"] == [1, 2, 5]
    loaded, reader = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "eyes"),
        AutoProcessor.from_pretrained(tmp_path / "eyes"),
    )
    assert reader.prefix_lengths == [1, 2, 5]
    for length in (1, 5):
        assert torch.equal(loaded(**asked(reader, length)).logits, model(**asked(processor, length)).logits)
    reader.prefix_length = 2  # for all calls: what evaluates, chats and serves then writes so many
    assert (asked(reader, None)["input_ids"] == reader.image_token_id).sum() == 2
    chat = [{"role": "user", "content": [{"type": "image", "image": rows(1)[0]["image"]}, {"type": "text", "text": "what ?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    written = reader.apply_chat_template(chat, processor_kwargs={"prefix_length": 1}, **options)
    assert (written["input_ids"] == reader.image_token_id).sum() == 1


def test_a_length_is_drawn_for_each_batch_and_drawn_again_on_resume(tmp_path: Path) -> None:
    model, processor = several(tmp_path)
    lengths: list[list[int]] = []

    def train(folder: str, **options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        fresh, _ = several(tmp_path)
        seen: list[int] = []
        lengths.append(seen)
        collate = DataCollatorForFrozenPrefix(processor)

        def collator(batch: list[dict]) -> dict[str, Any]:
            made = collate(batch)
            seen.append(int((made["input_ids"] == processor.image_token_id).sum()) // len(batch))
            return made

        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=2,
            num_train_epochs=3,
            report_to=[],
            save_steps=5,
            save_strategy="steps",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(fresh, arguments, train_dataset=rows(8), data_collator=collator, processing_class=processor)
        trainer.train(**options)
        return {name: value.clone() for name, value in fresh.model.connector.state_dict().items()}

    whole = train("whole")
    assert len(lengths[0]) == 12 and set(lengths[0]) == {1, 2, 5}
    again = train("whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert lengths[1][-7:] == lengths[0][-7:]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_other_lengths_are_refused(tmp_path: Path) -> None:
    model, processor = several(tmp_path)
    with pytest.raises(ValueError, match=r"prefix_length=3: .* prefixes of 1 or 2 or 5 vectors"):
        asked(processor, 3)
    with pytest.raises(ValueError, match="A prefix of 3 vectors an image, and this model writes 1 or 2 or 5"):
        model.get_image_features(asked(processor, 1)["pixel_values"], prefix_length=3)
    inputs = asked(processor, 5)
    inputs["input_ids"] = inputs["input_ids"][:, :-2]  # a placeholder less, and a word
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match=r"hold 4 image placeholders for 1 images, .* one of \[1, 2, 5\]"):
        model(**{**inputs, "input_ids": torch.tensor([[1, *[processor.image_token_id] * 4, 5]])})
    plain, its_processor = join(tmp_path, connector_type="resampler", prefix_length=4)
    with pytest.raises(ValueError, match="prefix_length=2: .* prefixes of 4 vectors"):
        asked(its_processor, 2)
    v, t = save_parents(tmp_path / "again")
    for options, message in (
        ({"connector_type": "mlp"}, "needs a connector that can write shorter prefixes than its own, one of"),
        ({"fusion": "cross_attention"}, "'resampler' with 'cross_attention'"),
        ({"prefix_length": 3}, "the longest of them `prefix_length`, which is 3"),
        ({"prefix_lengths": [0, 4]}, "lengths of at least 1"),
        ({"connector_type": "avg_pool", "prefix_lengths": [1, 2]}, r"must be squares .*: \[2\] does not fit"),
    ):
        config = {"connector_type": "resampler", "prefix_lengths": [1, 4], **options}
        with pytest.raises(ValueError, match=message):
            Model.from_vision_text_pretrained(v, t, **config)
