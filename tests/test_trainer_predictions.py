"""What Trainer's evaluation hands to `compute_metrics`: logits, of every class and family, and nothing beside them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixCausalLMOutputWithPast,
    FrozenPrefixConfig,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixImageTextOutput,
    FrozenPrefixProcessor,
)
from modeling_frozen.metrics import argmax_logits, caption_compute_metrics
from tests.helpers.tiny import join, rows, save_parents, tokenizer


ARGUMENTS = {"per_device_eval_batch_size": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}


@pytest.mark.parametrize(
    ("output", "scores"),
    [
        (FrozenPrefixCausalLMOutputWithPast, {"logits"}),
        (SequenceClassifierOutput, {"logits"}),
        (FrozenPrefixImageTextOutput, {"logits_per_image", "logits_per_text", "text_embeds", "image_embeds"}),
    ],
)
def test_every_other_field_is_left_aside(output: type, scores: set[str]) -> None:
    fields = {field.name for field in dataclasses.fields(output)} - {"loss"}
    assert fields - set(FrozenPrefixConfig.keys_to_ignore_at_inference) == scores


def encoder_decoder(folder: Path) -> tuple[Any, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    tower, words = save_parents(folder)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=24, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(words)
    tokenizer(bos=False).save_pretrained(words)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words)
    return model, FrozenPrefixProcessor.from_model(model)


MODELS = {
    "decoder": join,
    "gated blocks": lambda folder: join(folder, connector_type="resampler", prefix_length=4, fusion="cross_attention"),
    "encoder-decoder": encoder_decoder,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_predictions_are_logits(kind: str, inside: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = MODELS[kind](tmp_path)
    if inside:
        model.config.output_hidden_states = model.config.text_config.output_hidden_states = True
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": 1.0}

    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "out"), remove_unused_columns=False, **ARGUMENTS),
        eval_dataset=rows(5),
        data_collator=DataCollatorForFrozenPrefix(processor),
        compute_metrics=compute_metrics,
    )
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    (prediction,) = seen
    vocabulary = model.model.language_model.get_output_embeddings().out_features
    assert isinstance(prediction.predictions, np.ndarray), type(prediction.predictions)
    assert prediction.predictions.shape == (*prediction.label_ids.shape, vocabulary) and len(prediction.label_ids) == 5


def seq2seq_trainer(model: Any, processor: Any, folder: Path, **options: Any) -> Seq2SeqTrainer:
    arguments = Seq2SeqTrainingArguments(
        str(folder / "out"), predict_with_generate=True, generation_max_length=6, remove_unused_columns=False, **ARGUMENTS
    )
    collator = DataCollatorForFrozenPrefix(processor)
    return Seq2SeqTrainer(
        model, arguments, eval_dataset=rows(4), data_collator=collator, processing_class=processor, **options
    )


@pytest.mark.parametrize("kind", ["decoder", "gated blocks"])
def test_a_decoder_never_generates_after_its_own_answer(kind: str, tmp_path: Path) -> None:
    model, processor = MODELS[kind](tmp_path)
    metrics = caption_compute_metrics(processor, generated=True)
    trainer = seq2seq_trainer(model, processor, tmp_path, compute_metrics=metrics)
    with pytest.raises(ValueError, match="predict_with_generate.*prompts hold the answers.*EvaluationCallback"):
        trainer.evaluate()


def test_an_encoder_decoder_generates_in_trainer_what_it_generates(tmp_path: Path) -> None:
    model, processor = encoder_decoder(tmp_path)
    trainer = seq2seq_trainer(
        model, processor, tmp_path, compute_metrics=caption_compute_metrics(processor, generated=True, is_encoder_decoder=True)
    )
    output = trainer.predict(rows(4))
    assert 0 <= output.metrics["test_cider"]
    inputs = processor(images=[row["image"] for row in rows(4)], text=["<image>"] * 4, return_tensors="pt")
    expected = model.generate(**inputs, max_length=6)
    assert np.array_equal(output.predictions[:, : expected.shape[1]], expected.numpy())


def test_teacher_forced_scores_of_an_image_come_out_of_trainer(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "out"), remove_unused_columns=False, **ARGUMENTS),
        eval_dataset=rows(4),
        data_collator=DataCollatorForFrozenPrefix(processor),
        compute_metrics=caption_compute_metrics(processor),
        preprocess_logits_for_metrics=argmax_logits,
    )
    assert 0 <= trainer.evaluate()["eval_teacher_forced_token_accuracy"] <= 1
