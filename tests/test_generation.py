"""`generate()` in all the ways of transformers: everything is encoded once, and every way gives what plain decoding gives."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, cache_utils
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils import ModelOutput

from modeling_frozen import FrozenPrefixForConditionalGeneration
from modeling_frozen.generation_frozen_prefix import CandidatesOfText
from modeling_frozen.transformers_compat import cache_of
from tests.helpers.families_joined import IMAGE, PREFIX, build, pictures, prompt, shared_model
from tests.helpers.families_text import DECODERS, ENCODER_DECODERS, FAMILIES, VOCAB_SIZE, language_model
from tests.helpers.tiny import WORDS, join, rows, skip_where_torch_traces_no_forward, text_config, tokenizer


every_family = pytest.mark.parametrize("family", FAMILIES)
every_decoder = pytest.mark.parametrize("family", DECODERS)
SOME = ["gpt2", "mpt", "opt_350m", "llama", "gemma3_text", "t5"]
some_families = pytest.mark.parametrize("family", SOME)
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def new_cache(family: str) -> DynamicCache:
    return DynamicCache(config=shared_model(family).config.get_text_config(decoder=True))


def keeps_cache(family: str) -> bool:
    model = shared_model(family).model
    return model.keeps_cache and not model.is_recurrent


# ------------------------------------------------------------------------------------------------------- encoded once


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
}


@some_families
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_tower_and_connector_run_once(family: str, way: str) -> None:
    model = build(family)
    runs: list[str] = []
    for name in ("vision_tower", "connector"):
        getattr(model.model, name).register_forward_hook(lambda *_, name=name: runs.append(name))
    model.generate(prompt(), pixel_values=pictures(), **{**GREEDY, "use_cache": True, **WAYS[way]})
    assert runs == ["vision_tower", "connector"]


@torch.no_grad()
def test_tower_and_connector_run_once_with_an_assistant() -> None:
    model = build("llama")
    runs: list[str] = []
    for name in ("vision_tower", "connector"):
        getattr(model.model, name).register_forward_hook(lambda *_, name=name: runs.append(name))
    model.generate(prompt(), pixel_values=pictures(), assistant_model=language_model("llama"), **GREEDY)
    assert runs == ["vision_tower", "connector"]


@every_decoder
@pytest.mark.parametrize("way", ["beams", "samples"])
@torch.no_grad()
def test_a_prompt_is_read_once_for_all_its_answers(family: str, way: str) -> None:
    model = build(family)
    options = {**GREEDY, "use_cache": True, **WAYS[way], "max_new_tokens": 4}
    ids, images = torch.cat([prompt(seed=1), prompt(seed=2)]), pictures(2)
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(len(args[0])))
    torch.manual_seed(3)
    ours = model.generate(ids, pixel_values=images, **options)
    assert read == [2 if keeps_cache(family) else 6, *[6] * 3]
    torch.manual_seed(3)
    plain = model.generate(ids, pixel_values=images, **{**options, "use_cache": False})  # each answer reads all
    assert torch.equal(ours, plain)
    # Of another picture each: rows of equal words differ.
    torch.manual_seed(3)
    ours = model.generate(ids[:1].expand(2, -1), pixel_values=images, **options)
    torch.manual_seed(3)
    plain = model.generate(ids[:1].expand(2, -1), pixel_values=images, **{**options, "use_cache": False})
    assert torch.equal(ours, plain)


@every_decoder
@torch.no_grad()
def test_each_step_reads_one_word(family: str) -> None:
    model = build(family)
    read: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(next(kwargs[n] for n in ("input_ids", "inputs_embeds") if n in kwargs).shape[1]),
        with_kwargs=True,
    )
    ids = prompt()
    options = {**GREEDY, "use_cache": True}
    model.generate(ids, pixel_values=pictures(), **options)
    length = ids.shape[1]
    assert read == [length, *[1] * 7] if model.model.keeps_cache else [length + step for step in range(8)]


# ------------------------------------------------------------------------------------------------- assisted decoding


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt_350m", "gemma3_text", "bloom", "qwen3", "t5"])
@pytest.mark.parametrize("knows", ["the same words", "other weights"])
@torch.no_grad()
def test_an_assistant_that_cannot_see_changes_nothing(family: str, knows: str) -> None:
    model = shared_model(family)
    assistant = copy.deepcopy(model.model.language_model) if knows == "the same words" else language_model(family, seed=5)
    for ids, images in ((prompt(), pictures()), (prompt(words=8, images=2), pictures(2))):
        expected = model.generate(ids, pixel_values=images, **GREEDY)
        ours = model.generate(ids, pixel_values=images, assistant_model=assistant, **GREEDY)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("images", [0, 1])
@torch.no_grad()
def test_what_an_assistant_foretells_is_read_at_once(images: int) -> None:
    """The language model itself, asked without the picture, foretells each word of a text, and behind a picture what it can:
    a word that is kept spares a call."""
    model, assistant = build("llama"), copy.deepcopy(shared_model("llama").model.language_model)
    assistant.generation_config.assistant_confidence_threshold = 0.0  # it proposes as many words as there are to come
    calls: list[int] = []
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    seen = {"pixel_values": pictures()} if images else {}
    expected = model.generate(prompt(images=images), **seen, **GREEDY)
    assert len(calls) == 8
    calls.clear()
    kept: list[int] = []
    update = CandidatesOfText.update_candidate_strategy

    class Counting(CandidatesOfText):
        def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
            kept.append(int(num_matches))
            update(self, input_ids, scores, num_matches)

    make = model._get_candidate_generator

    def counted(**kwargs: object) -> CandidatesOfText:
        generator = make(**kwargs)
        generator.__class__ = Counting
        return generator

    model._get_candidate_generator = counted
    assert torch.equal(model.generate(prompt(images=images), **seen, assistant_model=assistant, **GREEDY), expected)
    assert len(calls) + sum(kept) == 8
    if not images:
        assert len(calls) == 1


@torch.no_grad()
def test_an_assistant_cannot_propose_a_picture(tmp_path) -> None:
    """Where the placeholder is one of the vocabulary's spare ids, an assistant may well write it."""
    model, processor = join(tmp_path)
    assistant = copy.deepcopy(model.model.language_model)

    def write_placeholders(_: object, __: object, output: ModelOutput) -> None:
        output.logits[..., model.config.image_token_id] = 1e4

    assistant.register_forward_hook(write_placeholders)
    inputs = processor(images=rows(1)[0]["image"], text="<image> a red", return_tensors="pt")
    assert model.config.image_token_id < assistant.config.vocab_size
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, assistant_model=assistant, **GREEDY), expected)


@torch.no_grad()
def test_an_assistant_of_other_words_changes_nothing(tmp_path) -> None:
    model, processor = join(tmp_path)
    words = [*WORDS[:4], "another", *WORDS[4:]]
    assistant = LlamaForCausalLM(text_config(vocab_size=len(words))).eval()
    inputs = processor(images=rows(1)[0]["image"], text="<image> a red square that is", return_tensors="pt")
    expected = model.generate(**inputs, **GREEDY)
    both = {"tokenizer": processor.tokenizer, "assistant_tokenizer": tokenizer(words)}
    assert torch.equal(model.generate(**inputs, assistant_model=assistant, **both, **GREEDY), expected)


@torch.no_grad()
def test_an_assistant_reads_the_words_alone() -> None:
    """Placeholders are hidden from its attention, so it proposes what it would for the text without the picture."""
    model, assistant = build("llama"), language_model("llama", seed=5)
    seen: list[dict] = []
    assistant.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    ids = prompt()
    model.generate(ids, pixel_values=pictures(), assistant_model=assistant, **GREEDY)
    first = seen[0]
    words = ids != IMAGE
    assert bool((first["input_ids"] < VOCAB_SIZE).all())
    with torch.no_grad():
        logits = assistant(**{k: first[k] for k in ("input_ids", "attention_mask", "position_ids")}).logits[0, -1]
        expected = assistant(ids[words][None]).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "bloom", "t5"])
@torch.no_grad()
def test_prompt_lookup_never_proposes_a_picture(family: str) -> None:
    model = shared_model(family)
    ids = torch.tensor([[7, 8, *[IMAGE] * PREFIX, 9, 7, 8]])  # what followed "7 8" before was a picture
    expected = model.generate(ids, pixel_values=pictures(), **GREEDY)
    assert torch.equal(model.generate(ids, pixel_values=pictures(), prompt_lookup_num_tokens=3, **GREEDY), expected)


@pytest.mark.parametrize(
    "options", [{"assistant_model": True}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}]
)
@torch.no_grad()
def test_a_prefix_is_asked_with_help(options: dict) -> None:
    """Ways that want a cache of their own read the words again, and the picture not."""
    model = build("llama")
    prefix = model.encode_prefix(prompt(seed=1), pixel_values=pictures())
    if "assistant_model" in options:
        options = {"assistant_model": language_model("llama", seed=5)}
    question = torch.tensor([[5, 6, 7, 5, 6]])
    expected = model.generate(question, prefix_cache=prefix, **GREEDY)
    runs: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(model.generate(question, prefix_cache=prefix, **GREEDY, **options), expected)
    assert not runs


# ------------------------------------------------------------------------------------------------------------- caches


@every_decoder
@torch.no_grad()
def test_an_offloaded_cache_gives_the_same(family: str) -> None:
    if not keeps_cache(family):
        pytest.skip("the family keeps no cache of transformers")
    options = {**GREEDY, "use_cache": True, "cache_implementation": "offloaded"}
    if not torch.accelerator.is_available():
        with pytest.raises((RuntimeError, AssertionError)) as error:
            language_model(family).generate(prompt(images=0), **options)
        with pytest.raises(type(error.value)):
            shared_model(family).generate(prompt(), pixel_values=pictures(), **options)
        return
    if not torch.cuda.is_available():
        pytest.skip("moves to CUDA")
    model, ids = build(family).to("cuda"), prompt().to("cuda")
    expected = model.generate(ids, pixel_values=pictures().to("cuda"), **GREEDY)
    offloaded = model.generate(ids, pixel_values=pictures().to("cuda"), **options)
    assert torch.equal(offloaded, expected)


@every_decoder
@torch.no_grad()
def test_a_quantised_cache_does_as_in_the_parent(family: str) -> None:
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("quantised caches of this transformers need quanto or HQQ")
    if not keeps_cache(family) or any(layer.is_sliding for layer in new_cache(family).layers):
        pytest.skip("transformers quantises no cache of this family")
    model, words = build(family), prompt(words=12, images=0)
    options = {**GREEDY, "use_cache": True, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    assert torch.equal(model.generate(words, **options), model.model.language_model.generate(words, **options))
    read: list[type] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(type(cache_of(kwargs)).__name__), with_kwargs=True
    )
    assert model.generate(prompt(), pixel_values=pictures(), **options).shape == (1, prompt().shape[1] + 8)
    assert set(read) == {"QuantizedCache"}


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), pytest.param("t5", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_a_compiled_decode_step_over_a_static_cache_gives_the_same(family: str) -> None:
    skip_where_torch_traces_no_forward()
    model, ids = build(family), prompt()
    torch.compiler.reset()
    expected = model.generate(ids, pixel_values=pictures(), **GREEDY)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(backend=backend, fullgraph=True, dynamic=None, mode=None)
    compiled._compile_all_devices = True
    options = {**GREEDY, "cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(model.generate(ids, pixel_values=pictures(), **options), expected)
    assert 1 <= len(graphs) <= 2  # of the step alone; once more where a first size turns out to vary


@every_decoder
@torch.no_grad()
def test_prefill_in_chunks_gives_the_same(family: str) -> None:
    """Chunks cut pictures in two."""
    if not keeps_cache(family):
        pytest.skip("the family keeps no cache of transformers")
    model = shared_model(family)
    ids, images = torch.cat([prompt(words=6, images=2, seed=1), prompt(words=6, images=2, seed=2)]), pictures(4)
    options = {**GREEDY, "use_cache": True}
    expected = model.generate(ids, pixel_values=images, **options)
    chunked = model.generate(ids, pixel_values=images, prefill_chunk_size=3, **options)
    assert torch.equal(chunked, expected)


@every_decoder
@torch.no_grad()
def test_a_dialogue_goes_on_from_its_cache(family: str) -> None:
    if not keeps_cache(family):
        pytest.skip("the family keeps no cache of transformers")
    model = shared_model(family)
    ids, images = torch.cat([prompt(seed=1), prompt(seed=2)]), pictures(2)
    first = model.generate(ids, pixel_values=images, return_dict_in_generate=True, **{**GREEDY, "use_cache": True})
    assert isinstance(cache_of(first), DynamicCache)
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]] * 2)], dim=1)
    whole = {**GREEDY, "attention_mask": torch.ones_like(more)}
    expected = model.generate(more, pixel_values=images, **whole)
    for again in ({}, {"pixel_values": images}):
        kept = copy.deepcopy(cache_of(first))
        assert torch.equal(model.generate(more, past_key_values=kept, **again, **whole), expected)
    if family in ("llama", "gpt2", "bloom"):
        beams = {**whole, "num_beams": 2, "max_new_tokens": 3}
        expected = model.generate(more, pixel_values=images, **beams)
        kept = copy.deepcopy(cache_of(first))
        assert torch.equal(model.generate(more, past_key_values=kept, **beams), expected)


# ------------------------------------------------------------------------------------------------ inputs and outputs


@every_family
@torch.no_grad()
def test_embeddings_in_place_of_ids(family: str) -> None:
    """With the picture in them already; new ids alone come back."""
    model, ids = shared_model(family), prompt()
    if not model.model.keeps_cache:
        pytest.skip("embeddings are read at the first step alone, so transformers itself wants a cache")
    _, embeds, _ = model.model.merge(ids, None, {"pixel_values": pictures()})
    expected = model.generate(ids, pixel_values=pictures(), **GREEDY)[:, ids.shape[1] if family in DECODERS else 0 :]
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected)


@every_family
@torch.no_grad()
def test_scores_logits_and_states_come_back(family: str) -> None:
    model, ids = shared_model(family), prompt()
    options = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(ids, pixel_values=pictures(), output_hidden_states=True, **options)
    assert torch.equal(output.sequences, model.generate(ids, pixel_values=pictures(), **{**GREEDY, "max_new_tokens": 3}))
    assert len(output.scores) == len(output.logits) == 3
    assert torch.equal(output.scores[0], output.logits[0])
    states = output.hidden_states if family in DECODERS else output.decoder_hidden_states
    assert len(states) == 3 and states[0] is not None
    if family in ENCODER_DECODERS:
        assert output.encoder_hidden_states is not None


@every_decoder
@torch.no_grad()
def test_the_head_is_not_copied_for_each_row(family: str) -> None:
    """A product of batches, which torch takes for rows that lie apart, has a frozen head copied for each, in bfloat16."""
    model, ids = shared_model(family), prompt().expand(2, -1)
    inputs = {"input_ids": ids, "pixel_values": pictures().repeat(2, 1, 1, 1)}
    whole = model(**inputs).logits
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        output = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(output, whole[:, -1:])
    products = [event for event in seen.events() if event.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")]
    by_the_head = {event.name for event in products if any(VOCAB_SIZE in shape for shape in event.input_shapes)}
    assert by_the_head and by_the_head <= {"aten::mm", "aten::addmm"}, by_the_head


@every_family
@torch.no_grad()
def test_an_encoder_output_is_used_again(family: str) -> None:
    if family in DECODERS:
        pytest.skip("for encoder-decoders")
    model, ids = shared_model(family), prompt()
    expected = model.generate(ids, pixel_values=pictures(), **GREEDY)
    _, embeds, _ = model.model.merge(ids, None, {"pixel_values": pictures()})
    encoded = model.get_encoder()(inputs_embeds=embeds, return_dict=True)
    assert torch.equal(model.generate(encoder_outputs=encoded, **GREEDY), expected)


@some_families
@torch.no_grad()
def test_several_answers_to_each_of_several_pictures(family: str) -> None:
    model = shared_model(family)
    ids, images = torch.cat([prompt(seed=1), prompt(seed=2)]), pictures(2)
    config = GenerationConfig(do_sample=True, num_return_sequences=3, max_new_tokens=4, eos_token_id=None, top_k=1)
    config.decoder_start_token_id = model.generation_config.decoder_start_token_id
    drawn = model.generate(ids, pixel_values=images, generation_config=config)
    expected = model.generate(ids, pixel_values=images, **{**GREEDY, "max_new_tokens": 4})
    assert torch.equal(drawn, expected.repeat_interleave(3, dim=0))  # top_k=1: each is greedy


@torch.no_grad()
def test_what_the_language_model_would_do_it_does() -> None:
    """Generation settings are the parent's."""
    model: FrozenPrefixForConditionalGeneration = build("llama")
    assert model.generation_config.eos_token_id == model.model.language_model.generation_config.eos_token_id
    assert model.generation_config is not model.model.language_model.generation_config
