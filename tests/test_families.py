"""Every family of the tables, put through what a user would say of it."""

import copy

import pytest
import torch

from modeling_frozen import FrozenPrefixForConditionalGeneration
from tests.helpers.families_joined import IMAGE, PREFIX, build, decoder_inputs, pictures, prompt, shared_model
from tests.helpers.families_text import DECODERS, ENCODER_DECODERS, FAMILIES, language_model
from tests.helpers.tiny import recompute_activations


every_family = pytest.mark.parametrize("family", FAMILIES)
every_decoder = pytest.mark.parametrize("family", DECODERS)


@every_family
@torch.no_grad()
def test_changing_the_image_changes_the_logits(family: str) -> None:
    model, ids = shared_model(family), prompt()
    first, second = (model(ids, pictures(seed=seed), **decoder_inputs(family)).logits for seed in (1, 2))
    assert (first - second)[:, -1].abs().max() > 1e-4


@every_family
def test_gradients_reach_every_connector_parameter_and_nothing_else(family: str) -> None:
    model = build(family).train()
    ids = prompt()
    labels = ids.masked_fill(ids == IMAGE, -100)
    model(ids, pictures(), labels=labels).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {f"model.connector.{name}" for name, _ in model.model.connector.named_parameters()}


@every_family
@torch.no_grad()
def test_text_only_logits_are_the_bare_parents(family: str) -> None:
    model = shared_model(family)
    ids = prompt(images=0)
    ours = model(ids, attention_mask=torch.ones_like(ids), **decoder_inputs(family)).logits
    bare = model.model.language_model(ids, attention_mask=torch.ones_like(ids), **decoder_inputs(family)).logits
    assert torch.equal(ours, bare)


@every_family
@torch.no_grad()
def test_no_token_sees_a_later_one(family: str) -> None:
    model, ids = shared_model(family), prompt()
    inputs = {"input_ids": ids, **decoder_inputs(family)}
    name, tokens = list(inputs.items())[-1]
    logits = []
    for last in (10, 11):
        changed = torch.cat([tokens[:, :-1], torch.tensor([[last]])], dim=1)
        logits.append(model(**{**inputs, name: changed}, pixel_values=pictures()).logits[:, :-1])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@every_family
@torch.no_grad()
def test_merged_words_are_the_bare_parents(family: str) -> None:
    """The route through `inputs_embeds` reads words as the parent reads ids: with the prefix replaced by the embeddings
    of real words, logits are those of the words."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = shared_model(family)
    ids = prompt()
    words = ids.clone()
    words[ids == IMAGE] = torch.tensor([11, 12, 13, 14])
    vectors = model.model.embed_words(words[ids == IMAGE][None])[0]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=[vectors])}
    ours = model(ids, mm_encoder_outputs=encoded, **decoder_inputs(family)).logits
    bare = model.model.language_model(words, **decoder_inputs(family)).logits
    torch.testing.assert_close(ours, bare, atol=1e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_single_samples(family: str, side: str) -> None:
    model = shared_model(family)
    rows = [prompt(words=3, seed=1)[0], prompt(words=8, seed=2)[0]]
    width = max(len(row) for row in rows)
    ids = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    images = pictures(2)
    if side == "left" and model.model.language_model._is_stateful and not model.model._skips_padding:
        with pytest.raises(ValueError, match="pad on the right"):
            model(ids, images, attention_mask=mask)
        return
    batch = model(ids, images, attention_mask=mask, **decoder_inputs(family, 2)).logits
    for i, row in enumerate(rows):
        single = model(row[None], images[i : i + 1], **decoder_inputs(family)).logits[0]
        ours = batch[i] if family in ENCODER_DECODERS else batch[i][mask[i].bool()]
        torch.testing.assert_close(ours, single, atol=2e-4, rtol=1e-3)


@every_family
@torch.no_grad()
def test_greedy_with_cache_equals_greedy_without(family: str) -> None:
    model, ids = shared_model(family), torch.cat([prompt(seed=1), prompt(seed=2)])
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    cached, anew = (model.generate(ids, pixel_values=pictures(2), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, anew)


@every_family
@torch.no_grad()
def test_generation_sees_the_image(family: str) -> None:
    model, ids = shared_model(family), prompt()
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"attention_mask": torch.ones_like(ids), "eos_token_id": None}
    first, second = (model.generate(ids, pixel_values=pictures(seed=s), **options).logits[0] for s in (1, 2))
    assert (first - second).abs().max() > 1e-4
    step = model(ids, pictures(seed=1), **({} if family in DECODERS else first_decoder_step(model))).logits[:, -1]
    torch.testing.assert_close(first, step.float(), atol=1e-5, rtol=1e-5)


def first_decoder_step(model: FrozenPrefixForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": torch.tensor([[model.generation_config.decoder_start_token_id]])}


@every_family
@torch.no_grad()
def test_beams_and_return_sequences(family: str) -> None:
    """Each row's beams are those that it has alone, whatever number of pictures its neighbours hold."""
    model = shared_model(family)
    rows = [prompt(words=5, images=2, seed=1), prompt(words=5 + PREFIX + 1, images=1, seed=2)]
    ids, images = torch.cat(rows), pictures(3)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, pixel_values=images, attention_mask=torch.ones_like(ids), **options)
    alone = [
        model.generate(row, pixel_values=picture, attention_mask=torch.ones_like(row), **options)
        for row, picture in zip(rows, (images[:2], images[2:]), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@every_family
@torch.no_grad()
def test_sampling_with_a_seed_repeats(family: str) -> None:
    model, ids = shared_model(family), prompt()
    drawn = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        options = {"max_new_tokens": 8, "do_sample": True, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
        drawn.append(model.generate(ids, pixel_values=pictures(), temperature=2.0, **options).tolist())
    assert drawn[0] == drawn[1]
    assert any(other != drawn[0] for other in drawn[2:])


@every_family
@torch.no_grad()
def test_the_order_of_two_images_matters(family: str) -> None:
    model, ids, images = shared_model(family), prompt(images=2), pictures(2)
    ahead, swapped = (model(ids, order, **decoder_inputs(family)).logits for order in (images, images.flip(0)))
    assert (ahead - swapped)[:, -1].abs().max() > 1e-5


@every_family
@torch.no_grad()
def test_processors_meet_a_placeholder_past_the_vocabulary(family: str) -> None:
    """Repetition penalty gathers logits at prompt ids: the placeholder, which has no logit, must neither crash it nor
    lend its penalty to a word."""
    model, ids = shared_model(family), prompt()
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    plain = model.generate(ids, pixel_values=pictures(), **options)
    neutral = model.generate(ids, pixel_values=pictures(), repetition_penalty=1.0 + 1e-12, **options)
    assert torch.equal(plain, neutral)
    strong = model.generate(ids, pixel_values=pictures(), repetition_penalty=1e4, no_repeat_ngram_size=2, **options)
    new = strong[0, -4:].tolist()
    assert len(set(new)) == len(new)


@every_family
def test_saved_small_and_reloaded_it_gives_the_same_logits(family: str, tmp_path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    CLIPVisionModel(vision).save_pretrained(tmp_path / "tower")
    language_model(family).save_pretrained(tmp_path / "words")
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        tmp_path / "tower", tmp_path / "words", connector_type="resampler", prefix_length=PREFIX,
        connector_config={"num_heads": 2, "hidden_size": 16}, image_token_id=IMAGE,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "eyes")
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")
    with torch.no_grad():
        before, after = (m(prompt(), pictures(), **decoder_inputs(family)).logits for m in (model, again))
    assert torch.equal(before, after)
    written = sum(file.stat().st_size for file in (tmp_path / "eyes").iterdir())
    connector = sum(p.numel() * p.element_size() for p in model.model.connector.parameters())
    assert connector <= written <= connector + 64 * 1024
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {f"model.connector.{name}" for name, _ in again.model.connector.named_parameters()}


@every_family
def test_bf16_parents_with_fp32_connector_train_a_step(family: str) -> None:
    model = build(family)
    model.model.vision_tower.to(torch.bfloat16)
    model.model.language_model.to(torch.bfloat16)
    model.train()
    frozen = {name: t.clone() for name, t in model.state_dict().items() if ".connector." not in name}
    ids = prompt()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = copy.deepcopy(model.model.connector.state_dict())
    loss = model(ids, pictures(), labels=ids.masked_fill(ids == IMAGE, -100)).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    after = model.model.connector.state_dict()
    if getattr(model.model.language_model.base_model, "layers_are_rescaled", False):
        # RWKV itself halves weights while it evaluates, and doubles them to train: exact, and undone here to compare.
        model.model.language_model.base_model.train()
        model.model.language_model.base_model._rescale_layers()
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in frozen.items())


@every_family
def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less(family: str) -> None:
    """Frozen layers are in eval mode, in which transformers' checkpointing does nothing, silently."""
    if not language_model(family).supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="checkpointing"):
            recompute_activations(build(family).model.language_model)
        return
    ids, gradients, kept = prompt(), [], []
    for step in ("plain", "enabled", "disabled again"):
        model = build(family).train()
        if step != "plain":
            recompute_activations(model)
        if step == "disabled again":
            recompute_activations(model, enable=False)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, pictures(), labels=ids.masked_fill(ids == IMAGE, -100)).loss
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad for p in model.model.connector.parameters()])
    for plain, checkpointed in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)
    assert kept[1] < 0.75 * kept[0] and kept[2] == kept[0]


@every_family
@torch.no_grad()
def test_static_cache_where_the_parent_has_it(family: str) -> None:
    model, ids = shared_model(family), prompt()
    parent = model.model.language_model
    assert model._can_compile_fullgraph == parent._can_compile_fullgraph
    if not parent._can_compile_fullgraph:
        return
    short = torch.nn.functional.pad(prompt(words=3, seed=1), (2, 0))
    for rows in (ids, torch.cat([ids, short])):  # the short one padded on the left
        mask = (rows != 0).long()
        inputs = {"input_ids": rows, "attention_mask": mask, "pixel_values": pictures(len(rows))}
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        dynamic = model.generate(**inputs, **options)
        static = model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
        assert torch.equal(dynamic, static)


def _packed(ids: torch.Tensor, ends: list[int]) -> dict[str, torch.Tensor]:
    """One row of a beginning and several next tokens that don't see each other, as transformers' own test of such masks."""
    length, count = ids.shape[1], len(ends)
    seen = torch.ones(length + count, length + count, dtype=torch.bool).tril()
    seen[length:, length:] = torch.eye(count, dtype=torch.bool)
    return {
        "input_ids": torch.cat([ids, torch.tensor([ends])], dim=1),
        "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None],
        "position_ids": torch.tensor([[*range(length), *[length] * count]]),
    }


@every_decoder
@torch.no_grad()
def test_a_mask_of_four_dimensions_where_the_parent_takes_one(family: str) -> None:
    model, ends = shared_model(family), [10, 11, 12]
    parent = model.model.language_model

    def difference(run: object, ids: torch.Tensor, **media: torch.Tensor) -> float:
        rows = [torch.cat([ids, torch.tensor([[end]])], dim=1) for end in ends]
        alone = torch.cat([run(row, **media).logits[0, -1:] for row in rows])
        return (run(**_packed(ids, ends), **media).logits[0, -len(ends) :] - alone).abs().max().item()

    try:
        taken = difference(parent, prompt(words=prompt().shape[1] - 1, images=0)) < 1e-4
    except (ValueError, TypeError, RuntimeError, IndexError):
        taken = False
    assert taken or family not in ("llama", "gpt2", "qwen3")
    if taken:
        assert difference(model, prompt(), pixel_values=pictures()) < 1e-4
