"""Videos and sounds, put through what a user would say of them. Towers, connectors and placeholders are the same idea
for all; so are most of these sentences."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    Wav2Vec2FeatureExtractor,
)

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixConfig,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
)
from modeling_frozen.audio_towers import encode_audio, load_audio_tower, probe_audio_tower
from modeling_frozen.processors.media_loading import load_waveform
from tests.helpers import tiny
from tests.helpers.audio_towers import AUDIO_TOWERS, save_audio_tower
from tests.helpers.families_text import DECODERS, VOCAB_SIZE, text_config
from tests.helpers.videos import write_video


PREFIX, FRAMES, SOUND = 2, 3, 3
IMAGE, VIDEO, AUDIO = VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2  # past the vocabulary: no rows of their own
RESAMPLER = {"num_heads": 2, "hidden_size": 16, "num_layers": 1}
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
GREEDY = {"num_beams": 1, "num_return_sequences": 1}

FAMILIES = ("llama", "gpt2", "mamba", "t5")
families = pytest.mark.parametrize("family", FAMILIES)


def vision_config() -> CLIPVisionConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPVisionConfig(**sizes, image_size=8, patch_size=4)


every_audio_tower = pytest.mark.parametrize("kind", AUDIO_TOWERS)


def build(family: str, **options: Any) -> FrozenPrefixForConditionalGeneration:
    """With images, videos and audio (wav2vec2, whose sounds are of any length)."""
    defaults = {
        "connector_type": "resampler",
        "prefix_length": PREFIX,
        "connector_config": RESAMPLER,
        "num_frames": FRAMES,
    }
    defaults |= {
        "audio_config": AUDIO_TOWERS["wav2vec2"][0],
        "audio_prefix_length": SOUND,
        "audio_connector_config": RESAMPLER,
    }
    config = FrozenPrefixConfig.from_vision_text_configs(vision_config(), text_config(family), **{**defaults, **options})
    torch.manual_seed(0)
    return FrozenPrefixForConditionalGeneration(config).eval()


@functools.cache
def shared_model(family: str) -> FrozenPrefixForConditionalGeneration:
    """Shared by the checks that change nothing in it."""
    return build(family)


def row(*parts: str, words: int = 2, seed: int = 0, video: int = FRAMES * PREFIX) -> torch.Tensor:
    """One row of ids: a word, then each part's placeholders with words behind."""
    generator = torch.Generator().manual_seed(seed)
    ids = [5]
    for part in parts:
        ids += {"image": [IMAGE] * PREFIX, "video": [VIDEO] * video, "audio": [AUDIO] * SOUND}[part]
        ids += torch.randint(3, VOCAB_SIZE, (words,), generator=generator).tolist()
    return torch.tensor([ids + [7]])


def pictures(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def videos(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, FRAMES, 3, 8, 8, generator=torch.Generator().manual_seed(100 + seed))


def sounds(count: int = 1, seed: int = 0) -> torch.Tensor:
    """Each a tone: the mean of much noise is the same for all."""
    pitch = torch.rand(count, 1, generator=torch.Generator().manual_seed(200 + seed))
    return (torch.arange(4000) * pitch).sin()


def all_media(images: int = 1, films: int = 1, noises: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    inputs = {"pixel_values": pictures(images, seed), "pixel_values_videos": videos(films, seed)}
    inputs["input_features"] = sounds(noises, seed)
    return {name: value for name, value in inputs.items() if len(value)}


def decoder(family: str, rows: int = 1) -> dict[str, torch.Tensor]:
    return {} if family in DECODERS else {"decoder_input_ids": torch.tensor([[2, 7, 8, 9]]).expand(rows, -1)}


# ----------------------------------------------------------------------------------- what reaches words


@families
@torch.no_grad()
def test_changing_one_frame_or_the_sound_changes_the_logits(family: str) -> None:
    model, ids, inputs = shared_model(family), row("video", "audio", "image"), all_media()
    before = model(ids, **inputs, **decoder(family)).logits
    for name in inputs:
        changed = {key: value.clone() for key, value in inputs.items()}
        part = changed[name][0, -1] if name == "pixel_values_videos" else changed[name][0]  # the last frame alone
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(9)))
        assert (model(ids, **changed, **decoder(family)).logits - before)[:, -1].abs().max() > 1e-5, name


@pytest.mark.parametrize(("pooling", "matters"), [("none", True), ("connector", True), ("mean", False)])
@pytest.mark.parametrize("connector", ["resampler", "transformer", "qformer", "lstm"])
@torch.no_grad()
def test_the_order_of_frames_matters_where_it_should(pooling: str, matters: bool, connector: str) -> None:
    sizes = {"hidden_size": 16, **({"num_layers": 1} if connector == "lstm" else {"num_layers": 1, "num_heads": 2})}
    model = build("llama", video_pooling=pooling, connector_type=connector, connector_config=sizes)
    ids = row("video", video=model.config.num_video_tokens)
    assert model.config.num_video_tokens == (FRAMES if pooling == "none" else 1) * PREFIX
    ahead, back = (model(ids, pixel_values_videos=film).logits for film in (videos(), videos().flip(1)))
    assert ((ahead - back)[:, -1].abs().max() > 1e-5) == matters
    assert model(ids, pixel_values_videos=videos()).video_hidden_states.shape == (model.config.num_video_tokens, 32)


@torch.no_grad()
def test_a_video_without_pooling_is_its_frames_as_pictures() -> None:
    model = shared_model("llama")
    film = videos(2)
    seen = model.get_video_features(film).pooler_output
    frames = model.get_image_features(film.flatten(0, 1)).pooler_output
    for index, prefix in enumerate(seen):
        torch.testing.assert_close(prefix, torch.cat(frames[index * FRAMES : (index + 1) * FRAMES]))


def test_position_embeddings_repeat_for_each_frame() -> None:
    model = build("llama", video_pooling="connector", connector_config={**RESAMPLER, "position_embedding": True})
    ids = row("video", video=PREFIX)
    labels = ids.masked_fill(ids >= VOCAB_SIZE, -100)
    model.train()(ids, pixel_values_videos=videos(), labels=labels).loss.backward()
    assert model.model.connector.positions.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- training


@families
@pytest.mark.parametrize(
    ("part", "reached"), [("image", "connector"), ("video", "connector"), ("audio", "audio_connector"), (None, None)]
)
def test_gradients_reach_the_right_connector_and_nothing_else(family: str, part: str | None, reached: str | None) -> None:
    model = build(family).train()
    ids = row(*([part] if part else []), words=4)
    name = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}.get(part)
    labels = ids.masked_fill(ids >= VOCAB_SIZE, -100)
    model(ids, **({name: all_media()[name]} if name else {}), labels=labels).loss.backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    wanted = {} if reached is None else dict(getattr(model.model, reached).named_parameters())
    assert trained == {f"model.{reached}.{key}" for key in wanted}
    # Distributed training waits for every parameter: those that had no part have a gradient of zero.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_towers_stay_as_they_are_in_training() -> None:
    model = build("llama").train()
    assert not model.model.audio_tower.training and model.model.audio_connector.training
    assert {key.split(".")[1] for key, p in model.named_parameters() if p.requires_grad} == {
        "connector",
        "audio_connector",
    }
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "connector" not in key}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = row("image", "video", "audio")
    model(ids, **all_media(), labels=ids.masked_fill(ids >= VOCAB_SIZE, -100)).loss.backward()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())


def test_the_audio_tower_trains_when_asked() -> None:
    model = build("llama", trainable=("connector", "audio")).train()
    ids = row("audio")
    model(ids, input_features=sounds(), labels=ids.masked_fill(ids >= VOCAB_SIZE, -100)).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.audio_tower.parameters())
    assert all(p.grad is None for p in model.model.vision_tower.parameters())


# ------------------------------------------------------------------------------------------------ batches

ROWS = (("video", "image"), (), ("audio", "video", "image", "audio"), ("image", "audio"), ("video",))


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """All of `ROWS` padded to one length; the rows alone, and the media of each."""
    alone = [row(*parts, words=2 + index, seed=index) for index, parts in enumerate(ROWS)]
    inputs = [
        all_media(parts.count("image"), parts.count("video"), parts.count("audio"), seed=index)
        for index, parts in enumerate(ROWS)
    ]
    width = max(one.shape[1] for one in alone)
    ids, mask = torch.zeros(len(alone), width, dtype=torch.long), torch.zeros(len(alone), width, dtype=torch.long)
    for index, one in enumerate(alone):
        place = slice(width - one.shape[1], width) if side == "left" else slice(0, one.shape[1])
        ids[index, place], mask[index, place] = one[0], 1
    return ids, mask, alone, inputs


def joined(inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = ("pixel_values", "pixel_values_videos", "input_features")
    return {name: torch.cat([one[name] for one in inputs if name in one]) for name in names}


@families
@torch.no_grad()
def test_videos_sounds_and_images_in_any_order_equal_single_samples(family: str) -> None:
    model = shared_model(family)
    ids, mask, alone, inputs = batch("right")
    together = model(ids, attention_mask=mask, **joined(inputs), **decoder(family, len(ROWS))).logits
    for index, (one, media) in enumerate(zip(alone, inputs, strict=True)):
        single = model(one, attention_mask=torch.ones_like(one), **media, **decoder(family)).logits[0]
        ours = together[index] if family not in DECODERS else together[index, : one.shape[1]]
        torch.testing.assert_close(ours, single, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_alone_equals_together_greedy_and_with_beams(family: str, beams: int) -> None:
    model = shared_model(family)
    ids, mask, alone, inputs = batch("left")
    options = {**OPTIONS, "num_beams": beams, "num_return_sequences": min(beams, 2)}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    together = model.generate(ids, attention_mask=mask, **joined(inputs), **options)
    for index, (one, media) in enumerate(zip(alone, inputs, strict=True)):
        single = model.generate(one, attention_mask=torch.ones_like(one), **media, **options)
        place = slice(index * options["num_return_sequences"], (index + 1) * options["num_return_sequences"])
        length = OPTIONS["max_new_tokens"]
        assert torch.equal(together.sequences[place, -length:], single.sequences[:, -length:])
        # Tiny random models say much the same of everything: the numbers tell.
        place = slice(index * beams, (index + 1) * beams)
        torch.testing.assert_close(together.logits[0][place], single.logits[0], atol=2e-5, rtol=1e-4)
        greedy = model.generate(one, attention_mask=torch.ones_like(one), **media, **{**options, **GREEDY}).logits[0]
        torch.testing.assert_close(single.logits[0], greedy.expand(beams, -1), atol=2e-5, rtol=1e-4)


@families
@torch.no_grad()
def test_greedy_with_cache_equals_greedy_without(family: str) -> None:
    model, ids = shared_model(family), row("video", "audio", "image")
    options = {**OPTIONS, **all_media(), "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@families
@torch.no_grad()
def test_placeholders_past_the_vocabulary_meet_logits_processors(family: str) -> None:
    model, ids = shared_model(family), row("video", "audio", "image")
    options = {**OPTIONS, **all_media(), "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **options)
    assert torch.equal(plain, model.generate(ids, repetition_penalty=1.0 + 1e-12, **options))
    new = model.generate(ids, repetition_penalty=1e4, no_repeat_ngram_size=2, **options)[0, -5:].tolist()
    assert len(set(new)) == len(new) and max(new) < VOCAB_SIZE


@torch.no_grad()
def test_encoded_once_it_serves_any_number_of_calls() -> None:
    model, ids, inputs = shared_model("llama"), row("video", "audio", "image"), all_media()
    encoded = {
        "image": model.get_image_features(inputs["pixel_values"]),
        "video": model.get_video_features(inputs["pixel_values_videos"]),
        "audio": model.get_audio_features(inputs["input_features"]),
    }
    lengths = {key: [len(prefix) for prefix in value.pooler_output] for key, value in encoded.items()}
    assert lengths == {"image": [PREFIX], "video": [FRAMES * PREFIX], "audio": [SOUND]}
    assert torch.equal(model(ids, mm_encoder_outputs=encoded).logits, model(ids, **inputs).logits)
    options = {**OPTIONS, "num_beams": 2, "attention_mask": torch.ones_like(ids)}
    first, again = (model.generate(ids, mm_encoder_outputs=encoded, **options) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first, model.generate(ids, **inputs, **options))
    with pytest.raises(ValueError, match="both pixel_values_videos and mm_encoder_outputs"):
        model(ids, mm_encoder_outputs=encoded, pixel_values_videos=inputs["pixel_values_videos"])


@torch.no_grad()
def test_gated_blocks_look_at_videos_and_sounds_too() -> None:
    model = build("llama", fusion="cross_attention")
    for name, parameter in model.model.cross_attention.named_parameters():
        if "gate" in name:
            parameter.fill_(0.5)
    tokens = {"image": [IMAGE], "video": [VIDEO], "audio": [AUDIO]}

    def ids(*parts: str) -> torch.Tensor:
        return torch.tensor([[5, *(index for part in parts for index in (*tokens[part], 6)), 9]])

    inputs = all_media()
    one = model(ids("image", "audio", "video"), **inputs).logits
    other = model(ids("image", "audio", "video"), **{**inputs, "pixel_values_videos": videos(seed=3)}).logits
    torch.testing.assert_close(one[:, :5], other[:, :5])  # before the video nobody sees it
    assert (one - other)[:, -1].abs().max() > 1e-5
    alone = model(ids("audio"), input_features=inputs["input_features"]).logits[:, 1:3]
    assert (alone - model(ids("audio"), input_features=sounds(seed=5)).logits[:, 1:3]).abs().max() > 1e-5
    with pytest.raises(ValueError, match="1 video placeholders, and no video was passed"):
        model(ids("image", "video"), pixel_values=inputs["pixel_values"])


# ----------------------------------------------------------------------------------------------------- refusals


@torch.no_grad()
def test_wrong_counts_are_refused_with_both_numbers() -> None:
    model = shared_model("llama")
    with pytest.raises(ValueError, match=rf"holds {FRAMES * PREFIX} video placeholders .*videos fill {2 * FRAMES * PREFIX}"):
        model(row("video"), pixel_values_videos=videos(2))
    with pytest.raises(ValueError, match=r"Sample 0 holds 2 audio placeholders.*prefix length 3"):
        model(row("audio")[:, 2:], input_features=sounds())
    with pytest.raises(ValueError, match=r"should be \(videos, frames, channels"):
        model(row("video"), pixel_values_videos=videos()[0])


@pytest.mark.parametrize("missing", ["pixel_values", "pixel_values_videos", "input_features"])
def test_one_kind_of_several_that_is_not_passed_is_refused(missing: str) -> None:
    model, inputs = shared_model("llama"), all_media()
    del inputs[missing]
    ids = row("video", "audio", "image")
    for call in (model, functools.partial(model.generate, **OPTIONS)):
        with pytest.raises(
            ValueError, match=f"placeholders, and no (image|video|audio) was passed for them: pass .*`{missing}`"
        ):
            call(ids, **inputs)


def test_what_the_model_has_no_tower_for_is_refused() -> None:
    model = build("llama", num_frames=None, audio_config=None)
    assert model.input_modalities == ("image", "text")
    with pytest.raises(ValueError, match=r"takes \['image'\], and no audio: join an audio tower"):
        model(row(), input_features=sounds())
    with pytest.raises(ValueError, match="no video: set `num_frames`"):
        model(row(), pixel_values_videos=videos())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"video_pooling": "connector", "connector_type": "mlp", "connector_config": {}, "prefix_length": None},
            "'mlp'. does not",
        ),
        ({"num_frames": 0}, "num_frames=0"),
        (
            {"audio_connector_type": "mlp", "audio_connector_config": {}, "audio_prefix_length": None},
            "longer audio has more",
        ),
        ({"audio_connector_type": "nonsense"}, "Of the audio connector.*nonsense"),
        ({"image_token_id": 7, "video_token_id": 7}, "share an id"),
    ],
)
def test_values_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("llama", **options)


def test_a_model_without_videos_and_sounds_does_not_mention_them(tmp_path: Path) -> None:
    model = build("llama", num_frames=None, audio_config=None)
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in written if "audio" in key or "video" in key or "frames" in key]
    again = FrozenPrefixConfig.from_pretrained(tmp_path)
    assert again.media == ("image",) and again.image_token_id == IMAGE and again.audio_config is None
    every = build("llama").config
    assert every.placeholder_ids == {"image": IMAGE, "video": VIDEO, "audio": AUDIO}


# -------------------------------------------------------------------------------------------------- any audio tower


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(int(16000 * seconds)).astype(np.float32)


@every_audio_tower
@torch.no_grad()
def test_any_audio_tower_is_loaded_whole_and_padding_changes_nothing(kind: str, tmp_path: Path) -> None:
    save_audio_tower(tmp_path, kind)
    tower = load_audio_tower(str(tmp_path)).eval()
    _, model_class, extractor = AUDIO_TOWERS[kind]
    own = {key for key in tower.state_dict()}
    assert not [key for key in own if "masked_spec_embed" in key]  # many checkpoints lack it: it would be random
    whole = model_class.from_pretrained(tmp_path).state_dict()
    for key in own:  # the very weights of that half
        place = next(name for name in whole if name.endswith(f".{key}") and "decoder" not in name)
        assert torch.equal(tower.state_dict()[key], whole[place])
    probed = probe_audio_tower(tower.config, feature_extractor=extractor())
    assert probed == probe_audio_tower(tower.config)
    processor = FrozenPrefixProcessor(None, tiny.tokenizer(), feature_extractor=extractor(), audio_prefix_length=SOUND)

    def features(*heard: np.ndarray) -> list[torch.Tensor]:
        made = processor(audio=list(heard), return_tensors="pt")
        encoded, mask, _ = encode_audio(
            tower, made["input_features"], mask=made.get("input_features_mask"), is_longer=made.get("is_longer")
        )
        assert encoded.shape[2] == probed.audio_width and probed.num_positions in (None, encoded.shape[1])
        return list(encoded) if mask is None else [one[valid] for one, valid in zip(encoded, mask, strict=True)]

    short, long = features(noise(0.3), noise(0.9, seed=1))
    torch.testing.assert_close(short, features(noise(0.3))[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(long, features(noise(0.9, seed=1))[0], atol=1e-5, rtol=1e-4)


@every_audio_tower
@pytest.mark.parametrize("has_images", [True, False])
def test_saved_small_and_reloaded_it_hears_the_same(kind: str, has_images: bool, tmp_path: Path) -> None:
    tower, words = tiny.save_parents(tmp_path)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tower if has_images else None, words, save_audio_tower(tmp_path / "audio", kind),
        prefix_length=4, audio_prefix_length=SOUND, audio_connector_config=RESAMPLER, num_frames=2 if has_images else None,
    )  # fmt: skip
    processor = FrozenPrefixProcessor.from_model(model)
    red = Image.new("RGB", (20, 18), "red")
    media = {"audio": [[noise(0.4)], []]} | ({"images": [[], [red]], "videos": [[], [[red, red, red]]]} if has_images else {})
    texts = ["<audio> a picture", "<video> is <image> red" if has_images else "a square"]
    inputs = processor(text=texts, padding=True, return_tensors="pt", **media)
    assert (inputs["input_ids"] == model.config.audio_token_id).sum(1).tolist() == [SOUND, 0]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    reread = AutoProcessor.from_pretrained(tmp_path / "model")
    assert again.input_modalities == (("image", "video", "audio", "text") if has_images else ("audio", "text"))
    repeated = reread(text=texts, padding=True, return_tensors="pt", **media)
    assert repeated.keys() == inputs.keys()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**repeated).logits)
        assert torch.equal(model.generate(**inputs, **OPTIONS), again.generate(**repeated, **OPTIONS))
    written = (tmp_path / "model" / "model.safetensors").stat().st_size
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert trained <= written <= trained + 16 * 1024
    assert {key.split(".")[1] for key, p in again.named_parameters() if p.requires_grad} == (
        {"connector", "audio_connector"} if has_images else {"audio_connector"}
    )
    other = tmp_path / "audio" / "model.safetensors"
    data = bytearray(other.read_bytes())
    data[-500:] = bytes(500)
    other.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="audio tower at .* has fingerprint"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("layer", "strategy"), [([-1, -2], "full"), (-2, "full"), (-1, "pooled")])
@torch.no_grad()
def test_layers_and_pooling_of_the_audio_tower(layer: Any, strategy: str) -> None:
    model = build(
        "llama", audio_feature_layer=layer, audio_feature_select_strategy=strategy,
        **({"audio_connector_type": "mlp", "audio_connector_config": {}} if strategy == "pooled" else {}),
    )  # fmt: skip
    assert model.config.audio_width == 16 * (2 if isinstance(layer, list) else 1)
    first, second = (model(row("audio"), input_features=sounds(seed=seed)).logits for seed in (1, 2))
    assert (first - second)[:, -1].abs().max() > 1e-5


# ------------------------------------------------------------------------------------------------------ processor


def processor(num_frames: int = 4, **options: Any) -> FrozenPrefixProcessor:
    from transformers import CLIPImageProcessorPil

    size = {"height": 8, "width": 8}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size, do_convert_rgb=True)
    lengths = {"prefix_length": 2, "video_prefix_length": 3, "audio_prefix_length": 2}
    return FrozenPrefixProcessor(
        image_processor,
        tiny.tokenizer(),
        feature_extractor=Wav2Vec2FeatureExtractor(),
        num_frames=num_frames,
        **{**lengths, **options},
    )


def grey(*levels: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (level, level, level)) for level in levels]


def seen(pixels: torch.Tensor, of: FrozenPrefixProcessor) -> list[int]:
    """Grey levels of the frames."""
    mean, std = of.image_processor.image_mean[0], of.image_processor.image_std[0]
    return [round((frame[0].mean().item() * std + mean) * 255) for frame in pixels]


def test_frames_are_sampled_evenly_from_every_kind_of_video(tmp_path: Path) -> None:
    of = processor()
    levels = list(range(0, 200, 20))
    frames = grey(*levels)
    array = np.stack([np.asarray(frame) for frame in frames])
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    kinds = {
        "frames": frames,
        "array": array,
        "tensor": torch.from_numpy(array).movedim(-1, 1),
        "path": str(tmp_path / "film.gif"),
        "bytes": (tmp_path / "film.gif").read_bytes(),
        "dict": {"path": str(tmp_path / "film.gif"), "bytes": None},
        "animated": Image.open(tmp_path / "film.gif"),
    }
    for kind, film in kinds.items():
        out = of(text="<video> a", videos=film, return_tensors="pt")
        assert out["pixel_values_videos"].shape == (1, 4, 3, 8, 8), kind
        assert seen(out["pixel_values_videos"][0], of) == [0, 60, 120, 180], kind
        assert (out["input_ids"] == of.video_token_id).sum() == 3
    short = of(text="<video> a", videos=grey(10, 200), return_tensors="pt")["pixel_values_videos"]
    assert seen(short[0], of) == [10, 10, 200, 200]
    both = of(text=["a", "a"], videos=[frames, str(tmp_path / "film.gif")], return_tensors="pt")
    assert both["pixel_values_videos"].shape[0] == 2 and (both["input_ids"] == of.video_token_id).sum(1).tolist() == [
        3,
        3,
    ]


def test_a_film_without_a_decoder_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(64))
    monkeypatch.setattr("modeling_frozen.processors.media_loading._DECODERS", ())
    with pytest.raises(ValueError, match=r"video 0 .*film.mp4.*no video decoder is installed.*list of images"):
        processor()(text="<video>", videos=str(tmp_path / "film.mp4"))
    with pytest.raises(ValueError, match="video 0 .*no such file"):
        processor()(text="<video>", videos=str(tmp_path / "nothing.mp4"))


@pytest.mark.parametrize("kind", [".mp4", ".webm"])  # WebM does not say how many frames it has
def test_a_film_is_read_at_the_frames_that_are_sampled(kind: str, tmp_path: Path) -> None:
    of, path = processor(), tmp_path / f"film{kind}"
    write_video(path, list(range(20, 220, 5)))
    for film in (str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, open(path, "rb")):
        out = of(text="<video> a", videos=film, return_tensors="pt")["pixel_values_videos"]
        assert seen(out[0], of) == pytest.approx([20, 85, 150, 215], abs=4)
    write_video(path, [40, 200])  # shorter than what is sampled
    short = of(text="<video> a", videos=str(path), return_tensors="pt")["pixel_values_videos"]
    assert seen(short[0], of) == pytest.approx([40, 40, 200, 200], abs=4)


def test_films_and_images_of_one_row_go_to_their_places(tmp_path: Path) -> None:
    of, red = processor(), Image.new("RGB", (8, 8), "red")
    for number, level in enumerate((40, 200)):
        write_video(tmp_path / f"{number}.mp4", [level] * 6)
    films = [str(tmp_path / f"{number}.mp4") for number in range(2)]
    batch = DataCollatorForFrozenPrefix(of)([{"image": red, "videos": films, "text": "<video> a <image> is <video> what"}])
    assert batch["pixel_values"].shape[0] == 1 and batch["pixel_values_videos"].shape[0] == 2
    assert [seen(film, of)[0] for film in batch["pixel_values_videos"]] == pytest.approx([40, 200], abs=4)
    order = [token for token in batch["input_ids"][0].tolist() if token in (of.image_token_id, of.video_token_id)]
    assert order == [of.video_token_id] * 3 + [of.image_token_id] * 2 + [of.video_token_id] * 3


def test_a_long_film_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    """A frame of 640 x 480 takes 0.9 MB: whole, the long film would take 270 MB more."""
    peaks = []
    for count in (10, 300):
        write_video(tmp_path / "film.mp4", [number % 200 for number in range(count)], size=(640, 480))
        code = (
            "import resource, sys; from modeling_frozen.processors.media_loading import load_video; "
            "assert len(load_video(sys.argv[1], 4)) == 4; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "film.mp4")], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 60, peaks


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_audio_files_of_any_rate_are_resampled(kind: str, rate: int, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    path, of = tmp_path / f"tone.{kind}", processor()
    tone = [np.sin(2 * np.pi * 440 * np.arange(int(rate * 0.5)) / rate) * volume for volume in (0.5, 0.3)]
    soundfile.write(path, np.stack(tone, axis=1), rate)
    for audio in (str(path), path, path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, open(path, "rb")):
        wave = load_waveform(audio, 16000)
        assert wave.dtype == np.float32 and len(wave) == pytest.approx(8000, abs=2500)  # mp3 pads
        spectrum = np.abs(np.fft.rfft(wave))
        assert np.argmax(spectrum) * 16000 / len(wave) == pytest.approx(440, abs=4)
        assert np.abs(wave[2000:6000]).max() == pytest.approx(0.4, abs=0.04)  # the mean of both channels
    assert of(audio=str(path), return_tensors="pt")["input_features"].shape[-1] == len(wave)


def test_sounds_of_every_kind_are_one_waveform() -> None:
    of, wave = processor(), noise(0.1)
    kinds = [
        wave,
        wave.tolist(),
        torch.from_numpy(wave),
        np.stack([wave, wave]),
        {"array": wave, "sampling_rate": 16000},
    ]
    expected = of(audio=wave, return_tensors="pt")["input_features"]
    for kind in kinds:
        torch.testing.assert_close(of(audio=kind, return_tensors="pt")["input_features"], expected)
    with pytest.raises(ValueError, match="audio 0 has 8000 samples per second.*16000"):
        of(audio={"array": wave, "sampling_rate": 8000})
    with pytest.raises(ValueError, match="Can't open audio 0 .*nothing.wav"):
        of(audio="nothing.wav")
    options = {"padding": True, "max_length": 40, "truncation": True}  # of the texts
    two = of(text=["<audio>", "<audio> a"], audio=[wave, noise(0.2)], return_tensors="pt", **options)
    assert two["input_features"].shape == (2, 3200) and two["input_features_mask"].sum(1).tolist() == [1600, 3200]


def test_all_media_go_to_their_texts_in_reading_order() -> None:
    of, red = processor(), Image.new("RGB", (8, 8), "red")
    out = of(
        text=["a <video> is <image>", "what", "<audio> a <audio>"],
        images=[[red], [red], []],
        videos=[[grey(1, 2)], [grey(3), grey(4)], []],
        audio=[[], [], [noise(0.1), noise(0.1)]],
        padding=True,
        return_tensors="pt",
        return_mm_token_type_ids=True,
    )
    assert out["pixel_values"].shape[0] == 2 and out["pixel_values_videos"].shape[0] == 3
    assert (out["input_ids"] == of.image_token_id).sum(1).tolist() == [2, 2, 0]
    assert (out["input_ids"] == of.video_token_id).sum(1).tolist() == [3, 6, 0]
    assert (out["input_ids"] == of.audio_token_id).sum(1).tolist() == [0, 0, 4]
    placed = of.decode(out["input_ids"][1]).split("<s>")[-1].replace(" ", "")
    assert placed == "<image>" * 2 + "<video>" * 6 + "what"
    assert torch.equal(out["mm_token_type_ids"] == 3, out["input_ids"] == of.audio_token_id)


def test_wrong_counts_of_the_processor_are_refused_with_numbers() -> None:
    of = processor()
    with pytest.raises(ValueError, match="<video>.*Sample 0: its text holds 2 <video> but it has 1 videos"):
        of(text="<video> <video>", videos=[[grey(1, 2)]])
    with pytest.raises(ValueError, match="<audio>.*Sample 1: its text holds 1 <audio> but it has 0 audio inputs"):
        of(text=["<audio>", "<audio>"], audio=[[noise(0.1)], []])
    with pytest.raises(ValueError, match="<audio>"):
        of(text="<audio> a")
    with pytest.raises(ValueError, match=r"takes \['image', 'video'\] and text, and was given audio"):
        FrozenPrefixProcessor(of.image_processor, tiny.tokenizer(), 2, num_frames=2)(text="a", audio=noise(0.1))


def test_truncation_cuts_words_and_no_placeholder() -> None:
    of = processor()
    inputs = {"videos": [[grey(1, 2)]], "audio": [[noise(0.1)]], "images": [[grey(9)[0]]]}
    text = "<video> a picture that is <audio> a square that is <image> ."
    out = of(text=text, max_length=10, truncation=True, **inputs)["input_ids"][0]
    assert len(out) <= 10
    assert [out.count(index) for index in (of.image_token_id, of.video_token_id, of.audio_token_id)] == [2, 3, 2]
    with pytest.raises(ValueError, match="1 images and 1 videos and 1 audios take 7 placeholders, 8 tokens"):
        of(text=text, max_length=7, truncation=True, **inputs)


def test_a_chat_with_all_media() -> None:
    of = processor()
    content = [{"type": "video", "video": grey(1, 2)}, {"type": "image", "image": grey(3)[0]}]
    content += [{"type": "audio", "audio": noise(0.1)}, {"type": "text", "text": "what is that ?"}]
    out = of.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert {"pixel_values", "pixel_values_videos", "input_features"} <= out.keys()
    assert [(out["input_ids"] == index).sum() for index in (of.image_token_id, of.video_token_id, of.audio_token_id)] == [
        2,
        3,
        2,
    ]


@pytest.mark.parametrize("media", ["all", "audio", "vision"])
def test_processors_save_and_load(media: str, tmp_path: Path) -> None:
    of = processor()
    if media == "audio":
        of = FrozenPrefixProcessor(None, tiny.tokenizer(), feature_extractor=Wav2Vec2FeatureExtractor(), audio_prefix_length=2)
    elif media == "vision":
        of = FrozenPrefixProcessor(of.image_processor, tiny.tokenizer(), 2)
    of.save_pretrained(tmp_path)
    again = FrozenPrefixProcessor.from_pretrained(tmp_path)
    names = ("tokens", "num_frames", "video_prefix_length", "audio_prefix_length", "prefix_length", "chat_template")
    for name in (*names, "image_token_id", "video_token_id", "audio_token_id"):
        assert getattr(again, name) == getattr(of, name), name
    assert again.get_attributes() == of.get_attributes()
    assert hasattr(again, "feature_extractor") == (media != "vision")
    assert hasattr(again, "image_processor") == (media != "audio")
    written = (tmp_path / "processor_config.json").read_text()
    assert (media != "vision") == ("audio" in written) and (media == "all") == ("video" in written)


# ----------------------------------------------------------------------------------------------------------- collator


def test_rows_with_videos_and_sounds_are_collated() -> None:
    of = processor()
    collator = DataCollatorForFrozenPrefix(of)
    rows = [
        {"video": grey(1, 2), "text": "a red square"},
        {"audio": noise(0.1), "prompt": "what is that ?", "answer": "red"},
        {"image": grey(9)[0], "video": [grey(1), grey(2)], "audio": None, "text": "a blue square"},
        {"messages": [
            {"role": "user", "content": [{"type": "audio", "audio": noise(0.2)}, {"type": "text", "text": "what ?"}]},
            {"role": "assistant", "content": "green"},
        ]},
    ]  # fmt: skip
    batch = collator(rows)
    counts = {name: (batch["input_ids"] == getattr(of, f"{name}_token_id")).sum(1).tolist() for name in of.tokens}
    assert counts == {"image": [0, 0, 2, 0], "video": [3, 0, 6, 0], "audio": [0, 2, 0, 2]}
    assert batch["pixel_values"].shape[0] == 1 and batch["pixel_values_videos"].shape[0] == 3
    assert batch["input_features"].shape[0] == 2
    learnt = [of.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert [text.replace("</s>", "").strip() for text in learnt] == ["a red square", "red", "a blue square", "green"]
    with pytest.raises(ValueError, match="Row 0 holds 2 <video> but has 1 videos"):
        collator([{"video": grey(1, 2), "text": "<video> a <video>"}])


def test_a_model_of_audio_alone_trains_as_others_do(tmp_path: Path) -> None:
    _, words = tiny.save_parents(tmp_path)
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        None, words, save_audio_tower(tmp_path / "audio", "whisper"), audio_prefix_length=2, audio_connector_config=RESAMPLER
    ).train()
    tone = {name: np.sin(np.arange(8000) * rate).astype(np.float32) for name, rate in (("red", 0.05), ("blue", 0.9))}
    collator = DataCollatorForFrozenPrefix(FrozenPrefixProcessor.from_model(model))
    batch = collator([{"audio": sound, "text": f"a {name} square"} for name, sound in tone.items()])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_without_its_audio_tower_says_so() -> None:
    model = build("llama")
    model.model.audio_tower = None
    with pytest.raises(ValueError, match=r'audio tower is not loaded: load it by `model.load_base_model\("audio"\)`\.'):
        model.get_audio_features(sounds())
