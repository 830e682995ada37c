"""What the prefix says, where the words look, whether they see: against the model's own numbers."""

import copy
import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.connectors import build_connector
from modeling_frozen.cross_attention import GatedCrossAttentionBlock
from modeling_frozen.interpretation.connector_attention import prefix_origins
from modeling_frozen.interpretation.interpret import _gated_weights, _joined, attention_to_image, nearest_words, sightedness
from modeling_frozen.interpretation.results import ImageAttention, Sightedness, WordSightedness
from modeling_frozen.vision_towers import grid_of
from tests.helpers.families_text import language_model
from tests.helpers.tiny import COLOURS, WORDS, join, rows, save_parents, tokenizer


IMAGES = [row["image"] for row in rows(3)]
TEXTS = [row["text"] for row in rows(3)]
SMALL = {"num_layers": 2, "num_heads": 2, "hidden_size": 16}
GATED = {
    "fusion": "cross_attention",
    "connector_type": "resampler",
    "prefix_length": 3,
    "connector_config": SMALL,
    "cross_attention_config": {"every_n_layers": 1, "num_heads": 2, "head_dim": 8},
}


def write(model: Any, *words: str) -> None:
    """Makes the connector write the embeddings of these words, whatever the picture."""
    ids = torch.tensor([WORDS.index(word) for word in words])
    with torch.no_grad():
        model.model.connector.output.weight.zero_()
        model.model.connector.output.bias.copy_(model.model.embed_words(ids).flatten())


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """An MLP over 2 x 2 positions; nobody changes it."""
    return join(tmp_path_factory.mktemp("joined"))


def family(folder: Path, name: str, **options: Any) -> tuple[Any, Any]:
    """A tiny tower with the tiny language model of a family."""
    save_parents(folder)
    language_model(name).save_pretrained(folder / "words")
    tokenizer().save_pretrained(folder / "words")
    return join(folder, **options)


# --------------------------------------------------------------------------------------------------- nearest words


def test_a_prefix_of_words_is_read_as_these_words(tmp_path: Path) -> None:
    model, processor = join(tmp_path, vision_feature_select_strategy="pooled", prefix_length=3)
    write(model, "red", "square", "green")
    result = nearest_words(model, processor, IMAGES[:2], top_k=2)
    assert [[row[0] for row in image] for image in result.words] == [["red", "square", "green"]] * 2
    for similarities, norms in zip(result.similarities, result.norms, strict=True):
        torch.testing.assert_close(similarities[:, 0], torch.ones(3))
        assert (similarities[:, 1] < 0.99).all()
        expected = model.model.embed_words(torch.tensor([WORDS.index("red")])).norm()
        assert norms[0] == pytest.approx(float(expected), rel=1e-5)


def test_nearest_words_are_those_of_all_words(joined: tuple[Any, Any]) -> None:
    model, processor = joined
    result = nearest_words(model, processor, IMAGES, top_k=4, skip_special_tokens=False, batch_size=2)
    table = model.get_input_embeddings().weight.detach()[: len(WORDS)]
    with torch.no_grad():
        prefixes = model.get_image_features(processor(images=IMAGES, return_tensors="pt")["pixel_values"]).pooler_output
    for prefix, ids, values, words in zip(prefixes, result.ids, result.similarities, result.words, strict=True):
        cosines = torch.cosine_similarity(prefix[:, None], table[None], dim=-1)
        expected, order = cosines.topk(4)
        torch.testing.assert_close(values, expected)
        assert torch.equal(ids, order) and words == [[WORDS[i] for i in row] for row in order.tolist()]
    assert len(result.rows()) == 3 * 4 * 4 and result.rows()[5]["position"] == 1
    lines = result.table(2).splitlines()
    assert len(lines) == 4 and lines[3].split()[:2] == ["3", result.words[2][3][0]]
    assert f"{float(result.similarities[2][3][1]):.2f}" in lines[3]


def test_placeholders_and_special_tokens_are_no_words(joined: tuple[Any, Any]) -> None:
    model, processor = joined
    every = nearest_words(model, processor, IMAGES[0], top_k=len(WORDS) - 4)
    assert set(every.words[0][0]) == set(WORDS[4:])
    with pytest.raises(ValueError, match=f"top_k={len(WORDS)} must be from 1 to the {len(WORDS) - 4} words"):
        nearest_words(model, processor, IMAGES[0], top_k=len(WORDS))


def test_vectors_that_stand_in_no_space_of_words_are_refused(tmp_path: Path) -> None:
    model, processor = join(tmp_path, **GATED)
    with pytest.raises(ValueError, match="gated blocks"):
        nearest_words(model, processor, IMAGES)
    with pytest.raises(ValueError, match="Linear is no frozen-prefix model"):
        nearest_words(torch.nn.Linear(1, 1), processor, IMAGES)


# ------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("text", [None, "a green square ."])
def test_attention_is_what_the_model_says_itself(joined: tuple[Any, Any], tmp_path: Path, text: str | None) -> None:
    model, processor = joined
    result = attention_to_image(model, processor, IMAGES[0], "what is", text=text, max_new_tokens=5, min_new_tokens=5)
    eager, _ = join(tmp_path)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    inputs = processor(images=[IMAGES[0]], text=["what is"], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if text is None:
        never = [model.config.image_token_id]
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5, suppress_tokens=never)[0]
    else:
        answer = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        ids = torch.cat([inputs["input_ids"][0], answer])
    with torch.no_grad():
        output = eager(input_ids=ids[None], pixel_values=inputs["pixel_values"], output_attentions=True)
    kept = [place for place in range(length, len(ids)) if int(ids[place]) not in processor.tokenizer.all_special_ids]
    assert result.ids.tolist() == ids[kept].tolist()
    assert result.words == [WORDS[i] if i < len(WORDS) else f"<{i}>" for i in result.ids.tolist()]
    columns = (ids == model.config.image_token_id).nonzero()[:, 0]
    for weights, expected in zip(result.attention, output.attentions, strict=True):
        queries = torch.tensor(kept) - 1  # the place before a word is where it was written
        torch.testing.assert_close(weights, expected[0][:, queries][..., columns])
    assert result.kind == "self" and result.grid == (2, 2)
    torch.testing.assert_close(result.maps().sum((1, 2)), result.share())
    torch.testing.assert_close(result.maps(1)[:, 1, 0], result.attention[1].mean(0)[:, 2])
    assert (result.share() > 0).all() and (result.share() < 1).all()


def test_the_model_keeps_its_implementation_and_other_threads_notice_nothing(joined: tuple[Any, Any]) -> None:
    model, processor = joined
    language = model.model.language_model
    assert language.config._attn_implementation == "sdpa"
    inputs = processor(images=IMAGES, text=["what is", "a", "a picture"], return_tensors="pt", padding=True)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    seen, wrong, stop = set(), [], threading.Event()

    def elsewhere() -> None:
        while not stop.is_set():
            wrong.append(not torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=4), expected))
            seen.add(language.config._attn_implementation)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    for _ in range(8):
        attention_to_image(model, processor, IMAGES[0], max_new_tokens=3)
    stop.set()
    thread.join()
    assert seen == {"sdpa"} and not any(wrong) and not model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["falcon", "gpt2", "opt_350m"])
def test_words_never_attend_to_what_follows_them(tmp_path: Path, name: str) -> None:
    """Falcon's weights did, when its implementation was switched in transformers' way."""
    model, processor = family(tmp_path, name)
    result = attention_to_image(model, processor, IMAGES[0], text="a red square .")
    assert result.words == ["a", "red", "square", "."]
    later = copy.deepcopy(processor)
    later.image_position = "end"  # the image stands behind the prompt, before the answer
    assert (attention_to_image(model, later, IMAGES[0], "what is", text="a red").share() > 0).all()
    weights = attention_to_image(model, processor, IMAGES[0], text="a").attention
    # BOS and four prefix vectors: all that the first word can look at.
    assert all((one[:, 0].sum(-1) < 1).all() and (one[:, 0].sum(-1) > 0.3).all() for one in weights)


@pytest.mark.parametrize("text", [None, "a green square ."])
def test_encoder_decoders_answer_by_their_cross_attention(tmp_path: Path, text: str | None) -> None:
    model, processor = family(tmp_path, "t5")
    options = {"min_new_tokens": 4, "max_new_tokens": 4}
    result = attention_to_image(model, processor, IMAGES[0], "what is", text=text, skip_special_tokens=False, **options)
    assert result.kind == "cross" and result.grid == (2, 2) and len(result.words) == len(result.ids) > 3
    inputs = processor(images=[IMAGES[0]], text=["what is"], return_tensors="pt")
    never = [model.config.image_token_id]
    ids = model.generate(**inputs, do_sample=False, **options, suppress_tokens=never)
    if text is not None:  # T5 starts at the pad token; this tokenizer puts BOS before a text
        ids = torch.tensor([[0, *processor.tokenizer(text)["input_ids"], WORDS.index("</s>")]])
    assert result.ids.tolist() == ids[0, 1:].tolist()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, decoder_input_ids=ids[:, :-1], output_attentions=True)
    columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    for weights, expected in zip(result.attention, output.cross_attentions, strict=True):
        torch.testing.assert_close(weights, expected[0][..., columns])


def test_gated_blocks_answer_by_their_own_attention(tmp_path: Path) -> None:
    model, processor = join(tmp_path, **GATED)
    for block in model.model.cross_attention:
        torch.nn.init.ones_(block.attention_gate)
    result = attention_to_image(model, processor, IMAGES[0], text="a green square .")
    assert result.kind == "gated" and [tuple(one.shape) for one in result.attention] == [(2, 4, 3)] * 2
    torch.testing.assert_close(result.share(), torch.ones(4))
    assert result.maps().shape == (4, 2, 2)
    assert not any(block._forward_pre_hooks for block in model.model.cross_attention)


def test_gated_weights_are_those_that_the_block_uses() -> None:
    block = GatedCrossAttentionBlock(
        hidden_size=12, embedding_dim=6, num_heads=2, head_dim=4, feedforward_multiple=1, dropout=0.0
    )
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, std=0.0 if "feedforward_gate" in name else 0.5)
    words, visual = torch.randn(2, 5, 12), torch.randn(2, 3, 6)
    mask = torch.tensor([[True, True, False], [True, False, True]])[:, None, None]
    weights = _gated_weights(block, words, visual, mask)
    read = (weights @ block.read(visual)[1]).transpose(1, 2).flatten(2)
    expected = words + block.attention_gate.tanh() * block.output(read)
    torch.testing.assert_close(block(words, visual, mask, torch.ones(2, 1, 1, dtype=torch.bool)), expected)


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_models_without_attention_say_so(tmp_path: Path, name: str) -> None:
    model, processor = family(tmp_path, name)
    with pytest.raises(ValueError, match="gives no attention weights: it is recurrent.*`sightedness`"):
        attention_to_image(model, processor, IMAGES[0], max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"connector_type": "lstm", "prefix_length": 3, "connector_config": {"hidden_size": 8}}, "'lstm' has no attention"),
        ({"vision_feature_select_strategy": "pooled", "prefix_length": 2}, "one pooled vector"),
    ],
)
def test_a_prefix_without_places_says_why(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    model, processor = join(tmp_path, **options)
    result = attention_to_image(model, processor, IMAGES[0], text="a red square")
    assert result.grid is None and reason in result.why_not_spatial
    with pytest.raises(ValueError, match=f"not spatial.*{reason}"):
        result.maps()
    assert result.by_word().shape == (3, options["prefix_length"])
    figure = result.plot()
    bars = [axes for axes in figure.axes if axes.patches]
    torch.testing.assert_close(
        torch.tensor([[float(bar.get_height()) for bar in axes.patches] for axes in bars]).float(), 100 * result.by_word()
    )


def test_leading_tokens_stand_on_no_place(tmp_path: Path) -> None:
    model, processor = join(tmp_path, vision_feature_select_strategy="full")
    result = attention_to_image(model, processor, IMAGES[0], text="a red square")
    assert result.num_leading == 1 and result.by_word().shape == (3, 5) and result.grid == (2, 2)
    torch.testing.assert_close(result.maps().flatten(1), result.by_word()[:, 1:])


def test_the_picture_is_what_the_tower_saw(joined: tuple[Any, Any]) -> None:
    model, processor = joined
    image = Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy())
    result = attention_to_image(model, processor, image, text="a")
    expected = torch.from_numpy(np.array(image)).float() / 255
    torch.testing.assert_close(result.image, expected, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------- from prefix vectors to places


@pytest.mark.parametrize("kind", ["resampler", "transformer", "qformer"])
def test_connectors_that_attend_say_where_their_vectors_come_from(kind: str) -> None:
    connector = build_connector(
        kind, num_positions=6, vision_width=8, embedding_dim=10, prefix_length=4, connector_config=SMALL
    ).eval()
    features = torch.randn(1, 6, 8)
    before = connector(features)
    origins = prefix_origins(connector, features)
    assert origins.shape == (4, 6) and (origins >= 0).all()
    torch.testing.assert_close(origins.sum(-1), torch.ones(4))
    mask = torch.tensor([[True, True, False, True, True, False]])
    assert prefix_origins(connector, features, mask).shape == (4, 4)
    torch.testing.assert_close(prefix_origins(connector, features, mask).sum(-1), torch.ones(4))
    # Nothing of it stays.
    torch.testing.assert_close(connector(features), before, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in connector.modules())


def test_rollout_of_one_layer_is_its_attention_and_of_two_by_hand() -> None:
    connector = build_connector(
        "resampler", num_positions=5, vision_width=8, embedding_dim=10, prefix_length=3, connector_config=SMALL
    ).eval()
    features = torch.randn(1, 5, 8)
    hidden = connector.project(connector.input_norm(features))
    queries, weights = connector.queries[None], []
    for layer in connector.layers:
        keys = torch.cat([layer.query_norm(queries), layer.context_norm(hidden)], dim=1)
        weights.append(layer.attention(layer.query_norm(queries), keys, keys)[1][0])
        queries = layer(queries, hidden, None)
    first = 0.5 * torch.cat([torch.eye(3), torch.zeros(3, 5)], 1) + 0.5 * weights[0]
    keys = torch.cat([first, torch.cat([torch.zeros(5, 3), torch.eye(5)], 1)])
    second = (0.5 * first + 0.5 * weights[1] @ keys)[:, 3:]
    expected = second / second.sum(-1, keepdim=True)
    torch.testing.assert_close(prefix_origins(connector, features), expected.detach())
    del connector.layers[1]
    alone = weights[0][:, 3:] / weights[0][:, 3:].sum(-1, keepdim=True)
    torch.testing.assert_close(prefix_origins(connector, features), alone.detach())


def test_rollout_through_other_connectors_by_hand() -> None:
    geometry = {"num_positions": 5, "vision_width": 8, "embedding_dim": 10, "prefix_length": 3}
    options = {"num_heads": 2, "hidden_size": 16}
    features, identity = torch.randn(1, 5, 8), torch.eye(8)

    def share(origins: torch.Tensor) -> torch.Tensor:
        return (origins[:3, 3:] / origins[:3, 3:].sum(-1, keepdim=True)).detach()

    connector = build_connector("qformer", **geometry, connector_config={**options, "num_layers": 2}).eval()
    connector.qformer.set_attn_implementation("eager")
    output = connector.qformer(
        query_embeds=connector.queries[None],
        encoder_hidden_states=connector.input_norm(features),
        output_attentions=True,
    )
    # transformers puts the cross-attention's weights among the others' too.
    to_queries = [one[0].mean(0) for one in output.attentions if one.shape[-1] == 3]
    to_positions = [one[0].mean(0) for one in output.cross_attentions]
    assert len(to_queries) == 2 and len(to_positions) == 1  # every second layer looks at the picture, the first among them
    origins = 0.5 * identity[:3] + 0.5 * to_queries[0] @ identity[:3]
    origins = 0.5 * origins + 0.5 * to_positions[0] @ identity[3:]
    origins = 0.5 * origins + 0.5 * to_queries[1] @ origins
    torch.testing.assert_close(prefix_origins(connector, features), share(origins))

    connector = build_connector("transformer", **geometry, connector_config={**options, "num_layers": 2}).eval()
    hidden = torch.cat([connector.queries[None], connector.project(connector.input_norm(features))], dim=1)
    origins = identity
    for layer in connector.layers:
        normed = layer.norm1(hidden)
        origins = 0.5 * origins + 0.5 * layer.self_attn(normed, normed, normed)[1][0] @ origins
        hidden = layer(hidden)
    torch.testing.assert_close(prefix_origins(connector, features), share(origins))


def test_origins_on_a_grid() -> None:
    sizes = {"num_positions": 16, "vision_width": 8, "embedding_dim": 8, "grid": (2, 8)}
    quarters = torch.kron(torch.eye(4), torch.full((1, 2), 0.25)).repeat(1, 2)  # both rows, two columns each
    for name, options in (("avg_pool", {"output_size": (1, 4)}), ("pixel_shuffle", {})):
        connector = build_connector(name, **sizes, prefix_length=4, connector_config=options).eval()
        torch.testing.assert_close(prefix_origins(connector, torch.randn(1, 16, 8)), quarters)
    blurred = build_connector("c_abstractor", **sizes, prefix_length=1).eval()
    assert prefix_origins(blurred, torch.randn(1, 16, 8)) is None
    own = build_connector("avg_pool", **{**sizes, "grid": "variable"}, prefix_length=1).eval()
    expected = torch.full((1, 6), 1 / 6)
    there = torch.arange(16)[None] < 6
    torch.testing.assert_close(prefix_origins(own, torch.randn(1, 16, 8), there, torch.tensor([[2, 3]])), expected)


def test_the_grid_of_positions() -> None:
    assert grid_of(196, 224, 224) == (14, 14)
    assert grid_of(14 * 28, 224, 448) == (14, 28)
    assert grid_of(49, 224, 224) == (7, 7)
    assert grid_of(15 * 20, 240, 320) == (15, 20)
    assert grid_of(7 * 10, 100, 150) == (7, 10)  # a convolution rounds up
    assert grid_of(7, 224, 224) is None


# ------------------------------------------------------------------------------------------------- sightedness


@pytest.mark.parametrize("name", ["llama", "t5", "gated"])
def test_sightedness_is_made_of_plain_log_probabilities(tmp_path: Path, name: str) -> None:
    model, processor = join(tmp_path, **GATED) if name == "gated" else family(tmp_path, name)
    if name == "gated":
        for block in model.model.cross_attention:
            torch.nn.init.ones_(block.attention_gate)
    texts = ["a red square .", "a green", "a blue square"]
    result = sightedness(model, processor, IMAGES, texts, prompts="what is", batch_size=2)
    collator = DataCollatorForFrozenPrefix(processor)
    for index, (sample, text) in enumerate(zip(result.samples, texts, strict=True)):
        start = ["<s>"] if name == "t5" else []  # this tokenizer writes BOS into what a decoder is to write
        assert sample.words == [*start, *text.split(), "</s>"] and sample.swapped.shape == (2, len(sample.words))
        nats = {}
        for j, image in enumerate(IMAGES):
            batch = collator([{"image": image, "prompt": "what is", "answer": text}])
            with torch.no_grad():
                output = model(**batch)
            logits, labels = output.logits[0], batch["labels"][0]
            if not model.config.is_encoder_decoder:
                logits, labels = logits[:-1], labels[1:]
            kept = labels != -100
            nats[j] = logits[kept].log_softmax(-1).gather(1, labels[kept][:, None])[:, 0]
            assert float(-nats[j].mean()) == pytest.approx(float(output.loss), rel=1e-4)
        others = torch.stack([nats[j] for j in nats if j != index])
        torch.testing.assert_close(sample.log_likelihood, nats[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sample.swapped, others, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sample.drop, nats[index] - others.mean(0), atol=1e-4, rtol=1e-4)
        assert sample.drop.abs().max() > 1e-3  # this model is not blind
    assert len(result.rows()) == sum(len(sample.words) for sample in result.samples)
    assert result.mean == pytest.approx(sum(row["drop"] for row in result.rows()) / len(result.rows()), rel=1e-5)


@pytest.mark.bits
def test_a_blind_model_loses_nothing(tmp_path: Path) -> None:
    model, processor = join(tmp_path / "prefix", vision_feature_select_strategy="pooled", prefix_length=2)
    write(model, "red", "square")
    assert all((sample.drop == 0).all() for sample in sightedness(model, processor, IMAGES, TEXTS).samples)
    model, processor = join(tmp_path / "gated", **GATED)  # gates start at zero
    assert all((sample.drop == 0).all() for sample in sightedness(model, processor, IMAGES, TEXTS).samples)


def test_pictures_to_swap_in(joined: tuple[Any, Any]) -> None:
    model, processor = joined
    red, green = IMAGES[:2]
    batch = sightedness(model, processor, [red, green], TEXTS[:2])
    result = sightedness(model, processor, red, TEXTS[0], other_images=green)
    torch.testing.assert_close(result.samples[0].drop, batch.samples[0].drop)
    same = sightedness(model, processor, red, TEXTS[0], other_images=[red])
    torch.testing.assert_close(same.samples[0].drop, torch.zeros(len(same.samples[0].words)), atol=1e-5, rtol=0)
    # The same photo with two captions is not another picture.
    twice = sightedness(model, processor, [red, red, green], [TEXTS[0], TEXTS[0], TEXTS[1]])
    assert [len(sample.swapped) for sample in twice.samples] == [1, 1, 2]
    with pytest.raises(ValueError, match="Text 0 has no other image"):
        sightedness(model, processor, [red, red], TEXTS[:2])
    with pytest.raises(ValueError, match="2 images, 1 texts"):
        sightedness(model, processor, [red, green], TEXTS[:1])
    with pytest.raises(ValueError, match="Text 1 holds several <image>"):
        sightedness(model, processor, [red, green], ["a", "<image> or <image>"])


def test_a_model_in_training_goes_on_training(joined: tuple[Any, Any]) -> None:
    model, processor = joined
    model.train()
    try:
        sightedness(model, processor, IMAGES[:2], TEXTS[:2])
        nearest_words(model, processor, IMAGES[0])
        attention_to_image(model, processor, IMAGES[0], text="a")
        assert model.training and model.model.connector.training and not model.model.language_model.training
    finally:
        model.eval()


# ----------------------------------------------------------------------------------------------------- figures


def test_figures_show_the_data(joined: tuple[Any, Any], tmp_path: Path) -> None:
    from matplotlib.text import Text

    model, processor = joined

    def said(figure: Any) -> list[str]:
        return [text.get_text() for text in figure.findobj(Text)]

    words = nearest_words(model, processor, IMAGES, top_k=3)
    figure = words.plot(tmp_path / "words.png", image=1)
    assert {word for row in words.words[1] for word in row} <= set(said(figure))
    assert torch.equal(torch.tensor(figure.axes[1].images[0].get_array()), words.similarities[1])

    looked = attention_to_image(model, processor, IMAGES[0], text="a green red square .")
    figure = looked.plot(tmp_path / "attention.png", layers=0)
    heat = [axes.images[1].get_array() for axes in figure.axes if len(axes.images) == 2]
    maps = looked.maps(0)
    assert len(heat) == len(looked.words) == 5
    torch.testing.assert_close(torch.tensor(heat[2]), maps[2] / maps[2].max())
    assert f"red  {looked.share(0)[2]:.0%}" in said(figure)

    seen = sightedness(model, processor, IMAGES[:2], TEXTS[:2], prompts="what is")
    figure = seen.plot(tmp_path / "sight.png")
    texts = said(figure)
    assert texts.count("square") == 2 and texts.count("what is") == 2
    for row in seen.rows():
        assert f"{row['drop']:+.1f}".replace("-0.0", "+0.0") in texts
    for name in ("words", "attention", "sight"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 500 and len(np.unique(np.array(image.convert("L")))) > 20
    assert COLOURS  # the squares above are of these


@pytest.mark.parametrize("width", [3.6, 7.5, None])
def test_figures_keep_within_their_width(joined: tuple[Any, Any], width: float | None) -> None:
    """Nothing that is written runs out of a figure, however narrow, and however long the prompt."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    model, processor = joined
    prompt = "<|im_start|>system\nYou are a helpful assistant named after nobody .<|im_end|>\n" * 3 + "what is it ?"
    text = "a green red square . a green red square . a green red square ."
    looked = attention_to_image(model, processor, IMAGES[0], text=text)
    nowhere = dataclasses.replace(looked, grid=None, why_not_spatial="the connector reads one vector of the whole image.")
    seen = sightedness(model, processor, IMAGES[:2], TEXTS[:2], prompts=prompt)
    near = nearest_words(model, processor, IMAGES[0], top_k=5)
    for result in (looked, nowhere, seen, near):
        figure = result.plot() if width is None else result.plot(width=width)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        wide, high = figure.bbox.width, figure.bbox.height
        assert width is None or wide <= (width + 0.01) * figure.dpi
        written = [*figure.texts, *(text for axes in figure.axes for text in (*axes.texts, axes.title))]
        written += [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)]
        for one in written:
            box = one.get_window_extent(canvas.get_renderer())
            if one.get_text().strip():
                assert -1 <= box.x0 and box.x1 <= wide + 1 and -1 <= box.y0 and box.y1 <= high + 1, one.get_text()
    shown = [one.get_text() for one in seen.plot(width=3.6).findobj(Text)]
    assert any(one.startswith("… ") and one.endswith("what is it ?") for one in shown)


def test_one_picture_of_the_encoder_serves_all(joined: tuple[Any, Any]) -> None:
    """Swapping goes by prefixes that were encoded once: the same as giving the model the other picture."""
    model, processor = joined
    pixels = processor(images=IMAGES[:2], return_tensors="pt")["pixel_values"]
    batch = DataCollatorForFrozenPrefix(processor)([{"image": IMAGES[0], "text": TEXTS[0]}])
    del batch["pixel_values"]
    with torch.no_grad():
        prefix = model.get_image_features(pixels).pooler_output[1]
        swapped = model(**batch, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=[prefix])})
        plain = model(**batch, pixel_values=pixels[1:])
    torch.testing.assert_close(swapped.logits, plain.logits)


def bytes_tokenizer(*pieces: str) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary as GPT-2's, of single bytes and these pieces."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {one: index for index, one in enumerate([*letters, *pieces, "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_tokens_are_joined_to_words_where_they_are_drawn() -> None:
    tokenizer = bytes_tokenizer("Ġrun", "ning", "Ġdog", ".", "Ġa")
    pieces = ["Ġa", "Ġrun", "ning", "Ġdog", ".", "Ċ", "Ġa", "Ġ", "Ã", "©", "</s>"]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(pieces))
    joined = _joined(tokenizer, ids)
    words = [" a", " running", " dog.", "\n", " a", " ", "é", "</s>"]
    assert [word for word, _, _ in joined] == words
    assert [(a, b) for _, a, b in joined] == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7), (7, 8), (8, 10), (10, 11)]
    wide = torch.tensor(tokenizer.convert_tokens_to_ids(list("".join(bytes_to_letters("犬が")))))
    assert [(word, b - a) for word, a, b in _joined(tokenizer, wide)] == [("犬", 3), ("が", 3)]


def bytes_to_letters(text: str) -> list[str]:
    """As byte-level vocabularies spell bytes."""
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [piece for piece, _ in spelt]


def test_a_word_has_the_nats_of_its_tokens_and_their_mean_attention() -> None:
    from matplotlib.text import Text

    drops = torch.tensor([0.5, 1.0, 2.0, -0.25])
    joined = [("a", 0, 1), (" running", 1, 3), (".", 3, 4)]
    sample = WordSightedness(["a", " run", "ning", "."], torch.arange(4), drops, torch.zeros(1, 4), joined=joined)
    texts = [text.get_text() for text in Sightedness([sample]).plot().findobj(Text)]
    assert {"running", "+3.0", "+0.5"} <= set(texts) and "ning" not in texts
    attention = [torch.tensor([[[0.1, 0.1], [0.2, 0.0], [0.0, 0.4], [0.0, 0.0]]])]
    looked = ImageAttention(
        sample.words, torch.arange(4), attention, "self", torch.eye(2), (1, 2), 0, None, torch.rand(4, 8, 3), joined
    )
    figure = looked.plot()
    assert "running  30%" in [text.get_text() for text in figure.findobj(Text)]
    heat = [axes.images[1].get_array() for axes in figure.axes if len(axes.images) == 2]
    assert len(heat) == 3
    torch.testing.assert_close(torch.tensor(heat[1]), torch.tensor([[0.5, 1.0]]))
