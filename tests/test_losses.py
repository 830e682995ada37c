"""The loss: in chunks it is the plain one, for every family, value and gradient, and no large tensor of logits exists."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from modeling_frozen.losses import check_loss_config, headless_path, labels_per_chunk
from tests.helpers.families_joined import IMAGE, build, pictures, prompt
from tests.helpers.families_text import DECODERS, FAMILIES, VOCAB_SIZE
from tests.helpers.tiny import join, recompute_activations, rows, skip_where_torch_traces_no_forward
from tests.helpers.training import arguments


# Shift labels inside their own forward alone, so that it must see them: they take the plain way.
PLAIN_ALONE = {"blenderbot-small", "m2m_100"}


def batch(family: str = "llama") -> dict[str, torch.Tensor]:
    """Two samples of unequal length with pictures; padding, prefix and the first words are not learnt."""
    ids = torch.zeros(2, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate((prompt(words=4, seed=1)[0], prompt(words=7, seed=2)[0])):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pictures(2)}


def loss_and_gradients(model: FrozenPrefixForConditionalGeneration, **inputs: Any) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal(one: tuple, other: tuple, **tolerance: float) -> None:
    torch.testing.assert_close(one[0], other[0], **(tolerance or {"atol": 1e-6, "rtol": 1e-5}))
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        # Rounding grows with the largest addend, not with their sum.
        default = {"atol": 1e-5 * gradient.abs().max().item(), "rtol": 1e-4}
        torch.testing.assert_close(gradient, other[1][name], **(tolerance or default))


class LargestVocabularyTensor(TorchDispatchMode):
    """Most rows of any tensor whose last axis is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == VOCAB_SIZE:
                if not tensor.is_contiguous():
                    continue  # the head's weight, seen across
                self.rows = max(self.rows, tensor.numel() // VOCAB_SIZE)
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_in_chunks_it_is_the_plain_loss(family: str) -> None:
    model = build(family).train()
    path = headless_path(model.model.language_model)
    assert path is not None, "the probe found no way to call this head alone"
    inputs = batch(family)
    plain = loss_and_gradients(model, **inputs, skip_logits=False)
    assert plain[1]
    with LargestVocabularyTensor() as seen:
        chunked = loss_and_gradients(model, **inputs, loss_config={"chunk_size": 3})
    check_equal(plain, chunked)
    if family in PLAIN_ALONE:
        return
    assert seen.rows == 3
    assert model(**inputs).logits is None
    options = {"num_items_in_batch": torch.tensor(5)}
    check_equal(
        loss_and_gradients(model, **inputs, **options, skip_logits=False),
        loss_and_gradients(model, **inputs, **options, loss_config={"chunk_size": 4}),
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt_350m", "t5", "bart"])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.1}])
def test_smoothing_and_z_loss_are_their_formulas(family: str, options: dict[str, float]) -> None:
    model, inputs = build(family).train(), batch(family)
    logits = model(**inputs, skip_logits=False).logits
    targets = inputs["labels"]
    if family in DECODERS:
        logits, targets = logits[:, :-1], targets[:, 1:]
    logits, targets = logits[targets != -100], targets[targets != -100]
    smoothing, weight = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    logprobs = logits.log_softmax(-1)
    own = -logprobs.gather(1, targets[:, None])[:, 0]
    expected = ((1 - smoothing) * own - smoothing * logprobs.mean(-1) + weight * logits.logsumexp(-1).square()).mean()
    torch.testing.assert_close(model(**inputs, loss_config={**options, "chunk_size": 3}).loss, expected)
    check_equal(
        loss_and_gradients(model, **inputs, loss_config=options, skip_logits=False),
        loss_and_gradients(model, **inputs, loss_config={**options, "chunk_size": 3}),
    )
    # Without labels there is nothing to be smoothed or normalised: evaluation is the plain loss.
    model.config.loss_config = options
    torch.testing.assert_close(model.eval()(**inputs).loss, own.mean())
    torch.testing.assert_close(model.train()(**inputs).loss, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "opt_350m", "t5"])
def test_a_head_that_trains_gets_its_gradient(family: str) -> None:
    """Tied or not; words of a tied head get both their gradients."""
    model = build(family, trainable=("connector", "text")).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.text_config.dropout = model.config.text_config.attention_dropout = 0.0
    inputs = batch(family)
    for module in model.model.language_model.modules():
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    assert headless_path(model.model.language_model) is not None
    plain = loss_and_gradients(model, **inputs, skip_logits=False)
    with LargestVocabularyTensor() as seen:
        chunked = loss_and_gradients(model, **inputs, loss_config={"chunk_size": 3})
    check_equal(plain, chunked, atol=1e-5, rtol=1e-3)
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0
    assert seen.rows == 3


def test_lora_beside_the_head_and_in_it() -> None:
    from peft import LoraConfig, get_peft_model

    for targets in (r".*language_model\..*\.q_proj", r".*language_model\.(.*\.q_proj|lm_head)"):
        model = build("llama")
        tuned = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["connector"])).train()
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        plain = loss_and_gradients(tuned, **batch(), skip_logits=False)
        check_equal(plain, loss_and_gradients(tuned, **batch(), loss_config={"chunk_size": 3}))
        assert any("lm_head" in name for name in plain[1]) == ("lm_head" in targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model = build("llama").train()
    exact = loss_and_gradients(model, **batch())
    with torch.autocast("cpu", dtype):
        chunked = loss_and_gradients(model, **batch(), loss_config={"chunk_size": 3})
        plain = loss_and_gradients(model, **batch(), skip_logits=False)
    check_equal(plain, chunked, atol=2e-2, rtol=5e-2)
    check_equal(exact, chunked, atol=2e-2, rtol=1e-1)
    model.model.language_model.to(dtype)
    check_equal(exact, loss_and_gradients(model, **batch(), loss_config={"chunk_size": 3}), atol=2e-2, rtol=1e-1)


def test_gated_blocks_too() -> None:
    model = build("llama", fusion="cross_attention", cross_attention_config={"num_heads": 2, "head_dim": 8}).train()
    for parameter in (p for name, p in model.named_parameters() if name.endswith("gate")):
        torch.nn.init.constant_(parameter, 0.5)
    ids = prompt(placeholders=1)
    inputs = {"input_ids": ids, "pixel_values": pictures(), "labels": ids.masked_fill(ids == IMAGE, -100)}
    plain = loss_and_gradients(model, **inputs, skip_logits=False)
    check_equal(plain, loss_and_gradients(model, **inputs, loss_config={"chunk_size": 2}))


def test_checkpointing_leaves_it_right() -> None:
    model = build("llama").train()
    plain = loss_and_gradients(model, **batch())
    recompute_activations(model)
    check_equal(plain, loss_and_gradients(model, **batch(), loss_config={"chunk_size": 3}))


def test_compilation_leaves_it_right() -> None:
    skip_where_torch_traces_no_forward()
    model = build("llama").train()
    plain = loss_and_gradients(model, **batch())
    whole = torch.compile(model, backend="eager")
    model.zero_grad()
    inputs = batch()  # tower and connector are compiled in test_families_joined.py
    encoded = {"image": model.get_image_features(inputs.pop("pixel_values"))}
    loss = whole(**inputs, mm_encoder_outputs=encoded).loss
    loss.backward()
    check_equal(plain, (loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.compiler.reset()
    model.model.language_model.base_model.compile(backend="eager")
    with LargestVocabularyTensor() as seen:
        check_equal(plain, loss_and_gradients(model, **batch(), loss_config={"chunk_size": 3}))
    assert seen.rows == 3
    model.model.language_model.compile(backend="eager")  # nobody can cut what is compiled as one
    assert headless_path(model.model.language_model) is None
    with torch.compiler.set_stance("force_eager"):  # the way is chosen by what it is; tracing it anew is torch's business
        check_equal(plain, loss_and_gradients(model, **batch()))


def test_the_language_model_is_called_as_ever_and_not_changed() -> None:
    """Hooks of its own make the plain way the right one; the halves are copies, so nothing is left behind in it."""
    model = build("llama").train()
    language_model = model.model.language_model
    before = {key: copy.copy(value) for key, value in language_model.__dict__.items()}
    plain = loss_and_gradients(model, **batch())
    assert {key: copy.copy(value) for key, value in language_model.__dict__.items()} == before
    calls = []
    handle = language_model.register_forward_hook(lambda module, args, output: calls.append(output.logits.shape))
    check_equal(plain, loss_and_gradients(model, **batch()))
    assert len(calls) == 1 and calls[0][-1] == VOCAB_SIZE
    handle.remove()
    assert headless_path(language_model) and headless_path(language_model._replicate_for_data_parallel()) is None
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 7  # a user's own wants logits
    assert model(**batch()).loss == 7


def test_a_text_only_batch_and_one_without_labels() -> None:
    model, inputs = build("llama").train(), batch()
    inputs.pop("pixel_values")
    inputs["input_ids"] = inputs["input_ids"].clamp(max=VOCAB_SIZE - 1)
    loss, gradients = loss_and_gradients(model, **inputs)
    assert torch.isfinite(loss) and gradients and all(not gradient.any() for gradient in gradients.values())
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, gradients = loss_and_gradients(model, **inputs, num_items_in_batch=3)
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss, model(**batch(), loss_config={}).loss)


def test_chunks_hold_alike_many_labels_in_as_few_as_there_can_be() -> None:
    most = 64 * 2**20 // (4 * 32_000)
    assert labels_per_chunk(most, 32_000) == most and labels_per_chunk(most + 1, 32_000) == most // 2 + 1
    assert [labels_per_chunk(labels, 151_936) for labels in (1, 128, 129, 256, 257)] == [1, 128, 65, 128, 86]
    assert labels_per_chunk(0, 10) == 1 and labels_per_chunk(10, 10, chunk_size=7) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [({"label_smothing": 0.1}, "label_smoothing"), ({"label_smoothing": 1.0}, "share"), ({"z_loss": -1.0}, "negative"),
     ({"chunk_size": 0}, "at least 1")],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_loss_config(options)
    with pytest.raises(ValueError, match=message):
        build("llama", loss_config=options)


def test_options_travel_with_the_config(tmp_path: Path) -> None:
    model, _ = join(tmp_path, loss_config={"label_smoothing": 0.1})
    model.save_pretrained(tmp_path / "eyes")
    again = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "eyes")
    assert again.config.loss_config == {"label_smoothing": 0.1}
    assert "loss_config" not in join(tmp_path)[0].config.to_diff_dict()  # nothing new for older versions to stumble over


def test_trainer_smooths_labels_by_the_config_and_warns_of_its_own(tmp_path: Path) -> None:
    losses = []
    for i, loss_config in enumerate(({}, {"label_smoothing": 0.3})):
        torch.manual_seed(0)
        model, processor = join(tmp_path, loss_config=loss_config)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path / f"run{i}", max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2),
            train_dataset=rows(8),
            data_collator=DataCollatorForFrozenPrefix(processor),
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] != losses[0]
    seen = []
    from modeling_frozen import losses as module

    handler = module.logger.warning_once
    module.logger.warning_once = seen.append
    try:
        Trainer(
            model=model,
            args=arguments(tmp_path / "wrong", max_steps=1, label_smoothing_factor=0.3),
            train_dataset=rows(8),
            data_collator=DataCollatorForFrozenPrefix(processor),
        ).train()
    finally:
        module.logger.warning_once = handler
    assert seen and "loss_config" in seen[0]


def test_evaluation_without_logits_is_the_same_loss(tmp_path: Path) -> None:
    """Trainer's evaluation makes logits of every position and throws them away, unless the batch says not to."""
    model, processor = join(tmp_path)
    collator, losses = DataCollatorForFrozenPrefix(processor), []
    for options in ({}, {"skip_logits": True}):
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path / "run", per_device_eval_batch_size=3),
            eval_dataset=rows(8),
            data_collator=lambda batch, options=options: {**collator(batch), **options},
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    skipped = model.eval()(**collator(rows(3)), skip_logits=True)
    assert skipped.logits is None and skipped.loss.requires_grad


ON_LIGER = """
import torch
from modeling_frozen import losses
from tests.test_losses import batch, build, check_equal, loss_and_gradients

from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Loss

calls = []
torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: calls.append(1) if isinstance(m, Loss) else None)
for family, fits in (("llama", True), ("gptj", True), ("gemma2", False), ("cohere", False)):
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}):
        losses.LIGER_DEVICES.discard("cpu")
        model = build(family).train()
        plain = loss_and_gradients(model, **batch(), loss_config=options, skip_logits=False)
        losses.LIGER_DEVICES.add("cpu")
        calls.clear()
        check_equal(plain, loss_and_gradients(model, **batch(), loss_config=options), atol=1e-4, rtol=1e-3)
        assert bool(calls) == fits, (family, options)
"""


@pytest.mark.slow
def test_ligers_kernels_where_the_head_is_a_linear_layer() -> None:
    """On a CPU, by Triton's interpreter: it must be asked for before Triton is imported, hence a process of its own."""
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", ON_LIGER], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
