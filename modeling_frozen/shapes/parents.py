"""Two tiny parents, trained apart, as folders that `from_pretrained` loads: a language model on words, a tower on pictures."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from tqdm.auto import trange
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessorPil,
)

from .scenes import COLOURS, PLACES, QUESTIONS, SHAPES, SIDE, SIZES, Scene, draw, sentence_and_questions, split_scenes


def make_tokenizer(more: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """One id per word; `more` are texts with words beside those of sentences and questions."""
    texts = [scene.sentence for half in split_scenes() for scene in half] + [*QUESTIONS, *more]
    words = ["<pad>", "<s>", "</s>", *sorted({word for text in texts for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def optimize(model: nn.Module, steps: int, learning_rate: float, what: str, loss_of_step) -> None:
    """AdamW with one cycle of the learning rate; `loss_of_step` makes the loss of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in (bar := trange(steps, desc=what)):
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def build_llama(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.08,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


def train_language_model(
    folder: Path,
    steps: int,
    seed: int,
    write: Callable[[random.Random, list[Scene]], str] = sentence_and_questions,
    more: Iterable[str] = (),
    build: Callable[[int], PreTrainedModel] = build_llama,
) -> None:
    """A small language model (`build` makes it for a number of words) on texts that `write` makes of scenes that nobody drew
    (its other words in `more`): words alone."""
    torch.manual_seed(seed)
    rng, tokenizer, (known, _) = random.Random(seed), make_tokenizer(more), split_scenes()
    model = build(len(tokenizer))

    def loss_of_step(_: int) -> torch.Tensor:
        texts = [f"{write(rng, known)} </s>" for _ in range(24)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss

    optimize(model, steps, 3e-3, "language model (sentences only)", loss_of_step)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tower() -> tuple[ResNetModel, ViTImageProcessorPil]:
    """A small ResNet, untrained, (16 positions, 96 wide), and what prepares its pictures."""
    config = ResNetConfig(
        embedding_size=24, hidden_sizes=[24, 48, 96], depths=[1, 1, 1], layer_type="basic", downsample_in_first_stage=False
    )
    config.image_size = SIDE
    return ResNetModel(config), ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def train_tower(folder: Path, steps: int, seed: int) -> None:
    """The small ResNet, that tells the four properties of a picture apart, as numbers."""
    torch.manual_seed(seed)
    rng, (known, _) = random.Random(seed), split_scenes()
    model, processor = make_tower()
    heads = nn.ModuleList(nn.Linear(96 * 16, len(names)) for names in (SIZES, COLOURS, SHAPES, PLACES))

    def loss_of_step(_: int) -> torch.Tensor:
        scenes = [rng.choice(known) for _ in range(48)]
        pixel_values = processor([draw(scene, rng) for scene in scenes], return_tensors="pt")["pixel_values"]
        features = model(pixel_values).last_hidden_state.flatten(1)
        labels = torch.tensor([scene.numbers for scene in scenes])
        losses = [nn.functional.cross_entropy(head(features), labels[:, i]) for i, head in enumerate(heads)]
        return torch.stack(losses).sum()

    optimize(nn.ModuleList([model, heads]), steps, 3e-3, "vision tower (pictures only)", loss_of_step)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
