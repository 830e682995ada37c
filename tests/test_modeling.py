"""The model: what is frozen, how prefix and words meet, and what is refused by name."""

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    BatchFeature,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
)

from modeling_frozen import (
    FrozenPrefixConfig,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixModel,
    FrozenPrefixProcessor,
)
from modeling_frozen.connectors import CONNECTORS
from tests.helpers.tiny import join, length_of_its_own, rows, save_parents, text_config, vision_config


Model = FrozenPrefixForConditionalGeneration


def constructed(cls: type = Model, **options: object) -> FrozenPrefixForConditionalGeneration:
    options = {"vision": {}, "text": {}, "connector_type": "mlp", **options}
    vision, text = vision_config(**options.pop("vision")), text_config(**options.pop("text"))
    return cls(FrozenPrefixConfig.from_vision_text_configs(vision, text, **options))


def trainable(model: nn.Module) -> set[str]:
    """Parts that train, by the name before the first tensor."""
    return {name.removeprefix("model.").split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def inputs(processor, texts: list[str], images: list) -> BatchFeature:
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True)


@pytest.fixture
def joined(tmp_path: Path):
    return join(tmp_path)


# ------------------------------------------------------------------------------------------------------------ frozen


@pytest.mark.parametrize("cls", [Model, FrozenPrefixModel])
def test_a_constructed_model_trains_its_connector_alone(cls: type) -> None:
    model = constructed(cls)
    assert trainable(model) == {"connector"}
    assert trainable(model.train()) == {"connector"}


@pytest.mark.parametrize("auto_class", [Model, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModel])
def test_a_reloaded_model_trains_its_connector_alone(joined, tmp_path: Path, auto_class: type) -> None:
    model, _ = joined
    assert trainable(model) == {"connector"}
    model.save_pretrained(tmp_path / "eyes")
    again = auto_class.from_pretrained(tmp_path / "eyes")
    assert trainable(again) == {"connector"}
    again, info = auto_class.from_pretrained(tmp_path / "eyes", output_loading_info=True)
    assert trainable(again) == {"connector"} and not info["missing_keys"]


@pytest.mark.parametrize("trains", [("connector",), ("connector", "vision"), ("text",), ("connector", "vision", "text")])
def test_one_word_says_what_trains(tmp_path: Path, trains: tuple[str, ...]) -> None:
    names = {"connector": "connector", "vision": "vision_tower", "text": "language_model"}
    model, _ = join(tmp_path, trainable=trains)
    assert trainable(model) == {names[part] for part in trains}
    model.train()
    for part in ("vision", "text"):
        modes = {module.training for module in getattr(model.model, names[part]).modules()}
        assert modes == {part in trains}
    model.save_pretrained(tmp_path / "eyes")
    assert trainable(Model.from_pretrained(tmp_path / "eyes")) == {names[part] for part in trains}


def test_frozen_parents_stay_in_eval_mode(tmp_path: Path) -> None:
    """Dropout on in a frozen parent would teach the connector noise."""
    save_parents(tmp_path, vision={"attention_dropout": 0.5}, text={"attention_dropout": 0.5})
    model, processor = join(tmp_path)
    assert model.train() is model
    assert model.training and model.model.connector.training
    assert not any(m.training for m in model.model.vision_tower.modules())
    assert not any(m.training for m in model.model.language_model.modules())
    batch = inputs(processor, ["a"], [rows(1)[0]["image"]])
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_batch_statistics_of_a_frozen_tower_stand_still() -> None:
    from transformers import MobileNetV2Config

    from tests.helpers.families_text import text_config as tiny_text

    tower = MobileNetV2Config(image_size=32, depth_multiplier=0.1)
    config = FrozenPrefixConfig.from_vision_text_configs(tower, tiny_text("llama"), connector_type="linear")
    model = Model(config).train()
    before = copy.deepcopy(model.model.vision_tower.state_dict())
    ids = torch.full((1, config.prefix_length + 2), config.image_token_id)
    ids[:, -2:] = 5
    model(ids, torch.randn(1, 3, 32, 32), labels=ids.masked_fill(ids == config.image_token_id, -100)).loss.backward()
    assert all(torch.equal(before[k], v) for k, v in model.model.vision_tower.state_dict().items())


def test_the_frozen_tower_keeps_no_graph(joined) -> None:
    model, processor = joined
    pixel_values = inputs(processor, ["a"], [rows(1)[0]["image"]])["pixel_values"]
    encoded = model.get_image_features(pixel_values)
    assert not encoded.last_hidden_state.requires_grad and encoded.pooler_output[0].requires_grad
    # … unless somebody asks where in the picture a word comes from
    assert model.get_image_features(pixel_values.requires_grad_(True)).last_hidden_state.requires_grad


def test_input_gradients_are_asked_of_the_words_alone(joined) -> None:
    """PEFT and activation checkpointing hook the inputs of every sub-model; at the tower's that keeps its whole graph."""
    model, processor = joined
    model.enable_input_require_grads()
    batch = inputs(processor, ["a"], [rows(1)[0]["image"]])
    assert not model.get_image_features(batch["pixel_values"]).last_hidden_state.requires_grad
    assert model.get_input_embeddings()(batch["input_ids"].clamp(max=3)).requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(batch["input_ids"].clamp(max=3)).requires_grad


def test_a_text_only_batch_trains_with_zero_gradients(joined) -> None:
    model, processor = joined
    batch = inputs(processor, ["a red square ."], [])
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(loss, model.eval()(**batch, labels=batch["input_ids"]).loss)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.connector.parameters())


def test_resizing_the_vocabulary_is_refused(joined) -> None:
    model = joined[0]
    with pytest.raises(ValueError, match="never resized"):
        model.resize_token_embeddings(100)
    rows = model.get_input_embeddings().num_embeddings
    for size, multiple in ((rows, None), (None, None), (None, 4), (rows - 1, 2)):
        assert model.resize_token_embeddings(size, pad_to_multiple_of=multiple) is model.get_input_embeddings()
    with pytest.raises(ValueError, match=f"{rows} rows, and not 64"):
        model.model.resize_token_embeddings(pad_to_multiple_of=64)


# ------------------------------------------------------------------------------------------------------ prefix and words


@pytest.mark.parametrize("connector_type", CONNECTORS)
def test_every_connector_starts_at_the_norm_of_words(tmp_path: Path, connector_type: str) -> None:
    model, processor = join(tmp_path, connector_type=connector_type, **length_of_its_own(connector_type))
    words = model.get_input_embeddings().weight.norm(dim=-1).median()
    batch = inputs(processor, ["a", "a"], [[row["image"]] for row in rows(2)])
    prefix = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
    assert model(**batch).image_hidden_states.shape == prefix.shape
    if connector_type != "identity":
        assert 0.4 * words < prefix.norm(dim=-1).mean() < 2.5 * words


def test_texts_with_none_one_and_two_images_share_a_batch(joined) -> None:
    """Each sample reads its own pictures: as if it were alone."""
    model, processor = joined
    images = [row["image"] for row in rows(3)]
    texts = ["a square .", "<image> a picture", "a <image> that is <image> ?"]
    nested = [[], images[:1], images[1:]]
    batch = inputs(processor, texts, nested)
    together = model(**batch).logits
    for i, (text, own) in enumerate(zip(texts, nested, strict=True)):
        alone = inputs(processor, [text], [own] if own else [])
        mask = batch["attention_mask"][i].bool()
        torch.testing.assert_close(together[i][mask], model(**alone).logits[0], atol=1e-5, rtol=1e-4)


def test_encoded_once_it_serves_many_texts(joined) -> None:
    model, processor = joined
    image = rows(1)[0]["image"]
    encoded = model.get_image_features(inputs(processor, ["a"], [image])["pixel_values"])
    for text in ("a picture", "what colour ?"):
        batch = inputs(processor, [text], [image])
        pixel_values = batch.pop("pixel_values")
        torch.testing.assert_close(
            model(**batch, mm_encoder_outputs={"image": encoded}).logits, model(**batch, pixel_values=pixel_values).logits
        )
        outputs = [
            model.generate(**batch, **image_input, max_new_tokens=4, do_sample=False)
            for image_input in ({"mm_encoder_outputs": {"image": encoded}}, {"pixel_values": pixel_values})
        ]
        assert torch.equal(*outputs)


def test_pictures_come_in_as_large_as_the_image_processor_makes_them(tmp_path: Path) -> None:
    """DINOv2's config says 518 pixels, its image processor crops to 224: positions are those that will come."""
    save_parents(tmp_path)
    tower = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=70, patch_size=14))
    tower.save_pretrained(tmp_path / "dino")
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dino")
    model = Model.from_vision_text_pretrained(tmp_path / "dino", tmp_path / "words", connector_type="linear")
    assert model.config.num_positions == model.config.prefix_length == 4
    processor = FrozenPrefixProcessor.from_model(model)
    assert model(**inputs(processor, ["a"], [rows(1)[0]["image"]])).logits.shape[1] > 4


def test_embeddings_in_place_of_ids(joined) -> None:
    model, processor = joined
    batch = inputs(processor, ["a picture"], [rows(1)[0]["image"]])
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **batch).logits, expected)


def test_labels_are_learnt_where_they_stand(joined) -> None:
    """The loss over chosen places is that over all logits, and of transformers' own function."""
    model, processor = joined
    batch = inputs(processor, ["a red square .", "a blue square ."], [[row["image"]] for row in rows(2)])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :6] = -100
    full = model(**batch).logits[:, :-1]
    expected = nn.functional.cross_entropy(full.reshape(-1, full.shape[-1]), labels[:, 1:].reshape(-1))
    for mode in (True, False):
        output = model.train(mode)(**batch, labels=labels)
        torch.testing.assert_close(output.loss, expected)
        assert (output.logits is None) == mode
    summed = model.train()(**batch, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(summed, expected * (labels[:, 1:] != -100).sum() / 7)


def test_both_dtypes_meet_at_the_borders(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path)
    model = Model.from_vision_text_pretrained(tower, words, dtype=torch.bfloat16)
    assert {p.dtype for p in model.model.connector.parameters()} == {torch.float32}
    assert {model.model.vision_tower.dtype, model.model.language_model.dtype} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "eyes")
    again = Model.from_pretrained(tmp_path / "eyes")
    assert {p.dtype for p in again.model.connector.parameters()} == {torch.float32}
    assert {again.model.vision_tower.dtype, again.model.language_model.dtype} == {torch.bfloat16}
    ids = torch.full((1, 6), model.config.image_token_id)
    ids[:, 4:] = 5
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(ids, images).logits, again(ids, images).logits)
    other = Model.from_pretrained(tmp_path / "eyes", dtype=torch.float32)
    assert other.model.language_model.dtype == torch.float32


def test_each_part_takes_its_own_options(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path)
    model = Model.from_vision_text_pretrained(tower, words, text_attn_implementation="eager", vision_dtype="float16")
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.model.vision_tower.dtype == torch.float16
    model.save_pretrained(tmp_path / "eyes")
    again = Model.from_pretrained(
        tmp_path / "eyes", attn_implementation={"vision_config": "eager", "text_config": "sdpa"}, vision_dtype="float32"
    )
    assert again.model.language_model.config._attn_implementation == "sdpa"
    assert again.model.vision_tower.config._attn_implementation == "eager"
    assert (again.model.vision_tower.dtype, again.model.language_model.dtype) == (torch.float32, torch.float32)


def test_threads_generate_as_one_after_the_other(joined) -> None:
    model, processor = joined
    batches = [inputs(processor, ["a picture"], [row["image"]]) for row in rows(8)]
    expected = [model.generate(**batch, max_new_tokens=6, do_sample=False) for batch in batches]
    actual: list = [None] * len(batches)

    def run(i: int) -> None:
        actual[i] = model.generate(**batches[i], max_new_tokens=6, do_sample=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


# ------------------------------------------------------------------------------------------------------------- refused


def test_placeholders_are_counted_per_sample(joined) -> None:
    model, processor = joined
    batch = inputs(processor, ["a picture", "a picture"], [[row["image"]] for row in rows(2)])
    length = model.config.prefix_length
    ids = batch["input_ids"].clone()
    row = (ids[1] == model.config.image_token_id).nonzero()[0]
    ids[1, row] = 5  # one placeholder cut
    with pytest.raises(ValueError, match=rf"Sample 1 holds {length - 1} .* {length}"):
        model(input_ids=ids, pixel_values=batch["pixel_values"], attention_mask=batch["attention_mask"])
    # the right total in the wrong rows would put one sample's picture into the other
    other = (ids[0] != model.config.image_token_id).nonzero()[0]
    ids[0, other] = model.config.image_token_id
    with pytest.raises(ValueError, match=rf"Sample 0 holds {length + 1} "):
        model(input_ids=ids, pixel_values=batch["pixel_values"], attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match=rf"{2 * length} image placeholders.*fill {3 * length}"):
        model(**{**batch, "pixel_values": torch.cat([batch["pixel_values"], batch["pixel_values"][:1]])})


def test_an_input_longer_than_the_positions_is_refused() -> None:
    from tests.helpers.families_text import text_config as tiny_text

    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), tiny_text("gpt2"), connector_type="linear")
    model = Model(config).eval()
    ids = torch.full((1, 260), 5)
    ids[:, :4] = config.image_token_id
    with pytest.raises(ValueError, match="260 long.*256"):
        model(ids, torch.randn(1, 3, 16, 16))


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    tower, words = save_parents(tmp_path)
    with pytest.raises(ValueError, match="Did you mean `connector_type`"):
        Model.from_vision_text_pretrained(tower, words, conector_type="mlp")


def test_a_config_without_geometry_cannot_build() -> None:
    with pytest.raises(ValueError, match="from_vision_text_configs"):
        Model(FrozenPrefixConfig())


def test_ids_or_embeddings_not_both(joined) -> None:
    model, _ = joined
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long), inputs_embeds=torch.zeros(1, 2, 32))
    encoded = model.get_image_features(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        model(
            torch.ones(1, 2, dtype=torch.long), pixel_values=torch.zeros(1, 3, 16, 16), mm_encoder_outputs={"image": encoded}
        )


@pytest.mark.parametrize(("strategy", "positions"), [("full", 5), ("pooled", 1)])
@pytest.mark.parametrize("connector_type", ["avg_pool", "pixel_shuffle", "c_abstractor"])
def test_what_is_no_grid_is_refused_when_the_config_is_made(connector_type: str, strategy: str, positions: int) -> None:
    options = {"connector_type": connector_type, **length_of_its_own(connector_type)}
    with pytest.raises(ValueError, match=rf"'{connector_type}' reads .* as a grid .*num_positions={positions}\b"):
        FrozenPrefixConfig.from_vision_text_configs(
            vision_config(), text_config(), vision_feature_select_strategy=strategy, **options
        )


@pytest.mark.parametrize("connector_type", ["avg_pool", "pixel_shuffle", "c_abstractor"])
def test_connectors_on_grids_come_back_and_are_switched(connector_type: str, tmp_path: Path) -> None:
    model, processor = join(tmp_path, connector_type=connector_type, **length_of_its_own(connector_type))
    assert model.config.vision_grid == [2, 2]
    model.save_pretrained(tmp_path / "eyes")
    batch = inputs(processor, ["a"], [[rows(1)[0]["image"]]])
    for loaded in (Model.from_pretrained(tmp_path / "eyes"), AutoModelForImageTextToText.from_pretrained(tmp_path / "eyes")):
        assert loaded.config.vision_grid == [2, 2]
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    other, its_processor = join(tmp_path, connector_type="mlp")
    plain = other(**inputs(its_processor, ["a"], [[rows(1)[0]["image"]]])).logits
    other.load_connector(tmp_path / "eyes", "grid")
    other.set_connector("grid")
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    other.set_connector("default")
    assert torch.equal(other(**inputs(its_processor, ["a"], [[rows(1)[0]["image"]]])).logits, plain)


def test_each_of_several_layers_has_a_norm_of_its_own(tmp_path: Path) -> None:
    several, _ = join(tmp_path, vision_feature_layer=[0, -2, -1])
    assert several.config.connector_config == {"input_norm_groups": 3}
    assert several.model.connector.input_norm.groups == 3
    one_norm, _ = join(tmp_path, vision_feature_layer=[0, -2, -1], connector_config={"input_norm_groups": 1})
    assert type(one_norm.model.connector.input_norm) is torch.nn.LayerNorm
    # A checkpoint from before says nothing of groups, and has one norm over all.
    several.save_pretrained(tmp_path / "eyes")
    config = json.loads((tmp_path / "eyes" / "config.json").read_text())
    assert config["connector_config"] == {"input_norm_groups": 3}
    del config["connector_config"]
    (tmp_path / "eyes" / "config.json").write_text(json.dumps(config))
    assert type(Model.from_pretrained(tmp_path / "eyes").model.connector.input_norm) is torch.nn.LayerNorm
