"""A prefix encoded once and asked many questions: answers and scores are those of asking each afresh, for every family."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING

from modeling_frozen import FrozenPrefixForConditionalGeneration
from modeling_frozen.transformers_compat import cache_of
from tests.helpers import families_text
from tests.helpers.families_joined import IMAGE, PREFIX, build, pictures, shared_model
from tests.helpers.families_text import DECODERS, ENCODER_DECODERS, FAMILIES, VOCAB_SIZE
from tests.helpers.tiny import join, rows, skip_before


Inputs = dict[str, torch.Tensor]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_decoder = pytest.mark.parametrize("family", DECODERS)
# One of each kind of position or cache: learned, ALiBi by mask and by column, rotary, windows, multipliers, states, encoders.
SOME = ["gpt2", "gpt_neo", "bloom", "mpt", "opt_350m", "llama", "gemma3_text", "mamba", "rwkv", "t5", "bart"]
some_families = pytest.mark.parametrize("family", SOME)
every_family_slowly = pytest.mark.parametrize(
    "family", [family if family in SOME else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


def words(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(texts: list[list[int]], side: str = "left") -> Inputs:
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


def shared(length: int = 3, seed: int = 0) -> list[int]:
    """A picture among words that the questions share."""
    own = words(length, seed)
    return [own[0], *[IMAGE] * PREFIX, *own[1:]]


def can_batch(model: FrozenPrefixForConditionalGeneration) -> bool:
    """Whether rows of unequal length may go together at all."""
    return not model.model.is_recurrent or model.model._skips_padding


def snapshot(prefix) -> list[torch.Tensor]:
    kept = [prefix.input_ids, prefix.attention_mask]
    kept += [] if prefix.cache is None else [t for layer in prefix.cache.layers for t in (layer.keys, layer.values)]
    kept += [] if prefix.encoder_outputs is None else [prefix.encoder_outputs.last_hidden_state]
    return [tensor.clone() for tensor in kept]


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# ------------------------------------------------------------------------------------------------------------- asking


@every_family
@torch.no_grad()
def test_questions_of_unequal_length_are_answered_as_if_asked_afresh(family: str) -> None:
    """Total lengths pass the windows of those families that have them."""
    model = shared_model(family)
    start = shared(4)
    questions = [words(length, seed) for seed, length in enumerate((9, 2, 1, 5) if can_batch(model) else (4, 4, 4), 1)]
    prefix = model.encode_prefix(**padded([start]), pixel_values=pictures())
    before = snapshot(prefix)
    for side in ("left", "right"):
        ours = model.generate(**padded(questions, side), prefix_cache=prefix, **GREEDY)
        afresh = padded([start + question for question in questions])
        expected = model.generate(**afresh, pixel_values=pictures().expand(len(questions), -1, -1, -1), **GREEDY)
        assert torch.equal(ours, expected)
    for question in questions:
        alone = model.generate(torch.tensor([start + question]), pixel_values=pictures(), **GREEDY)
        assert torch.equal(model.generate(torch.tensor([question]), prefix_cache=prefix, **GREEDY), alone)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(prefix), strict=True))


@every_family_slowly
@torch.no_grad()
def test_many_pictures_each_with_their_questions(family: str) -> None:
    model = shared_model(family)
    lengths = ((3, 5), (4, 2, 6)) if can_batch(model) else ((3, 3), (4, 4, 4))
    starts = [shared(length, seed=length) for length in lengths[0]]
    questions = [words(length, seed) for seed, length in enumerate(lengths[1], 1)]
    images, about = pictures(2), [0, 1, 1]
    prefix = model.encode_prefix(**padded(starts), pixel_values=images)
    assert len(prefix) == 2
    before = snapshot(prefix)
    one_each = padded([start + question for start, question in zip(starts, questions, strict=False)])
    expected = model.generate(**one_each, pixel_values=images, **GREEDY)
    assert torch.equal(model.generate(**padded(questions[:2]), prefix_cache=prefix, **GREEDY), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(prefix), strict=True))
    ours = model.generate(**padded(questions), prefix_cache=prefix[about], **GREEDY)
    afresh = padded([starts[row] + question for row, question in zip(about, questions, strict=True)])
    expected = model.generate(**afresh, pixel_values=images[about], **GREEDY)
    assert torch.equal(ours, expected)
    for row in (0, 1):
        one = model.generate(torch.tensor([questions[0]]), prefix_cache=prefix[row], **GREEDY)
        afresh = torch.tensor([starts[row] + questions[0]])
        assert torch.equal(one, model.generate(afresh, pixel_values=images[row : row + 1], **GREEDY))
        scores = model.score(questions, prefix_cache=prefix[row])
        torch.testing.assert_close(scores, model.score(questions, prefix_cache=prefix)[row : row + 1], atol=1e-3, rtol=1e-3)


@every_family_slowly
@torch.no_grad()
def test_beams_and_samples_are_those_of_asking_afresh(family: str) -> None:
    model = shared_model(family)
    start = shared(3)
    questions = [words(length, seed) for seed, length in enumerate((4, 2) if can_batch(model) else (3, 3), 1)]
    prefix = model.encode_prefix(**padded([start]), pixel_values=pictures())
    afresh = {
        **padded([start + question for question in questions]),
        "pixel_values": pictures().expand(len(questions), -1, -1, -1),
    }
    base = {"max_new_tokens": 4, "eos_token_id": None}
    for options in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0},
        {"do_sample": False, "repetition_penalty": 3.0, "no_repeat_ngram_size": 2},
    ):
        torch.manual_seed(7)
        ours = model.generate(**padded(questions), prefix_cache=prefix, **base, **options)
        torch.manual_seed(7)
        assert torch.equal(ours, model.generate(**afresh, **base, **options)), options


@every_decoder
@torch.no_grad()
def test_the_towers_and_the_prefix_are_read_once(family: str) -> None:
    model = build(family)
    if family in ("mistral", "gemma2", "gemma3_text"):
        skip_before("5.18", "hands out more of a recorded window than its mask is made for: such caches are not kept")
    towers = count_calls(model.model.vision_tower)
    prefix = model.encode_prefix(**padded([shared(4)]), pixel_values=pictures())
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    for seed in (1, 2):
        model.generate(torch.tensor([words(3, seed)]), prefix_cache=prefix, **{**GREEDY, "max_new_tokens": 3})
    assert len(towers) == 1
    if prefix.cache is not None:
        assert read == [3, 1, 1] * 2
    else:
        assert family in ("mamba", "mamba2", "rwkv")


@every_decoder
@torch.no_grad()
def test_the_kept_keys_go_to_generate_as_a_cache_of_transformers(family: str) -> None:
    """`past_key_values=` with all words so far, as users of transformers go on from a cache; pictures may come again."""
    model = shared_model(family)
    start, question = shared(4), words(5, 1)
    prefix = model.encode_prefix(**padded([start]), pixel_values=pictures())
    whole = torch.tensor([start + question])
    expected = model.generate(whole, pixel_values=pictures(), **GREEDY)
    if prefix.cache is None:
        with pytest.raises(ValueError, match="prefix_cache"):
            _ = prefix.past_key_values
        return
    before = snapshot(prefix)
    for layer in prefix.past_key_values.layers:  # no more than `generate` itself would hold
        assert layer.keys.shape[-2] == min(len(start), getattr(layer, "sliding_window", 1000) - 1)
    assert torch.equal(model.generate(whole, past_key_values=prefix.past_key_values, **GREEDY), expected)
    again = model.generate(whole, pixel_values=pictures(), past_key_values=prefix.past_key_values, **GREEDY)
    assert torch.equal(again, expected)
    logits = model(torch.tensor([question]), past_key_values=prefix.past_key_values).logits
    torch.testing.assert_close(logits, model(whole, pictures()).logits[:, len(start) :], atol=1e-4, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(prefix), strict=True))


@some_families
@torch.no_grad()
def test_a_dialogue_goes_on_with_another_picture(family: str) -> None:
    model = shared_model(family)
    first, second = shared(4, seed=1), shared(5, seed=2)
    images = pictures(2)
    prefix = model.encode_prefix(**padded([first]), pixel_values=images[:1])
    prefix = model.encode_prefix(**padded([second]), pixel_values=images[1:], prefix_cache=prefix)
    question = words(3, 3)
    expected = model.generate(torch.tensor([first + second + question]), pixel_values=images, **GREEDY)
    assert torch.equal(model.generate(torch.tensor([question]), prefix_cache=prefix, **GREEDY), expected)
    if family in DECODERS and model.model.keeps_cache and not model.model.is_recurrent:
        turn = model.generate(
            torch.tensor([first]), pixel_values=images[:1], return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 1}
        )
        whole = torch.tensor([first + second + question])
        kept = cache_of(turn)
        assert torch.equal(model.generate(whole, pixel_values=images, past_key_values=kept, **GREEDY), expected)


@some_families
@torch.no_grad()
def test_whole_prompts_and_no_question_at_all(family: str) -> None:
    model = shared_model(family)
    start, question = shared(4), words(3, 1)
    prefix = model.encode_prefix(**padded([start]), pixel_values=pictures())
    whole = torch.tensor([start + question])
    expected = model.generate(whole, pixel_values=pictures(), **GREEDY)
    assert torch.equal(model.generate(whole, prefix_cache=prefix, **GREEDY), expected)
    expected = model.generate(torch.tensor([start]), pixel_values=pictures(), **GREEDY)
    assert torch.equal(model.generate(prefix_cache=prefix, **GREEDY), expected)
    other = whole.clone()
    other[0, 0] = 3 + (other[0, 0] - 2) % (VOCAB_SIZE - 3)
    with pytest.raises(ValueError, match="does not begin with"):
        model.generate(other, prefix_cache=prefix, **GREEDY)


@torch.no_grad()
def test_gated_cross_attention_is_asked_again_with_its_pictures() -> None:
    model = build("llama", fusion="cross_attention")
    for block in model.model.cross_attention:
        for name, parameter in block.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
    start, questions = [words(1, 9)[0], IMAGE, *words(3, 8)], [words(4, 1), words(2, 2)]
    prefix = model.encode_prefix(**padded([start]), pixel_values=pictures())
    towers = count_calls(model.model.vision_tower)
    ours = model.generate(**padded(questions), prefix_cache=prefix, **GREEDY)
    scores = model.score(questions, prefix_cache=prefix)
    assert not towers
    afresh = padded([start + question for question in questions])
    assert torch.equal(ours, model.generate(**afresh, pixel_values=pictures().expand(2, -1, -1, -1), **GREEDY))
    torch.testing.assert_close(scores, plain_scores(model, "llama", [start], pictures(), questions), atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ scoring


def plain_scores(
    model: FrozenPrefixForConditionalGeneration, family: str, starts: list[list[int]], images: torch.Tensor, answers: list
) -> torch.Tensor:
    """By one forward over each whole sequence."""
    scores = torch.empty(len(starts), len(answers))
    for i, start in enumerate(starts):
        for j, answer in enumerate(answers):
            if family in ENCODER_DECODERS:
                fed = torch.tensor([[model.generation_config.decoder_start_token_id, *answer[:-1]]])
                logits = model(torch.tensor([start]), images[i : i + 1], decoder_input_ids=fed).logits[0]
            else:
                logits = model(torch.tensor([start + answer]), images[i : i + 1]).logits[0, len(start) - 1 : -1]
            scores[i, j] = logits.float().log_softmax(-1)[range(len(answer)), answer].sum()
    return scores


@every_family
@torch.no_grad()
def test_scores_are_those_of_whole_sequences(family: str) -> None:
    model = shared_model(family)
    starts = [shared(3, 1), shared(6, 2)] if can_batch(model) else [shared(3, 1), shared(3, 2)]
    images = pictures(2)
    answers = [words(length, seed) for seed, length in enumerate((1, 4, 2, 1, 7))]
    expected = plain_scores(model, family, starts, images, answers)
    prefix = model.encode_prefix(**padded(starts), pixel_values=images)
    before = snapshot(prefix)
    for batch_size in (2, 32):
        scores = model.score(answers, prefix_cache=prefix, batch_size=batch_size)
        torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)
    lengths = torch.tensor([len(answer) for answer in answers])
    means = model.score(answers, prefix_cache=prefix, reduction="mean")
    torch.testing.assert_close(means, expected / lengths, atol=1e-3, rtol=1e-3)
    for side in ("left", "right"):
        tensors = padded(answers, side)
        scores = model.score(
            tensors["input_ids"], candidates_mask=tensors["attention_mask"], **padded(starts, side), pixel_values=images
        )
        torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(prefix), strict=True))


@some_families
@torch.no_grad()
def test_a_prompt_after_the_prefix_and_candidates_of_its_own(family: str) -> None:
    model = shared_model(family)
    start, questions = shared(3), [words(4, 1), words(2, 2)] if can_batch(model) else [words(3, 1), words(3, 2)]
    answers = [[words(2, 5), words(1, 6)], [words(3, 7)]]
    prefix = model.encode_prefix(**padded([start]), pixel_values=pictures())
    scores = model.score(answers, prefix_cache=prefix, **padded(questions))
    for row, (question, own) in enumerate(zip(questions, answers, strict=True)):
        expected = plain_scores(model, family, [start + question], pictures(), own)[0]
        torch.testing.assert_close(scores[row, : len(own)], expected, atol=1e-3, rtol=1e-3)
    assert scores[1, 1] == -float("inf")


def test_strings_by_the_processor(tmp_path) -> None:
    model, processor = join(tmp_path)
    images = [row["image"] for row in rows(3)]
    prefix = model.encode_prefix(images=images, text=["<image> a picture"] * 3, processor=processor)
    assert len(prefix) == 3
    colours = ["red square", "green square", "blue"]
    asked = model.encode_prefix(text=["that is"] * 3, processor=processor, prefix_cache=prefix)
    scores = model.score(colours, tokenizer=processor.tokenizer, prefix_cache=asked)
    for i, image in enumerate(images):
        for j, colour in enumerate(colours):
            inputs = processor(images=image, text=f"<image> a picture that is {colour}", return_tensors="pt")
            length = len(colour.split())
            logits = model(**inputs).logits[0, -length - 1 : -1].log_softmax(-1)
            expected = logits[range(length), inputs["input_ids"][0, -length:]].sum()
            torch.testing.assert_close(scores[i, j], expected.detach(), atol=1e-4, rtol=1e-4)
    alone = model.encode_prefix(images=images, processor=processor)
    assert len(alone) == 3
    with pytest.raises(ValueError, match="no tokenizer"):
        model.score(colours, prefix_cache=asked)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
STATES = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRIDS = {
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "falcon_h1": {**SIZES, **STATES, "mamba_d_ssm": 32, "mamba_n_heads": 4, "head_dim": 8},
    "bamba": {**SIZES, **STATES, "attn_layer_indices": [1], "mamba_n_heads": 8},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_read_the_words_again_and_answer_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States can't be stepped in batches of unequal questions, so what is kept of these is the encoded picture."""
    if family not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such family")
    for table in (families_text.DECODERS, families_text.FAMILIES):
        monkeypatch.setitem(table, family, (family, HYBRIDS[family]))
    test_questions_of_unequal_length_are_answered_as_if_asked_afresh(family)
    test_scores_are_those_of_whole_sequences(family)
    with torch.no_grad():
        assert shared_model(family).encode_prefix(**padded([shared(3)]), pixel_values=pictures()).cache is None


# ------------------------------------------------------------------------------------------------------------ refused


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = shared_model("llama")
    prefix = model.encode_prefix(**padded([shared(3), shared(3, 1)]), pixel_values=pictures(2))
    question = torch.tensor([words(3, 1)])
    with pytest.raises(ValueError, match=r"1 question.*2 prefixes"):
        model.generate(question, prefix_cache=prefix)
    with pytest.raises(ValueError, match="`pixel_values` was passed beside `prefix_cache`"):
        model.generate(question, prefix_cache=prefix[0], pixel_values=pictures())
    with pytest.raises(IndexError, match="2 rows"):
        _ = prefix[2]
    picture = model.encode_prefix(torch.tensor([[5, *[IMAGE] * PREFIX]]), pixel_values=pictures())
    with pytest.raises(ValueError, match="ends with an image"):
        model.generate(prefix_cache=picture)
    with pytest.raises(ValueError, match="needs `input_ids`"):
        model.encode_prefix(pixel_values=pictures())
    with pytest.raises(TypeError, match="pixel_value"):
        model.encode_prefix(question, pixel_value=pictures())
    with pytest.raises(ValueError, match="sum"):
        model.score([[3]], prefix_cache=prefix, reduction="max")
    with pytest.raises(ValueError, match="a token"):
        model.score([[]], prefix_cache=prefix)


def test_a_question_costs_no_copy_of_what_is_kept() -> None:
    """Many questions share one row's keys until they grow."""
    model = shared_model("llama")
    prefix = model.encode_prefix(**padded([shared(3)]), pixel_values=pictures())
    many = prefix[[0] * 50]
    for layer, kept in zip(many.cache.layers, prefix.cache.layers, strict=True):
        assert layer.keys.data_ptr() == kept.keys.data_ptr()
        assert layer.keys.untyped_storage().nbytes() == kept.keys.untyped_storage().nbytes()
    copied = copy.deepcopy(prefix)
    model.generate(torch.tensor([words(3, 1)]), prefix_cache=copied, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(prefix), snapshot(copied), strict=True))


@torch.no_grad()
def test_words_without_a_picture_and_stored_features_are_prefixes_too() -> None:
    model = shared_model("llama")
    start, question = words(5, 1), words(3, 2)
    prefix = model.encode_prefix(torch.tensor([start]))
    expected = model.generate(torch.tensor([start + question]), **GREEDY)
    assert torch.equal(model.generate(torch.tensor([question]), prefix_cache=prefix, **GREEDY), expected)
    seen = shared(3)
    features = model.model.vision_tower(pictures()).last_hidden_state[:, model.config.num_leading_tokens :]
    expected = model.generate(torch.tensor([seen + question]), pixel_values=pictures(), **GREEDY)
    prefix = model.encode_prefix(torch.tensor([seen]), vision_features=features)
    assert torch.equal(model.generate(torch.tensor([question]), prefix_cache=prefix, **GREEDY), expected)
