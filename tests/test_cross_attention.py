"""Gated cross-attention in every decoder family: what a user would say of it."""

import copy
import functools
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel

from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration
from modeling_frozen.cross_attention import decoder_layers, probe_decoder
from modeling_frozen.transformers_compat import cache_of
from tests.helpers.families_joined import IMAGE, pictures
from tests.helpers.families_joined import prompt as families_prompt
from tests.helpers.families_text import DECODERS, ENCODER_DECODERS, VOCAB_SIZE, language_model, text_config
from tests.helpers.tiny import join, recompute_activations, skip_where_torch_traces_no_forward


Model = FrozenPrefixForConditionalGeneration

TOKENS = 4
BEGINNING = 1  # what a placeholder reads as
VISION = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
RESAMPLER = {"num_heads": 2, "hidden_size": 16, "num_layers": 1}
BLOCKS = {"every_n_layers": 1, "num_heads": 2, "head_dim": 8, "feedforward_multiple": 2}
SPECIFICATION = {
    "fusion": "cross_attention",
    "cross_attention_config": BLOCKS,
    "connector_type": "resampler",
    "connector_config": RESAMPLER,
    "prefix_length": TOKENS,
}


def open_gates(model: Model) -> Model:
    with torch.no_grad():
        for number, block in enumerate(model.model.cross_attention):
            block.attention_gate.fill_(1.0 + number)
            block.feedforward_gate.fill_(-0.7 - number)
    return model


def build(family: str, *, gates: bool = True, **options: object) -> Model:
    config = FrozenPrefixConfig.from_vision_text_configs(VISION, text_config(family), **{**SPECIFICATION, **options})
    torch.manual_seed(0)
    model = Model(config).eval()
    return open_gates(model) if gates else model


@functools.cache
def shared_model(family: str) -> Model:
    """Shared by the checks that change nothing in it; its gates are open."""
    return build(family)


# One placeholder stands for an image here, however many vectors it has.
prompt = functools.partial(families_prompt, placeholders=1)


def as_read(ids: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(ids == IMAGE, BEGINNING)


def connecting(model: Model) -> dict[str, torch.nn.Parameter]:
    parts = ("model.connector.", "model.cross_attention.")
    return {name: p for name, p in model.named_parameters() if name.startswith(parts)}


def greedy(ids: torch.Tensor, new: int = 6) -> dict[str, object]:
    return {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}


every_decoder = pytest.mark.parametrize("family", DECODERS)


@every_decoder
@torch.no_grad()
def test_at_first_it_is_the_bare_parent_bit_for_bit(family: str) -> None:
    model, ids = build(family, gates=False), prompt(images=2)
    keys = set(model.model.language_model.state_dict())
    bare = language_model(family).requires_grad_(False)  # torch multiplies otherwise by weights that train
    bare.load_state_dict(model.model.language_model.state_dict())
    assert keys == set(bare.state_dict())
    assert torch.equal(model(ids, pictures(2)).logits, bare(as_read(ids)).logits)
    states = model.model(ids, pictures(2)).last_hidden_state
    assert torch.equal(states, bare.base_model(as_read(ids)).last_hidden_state)


@every_decoder
@torch.no_grad()
def test_words_before_any_image_are_the_bare_parents(family: str) -> None:
    model, ids = shared_model(family), prompt(words=6)
    parent = model.model.language_model
    text = as_read(ids)
    assert torch.equal(model(text).logits, parent(text).logits)
    late = torch.cat([text, torch.tensor([[IMAGE, 7]])], dim=1)
    ours, bare = model(late, pictures()).logits, parent(as_read(late)).logits
    # Experts take all words in one heap, so their rounding of a word depends on the others.
    torch.testing.assert_close(ours[:, :-2], bare[:, :-2], atol=1e-6, rtol=1e-5)
    assert (ours - bare)[:, -2:].abs().amax(-1).min() > 1e-4


@every_decoder
@torch.no_grad()
def test_changing_the_image_changes_the_logits(family: str) -> None:
    model, ids = shared_model(family), prompt()
    first, second = (model(ids, pictures(seed=seed)).logits for seed in (1, 2))
    assert (first - second)[:, -1].abs().max() > 1e-4


@every_decoder
@torch.no_grad()
def test_the_order_of_two_images_matters(family: str) -> None:
    model, ids, images = shared_model(family), prompt(images=2), pictures(2)
    ahead, swapped, other_first = (
        model(ids, order).logits for order in (images, images.flip(0), torch.cat([pictures(1, 5), images[1:]]))
    )
    assert (ahead - swapped)[:, -1].abs().max() > 1e-5
    assert (ahead - other_first)[:, 1:3].abs().max() > 1e-5  # words between see the first
    torch.testing.assert_close(ahead[:, :1], swapped[:, :1], atol=1e-6, rtol=1e-5)


@every_decoder
def test_gradients_reach_every_parameter_of_connector_and_blocks_and_nothing_else(family: str) -> None:
    model, ids = build(family).train(), prompt()
    labels = ids.masked_fill(ids == IMAGE, -100)
    model(ids, pictures(), labels=labels).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == set(connecting(model))


@every_decoder
def test_a_step_opens_the_gates(family: str) -> None:
    """Closed gates stop all gradients but their own, and those must not be lost."""
    model, ids = build(family, gates=False).train(), prompt()
    model(ids, pictures(), labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name in connecting(model) if name.endswith("_gate")}
    assert all(p.grad is not None for p in connecting(model).values())


@every_decoder
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_single_samples(family: str, side: str) -> None:
    model = shared_model(family)
    rows = [prompt(words=3, images=2, seed=1)[0], prompt(words=8, seed=2)[0], prompt(words=4, images=0, seed=3)[0]]
    width = max(len(row) for row in rows)
    ids = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    images = pictures(3)
    if side == "left" and model.model.language_model._is_stateful and not model.model._skips_padding:
        with pytest.raises(ValueError, match="pad on the right"):
            model(ids, images, attention_mask=mask)
        return
    batch = model(ids, images, attention_mask=mask).logits
    for i, (row, own) in enumerate(zip(rows, (images[:2], images[2:], None), strict=True)):
        single = model(row[None], own).logits[0]
        torch.testing.assert_close(batch[i][mask[i].bool()], single, atol=2e-4, rtol=1e-3)


@every_decoder
@torch.no_grad()
def test_greedy_with_cache_equals_greedy_without(family: str) -> None:
    model = shared_model(family)
    ids = torch.cat([prompt(words=7, images=1, seed=1), prompt(words=5, images=2, seed=2), prompt(words=9, images=0)])
    cached, anew = (model.generate(ids, pixel_values=pictures(3), use_cache=use, **greedy(ids)) for use in (True, False))
    assert torch.equal(cached, anew)
    step = cached[:, : ids.shape[1]]
    for _ in range(6):  # and both are what the whole says at each place
        step = torch.cat([step, model(step, pictures(3)).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, step)


@every_decoder
@torch.no_grad()
def test_generation_sees_the_image_at_every_step(family: str) -> None:
    model, ids = shared_model(family), prompt()
    options = {**greedy(ids, 3), "return_dict_in_generate": True, "output_logits": True}
    outputs = model.generate(ids, pixel_values=pictures(seed=1), **options)
    whole = model(outputs.sequences, pictures(seed=1)).logits
    blind = model(outputs.sequences, pictures(seed=2)).logits
    for step, logits in enumerate(outputs.logits):
        place = ids.shape[1] - 1 + step
        torch.testing.assert_close(logits, whole[:, place].float(), atol=2e-4, rtol=1e-3)
        assert (logits - blind[:, place]).abs().max() > 1e-4


@every_decoder
@torch.no_grad()
def test_beams_and_return_sequences(family: str) -> None:
    model = shared_model(family)
    rows = [prompt(words=5, images=2, seed=1), prompt(words=7, images=1, seed=2)]
    ids, images = torch.cat(rows), pictures(3)
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
    }
    together = model.generate(ids, pixel_values=images, attention_mask=torch.ones_like(ids), **options)
    alone = [
        model.generate(row, pixel_values=picture, attention_mask=torch.ones_like(row), **options)
        for row, picture in zip(rows, (images[:2], images[2:]), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@every_decoder
@torch.no_grad()
def test_left_padded_generation_equals_single_samples(family: str) -> None:
    model = shared_model(family)
    if model.model.language_model._is_stateful and not model.model._skips_padding:
        return  # refused; see the padded batch
    rows = [prompt(words=3, images=2, seed=1), prompt(words=8, seed=2)]
    width, images = max(row.shape[1] for row in rows), pictures(3)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - row.shape[1] for row in rows]).long()
    together = model.generate(ids, pixel_values=images, **{**greedy(ids), "attention_mask": mask})[:, width:]
    alone = [
        model.generate(row, pixel_values=own, **greedy(row))[:, row.shape[1] :]
        for row, own in zip(rows, (images[:2], images[2:]), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@every_decoder
@torch.no_grad()
def test_static_cache_where_the_parent_has_it(family: str) -> None:
    model, ids = shared_model(family), prompt(images=2)
    if not model.model.language_model._can_compile_fullgraph:
        return
    dynamic = model.generate(ids, pixel_values=pictures(2), **greedy(ids, 5))
    static = model.generate(ids, pixel_values=pictures(2), cache_implementation="static", **greedy(ids, 5))
    assert torch.equal(dynamic, static)


@every_decoder
def test_bf16_parents_with_fp32_blocks_train_a_step(family: str) -> None:
    model = build(family)
    model.model.vision_tower.to(torch.bfloat16)
    model.model.language_model.to(torch.bfloat16)
    model.train()
    ours = set(connecting(model))
    frozen = {name: t.clone() for name, t in model.state_dict().items() if name not in ours}
    before = {name: t.detach().clone() for name, t in connecting(model).items()}
    ids = prompt()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(ids, pictures(), labels=ids.masked_fill(ids == IMAGE, -100)).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    if getattr(model.model.language_model.base_model, "layers_are_rescaled", False):
        model.model.language_model.base_model.train()  # RWKV's own doubling and halving: exact, undone to compare
        model.model.language_model.base_model._rescale_layers()
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in connecting(model).values())
    assert all(not torch.equal(before[name], p) for name, p in connecting(model).items())
    assert all(torch.equal(model.state_dict()[name], t) for name, t in frozen.items())


@every_decoder
def test_activation_checkpointing_gives_the_same_gradients(family: str) -> None:
    gradients, saved = [], []
    for enable in (False, True):
        model, ids, kept = build(family).train(), prompt(images=2), []
        if enable and not model.model.language_model.supports_gradient_checkpointing:
            return
        if enable:
            recompute_activations(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = model(ids, pictures(2), labels=ids.masked_fill(ids == IMAGE, -100)).loss
        saved.append(sum(kept))
        loss.backward()
        gradients.append([p.grad for p in connecting(model).values()])
    assert saved[1] < saved[0]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_checkpointed_layers_that_train_see_the_images_again(family: str) -> None:
    gradients = []
    for enable in (False, True):
        model, ids = build(family, trainable=("connector", "text")).train(), prompt(images=2)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if enable:
            recompute_activations(model)
        model(ids, pictures(2), labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(connecting(model)) < set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "rwkv"])
def test_layers_checkpointed_from_outside_see_the_images_again(family: str) -> None:
    """As torch's own wrapper does, which FSDP's users get: hooks run again in the backward pass."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    gradients = []
    for enable in (False, True):
        model, ids = build(family).train(), prompt(images=2)
        if enable:
            layers = set(decoder_layers(model.model.language_model))
            apply_activation_checkpointing(model, check_fn=layers.__contains__)
        model(ids, pictures(2), labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
        gradients.append([p.grad for p in connecting(model).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


@every_decoder
def test_saved_small_and_reloaded_it_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    CLIPVisionModel(VISION).save_pretrained(tmp_path / "tower")
    language_model(family).save_pretrained(tmp_path / "words")
    model = open_gates(
        Model.from_vision_text_pretrained(tmp_path / "tower", tmp_path / "words", image_token_id=IMAGE, **SPECIFICATION)
    )
    model.save_pretrained(tmp_path / "eyes")
    again = Model.from_pretrained(tmp_path / "eyes")
    with torch.no_grad():
        before, after = (m(prompt(), pictures()).logits for m in (model, again))
    assert torch.equal(before, after)
    written = sum(file.stat().st_size for file in (tmp_path / "eyes").iterdir())
    ours = sum(p.numel() * p.element_size() for p in connecting(model).values())
    assert ours <= written <= ours + 64 * 1024
    assert {name for name, p in again.named_parameters() if p.requires_grad} == set(connecting(again))


# --------------------------------------------------------------------------------------- what can't, and what is asked


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders_are_refused_with_the_reason(family: str) -> None:
    with pytest.raises(ValueError, match="those words are the encoder's"):
        FrozenPrefixConfig.from_vision_text_configs(VISION, text_config(family), **SPECIFICATION)


@pytest.mark.parametrize(
    "model_type, options, reason",
    [
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, r"\(3, 2, 32\)"),
        (
            "gemma3n_text",
            {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "layer_types": None},
            r"\(4, 2, 3, 2048\)",
        ),
    ],
)
def test_layers_that_read_something_else_are_refused(model_type: str, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        probe_decoder(AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, **options))


def test_a_language_model_without_a_list_of_layers_is_refused() -> None:
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="no list of layers"):
        decoder_layers(SimpleNamespace(base_model=torch.nn.Linear(2, 2)))


def test_a_language_model_that_skips_layers_is_no_silent_failure() -> None:
    model = build("llama")
    model.model.language_model.base_model.layers = model.model.language_model.base_model.layers[:1]
    with pytest.raises(RuntimeError, match="1 of 2 gated blocks"):
        model(prompt(), pictures())


def test_the_decoder_layers_are_probed() -> None:
    assert (probe_decoder(text_config("opt_350m")).hidden_size, probe_decoder(text_config("mixtral")).num_layers) == (
        32,
        2,
    )
    config = text_config("mixtral")
    config.num_local_experts = 9
    assert probe_decoder(config).num_layers == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fusion": "cross_atention"}, "cross_attention"),
        ({"cross_attention_config": {"every_n_layer": 2}}, "Did you mean `every_n_layers`"),
        (
            {"cross_attention_config": {"every_n_layers": 3}},
            "every_n_layers=3 leaves no block in a language model of 2",
        ),
        ({"cross_attention_config": {"num_heads": 0}}, "num_heads=0 must be a positive"),
        ({"cross_attention_config": {"dropout": 1.0}}, "dropout=1.0 must be"),
        ({"fusion": "prefix"}, "set `fusion='cross_attention'`"),
    ],
)
def test_wrong_specifications_are_refused(options: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        FrozenPrefixConfig.from_vision_text_configs(VISION, text_config("llama"), **{**SPECIFICATION, **options})


def test_every_n_layers() -> None:
    places = {}
    for layers in (2, 9):
        config = text_config("gpt2")
        config.n_layer = layers
        for every in (None, 2):
            options = {**SPECIFICATION, "cross_attention_config": {**BLOCKS, "every_n_layers": every}}
            built = Model(FrozenPrefixConfig.from_vision_text_configs(VISION, config, **options))
            places[layers, every] = built.model.cross_attention.layer_indices
    assert places == {(2, None): [1], (2, 2): [1], (9, None): [3, 7], (9, 2): [1, 3, 5, 7]}


def test_images_need_their_placeholders() -> None:
    model = shared_model("llama")
    with pytest.raises(ValueError, match="holds 1 image placeholders.*but the images fill 2"):
        model(prompt(), pictures(2))
    with pytest.raises(ValueError, match="pass `input_ids`"):
        model(inputs_embeds=model.model.embed_words(as_read(prompt())), pixel_values=pictures())


# ----------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba"])
@torch.no_grad()
def test_a_kept_cache_is_asked_many_questions(family: str) -> None:
    """Read once, copied, its rows repeated and chosen: what was seen goes with it."""
    model = shared_model(family)
    ids, images = torch.cat([prompt(images=2, seed=1), prompt(words=7, images=1, seed=2)]), pictures(3)
    read = model(ids, images, use_cache=True)
    words = torch.tensor([[7, 8], [9, 10]])
    whole = model(torch.cat([ids, words], dim=1), images).logits[:, -2:]
    for cache in (copy.deepcopy(cache_of(read)), copy.deepcopy(cache_of(read))):
        mask = torch.ones(2, ids.shape[1] + 1)
        first = model(words[:, :1], cache=cache, attention_mask=mask).logits
        mask = torch.ones(2, ids.shape[1] + 2)
        second = model(words[:, 1:], cache=cache, attention_mask=mask).logits
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=2e-4, rtol=1e-3)
    if family == "mamba":
        return
    cache = copy.deepcopy(cache_of(read))
    cache.batch_repeat_interleave(2)
    repeated = model(words.repeat_interleave(2, dim=0), past_key_values=cache).logits
    torch.testing.assert_close(repeated, whole.repeat_interleave(2, dim=0), atol=2e-4, rtol=1e-3)
    cache = copy.deepcopy(cache_of(read))
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(model(words.flip(0), past_key_values=cache).logits.flip(0), whole, atol=2e-4, rtol=1e-3)
    cache = copy.deepcopy(cache_of(read))
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(model(words[1:], past_key_values=cache).logits, whole[1:], atol=2e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="2 rows.*images of 1"):
        model(words, past_key_values=cache)
    model(words, past_key_values=cache_of(read))
    assert torch.equal(model(as_read(ids)).logits, model.model.language_model(as_read(ids)).logits)


@torch.no_grad()
def test_a_conversation_of_images_grows_and_is_cropped() -> None:
    model = shared_model("qwen2")
    turns, images = (
        [prompt(words=3, seed=1), prompt(words=4, images=2, seed=2), prompt(words=2, images=0)],
        pictures(3),
    )
    own = (images[:1], images[1:], None)
    whole = model(torch.cat(turns, dim=1), images).logits
    cache, said = None, []
    for turn, pixel_values in zip(turns, own, strict=True):
        outputs = model(turn, pixel_values, past_key_values=cache, use_cache=True)
        cache = outputs.cache
        said.append(outputs.logits)
    torch.testing.assert_close(torch.cat(said, dim=1), whole, atol=2e-4, rtol=1e-3)
    cache.crop(turns[0].shape[1] - whole.shape[1])  # back to after the first image: the others were never seen
    assert cache.get_seq_length() == turns[0].shape[1]
    for turn, again in ((turns[2], images[:1]), (turns[1], torch.cat([images[:1], images[1:].flip(0)]))):
        ours = model(turn, again[1:] if len(again) > 1 else None, past_key_values=copy.deepcopy(cache)).logits
        anew = model(torch.cat([turns[0], turn], dim=1), again).logits[:, turns[0].shape[1] :]
        torch.testing.assert_close(ours, anew, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 3}])
@torch.no_grad()
def test_other_ways_to_generate_are_greedy_too(options: dict) -> None:
    model, ids = shared_model("llama"), prompt(words=9, images=2)
    plain = model.generate(ids, pixel_values=pictures(2), **greedy(ids, 12))
    assert torch.equal(model.generate(ids, pixel_values=pictures(2), **options, **greedy(ids, 12)), plain)


@torch.no_grad()
def test_images_of_different_lengths() -> None:
    """Towers that keep each image's own number of patches: padding is not looked at."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = shared_model("llama")
    short, long = (torch.randn(1, n * 32, generator=torch.Generator().manual_seed(n)) for n in (2, 5))
    rows = [prompt(words=5, images=2, seed=1), prompt(words=7, images=1, seed=2)]
    own = [[short, long], [short]]
    together = model(torch.cat(rows), mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=sum(own, []))})
    for i, (row, images) in enumerate(zip(rows, own, strict=True)):
        alone = model(row, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=images)})
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=2e-4, rtol=1e-3)
        options = {**greedy(row, 4), "use_cache": True}
        ours = model.generate(row, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=images)}, **options)
        options["use_cache"] = False
        anew = model.generate(row, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=images)}, **options)
        assert torch.equal(ours, anew)


# --------------------------------------------------------------------------------------------- sharing and concurrency


@torch.no_grad()
def test_threads_do_not_mix() -> None:
    model, ids = shared_model("llama"), prompt()
    expected = [model(ids, pictures(seed=seed)).logits for seed in range(4)]
    bare = model.model.language_model(as_read(ids)).logits
    wrong: list[int] = []

    def look(seed: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                ours = model(ids, pictures(seed=seed)).logits if seed < 4 else model.model.language_model(as_read(ids)).logits
                if not torch.equal(ours, expected[seed] if seed < 4 else bare):
                    wrong.append(seed)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_two_composites_share_a_language_model_and_copies_are_whole() -> None:
    parent, tower = language_model("llama"), CLIPVisionModel(VISION)
    first, second = (
        open_gates(Model.from_vision_text_pretrained(tower, parent, image_token_id=IMAGE, **SPECIFICATION)) for _ in range(2)
    )
    ids = prompt()
    alone = open_gates(
        Model.from_vision_text_pretrained(tower, language_model("llama"), image_token_id=IMAGE, **SPECIFICATION)
    )
    alone.load_state_dict(first.state_dict())
    assert torch.equal(first(ids, pictures()).logits, alone(ids, pictures()).logits)
    assert not torch.equal(first(ids, pictures()).logits, second(ids, pictures()).logits)
    again = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in connecting(again).values():
            parameter.zero_()
    assert torch.equal(again(ids, pictures()).logits, parent(as_read(ids)).logits)
    assert torch.equal(first(ids, pictures()).logits, alone(ids, pictures()).logits)


def test_text_alone_trains_nothing_and_reaches_everything() -> None:
    model, ids = build("llama").train(), prompt(images=0)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in connecting(model).values())


@torch.no_grad()
def test_compiled_it_gives_the_same_logits() -> None:
    """From what the connector gave: tower and connector are compiled in test_families_joined.py, in half the time."""
    skip_where_torch_traces_no_forward()
    model, ids = build("llama"), prompt(images=2)
    seen = {"mm_encoder_outputs": {"image": model.get_image_features(pictures(2))}}
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, **seen).logits, model(ids, pictures(2)).logits, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- saving, loading


def test_what_is_frozen_and_kept_in_fp32(tmp_path: Path) -> None:
    model, processor = join(tmp_path, fusion="cross_attention", cross_attention_config=BLOCKS, dtype=torch.bfloat16)
    open_gates(model).save_pretrained(tmp_path / "eyes")
    again = Model.from_pretrained(tmp_path / "eyes", dtype=torch.bfloat16)
    for loaded in (model, again):
        assert {p.dtype for p in connecting(loaded).values()} == {torch.float32}
        assert loaded.model.language_model.dtype == torch.bfloat16
    inputs = processor(images=[pictures_of("red")], text="<image> a picture", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.num_image_tokens == 1
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    locked = Model.from_pretrained(tmp_path / "eyes", trainable=("vision",))
    assert not any(p.requires_grad for p in connecting(locked).values())


def pictures_of(colour: str):
    from PIL import Image

    return Image.new("RGB", (16, 16), colour)


def test_a_lacking_tensor_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = join(tmp_path, fusion="cross_attention", cross_attention_config=BLOCKS)
    model.save_pretrained(tmp_path / "eyes")
    file = tmp_path / "eyes" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.cross_attention.1.attention_gate"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors.*cross_attention.1.attention_gate"):
        Model.from_pretrained(tmp_path / "eyes")


def test_another_language_model_must_have_the_same_layers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from tests.helpers.tiny import text_config as tiny_text_config

    model, _ = join(tmp_path, fusion="cross_attention", cross_attention_config=BLOCKS)
    model.save_pretrained(tmp_path / "eyes")
    LlamaForCausalLM(tiny_text_config(num_hidden_layers=3)).save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError, match="made for 2 layers of width 32, but .* has 3 of width 32"):
        Model.from_pretrained(tmp_path / "eyes", text_base_model=str(tmp_path / "deeper"))
