"""What `generate()` may write, and where it ends."""

from typing import Any

import pytest
import torch

from modeling_frozen import FrozenPrefixForConditionalGeneration
from modeling_frozen.backbones import language_model_class
from tests.helpers.families_text import text_config
from tests.helpers.tiny import join, rows, tokenizer, vision_config


def prompt(model: Any, processor: Any, text: str = "<image> a") -> dict[str, Any]:
    return processor(images=rows(1)[0]["image"], text=text, return_tensors="pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return join(tmp_path_factory.mktemp("pair"))


# -------------------------------------------------------------------------------------------------------- placeholders


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_placeholders_are_never_written(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    model, processor = pair
    index = model.config.image_token_id
    head = model.get_output_embeddings()
    assert index < head.weight.shape[0]
    # A head that would write nothing else.
    handle = head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([index]), 1e4))
    try:
        inputs = prompt(model, processor)
        out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **options)
        new = out[:, inputs["input_ids"].shape[1] :]
        assert new.shape[1] == 8 and not bool((new == index).any())
        # The next turn goes on from it.
        more = model.generate(out, pixel_values=inputs["pixel_values"], max_new_tokens=2)
        assert more.shape[1] <= out.shape[1] + 2
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------------------ guidance


@pytest.fixture(scope="module")
def past_the_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A vocabulary without spare rows, so that `<image>` lies past the head."""
    from tests.helpers.tiny import WORDS, save_parents

    folder = tmp_path_factory.mktemp("full")
    save_parents(folder, text={"vocab_size": len(WORDS)})
    model, processor = join(folder)
    assert model.config.image_token_id >= len(WORDS)
    return model, processor


@pytest.mark.parametrize("text", ["<image> a", "a picture"])
def test_guidance_where_the_placeholder_lies_past_the_head(past_the_head: tuple[Any, Any], text: str) -> None:
    model, processor = past_the_head
    inputs = prompt(model, processor, text) if "<image>" in text else processor(text=text, return_tensors="pt")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, guidance_scale=1.0 + 1e-6, **options), plain)
    guided = model.generate(**inputs, guidance_scale=3.0, repetition_penalty=1.3, no_repeat_ngram_size=2, **options)
    assert guided.shape == plain.shape


def test_guidance_is_that_of_the_language_model_alone(past_the_head: tuple[Any, Any]) -> None:
    model, processor = past_the_head
    inputs = processor(text="a picture that", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    options = {"max_new_tokens": 6, "guidance_scale": 2.0, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.model.language_model.generate(**inputs, **options))


# ----------------------------------------------------------------------------------------------------------- positions


@pytest.fixture(scope="module", params=["gpt2", "opt", "bart"])
def short(request: pytest.FixtureRequest) -> tuple[Any, Any, int]:
    """A language model that learned few positions, and ends no sentence by itself."""
    from transformers import CLIPVisionModel

    config = text_config(request.param)
    setattr(config, "n_positions" if request.param == "gpt2" else "max_position_embeddings", 20)
    text = language_model_class(config).from_config(config).eval()
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        CLIPVisionModel(vision_config()).eval(), text, connector_type="mlp"
    )
    model.generation_config.eos_token_id = None
    return model, None, 20


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_an_answer_ends_where_positions_run_out(short: tuple[Any, Any, int], options: dict[str, Any]) -> None:
    model, _, positions = short
    if model.config.is_encoder_decoder and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers looks up decoder-only prompts alone")
    ids = torch.tensor([[5, *[model.config.image_token_id] * model.config.num_image_tokens, 6, 7]])
    out = model.generate(ids, pixel_values=torch.randn(1, 3, 16, 16), max_new_tokens=100, do_sample=False, **options)
    assert out.shape[1] == positions + 1
    known = model.generate(ids, pixel_values=torch.randn(1, 3, 16, 16), max_new_tokens=4, do_sample=False, **options)
    assert known.shape[1] <= ids.shape[1] + 4


def test_an_embedded_prompt_ends_there_too(short: tuple[Any, Any, int]) -> None:
    model, _, positions = short
    if model.config.is_encoder_decoder:
        pytest.skip("the prompt is the encoder's")
    embeds = model.model.embed_words(torch.tensor([[5, 6, 7]]))
    assert model.generate(inputs_embeds=embeds, max_new_tokens=100).shape[1] == positions + 1 - 3


def test_a_prompt_longer_than_the_positions_is_refused(short: tuple[Any, Any, int]) -> None:
    model, _, positions = short
    with pytest.raises(ValueError, match="learned positions"):
        model.generate(torch.full((1, positions + 3), 5), max_new_tokens=5)


# ------------------------------------------------------------------------------------------------------- what is asked


def test_placeholders_without_images_are_refused(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    inputs = prompt(model, processor)
    with pytest.raises(ValueError, match="placeholder.*pixel_values"):
        model.generate(inputs["input_ids"], max_new_tokens=3)
    with pytest.raises(ValueError, match="pixel_value"):
        model.generate(inputs["input_ids"], pixel_value=inputs["pixel_values"], max_new_tokens=3)
    for call in (model, model.model):
        with pytest.raises(ValueError, match="placeholder.*pixel_values"):
            call(inputs["input_ids"], pixel_value=inputs["pixel_values"])
    with pytest.raises(ValueError, match="placeholder.*pixel_values"):
        model(inputs["input_ids"], labels=inputs["input_ids"])
    model(inputs["input_ids"], mm_encoder_outputs={"image": model.get_image_features(inputs["pixel_values"])})


@pytest.mark.parametrize("option", [{"assistant_early_exit": 1}, {"token_healing": True}])
def test_what_can_not_be_done_says_so(pair: tuple[Any, Any], option: dict[str, Any]) -> None:
    model, processor = pair
    with pytest.raises(ValueError, match=next(iter(option))):
        model.generate(**prompt(model, processor), max_new_tokens=3, tokenizer=tokenizer(), **option)
