"""Matching pictures and texts: any text model, a lock on either side, CLIP's conventions, and all the usual routes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from modeling_frozen import (
    DataCollatorForFrozenPrefixRetrieval,
    FrozenPrefixConfig,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixModel,
    FrozenPrefixProcessor,
)
from modeling_frozen.data.feature_cache import cache_vision_features
from modeling_frozen.evaluation.retrieval import (
    class_embeddings,
    embed_images,
    embed_texts,
    evaluate_retrieval,
    zero_shot_classify,
)
from modeling_frozen.metrics.scores import retrieval_compute_metrics
from tests.helpers.tiny import COLOURS, WORDS, rows, save_parents, text_config, tokenizer, vision_config


Retrieval = FrozenPrefixForImageTextRetrieval

SMALL = {"vocab_size": len(WORDS) + 7, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT_MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL)),
    # projects both ends: its words are 16 wide, its layers 32, its last hidden states 16
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, do_layer_norm_before=False, **SMALL,
        )
    ),
    "bert": lambda: BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
            **SMALL,
        )
    ),
    # says nowhere whether it reads ahead, and has no class that writes
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64, **SMALL)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
            vocab_size=len(WORDS) + 7, pad_token_id=0, eos_token_id=2,
        )
    ),
}  # fmt: skip


def parents(folder: Path, text: str | None = None) -> tuple[str, str]:
    tower, words = save_parents(folder)
    if text is not None:
        words = str(folder / text)
        torch.manual_seed(0)
        TEXT_MODELS[text]().save_pretrained(words)
        tokenizer().save_pretrained(words)
    return tower, words


def retrieval_model(folder: Path, text: str | None = None, **options: Any) -> tuple[Retrieval, FrozenPrefixProcessor]:
    tower, words = parents(folder, text)
    torch.manual_seed(0)
    model = Retrieval.from_vision_text_pretrained(tower, words, **{"projection_dim": 16, **options})
    return model, FrozenPrefixProcessor.from_model(model)


def inputs(processor: FrozenPrefixProcessor, side: str = "right", count: int = 4) -> dict[str, torch.Tensor]:
    texts = ["a red square .", "green", "a blue picture that is a square", "black square"][:count]
    read = processor.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    images = processor(images=[row["image"] for row in rows(count)], return_tensors="pt")
    return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], **images}


def parts_saved(folder: Path) -> set[str]:
    names = load_file(folder / "model.safetensors")
    return {name.split(".")[1] if name.startswith("model.") else name.split(".")[0] for name in names}


# -------------------------------------------------------------------------------------------------------- text models


@pytest.mark.parametrize("pooling", ["last", "mean", "cls", "ret"])
@pytest.mark.parametrize("text", [None, *TEXT_MODELS])
def test_padding_on_either_side_changes_nothing(tmp_path: Path, text: str | None, pooling: str) -> None:
    if pooling == "cls" and text in (None, "gpt2", "opt"):
        with pytest.raises(ValueError, match="all texts would be the same"):
            retrieval_model(tmp_path, text, text_pooling=pooling)
        return
    model, processor = retrieval_model(tmp_path, text, text_pooling=pooling)
    assert model.config.text_headless == (text in ("bert", "distilbert"))
    alone = []
    for one in ["a red square .", "green", "a blue picture that is a square", "black square"]:
        alone.append(model.get_text_features(**processor.tokenizer([one], return_tensors="pt")).pooler_output)
    for side in ("left", "right"):
        batch = inputs(processor, side)
        embeds = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        torch.testing.assert_close(embeds, torch.cat(alone), atol=2e-5, rtol=1e-4)
    assert embeds.shape == (4, 16) and not torch.allclose(embeds[0], embeds[1])


def test_pooling_by_default_is_the_text_model_s(tmp_path: Path) -> None:
    for text, pooling in {None: "last", "gpt2": "last", "bert": "mean", "distilbert": "mean", "t5": "mean"}.items():
        assert retrieval_model(tmp_path, text)[0].config.resolved_text_pooling == pooling


@pytest.mark.parametrize(
    ("described", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),  # of the same direction
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, "mean"),  # there is none such here: the default, and a warning
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean"),
    ],
)
def test_a_sentence_encoder_s_own_pooling_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, described: dict[str, Any], pooling: str
) -> None:
    tower, words = parents(tmp_path, "bert")
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "7_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (Path(words) / "modules.json").write_text(json.dumps(modules))
    (Path(words) / "7_Pooling").mkdir()
    (Path(words) / "7_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **described}))
    with caplog.at_level("WARNING"):
        model = Retrieval.from_vision_text_pretrained(tower, words, projection_dim=16)
    assert model.config.resolved_text_pooling == pooling
    assert ("max" in str(described)) == ("pools its words by" in caplog.text)
    assert Retrieval.from_vision_text_pretrained(tower, words, text_pooling="last").config.text_pooling == "last"
    model.save_pretrained(tmp_path / "saved")
    assert Retrieval.from_pretrained(tmp_path / "saved").config.resolved_text_pooling == pooling


def test_pooling_reads_the_place_it_names(tmp_path: Path) -> None:
    """Against hidden states of the language model itself."""
    model, processor = retrieval_model(tmp_path, text_pooling="last")
    ids = processor.tokenizer(["a red square ."], return_tensors="pt")["input_ids"]
    states = model.model.language_model.model(ids).last_hidden_state[0]
    for pooling, pooled in {"last": states[-1], "mean": states.mean(0)}.items():
        model.config.text_pooling = pooling
        torch.testing.assert_close(model.get_text_features(ids).pooler_output[0], model.text_projection(pooled))


def test_with_a_text_model_that_only_reads_the_tower_is_embedded_itself(tmp_path: Path) -> None:
    """A prefix is for a language model to read; where there is none, the connector would only stand in between."""
    for text, embedding in {None: "prefix", "gpt2": "prefix", "t5": "prefix", "bert": "tower", "distilbert": "tower"}.items():
        assert retrieval_model(tmp_path, text)[0].config.image_embedding == embedding
    asked = retrieval_model(tmp_path, "bert", connector_type="mlp", prefix_length=None)[0]
    assert asked.config.image_embedding == "prefix" and asked.visual_projection.in_features == asked.config.embedding_dim
    with pytest.raises(ValueError, match="choose one"):
        retrieval_model(tmp_path, image_embedding="tower", caption_loss_weight=1.0)

    model, processor = retrieval_model(tmp_path, "bert", trainable=("connector", "text"))
    batch = inputs(processor)
    with torch.no_grad():
        features = model.model.read_images({"pixel_values": batch["pixel_values"]}, {})[0]
        expected = model.visual_projection(features.mean(1))
        seen = model.get_image_features(batch["pixel_values"], output_hidden_states=True)
        torch.testing.assert_close(seen.pooler_output, expected)
        assert seen.hidden_states is not None
        stored = model.get_image_features(vision_features=features, image_index=torch.tensor([2, 0])).pooler_output
        torch.testing.assert_close(stored, expected[[2, 0]])
    output = model.train()(**batch)
    output.loss.backward()
    assert model.visual_projection.weight.grad.abs().sum() > 0
    for parameter in model.model.connector.parameters():  # a gradient, if zero: distributed training waits for one
        assert parameter.grad is not None and not parameter.grad.any()
    model.eval().save_pretrained(tmp_path / "saved")
    again = Retrieval.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.get_image_features(batch["pixel_values"]).pooler_output, expected)


@pytest.mark.parametrize("text", ["gpt2", "bert"])
def test_what_the_image_projection_reads_is_dropped_in_training_alone(tmp_path: Path, text: str) -> None:
    """From the prefix's mean and from the tower's: some of it is zero, the rest larger by as much; texts lose nothing."""
    model, processor = retrieval_model(tmp_path, text, projection_dropout=0.5, projection_dim=8)
    assert FrozenPrefixConfig.from_dict(model.config.to_dict()).projection_dropout == 0.5
    batch = inputs(processor)
    seen: list[torch.Tensor] = []
    model.visual_projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.get_image_features(batch["pixel_values"])
    words = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    model.train()
    model.get_image_features(batch["pixel_values"])
    whole, dropped = seen
    kept = dropped != 0
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    torch.testing.assert_close(model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output, words)
    with pytest.raises(ValueError, match="`projection_dropout=1.0` must be at least 0 and below 1"):
        FrozenPrefixConfig(projection_dropout=1.0)


def test_projections_of_a_tower_start_as_those_of_transformers(tmp_path: Path) -> None:
    model, _ = retrieval_model(tmp_path, "bert", projection_dim=512)
    for projection in (model.visual_projection, model.text_projection):
        torch.testing.assert_close(projection.weight.std(), torch.tensor(0.02), atol=0, rtol=0.1)


def test_ret_is_read_behind_the_words(tmp_path: Path) -> None:
    model, processor = retrieval_model(tmp_path, text_pooling="ret")
    ids = processor.tokenizer(["a red square ."], return_tensors="pt")["input_ids"]
    language_model = model.model.language_model
    words = torch.cat([language_model.get_input_embeddings()(ids), model.contrastive_head.ret[None, None]], dim=1)
    state = language_model.model(inputs_embeds=words).last_hidden_state[0, -1]
    torch.testing.assert_close(model.get_text_features(ids).pooler_output[0], model.text_projection(state))
    norms = language_model.get_input_embeddings().weight.norm(dim=-1)
    torch.testing.assert_close(model.contrastive_head.ret.norm(), norms.median(), rtol=0.05, atol=0)
    assert model.train()(**inputs(processor)).loss.backward() is None
    assert model.contrastive_head.ret.grad.abs().sum() > 0


def test_a_text_half_of_a_dual_model_serves(tmp_path: Path) -> None:
    tower, _ = parents(tmp_path)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(text_config={**small, **SMALL}, vision_config=vision_config().to_dict(), projection_dim=8)
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path / "clip")
    tokenizer().save_pretrained(tmp_path / "clip")
    model = Retrieval.from_vision_text_pretrained(tower, str(tmp_path / "clip"))
    assert model.config.text_pooling == "last"
    assert type(model.model.language_model).__name__ == "CLIPTextModel" and model.config.text_headless
    ids = torch.tensor([[1, 4, 5, 6]])
    states = model.get_text_features(ids).last_hidden_state
    torch.testing.assert_close(states, whole.text_model(input_ids=ids).last_hidden_state)
    model.save_pretrained(tmp_path / "out")
    assert parts_saved(tmp_path / "out") == {"connector", "contrastive_head"}
    again = Retrieval.from_pretrained(tmp_path / "out")
    assert torch.equal(again.get_text_features(ids).pooler_output, model.get_text_features(ids).pooler_output)


def test_what_only_reads_does_not_write(tmp_path: Path) -> None:
    model, _ = retrieval_model(tmp_path, "bert")
    with pytest.raises(ValueError, match="reads texts and writes none"):
        _ = model.generator
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="reads and doesn't write"):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="lacks|reads ahead"):
        FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(*parents(tmp_path, "bert"))
    with pytest.raises(ValueError, match="only reads"):
        retrieval_model(tmp_path, "bert", caption_loss_weight=1.0)


# -------------------------------------------------------------------------------------------------------- conventions


def test_outputs_are_those_of_clip(tmp_path: Path) -> None:
    model, processor = retrieval_model(tmp_path)
    batch = inputs(processor)
    out = model(**batch)
    assert out.loss is None and list(out.keys())[:4] == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    images = nn.functional.normalize(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    texts = nn.functional.normalize(model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output, dim=-1)
    torch.testing.assert_close(out.image_embeds, images)
    torch.testing.assert_close(out.logits_per_image, images @ texts.T * model.logit_scale.exp())
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)
    prefix = model.model.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(images, nn.functional.normalize(model.visual_projection(torch.stack(prefix).mean(1)), dim=-1))
    as_tuple = model(**batch, return_dict=False, return_loss=True)
    torch.testing.assert_close(as_tuple[1], out.logits_per_image)
    # two images, four texts: fine to look at, no pairs to learn from
    assert model(**{**batch, "pixel_values": batch["pixel_values"][:2]}).logits_per_image.shape == (2, 4)
    with pytest.raises(ValueError, match="takes pairs"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]}, return_loss=True)
    with pytest.raises(ValueError, match="`input_ids` is missing"):
        model(pixel_values=batch["pixel_values"])


@pytest.mark.parametrize("loss", ["clip", "siglip", "triplet"])
def test_every_loss_learns_to_match(tmp_path: Path, loss: str) -> None:
    model, processor = retrieval_model(tmp_path, contrastive_loss_type=loss)
    assert (model.logit_bias is not None) == (loss == "siglip")
    batch = inputs(processor)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert model.eval()(**batch).logits_per_image.argmax(-1).tolist() == [0, 1, 2, 3]


def test_an_image_of_several_texts_is_encoded_once(tmp_path: Path) -> None:
    model, processor = retrieval_model(tmp_path)
    batch = inputs(processor)
    twice = {**batch, "pixel_values": batch["pixel_values"][[0, 1, 0, 1]]}
    shared = {**batch, "pixel_values": batch["pixel_values"][:2], "image_index": torch.tensor([0, 1, 0, 1])}
    plain = model(**twice, return_loss=True)
    named = model(**twice, return_loss=True, image_ids=torch.tensor([5, 6, 5, 6]))
    once = model(**shared, return_loss=True)
    torch.testing.assert_close(once.logits_per_text, plain.logits_per_text)
    torch.testing.assert_close(once.loss, named.loss)
    assert not torch.isclose(once.loss, plain.loss)


# ------------------------------------------------------------------------------------------------------------ the lock


LOCKS = [
    (("connector",), {}, {"connector", "contrastive_head"}),
    (("text",), {}, {"language_model"}),
    (("connector", "text"), {}, {"connector", "contrastive_head", "language_model"}),
    (("vision",), {}, {"vision_tower"}),
    (("connector",), {"text": 1}, {"connector", "contrastive_head", "language_model"}),
    (("connector",), {"vision": 1}, {"connector", "contrastive_head", "vision_tower"}),
]


@pytest.mark.parametrize(("trainable", "unlocked", "learns"), LOCKS)
def test_only_what_is_unlocked_learns_and_it_is_saved(
    tmp_path: Path, trainable: tuple[str, ...], unlocked: dict[str, int], learns: set[str]
) -> None:
    model, processor = retrieval_model(tmp_path, trainable=trainable, unlocked_layers=unlocked)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = inputs(processor)
    for _ in range(2):
        model.train()(**batch).loss.backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    parts = {name.removeprefix("model.").split(".")[0] for name in changed}
    assert parts == learns
    if unlocked:
        first = [name for name in changed if "layers.0." in name]
        last = [name for name in changed if "layers.1." in name]
        assert last and not first and not any("embed" in name for name in changed)
    model.eval().save_pretrained(tmp_path / "out")
    assert parts_saved(tmp_path / "out") == {"connector", "contrastive_head"} | (learns & {"language_model", "vision_tower"})
    again = Retrieval.from_pretrained(tmp_path / "out")
    assert torch.equal(again(**batch).logits_per_text, model(**batch).logits_per_text)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, parameter in again.named_parameters() if parameter.requires_grad}


def test_unlocked_layers_work_in_train_mode_and_others_do_not(tmp_path: Path) -> None:
    model, _ = retrieval_model(tmp_path, unlocked_layers={"vision": 1})
    layers = model.train().model.vision_tower.encoder.layers
    assert layers[1].self_attn.training and not layers[0].self_attn.training
    with pytest.raises(ValueError, match="has 2 layers, so 3 of them"):
        retrieval_model(tmp_path, unlocked_layers={"vision": 3})
    with pytest.raises(ValueError, match="must say of some of"):
        FrozenPrefixConfig(unlocked_layers={"connector": 1})


def test_what_the_text_side_never_uses_does_not_train(tmp_path: Path) -> None:
    """The decoder of T5, an untied head: distributed training would wait for their gradients."""
    for text in ("t5", None):
        model, processor = retrieval_model(tmp_path, text, trainable=("connector", "text"))
        model.train()(**inputs(processor)).loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        language_model = model.model.language_model
        assert not language_model.lm_head.weight.requires_grad or language_model.config.tie_word_embeddings


def test_gated_blocks_do_not_stop_a_batch_that_matches_alone(tmp_path: Path) -> None:
    for weight in (0.0, 1.0):
        model, processor = retrieval_model(tmp_path, fusion="cross_attention", caption_loss_weight=weight)
        model.train()(**DataCollatorForFrozenPrefixRetrieval(processor, captions=weight > 0)(rows(4))).loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert model.visual_projection.weight.grad.abs().sum() > 0


def test_a_step_from_the_store_runs_no_tower(tmp_path: Path) -> None:
    """LiT from stored features costs the text side alone, and gives the same."""
    model, processor = retrieval_model(tmp_path, trainable=("connector", "text"))
    data = Dataset.from_list([{"image": row["image"], "text": row["text"]} for row in rows(4)])
    stored = cache_vision_features(data, model, processor, cache_dir=tmp_path / "store", dtype="float32", num_workers=0)
    collate = DataCollatorForFrozenPrefixRetrieval(processor)
    expected = model.train()(**collate(list(data))).loss
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    batch = collate(list(stored))
    assert "vision_features" in batch and "pixel_values" not in batch
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not calls


# -------------------------------------------------------------------------------------------- routes: Auto, pipeline, Trainer


def test_one_checkpoint_serves_every_class(tmp_path: Path) -> None:
    model, processor = retrieval_model(tmp_path)
    model.save_pretrained(tmp_path / "out")
    batch = inputs(processor)
    again = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "out")
    assert isinstance(again, Retrieval)
    assert torch.equal(again(**batch).logits_per_text, model(**batch).logits_per_text)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out"), FrozenPrefixModel)
    writer = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    prompt = processor(images=rows(1)[0]["image"], text="a", return_tensors="pt")
    expected = model.generator.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(writer.generate(**prompt, max_new_tokens=4, do_sample=False), expected)
    assert "contrastive_head.logit_scale" not in writer.state_dict()
    # a captioner is a good start: its connector, and projections that are new, not left empty
    writer.save_pretrained(tmp_path / "eyes")
    started = Retrieval.from_pretrained(tmp_path / "eyes", projection_dim=8, text_pooling="ret")
    assert torch.equal(started.model.connector.output.weight, model.model.connector.output.weight)
    assert started(**batch).logits_per_text.isfinite().all()
    torch.testing.assert_close(started.logit_scale.item(), 2.6592)
    assert started.contrastive_head.ret.norm() > 0.1


def test_transformers_pipeline_by_path(tmp_path: Path) -> None:
    model, processor = trained(tmp_path)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "out"))
    image = rows(1)[0]["image"]
    labels = classify(image, candidate_labels=list(COLOURS), hypothesis_template="a {} square .")
    assert labels[0]["label"] == "red"
    mine = zero_shot_classify(model, processor, [image], list(COLOURS), ["a {} square ."])[0]
    torch.testing.assert_close(labels[0]["score"], mine.max().item(), atol=1e-4, rtol=1e-3)


def trained(folder: Path) -> tuple[Retrieval, FrozenPrefixProcessor]:
    """A model that tells four colours apart."""
    model, processor = retrieval_model(folder, trainable=("connector", "text"))
    set_seed(0)
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=30, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[],
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True, eval_strategy="steps", eval_steps=30,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows(8),
        eval_dataset=rows(4),
        data_collator=DataCollatorForFrozenPrefixRetrieval(processor),
        compute_metrics=retrieval_compute_metrics(ks=(1,)),
    )
    predicted = trainer.predict(rows(4)).predictions
    assert [values.shape for values in predicted] == [(4, 4), (4, 4), (4, 16), (4, 16)]  # and no hidden states
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_loss"] < first["eval_loss"]  # it is there: `return_loss` and no label names
    assert last["eval_text_to_image_recall_at_1"] == last["eval_image_to_text_recall_at_1"] == 1
    return model.eval(), processor


def test_trainer_learns_to_retrieve_and_to_classify_without_labels(tmp_path: Path) -> None:
    model, processor = trained(tmp_path)
    squares = [row["image"] for row in rows(4)]
    recall = evaluate_retrieval(model, processor, squares, [[row["text"], row["text"]] for row in rows(4)], ks=(1, 2))
    assert recall["text_to_image_recall_at_1"] == 1 and recall["image_to_text_recall_at_1"] == 1
    scores = zero_shot_classify(model, processor, squares, list(COLOURS), ["a {} square .", "a picture that is {}"])
    assert scores.argmax(-1).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(scores.sum(-1), torch.ones(4))
    templates = ["a {} square .", "a picture that is {}"]
    classes = class_embeddings(model, processor, ["red", "blue"], templates)
    each = embed_texts(model, processor, [template.format("red") for template in templates])
    torch.testing.assert_close(classes[0], nn.functional.normalize(each.mean(0), dim=-1))
    torch.testing.assert_close(
        zero_shot_classify(model, processor, squares, classes),
        zero_shot_classify(model, processor, squares, ["red", "blue"], templates),
    )
    assert embed_images(model, processor, squares, batch_size=3).shape == (4, 16)
    with pytest.raises(ValueError, match="lack `{}`"):
        class_embeddings(model, processor, ["red"], ["a photo"])


# --------------------------------------------------------------------------------------------------- describing as well


def test_one_connector_describes_and_finds(tmp_path: Path) -> None:
    model, processor = retrieval_model(tmp_path, text_pooling="ret", caption_loss_weight=0.5, contrastive_loss_weight=2.0)
    collate = DataCollatorForFrozenPrefixRetrieval(processor, captions=True)
    batch = collate(rows(8))
    out = model(**batch)
    torch.testing.assert_close(out.loss, 2.0 * out.contrastive_loss + 0.5 * out.caption_loss)
    alone = model.generator(
        input_ids=batch["caption_input_ids"], attention_mask=batch["caption_attention_mask"],
        labels=batch["caption_targets"], pixel_values=batch["pixel_values"],
    )  # fmt: skip
    torch.testing.assert_close(out.caption_loss, alone.loss)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):  # 60 are enough from one random start, and not from that of another release
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    frozen = [p for p in model.model.language_model.parameters() if p.grad is not None or p.requires_grad]
    assert not frozen
    model.eval().save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    assert parts_saved(tmp_path / "out") == {"connector", "contrastive_head"}
    finder = Retrieval.from_pretrained(tmp_path / "out")
    squares = [row["image"] for row in rows(4)]
    recall = evaluate_retrieval(finder, processor, squares, [row["text"] for row in rows(4)], ks=(1,))
    assert recall["text_to_image_recall_at_1"] == 1
    writer = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    batch = processor(images=squares, text=[""] * 4, return_tensors="pt")
    written = writer.generate(**batch, max_new_tokens=5, do_sample=False)
    texts = processor.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(colour in text for colour, text in zip(COLOURS, texts, strict=True)) >= 3
    with pytest.raises(ValueError, match="needs captions"):
        finder(**DataCollatorForFrozenPrefixRetrieval(processor)(rows(4)))


def test_the_generator_shares_all_and_changes_nothing(tmp_path: Path) -> None:
    model, _ = retrieval_model(tmp_path, trainable=("connector", "text"))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = set(model.state_dict())
    model.train()
    assert model.generator is model.generator and model.generator.model is model.model and model.generator.training
    assert before == {name: p.requires_grad for name, p in model.named_parameters()} and keys == set(model.state_dict())
    assert not model.eval().generator.training
    assert isinstance(model.generator, PreTrainedModel) and model.generator.generation_config.eos_token_id == 2


# ------------------------------------------------------------------------------------------------------------ collator


def test_the_collator_knows_which_pairs_show_one_image(tmp_path: Path) -> None:
    _, processor = retrieval_model(tmp_path)
    collate = DataCollatorForFrozenPrefixRetrieval(processor)
    red, copy, blue = (Image.new("RGB", (16, 16), COLOURS[name]) for name in ("red", "red", "blue"))
    texts = ["a red square .", ["red", "square"], "blue"]
    batch = collate([{"image": image, "text": text} for image, text in zip((red, copy, blue), texts, strict=True)])
    ids = batch["image_ids"].tolist()
    assert ids[0] == ids[1] != ids[2] and batch["return_loss"] is True
    same = collate([{"image": red, "text": "a"}, {"image": red, "text": "square"}])
    assert same["image_index"].tolist() == [0, 0] and len(same["pixel_values"]) == 1
    named = collate([{"image": red, "text": "a", "image_id": 4}, {"image": copy, "text": "a", "image_id": "x"}])
    assert named["image_ids"][0] == 4 != named["image_ids"][1]
    assert (batch["input_ids"] != processor.image_token_id).all()
    pairs = DataCollatorForFrozenPrefixRetrieval(processor, all_texts=True)([{"image": red, "text": ["a", "red"]}])
    assert len(pairs["input_ids"]) == 2 and pairs["image_ids"][0] == pairs["image_ids"][1] and len(pairs["pixel_values"]) == 1
    with pytest.raises(ValueError, match="Row 0 has 2 images"):
        collate([{"image": [red, blue], "text": "a"}])


def test_a_constructed_model_comes_back(tmp_path: Path) -> None:
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text_config(), projection_dim=12)
    model = Retrieval(config).eval()
    assert model.visual_projection.weight.shape == (12, 32) and model.logit_scale.item() == pytest.approx(2.6592)
    model.save_pretrained(tmp_path / "out")
    ids = torch.tensor([[4, 5, 6]])
    again = Retrieval.from_pretrained(tmp_path / "out")
    assert torch.equal(again.get_text_features(ids).pooler_output, model.get_text_features(ids).pooler_output)
    half = Retrieval.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert half.logit_scale.dtype == half.model.connector.output.weight.dtype == torch.float32
    assert half.model.language_model.dtype == torch.bfloat16 and half.get_text_features(ids).pooler_output.isfinite().all()


@pytest.mark.parametrize("texts", [[""], ["a picture", " "], []])
def test_a_text_without_a_token_is_named(tmp_path: Path, texts: list[str]) -> None:
    save_parents(tmp_path)
    tokenizer(bos=False).save_pretrained(tmp_path / "words")
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(str(tmp_path / "tower"), str(tmp_path / "words"))
    processor = FrozenPrefixProcessor.from_model(model)
    message = f"Text {len(texts) - 1} .* holds no token" if texts else "no texts"
    with pytest.raises(ValueError, match=message):
        embed_texts(model, processor, texts, batch_size=1)
    with pytest.raises(ValueError, match="no images"):
        embed_images(model, processor, [])
    with pytest.raises(ValueError, match="no texts"):
        class_embeddings(model, processor, [])
