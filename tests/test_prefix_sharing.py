"""Rows of a training batch that begin alike are read once: the same loss and gradients as row by row, fewer positions read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from modeling_frozen.prefix_sharing import best_shared_start, mark_images
from modeling_frozen.training.lora import lora_config
from modeling_frozen.transformers_compat import windows_remember
from tests.helpers import families_joined, tiny
from tests.helpers.families_joined import CONNECTOR_SIZES, pictures
from tests.helpers.families_text import DECODERS, FAMILIES, VOCAB_SIZE


LENGTH, IMAGE = 8, VOCAB_SIZE
# Read row by row: those with a state in place of keys and values, and those that shift the labels themselves.
ROW_BY_ROW = {"mamba", "mamba2", "rwkv", "blenderbot-small", "m2m_100"}


def build(family: str = "llama", **options: Any) -> FrozenPrefixForConditionalGeneration:
    return families_joined.build(family, connector_type="transformer", **{"prefix_length": LENGTH, **options})


def batch(
    family: str = "llama", words: tuple[int, ...] = (3, 1, 2, 3, 2), index: tuple[int, ...] = (0, 1, 0, 0, 1), before: int = 1
) -> dict[str, Any]:
    """Five captions of two pictures, of several lengths, padded on the right, with words before the picture."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCAB_SIZE - 8, (count,), generator=generator).tolist() for count in words]
    decodes = family in DECODERS
    lead = list(range(5, 5 + before))
    ids = [lead + [IMAGE] * LENGTH + (text if decodes else []) for text in texts]
    width = max(map(len, ids))
    padded = torch.tensor([one + [0] * (width - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
    longest = max(words)
    written = torch.tensor([text + [-100] * (longest - len(text)) for text in texts])
    labels = torch.cat([torch.full((5, width - longest), -100), written], 1) if decodes else written
    if decodes:
        labels = padded.masked_fill((mask == 0) | (padded == IMAGE), -100)
        labels[:, :before] = -100
    return {
        "input_ids": padded,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": pictures(max(index) + 1),
        "image_index": torch.tensor(index),
    }


def positions_read(model: FrozenPrefixForConditionalGeneration, inputs: dict[str, Any]) -> tuple[int, Any]:
    """How many positions the language model's first attention (or MLP) read, and the model's output."""
    read = []
    language_model = model.model.language_model
    body = language_model.get_encoder() if model.config.is_encoder_decoder else language_model.get_decoder()
    layers = next(part for part in body.modules() if isinstance(part, torch.nn.ModuleList))
    handle = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[:2]), with_kwargs=True
    )
    output = model(**inputs)
    handle.remove()
    return sum(rows * length for rows, length in read), output


def gradients(model: FrozenPrefixForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: FrozenPrefixForConditionalGeneration, inputs: dict[str, Any]) -> float:
    """Positions read in common, as a share of those read row by row, where loss and gradients are the same."""
    model(**inputs)
    model.zero_grad()
    read, output = positions_read(model, inputs)
    output.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    index = inputs["image_index"]
    apart = {name: value for name, value in inputs.items() if name != "image_index"}  # without it no row shares anything
    apart["pixel_values"] = inputs["pixel_values"][index]
    read_apart, plain = positions_read(model, apart)
    plain.loss.backward()
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-6)
    plain_gradients = gradients(model)
    assert ours.keys() == plain_gradients.keys() and ours
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=2e-4, atol=2e-4 * float(gradient.abs().max()), msg=name)
    return read / read_apart


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_reading_each_row(family: str) -> None:
    model = build(family).train()
    share = compare(model, batch(family))
    windows = any(DynamicCache(config=model.config.get_text_config(decoder=True)).is_sliding)
    # Windows that forget are not kept: before transformers 5.18 recorded ones hand out more than their mask is made for.
    alone = family in ROW_BY_ROW or (windows and not windows_remember())
    assert share == 1 if alone else share < 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_prompt_is_read_once_whatever_pictures_follow(family: str) -> None:
    """Ten words in common: before two pictures that are read once each, and before five."""
    if family not in DECODERS:
        pytest.skip("an encoder reads rows whole")
    model = build(family).train()
    alone = compare(model, batch(family, before=10)) == 1
    assert alone == (compare(model, batch(family)) == 1)
    five = batch(family, index=(0, 1, 2, 3, 4), before=10)
    share = compare(model, five)
    assert share == 1 if alone else share < 0.7
    if alone:
        return
    read, _ = positions_read(model, batch(family, before=10))
    width = five["input_ids"].shape[1]
    # The last vector of a picture says a caption's first word, so it is read with the captions.
    assert read == 10 + 2 * (LENGTH - 1) + 5 * (width - 10 - LENGTH + 1)
    assert positions_read(model, five)[0] == 10 + 5 * (width - 10)


def test_rows_cut_out_of_a_batch_are_read_as_those_rows() -> None:
    """`nn.DataParallel`, and accelerate's `dispatch_batches`, cut every tensor by its rows: an index too, which then no longer
    begins at 0. Each image occurs once, so it can't mean anything else."""
    model, whole = build().train(), batch(index=(0, 1, 2, 3, 4), before=10)
    rows = {name: value[2:] for name, value in whole.items()}
    plain = {name: value for name, value in rows.items() if name != "image_index"}
    assert rows["image_index"].tolist() == [2, 3, 4]
    model(**whole)  # tries once whether reading in parts is the same
    read, output = positions_read(model, rows)
    assert read < rows["input_ids"].numel()
    torch.testing.assert_close(output.loss, model(**plain).loss)
    with pytest.raises(ValueError, match=r"runs from 2 to 4, but 3 distinct images.*share_images=False"):
        model(**{**rows, "image_index": torch.tensor([2, 4, 3])})


@pytest.mark.parametrize("trains", [False, True])
def test_words_before_all_pictures_have_a_gradient_where_their_reader_trains(trains: bool) -> None:
    model = build(trainable=("connector", "text") if trains else ("connector",)).train()
    model(**batch())
    recorded = []
    layer = model.model.language_model.get_decoder().layers[0]
    handle = layer.register_forward_hook(lambda _, args, output: recorded.append((output.shape[1], output.requires_grad)))
    model(**batch(before=10))
    handle.remove()
    assert recorded[0] == (10, trains) and recorded[1] == (LENGTH - 1, True)
    assert compare(model, batch(before=10)) < 0.8  # the same gradients either way


def test_the_reader_may_train_too() -> None:
    model = build(trainable=("connector", "text")).train()
    assert compare(model, batch()) < 0.8


def test_smoothing_and_another_divisor_are_honoured() -> None:
    model = build(loss_config={"label_smoothing": 0.1, "z_loss": 1e-3, "chunk_size": 3}).train()
    assert compare(model, {**batch(), "num_items_in_batch": torch.tensor(40)}) < 0.8


def test_the_same_question_is_read_once_and_another_picture_is_not() -> None:
    model, inputs = build().train(), batch()
    ids = inputs["input_ids"]
    asked = torch.tensor([[7, 8, 9]]).expand(5, -1)  # behind the picture, not learnt, the same in all rows
    longer = {
        **inputs,
        "input_ids": torch.cat([ids[:, : 1 + LENGTH], asked, ids[:, 1 + LENGTH :]], 1),
        "attention_mask": torch.cat([torch.ones_like(asked), inputs["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(asked, -100), inputs["labels"]], 1),
    }
    with_question, without = compare(model, longer), compare(model, inputs)
    assert with_question < without < 0.8
    # Each of another picture: nothing but the word before the pictures is common.
    other = {**inputs, "pixel_values": pictures(5), "image_index": torch.arange(5)}
    assert positions_read(model, other)[0] == inputs["input_ids"].numel()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_of_unequal_kind_share_a_batch(padding: str) -> None:
    """Text alone, two pictures in one row, words before the picture, and padding on either side."""
    picture = [IMAGE] * LENGTH
    rows = [
        [5, *picture, 7, 9, 11],
        [5, *picture, 8, *picture, 9],
        [5, *picture, 7, 12],
        [5, 6, 7, 8, 9],
        [5, 6, *picture, 9],
    ]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([pad + row if padding == "left" else row + pad for pad, row in zip(pads, rows, strict=True)])
    labels = ids.masked_fill((ids == 0) | (ids == IMAGE) | (ids == 5), -100)
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "pixel_values": pictures(2),
        "image_index": torch.tensor([0, 0, 1, 0, 1]),
    }
    assert compare(build().train(), inputs) <= 1
    # Without the rows that have no picture at their start, some of it is common.
    if padding == "right":
        kept = [0, 1, 2]
        few = {key: inputs[key][kept] for key in ("input_ids", "attention_mask", "labels")}
        index = torch.tensor([0, 0, 1, 0])
        assert compare(build().train(), {**inputs, **few, "image_index": index}) < 1


def test_dropout_falls_on_each_row_by_itself() -> None:
    options = {**CONNECTOR_SIZES["transformer"], "dropout": 0.5}
    model = build(connector_config=options).train()
    inputs = batch()
    model(**inputs)
    assert positions_read(model, inputs)[0] == inputs["input_ids"].numel()
    model.eval()  # nothing is drawn: shared again, where the head runs at labels alone
    inputs["skip_logits"] = True
    model(**inputs)
    assert positions_read(model, inputs)[0] < inputs["input_ids"].numel()


def test_a_language_model_that_draws_reads_each_row() -> None:
    model = build("gpt2", trainable=("connector", "text"))
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.train()
    inputs = batch()
    model(**inputs)
    assert positions_read(model, inputs)[0] == inputs["input_ids"].numel()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_that_come_later_are_asked_too(dropout: float) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build().train(), batch()
    model(**inputs)
    tuned = peft.get_peft_model(model, lora_config(model, r=2, lora_dropout=dropout)).train()
    tuned(**inputs)
    shared = positions_read(model, inputs)[0] < inputs["input_ids"].numel()
    assert shared == (dropout == 0.0)


def test_activation_checkpointing_reads_each_row() -> None:
    model, inputs = build(trainable=("connector", "text")).train(), batch()
    model(**inputs)
    tiny.recompute_activations(model)
    assert positions_read(model, inputs)[0] == inputs["input_ids"].numel()


def test_who_asks_for_more_gets_it_of_every_row() -> None:
    model, inputs = build().train(), batch()
    model(**inputs)
    shape = inputs["input_ids"].shape
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert all(one.shape[:2] == shape for one in states)
    assert model(**inputs, use_cache=True).cache.get_seq_length() == shape[1]
    assert model(**inputs, skip_logits=False).logits.shape[:2] == shape
    assert model.eval()(**inputs).logits.shape[:2] == shape


def test_the_common_starts_that_spare_most_are_chosen() -> None:
    ids = torch.tensor([[1, 9, 9, 3, 4], [1, 9, 9, 3, 5], [1, 9, 9, 6, 7], [1, 9, 9, 3, 0]])
    mask = (ids != 0).long()
    marks = mark_images(ids, mask, {"image": 9}, [2, 2, 2, 2], torch.tensor([0, 0, 1, 0]))
    assert marks.tolist() == [[1, -2, -2, 3, 4], [1, -2, -2, 3, 5], [1, -3, -3, 6, 7], [1, -2, -2, 3, -1]]
    length, rows, groups = best_shared_start(marks, 4)  # four columns of two kinds spare 8, one column of one kind 3
    assert (length, rows[groups].tolist()) == (4, [0, 0, 2, 0])
    assert best_shared_start(marks, 1)[0] == 1
    assert best_shared_start(marks[[0, 2]], 0) is None
    assert best_shared_start(marks, 5, whole=True) is None  # no two rows are alike throughout
    assert best_shared_start(marks[[0, 0, 2]], 5, whole=True)[2].tolist() in ([0, 0, 1], [1, 1, 0])


def test_sounds_and_films_are_like_nothing_else() -> None:
    ids = torch.tensor([[1, 8, 8, 3], [1, 8, 8, 3], [1, 9, 9, 3]])
    marks = mark_images(ids, None, {"image": 9, "video": 8}, [2], torch.tensor([0]))
    assert len(set(marks[ids == 8].tolist())) == 4 and not set(marks[ids == 8].tolist()) & set(marks[ids == 9].tolist())


@pytest.mark.parametrize("share", [True, False])
def test_trainer_learns_the_same_from_rows_with_many_texts_and_from_a_row_for_each(tmp_path: Path, share: bool) -> None:
    rows = tiny.rows(4)
    several = [{**row, "text": [row["text"], f"{row['text']} {row['text']}", "a"]} for row in rows]
    each = [{**row, "text": text} for row in several for text in row["text"]]
    trained = []
    ways = (("several", several, 2, {"all_texts": True}), ("each", each, 6, {"share_images": share}))
    tiny.save_parents(tmp_path / "parents")
    for name, dataset, size, options in ways:
        torch.manual_seed(0)
        model, processor = tiny.join(tmp_path / "parents")
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path / name), per_device_train_batch_size=size, train_sampling_strategy="sequential", max_steps=4,
                gradient_accumulation_steps=2, learning_rate=1e-2, remove_unused_columns=False, report_to="none",
                save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
            ),
            train_dataset=dataset,
            data_collator=DataCollatorForFrozenPrefix(processor, **options),
        )  # fmt: skip
        trainer.train()
        losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
        trained.append((losses, model.model.connector.state_dict()))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-4)
    for name, tensor in trained[1][1].items():
        torch.testing.assert_close(trained[0][1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
