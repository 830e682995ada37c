"""The classifier: its formula against a plain one, what trains, what is saved, and every way of giving it inputs."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_frozen import (
    DataCollatorForFrozenPrefixClassification,
    FrozenPrefixConfig,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixForSequenceClassification,
    FrozenPrefixProcessor,
)
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.hub import write_code
from modeling_frozen.metrics.scores import classification_compute_metrics
from modeling_frozen.modeling_frozen_prefix_classification import classification_loss, fuse
from modeling_frozen.text_reading import pool_text, read_text
from tests.helpers import fresh_python
from tests.helpers.audio_towers import AUDIO_TOWERS
from tests.helpers.families_text import FAMILIES, language_model
from tests.helpers.tiny import (
    COLOURS,
    WORDS,
    save_parents,
    skip_where_torch_traces_no_forward,
    text_config,
    tokenizer,
    vision_config,
)


Classifier = FrozenPrefixForSequenceClassification
TEXTS = ["a", "a picture", "what is that", "a square that is red"]


def join(folder: Path, **options: Any) -> tuple[Classifier, FrozenPrefixProcessor]:
    if not (folder / "tower").exists():
        save_parents(folder)
    options = {"connector_type": "mlp", "id2label": dict(enumerate(COLOURS)), **options}
    model = Classifier.from_vision_text_pretrained(str(folder / "tower"), str(folder / "words"), **options)
    return model, FrozenPrefixProcessor.from_model(model)


def rows(count: int = 8) -> list[dict[str, Any]]:
    colours = list(COLOURS.values())
    return [{"image": Image.new("RGB", (20, 18), colours[i % 4]), "text": TEXTS[i % 3], "label": i % 4} for i in range(count)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 3, "report_to": "none", "seed": 3,
        "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **options})


def inputs_of(processor: FrozenPrefixProcessor, count: int = 4, side: str = "left", **options: Any) -> dict[str, torch.Tensor]:
    images = [row["image"] for row in rows(count)]
    return dict(processor(images=images, text=TEXTS[:count], return_tensors="pt", padding=True, padding_side=side, **options))


# --- The formula -----------------------------------------------------------------------------------------------------


def plain_vector(model: Classifier, image: torch.Tensor, ids: list[int], pooling: str) -> torch.Tensor:
    """[f; p] / ||[f; p]||, one sample at a time, by the parents' own calls."""
    inner = model.model
    patches = inner.vision_tower(image[None]).last_hidden_state[:, 1:]
    f = inner.connector(patches)[0].mean(0)
    states = inner.language_model.model(torch.tensor([ids])).last_hidden_state[0]
    p = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]
    f, p = f / f.norm(), p / p.norm()
    both = torch.cat([f, p])
    return both / both.norm()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@torch.no_grad()
def test_the_formula_is_that_of_a_plain_implementation(tmp_path: Path, side: str, pooling: str) -> None:
    model, processor = join(tmp_path, text_pooling=pooling)
    inputs = inputs_of(processor, side=side)
    expected = torch.stack(
        [
            plain_vector(model, image, processor.tokenizer(text).input_ids, pooling)
            for image, text in zip(inputs["pixel_values"], TEXTS, strict=True)
        ]
    )
    vector = model.get_fused_features(**inputs)
    torch.testing.assert_close(vector, expected)
    torch.testing.assert_close(vector.norm(dim=-1), torch.ones(4))
    head = model.classifier
    logits = nn.functional.gelu(expected @ head.dense.weight.T + head.dense.bias) @ head.out_proj.weight.T
    torch.testing.assert_close(model(**inputs).logits, logits + head.out_proj.bias)


def test_fusing_lets_no_part_drown_another() -> None:
    first, second = torch.randn(3, 5), torch.randn(3, 7)
    expected = torch.cat([first / first.norm(dim=-1, keepdim=True), second / second.norm(dim=-1, keepdim=True)], -1)
    torch.testing.assert_close(fuse([first * 1000, second]), expected / 2**0.5)
    torch.testing.assert_close(fuse([first.bfloat16()]).norm(dim=-1), torch.ones(3))


def test_pooling_on_both_sides_of_the_words() -> None:
    states = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    states[mask == 0] = float("nan")
    for i, words in enumerate(states[i][mask[i].bool()] for i in range(3)):
        for pooling, expected in {"last": words[-1], "mean": words.mean(0), "cls": words[0]}.items():
            torch.testing.assert_close(pool_text(states, mask, pooling)[i], expected)
    with pytest.raises(ValueError, match="Text 1 of the batch is all padding"):
        pool_text(states, mask * torch.tensor([[1], [0], [1]]))
    with pytest.raises(ValueError, match="choose one of"):
        pool_text(states, mask, "max")
    with pytest.raises(ValueError, match="2-D mask"):
        pool_text(states, mask[:, :3])


@torch.no_grad()
def test_the_prompt_is_read_without_its_placeholders_unless_asked(tmp_path: Path) -> None:
    blind, processor = join(tmp_path, fused_inputs=("text",))
    inputs = inputs_of(processor)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    torch.testing.assert_close(blind(**inputs).logits, blind(**other).logits)
    words = processor.tokenizer(TEXTS, return_tensors="pt", padding=True)
    torch.testing.assert_close(blind(**words).logits, blind(**inputs).logits)
    seeing, _ = join(tmp_path, fused_inputs=("text",), prompt_sees_media=True)
    assert not torch.allclose(seeing(**inputs).logits, seeing(**other).logits)
    for row in range(4):  # by itself as in the batch
        alone = dict(processor(images=rows()[row]["image"], text=TEXTS[row], return_tensors="pt"))
        torch.testing.assert_close(seeing(**alone).logits[0], seeing(**inputs).logits[row], atol=1e-5, rtol=1e-4)


def test_a_text_that_stands_several_times_is_read_once(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    words = processor.tokenizer(["a", "a picture", "a", "a", "a picture"], return_tensors="pt", padding=True)
    lengths = []
    model.model.language_model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    states, mask, _ = read_text(model.model, words.input_ids, None, words.attention_mask)
    assert lengths == [2] and not states.requires_grad
    for row, text in enumerate(["a", "a picture", "a", "a", "a picture"]):
        alone = processor.tokenizer(text, return_tensors="pt").input_ids
        expected = model.model.language_model.model(alone).last_hidden_state[0]
        torch.testing.assert_close(states[row, : alone.shape[1]], expected)
        assert mask[row].sum() == alone.shape[1]
    model.model.language_model.requires_grad_(True)  # trained, it may have dropout, and each sample its own
    read_text(model.model, words.input_ids, None, words.attention_mask)
    assert lengths[-1] == 5


@torch.no_grad()
def test_image_alone_needs_no_text_and_text_alone_no_image(tmp_path: Path) -> None:
    model, processor = join(tmp_path, fused_inputs=("image",))
    inputs = inputs_of(processor)
    torch.testing.assert_close(model(pixel_values=inputs["pixel_values"]).logits, model(**inputs).logits)
    assert model.config.text_width is None and model.classifier.in_features == 32
    with pytest.raises(ValueError, match="there is no image"):
        model(input_ids=inputs["input_ids"])
    both, _ = join(tmp_path)
    with pytest.raises(ValueError, match="there is no text"):
        both(pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="must name, once each"):
        join(tmp_path, fused_inputs=("image", "smell"))


@torch.no_grad()
def test_the_towers_own_features_leave_the_connector_out(tmp_path: Path) -> None:
    model, processor = join(tmp_path, fused_inputs=("image",), image_embedding="tower")
    pixels = inputs_of(processor)["pixel_values"]
    expected = model.model.vision_tower(pixels).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(model.get_fused_features(pixel_values=pixels), fuse([expected]))
    model.model.connector.output.weight.mul_(-3)
    torch.testing.assert_close(model.get_fused_features(pixel_values=pixels), fuse([expected]))


@torch.no_grad()
def test_stored_features_and_images_of_several_samples(tmp_path: Path) -> None:
    for options in ({}, {"image_embedding": "tower"}):
        model, processor = join(tmp_path, **options)
        inputs = inputs_of(processor)
        pixels = inputs.pop("pixel_values")
        expected = model(**inputs, pixel_values=pixels[[0, 1, 1, 0]]).logits
        index = torch.tensor([0, 1, 1, 0])
        torch.testing.assert_close(model(**inputs, pixel_values=pixels[:2], image_index=index).logits, expected)
        features = model.model.vision_tower(pixels[:2]).last_hidden_state[:, 1:]
        torch.testing.assert_close(model(**inputs, vision_features=features, image_index=index).logits, expected)


@torch.no_grad()
def test_rows_of_a_store_are_collated_as_their_pictures(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    stored = cache_vision_features(Dataset.from_list(rows(4)), model, processor, cache_dir=tmp_path / "store", dtype="float32")
    collator = DataCollatorForFrozenPrefixClassification(processor)
    seen, read = (collator([data[i] for i in range(4)]) for data in (rows(4), stored))
    assert "pixel_values" not in read and read["labels"].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(model(**read).logits, model(**seen).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_comes_out(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    inputs = inputs_of(processor)
    output = model(**inputs, labels=torch.arange(4), output_hidden_states=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[-1].shape == (4, 6, 32)  # BOS and five words
    loss, logits = model(**inputs, labels=torch.arange(4), return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    embeds = model.get_input_embeddings()(processor.tokenizer(TEXTS[3], return_tensors="pt").input_ids)
    result = model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"][3:])
    torch.testing.assert_close(result.logits, output.logits[3:])
    prefix = {"image": model.model.get_image_features(inputs.pop("pixel_values"))}
    assert torch.equal(model(**inputs, mm_encoder_outputs=prefix).logits, output.logits)


@torch.no_grad()
def test_several_images_of_a_sample_are_counted_by_placeholders(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    images = [row["image"] for row in rows(3)]
    inputs = processor(images=[images[:2], images[2:]], text=["a", "a picture"], return_tensors="pt", padding=True)
    embeds = [prefix.mean(0) for prefix in model.model.get_image_features(inputs["pixel_values"]).pooler_output]
    f = torch.stack([(embeds[0] + embeds[1]) / 2, embeds[2]])
    torch.testing.assert_close(model.get_fused_features(**inputs)[:, :32], nn.functional.normalize(f, dim=-1) / 2**0.5)
    with pytest.raises(ValueError, match="3 images for 2 samples"):
        model(**{**inputs, **processor.tokenizer(["a", "a"], return_tensors="pt")})


def test_it_compiles_as_one_graph(tmp_path: Path) -> None:
    skip_where_torch_traces_no_forward()
    model, processor = join(tmp_path)
    inputs = inputs_of(processor)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_sounds_are_classified_by_the_same_formula(tmp_path: Path) -> None:
    config, kind, extractor = AUDIO_TOWERS["wav2vec2"]
    kind(config).save_pretrained(tmp_path / "audio")
    extractor().save_pretrained(tmp_path / "audio")
    _, words = save_parents(tmp_path)
    options = {"audio_prefix_length": 3, "audio_connector_config": {"num_heads": 2, "hidden_size": 16, "num_layers": 1}}
    model = Classifier.from_vision_text_pretrained(None, words, str(tmp_path / "audio"), num_labels=3, **options)
    assert model.config.resolved_fused_inputs == ("audio", "text")
    sounds = list(torch.randn(2, 800).numpy())
    processor = FrozenPrefixProcessor.from_model(model)
    inputs = processor(audio=sounds, text=["a", "a picture"], return_tensors="pt", padding=True)
    vector = model.get_fused_features(**inputs)
    for i, text in enumerate(["a", "a picture"]):
        alone = processor(audio=sounds[i], text=text, return_tensors="pt")
        prefix = model.model.get_audio_features(
            **{name: value for name, value in alone.items() if name.startswith("input_features")}
        ).pooler_output[0]
        expected = nn.functional.normalize(prefix.mean(0), dim=-1) / 2**0.5
        torch.testing.assert_close(vector[i, :32], expected, atol=1e-4, rtol=1e-3)
    batch = DataCollatorForFrozenPrefixClassification(processor)([{"audio": sounds[0], "text": "a", "label": 1}])
    assert model(**batch).loss.isfinite()


# --- Losses ----------------------------------------------------------------------------------------------------------


def test_problem_types_as_in_transformers() -> None:
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    logits, single = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, -100, 1])
    cases = [
        ("single_label_classification", 3, logits, single),
        ("multi_label_classification", 3, logits, torch.randint(0, 2, (6, 3)).float()),
        ("regression", 1, logits[:, :1], torch.randn(6)),
        ("regression", 3, logits, torch.randn(6, 3)),
    ]
    for problem_type, num_labels, values, labels in cases:
        config = type("Config", (), {"problem_type": problem_type, "num_labels": num_labels})()
        expected = ForSequenceClassificationLoss(labels, values, config)
        torch.testing.assert_close(classification_loss(values, labels, problem_type), expected)
    with pytest.raises(ValueError, match="takes \\(6,\\)"):
        classification_loss(logits, torch.zeros(6, 3), "single_label_classification")


def test_class_weights() -> None:
    logits, labels, weights = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, -100]), [1.0, 2.0, 0.5]
    each = nn.functional.cross_entropy(logits[:4], labels[:4], reduction="none")
    expected = (each * torch.tensor(weights)[labels[:4]]).sum() / 4
    torch.testing.assert_close(classification_loss(logits, labels, "single_label_classification", weights), expected)
    labels = torch.randint(0, 2, (5, 3)).float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(weights))
    torch.testing.assert_close(classification_loss(logits, labels, "multi_label_classification", weights), expected)


def test_the_problem_type_is_taken_from_the_labels_as_in_transformers(tmp_path: Path) -> None:
    for labels, options, kind in (
        (torch.arange(4), {}, "single_label_classification"),
        (torch.eye(4), {}, "multi_label_classification"),
        (torch.randn(4), {"id2label": {0: "how much"}}, "regression"),
    ):
        model, processor = join(tmp_path, **options)
        assert model(**inputs_of(processor), labels=labels).loss.isfinite() and model.config.problem_type == kind
    with pytest.raises(ValueError, match="holds 2 weights, for 4 labels"):
        join(tmp_path, class_weights=[1.0, 2.0])
    weighted, processor = join(tmp_path, class_weights=[1.0, 0.0, 0.0, 0.0])
    logits = weighted(**inputs_of(processor)).logits
    expected = nn.functional.cross_entropy(logits[:1], torch.tensor([0])) / 4
    torch.testing.assert_close(weighted(**inputs_of(processor), labels=torch.arange(4)).loss, expected)


# --- What trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prompt_sees_media": True}, {"fused_inputs": ("image",)}])
def test_gradients_reach_head_and_connector_and_nothing_else(tmp_path: Path, options: dict[str, Any]) -> None:
    model, processor = join(tmp_path, **options)
    model.train()
    model(**inputs_of(processor), labels=torch.arange(4)).loss.backward()
    own = {name for name, _ in model.named_parameters() if ".connector." in name or name.startswith("classifier.")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == own


@pytest.mark.parametrize("options", [{"fused_inputs": ("text",)}, {"image_embedding": "tower"}])
def test_an_idle_connector_has_a_gradient_of_zero(tmp_path: Path, options: dict[str, Any]) -> None:
    """Distributed training hangs on a parameter without any."""
    model, processor = join(tmp_path, **options)
    model.train()
    model(**inputs_of(processor), labels=torch.arange(4)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.grad.any() for p in model.model.connector.parameters())
    assert all(p.grad.any() for p in model.classifier.parameters())


def test_trainer_moves_head_and_connector_and_leaves_the_parents_bit_equal(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "run", eval_strategy="steps", eval_steps=3),
        train_dataset=rows(16),
        eval_dataset=rows(8),
        data_collator=DataCollatorForFrozenPrefixClassification(processor),
        compute_metrics=classification_compute_metrics,
        processing_class=processor,
    )
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    own = {name for name in before if ".connector." in name or name.startswith("classifier.")}
    assert moved == own
    assert {"eval_accuracy", "eval_f1"} <= set(trainer.state.log_history[-2])


def test_it_learns_what_only_the_picture_shows(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "run", max_steps=40, learning_rate=1e-2),
        train_dataset=rows(16),
        eval_dataset=rows(8),
        data_collator=DataCollatorForFrozenPrefixClassification(processor),
        compute_metrics=classification_compute_metrics,
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1
    shuffled = [{**row, "image": rows()[(i + 1) % 8]["image"]} for i, row in enumerate(rows())]
    assert trainer.evaluate(shuffled)["eval_accuracy"] == 0


@pytest.mark.parametrize("labels", ["single", "several"])
def test_gradient_accumulation_is_exact(tmp_path: Path, labels: str) -> None:
    data = rows(8)
    if labels == "several":
        data = [{**row, "label": torch.eye(4)[row["label"]].tolist()} for row in data]
    save_parents(tmp_path)
    weights = []
    for i, (size, steps) in enumerate(((8, 1), (2, 4))):
        torch.manual_seed(0)
        model, processor = join(tmp_path, classifier_config={"dropout": 0.0}, class_weights=[1.0, 2.0, 3.0, 4.0])
        args = arguments(
            tmp_path / f"run{i}", per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        )  # fmt: skip
        collator = DataCollatorForFrozenPrefixClassification(processor)
        Trainer(model=model, args=args, train_dataset=data, data_collator=collator).train()
        weights.append(model.classifier.out_proj.weight.detach())
    torch.testing.assert_close(*weights)


def test_a_frozen_head(tmp_path: Path) -> None:
    model, _ = join(tmp_path, trainable=("vision",))
    assert not any(p.requires_grad for p in model.classifier.parameters())
    assert all(p.requires_grad for p in model.model.vision_tower.parameters())


# --- Parents of every kind -------------------------------------------------------------------------------------------


def tiny_ids(config: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(2, 3, 16, 16)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_a_text_the_same_alone_and_padded(family: str) -> None:
    tower = CLIPVisionModel(vision_config())
    model = Classifier.from_vision_text_pretrained(tower, language_model(family), num_labels=3)
    inputs = tiny_ids(model.config)
    with torch.no_grad():
        logits = model(**inputs).logits
        left = {"input_ids": inputs["input_ids"].roll(2, 1), "attention_mask": inputs["attention_mask"].roll(2, 1)}
        alone = {"input_ids": inputs["input_ids"][1:, :2], "pixel_values": inputs["pixel_values"][1:]}
        torch.testing.assert_close(model(**alone).logits[0], logits[1], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            model(
                input_ids=torch.stack([inputs["input_ids"][0], left["input_ids"][1]]),
                attention_mask=torch.stack([inputs["attention_mask"][0], left["attention_mask"][1]]),
                pixel_values=inputs["pixel_values"],
            ).logits,
            logits, atol=1e-4, rtol=1e-3,
        )  # fmt: skip
        other = {**inputs, "input_ids": torch.tensor([[5, 6, 7, 9], [9, 11, 0, 0]])}
        assert not torch.allclose(model(**other).logits, logits, atol=1e-6)


def test_an_encoder_decoder_runs_its_encoder_alone(tmp_path: Path) -> None:
    tower, _ = save_parents(tmp_path)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=len(WORDS) + 7, pad_token_id=0, **sizes, **heads)).eval()
    model = Classifier.from_vision_text_pretrained(tower, bart, num_labels=3)
    assert model.config.resolved_text_pooling == "mean"
    bart.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
    inputs = tiny_ids(model.config)
    with torch.no_grad():
        states = bart.get_encoder()(inputs["input_ids"][1:, :2]).last_hidden_state[0]
        vector = model.get_fused_features(**inputs)
    expected = nn.functional.normalize(states.mean(0), dim=-1) / 2**0.5
    torch.testing.assert_close(vector[1, 32:], expected, atol=1e-5, rtol=1e-4)


def test_a_text_encoder_that_writes_nothing(tmp_path: Path) -> None:
    """BERT, from a folder of its own."""
    tower, words = save_parents(tmp_path)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    bert = BertModel(BertConfig(vocab_size=len(WORDS) + 7, **sizes), add_pooling_layer=False).eval()
    bert.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    model = Classifier.from_vision_text_pretrained(tower, str(tmp_path / "bert"), text_pooling="cls", num_labels=3)
    assert model.config.text_width == 24 and model.config.text_headless
    inputs = tiny_ids(model.config)
    with torch.no_grad():
        states = bert(inputs["input_ids"][1:, :2]).last_hidden_state[0]
        vector = model.get_fused_features(**inputs)
        torch.testing.assert_close(vector[1, 24:], nn.functional.normalize(states[0], dim=-1) / 2**0.5, atol=1e-5, rtol=1e-4)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(Classifier.from_pretrained(tmp_path / "saved").get_fused_features(**inputs), vector)


def test_half_precision_parents_and_an_fp32_head(tmp_path: Path) -> None:
    model, processor = join(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    for one in (model, again):
        assert one.model.language_model.dtype == one.model.vision_tower.dtype == torch.bfloat16
        assert {p.dtype for p in one.classifier.parameters()} == {torch.float32}
        output = one(**inputs_of(processor), labels=torch.arange(4))
        assert output.logits.dtype == output.loss.dtype == torch.float32
        output.loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in one.classifier.parameters())


def test_gated_blocks(tmp_path: Path) -> None:
    model, processor = join(
        tmp_path, fusion="cross_attention", connector_type="resampler", prefix_length=4, prompt_sees_media=True
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
        inputs = inputs_of(processor)
        other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
        width = model.config.embedding_dim
        assert model.get_fused_features(**inputs).shape == (4, 64)
        text = [model.get_fused_features(**one)[:, width:] for one in (inputs, other)]
        assert not torch.allclose(*text)
    model.train()
    model(**inputs, labels=torch.arange(4)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- Saving and loading ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_connector_and_head_and_comes_back(tmp_path: Path) -> None:
    options = {"fused_inputs": ("text", "image"), "classifier_config": {"hidden_size": 24}, "class_weights": [1.0] * 4}
    model, processor = join(tmp_path, **options)
    model.save_pretrained(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    own = {f"model.connector.{name}" for name in model.model.connector.state_dict()}
    assert names == own | {f"classifier.{name}" for name in model.classifier.state_dict()}
    inputs = inputs_of(processor)
    for auto in (Classifier, AutoModelForSequenceClassification, AutoModelForImageClassification):
        again = auto.from_pretrained(tmp_path / "saved")
        assert type(again) is Classifier and again.config.id2label == dict(enumerate(COLOURS))
        assert {name for name, p in again.named_parameters() if p.requires_grad} == names
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    model.save_pretrained(tmp_path / "whole", include_base_models=True)
    with torch.no_grad():
        assert torch.equal(Classifier.from_pretrained(tmp_path / "whole")(**inputs).logits, model(**inputs).logits)


def test_a_connector_that_learnt_captions_is_a_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower, words = save_parents(tmp_path)
    generator = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(tower, words)
    generator.save_pretrained(tmp_path / "eyes")
    assert not {"fused_inputs", "text_width"} & set(json.loads((tmp_path / "eyes" / "config.json").read_text()))
    model = Classifier.from_pretrained(tmp_path / "eyes", num_labels=5)
    for name, tensor in generator.model.connector.state_dict().items():
        assert torch.equal(model.model.connector.state_dict()[name], tensor)
    inputs = inputs_of(FrozenPrefixProcessor.from_model(model))
    assert model(**inputs).logits.shape == (4, 5)
    assert all(p.isfinite().all() for p in model.classifier.parameters())
    assert model.classifier.dense.weight.std().item() == pytest.approx(1, abs=0.1)


def test_a_constructed_model_comes_back_whole(tmp_path: Path) -> None:
    model = Classifier(FrozenPrefixConfig.from_vision_text_configs(vision_config(), text_config(), num_labels=3)).eval()
    model.save_pretrained(tmp_path / "saved")
    inputs = tiny_ids(model.config)
    with torch.no_grad():
        assert torch.equal(Classifier.from_pretrained(tmp_path / "saved")(**inputs).logits, model(**inputs).logits)


def test_parents_as_loaded_models(tmp_path: Path) -> None:
    model = Classifier.from_vision_text_pretrained(
        CLIPVisionModel(vision_config()), LlamaForCausalLM(text_config()), label2id={"no": 0, "yes": 1}
    )
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.text_width == 32
    with pytest.raises(ValueError, match="2 classes have names"):
        Classifier.from_vision_text_pretrained("tower", "words", num_labels=3, label2id={"no": 0, "yes": 1})


def test_transformers_pipelines(tmp_path: Path) -> None:
    """Each calls with one input: so image alone, or text alone, is what they serve."""
    for task, fused, value in (
        ("image-classification", ("image",), rows()[1]["image"]),
        ("text-classification", ("text",), "a picture"),
    ):
        model, processor = join(tmp_path, fused_inputs=fused)
        folder = tmp_path / fused[0]
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        kind = "images" if fused == ("image",) else "text"
        with torch.no_grad():
            probabilities = model(**processor(**{kind: value}, return_tensors="pt")).logits.softmax(-1)[0]
        result = pipeline(task, model=str(folder), device="cpu")(value)
        best = probabilities.argmax().item()
        assert result[0]["label"] == model.config.id2label[best]
        assert result[0]["score"] == pytest.approx(probabilities[best].item(), abs=1e-5)


def test_lora_trains_the_head_as_well(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from modeling_frozen.training.lora import lora_config

    model, processor = join(tmp_path)
    tuned = peft.get_peft_model(model, lora_config(model, r=2, task_type="SEQ_CLS"))
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert {"lora_A", "connector", "classifier"} == {
        next(part for part in ("lora_A", "lora_B", "connector", "classifier") if part in name).replace("_B", "_A")
        for name in trained
    }
    tuned.train()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    inputs = inputs_of(processor)
    tuned(**inputs, labels=torch.arange(4)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in tuned.named_parameters() if name in trained)
    tuned.eval()
    tuned.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(join(tmp_path)[0], tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, tuned(**inputs).logits)


REMOTE = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoProcessor, pipeline
from PIL import Image
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(images=Image.new("RGB", (20, 18), (220, 30, 30)), text="a picture", return_tensors="pt")
tasks = ["image-classification"] if sys.argv[2:] else []
names = [pipeline(task, model=sys.argv[2], trust_remote_code=True)(Image.new("RGB", (20, 18)))[0]["label"] for task in tasks]
print(json.dumps([type(model).__module__, model(**inputs).logits[0].tolist(), names]))
"""


def test_people_without_the_package(tmp_path: Path) -> None:
    folders = []
    for fused in (("image",), ("image", "text")):
        model, processor = join(tmp_path, fused_inputs=fused)
        folders.insert(0, str(tmp_path / f"pushed_{len(fused)}"))
        model.save_pretrained(folders[0])
        processor.save_pretrained(folders[0])
        write_code(folders[0])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = fresh_python.run("-c", REMOTE, *folders, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    module, logits, names = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.") and names[0] in COLOURS
    assert "is not supported for" not in done.stderr
    inputs = processor(images=Image.new("RGB", (20, 18), (220, 30, 30)), text="a picture", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(**inputs).logits[0])


# --- Collating -------------------------------------------------------------------------------------------------------


def test_the_collator_makes_what_the_processor_makes_and_labels(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    batch = DataCollatorForFrozenPrefixClassification(processor)(rows(3))
    texts = [row["text"] for row in rows(3)]
    images = [row["image"] for row in rows(3)]
    made = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="right")
    assert set(batch) == {*made, "labels"}
    assert all(torch.equal(batch[name], made[name]) for name in made)
    assert batch["labels"].tolist() == [0, 1, 2] and batch["labels"].dtype == torch.long


def test_each_text_of_a_row_has_its_label(tmp_path: Path) -> None:
    _, processor = join(tmp_path)
    data = [{**row, "text": [row["text"], "a"]} for row in rows(2)]
    batch = DataCollatorForFrozenPrefixClassification(processor, all_texts=True)(data)
    assert batch["labels"].tolist() == [0, 0, 1, 1] and batch["image_index"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "dtype", "shape"),
    [([1, 2], torch.long, (2,)), ([True, False], torch.long, (2,)), ([0.5, 1], torch.float, (2,)),
     ([[0, 1], [1, 1]], torch.float, (2, 2)), ([None, None], None, None)],
)  # fmt: skip
def test_kinds_of_labels(tmp_path: Path, labels: list[Any], dtype: Any, shape: Any) -> None:
    _, processor = join(tmp_path)
    data = [{**row, "label": label} for row, label in zip(rows(2), labels, strict=True)]
    batch = DataCollatorForFrozenPrefixClassification(processor)(data)
    result = batch.get("labels")
    assert (result is None) if dtype is None else (result.dtype == dtype and tuple(result.shape) == shape)


def test_rows_that_cannot_be_collated(tmp_path: Path) -> None:
    _, processor = join(tmp_path)
    collator = DataCollatorForFrozenPrefixClassification(processor)
    with pytest.raises(ValueError, match="Row 0: column 'label' holds 'red'"):
        collator([{**rows()[0], "label": "red"}])
    with pytest.raises(ValueError, match="Row 1: column 'label' holds None"):
        collator([rows()[0], {**rows()[1], "label": None}])
    with pytest.raises(ValueError, match="neither 'text' nor an image"):
        collator([{"label": 1}])
    with pytest.raises(ValueError, match="don't make a batch"):
        collator([{**rows()[0], "label": [1.0]}, {**rows()[0], "label": [1.0, 0.0]}])
    assert "pixel_values" not in collator([{"text": "a", "label": 1}])
    assert collator([{"image": rows()[0]["image"], "label": 1}])["pixel_values"].shape == (1, 3, 16, 16)
