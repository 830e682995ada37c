"""What differs between releases of transformers stays out of sight: the names of the cache, stand-ins for what is missing."""

import pickle

import pytest
import torch
from transformers import CLIPVisionConfig, DynamicCache, GPT2Config, PreTrainedConfig

from modeling_frozen import FrozenPrefixConfig
from modeling_frozen.parts import PARTS
from modeling_frozen.transformers_compat import (
    CACHE_NAMES,
    cache_argument,
    cache_of,
    cached_length,
    slice_logits_to_keep,
    take_cache,
)
from tests.helpers.families_joined import pictures, prompt, shared_model


GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": True}


@pytest.mark.old_names
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "t5"])
@torch.no_grad()
def test_the_cache_is_read_by_every_name(family: str) -> None:
    model, more = shared_model(family), {}
    if model.config.is_encoder_decoder:
        more = {"decoder_input_ids": torch.tensor([[1, 2]])}
    outputs = model(prompt(), pictures(), use_cache=True, **more)
    assert outputs.cache is not None and outputs.cache is cache_of(outputs)
    own = model.model.language_model(torch.tensor([[1, 2]]), use_cache=True, **more)
    for name in CACHE_NAMES:  # where the language model's own output has the name, so has ours
        if getattr(own, name, None) is not None:
            assert getattr(outputs, name) is outputs.cache and outputs[name] is outputs.cache


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_cache_is_taken_by_every_name(family: str, name: str) -> None:
    model, ids, images = shared_model(family), prompt(), pictures()
    whole = model(torch.cat([ids, torch.tensor([[5, 6]])], dim=1), images).logits[:, -2:]
    read = cache_of(model(ids, images, use_cache=True))
    mask = torch.ones(1, ids.shape[1] + 2)
    again = model(torch.tensor([[5, 6]]), attention_mask=mask, **{name: read}).logits
    torch.testing.assert_close(again, whole, atol=2e-4, rtol=1e-3)
    # forward of the headless model, and by position, as the fifth argument
    base = model.model(torch.tensor([[5, 6]]), None, mask, None, cache_of(model(ids, images, use_cache=True)))
    named = model.model(torch.tensor([[5, 6]]), attention_mask=mask, **{name: cache_of(model(ids, images, use_cache=True))})
    assert torch.equal(base.last_hidden_state, named.last_hidden_state)
    expected = model.generate(torch.cat([ids, torch.tensor([[5]])], dim=1), pixel_values=images, **GREEDY)
    kept = cache_of(model(ids, images, use_cache=True))
    asked = torch.cat([ids, torch.tensor([[5]])], dim=1)
    assert torch.equal(model.generate(asked, attention_mask=torch.ones_like(asked), **{name: kept}, **GREEDY), expected)


@torch.no_grad()
def test_two_caches_are_refused() -> None:
    model = shared_model("llama")
    with pytest.raises(ValueError, match="`cache` and as `past_key_values`: pass it once"):
        model(torch.tensor([[1]]), cache=DynamicCache(), past_key_values=DynamicCache())
    kwargs = {"past_key_values": None, "cache": "kept", "other": 1}
    assert take_cache(kwargs) == "kept" and kwargs == {"other": 1}


def test_which_argument_a_model_has_for_its_cache() -> None:
    assert cache_argument({"input_ids", "past_key_values"}) == "past_key_values"
    assert cache_argument({"cache_params"}) == "cache_params"
    assert cache_argument({"cache", "past_key_values"}) == "cache"


@pytest.mark.parametrize("family", ["llama", "mamba", "t5"])
@torch.no_grad()
def test_the_length_of_a_cache(family: str) -> None:
    model, more = shared_model(family), {}
    if model.config.is_encoder_decoder:
        more = {"decoder_input_ids": torch.tensor([[1, 2]])}
    read = model(prompt(), pictures(), use_cache=True, **more).cache
    assert cached_length(read) == {"llama": prompt().shape[1], "mamba": 0, "t5": 2}[family]
    assert cached_length(None) == cached_length(DynamicCache()) == 0


def test_outputs_survive_pickling() -> None:
    with torch.no_grad():
        outputs = shared_model("llama")(prompt(), pictures(), use_cache=True)
    again = pickle.loads(pickle.dumps(outputs))
    assert type(again) is type(outputs) and torch.equal(again.logits, outputs.logits)
    assert torch.equal(again.image_hidden_states, outputs.image_hidden_states)


def test_the_order_of_an_output_as_a_tuple() -> None:
    """Loss and logits first, as in every model of transformers, whatever the cache is called."""
    with torch.no_grad():
        outputs = shared_model("llama")(prompt(), pictures(), labels=prompt(), use_cache=True)
    first, second, third = outputs.to_tuple()[:3]
    assert first is outputs.loss and second is outputs.logits and third is outputs.cache


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, [[2, 3], [6, 7]]),
        (torch.tensor([0, 3]), [[0, 3], [4, 7]]),
        (torch.tensor([[1], [2]]), [[1], [6]]),
        (torch.tensor([[True, False, False, True], [False, True, False, False]]), [0, 3, 5]),
    ],
)
def test_which_logits_are_kept(keep: object, expected: list) -> None:
    states = torch.arange(8).view(2, 4, 1)
    assert torch.equal(slice_logits_to_keep(states, keep), torch.tensor(expected)[..., None])


def test_sub_configs_are_made_of_the_arguments() -> None:
    config = FrozenPrefixConfig(vision_config={"hidden_size": 24}, text_config={"model_type": "gpt2", "n_embd": 12})
    assert type(config.vision_config) is CLIPVisionConfig and config.vision_config.hidden_size == 24
    assert type(config.text_config) is GPT2Config and config.text_config.n_embd == 12
    assert config.audio_config is None and isinstance(config, PreTrainedConfig)
    assert set(FrozenPrefixConfig.sub_configs) == {f"{part}_config" for part in PARTS}
