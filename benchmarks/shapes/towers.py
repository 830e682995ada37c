"""One architecture of tower, trained in five ways on the same pictures of shapes, for LiMBeR's question.

LiMBeR (arXiv 2209.15162) lays a linear map between a frozen tower and a frozen language model and finds: the more language
the tower met in its training, the more of the picture gets through. Its towers differ in size and data too; here they don't.
All are the small ResNet of `make_tower`, see the same pictures as often, in batches of the same size, at the same
learning rate, and all but `self-supervised` are read for their loss by the mean over positions and one linear layer:

- `language`: pictures against captions, by FrozenPrefixForImageTextRetrieval with everything trainable (CLIP). Its text model
  starts from nothing and is thrown away; the one that captions later is another, which never met a picture;
- `labels`: numbers for shape and colour alone (ImageNet's labels name what a thing is and neither its size nor its place);
- `all labels`: numbers for all four properties that captions name: more than ImageNet gives, an upper bound;
- `self-supervised`: blocks of the picture are blanked, and each position restores its own part (BEiT, with pixels for tokens);
- `random`: nothing learnt but the statistics of its batch norms, without which later layers would get nothing sensible.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_frozen import FrozenPrefixForImageTextRetrieval
from modeling_frozen.shapes.parents import make_tokenizer, make_tower, optimize
from modeling_frozen.shapes.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, draw, split_scenes


PROPERTIES = tuple(len(names) for names in (SIZES, COLOURS, SHAPES, PLACES))  # as in `Scene.numbers`
BATCH, RATE, WIDTH = 48, 3e-3, 96
LossOfStep = Callable[[int], torch.Tensor]


class Pictures:
    """Pictures of known scenes, drawn once for all towers of a seed, and batches of them in an order that is the same too."""

    def __init__(self, count: int, seed: int):
        rng = random.Random(seed)
        known, _ = split_scenes()
        self.scenes: list[Scene] = [rng.choice(known) for _ in range(count)]
        self.images = [draw(scene, rng) for scene in self.scenes]
        processor = make_tower()[1]
        batches = [self.images[at : at + 64] for at in range(0, count, 64)]
        self.pixels = torch.cat([processor(batch, return_tensors="pt")["pixel_values"] for batch in batches])
        self.seed = seed

    def batches(self) -> Callable[[], torch.Tensor]:
        """Indices of the next batch, (batch,), drawn by the seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        return lambda: torch.randint(len(self.scenes), (min(BATCH, len(self.scenes)),), generator=generator)


def _by_language(tower: nn.Module, pictures: Pictures) -> tuple[nn.Module, LossOfStep]:
    tokenizer = make_tokenizer()
    reader = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.08, pad_token_id=0,
        )
    )  # fmt: skip
    model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
        tower, reader, trainable=("connector", "vision", "text"), connector_type="linear", projection_dim=64,
        text_pooling="mean", text_headless=True,
    )  # fmt: skip
    texts = tokenizer([scene.sentence for scene in pictures.scenes], return_tensors="pt", padding=True, padding_side="right")
    numbers = torch.tensor([scene.numbers for scene in pictures.scenes])
    kinds = torch.unique(numbers, dim=0, return_inverse=True)[1]  # equal scenes are no negatives of each other
    batch = pictures.batches()

    def loss_of_step(_: int) -> torch.Tensor:
        rows = batch()
        return model(
            input_ids=texts["input_ids"][rows], attention_mask=texts["attention_mask"][rows],
            pixel_values=pictures.pixels[rows], image_ids=kinds[rows], return_loss=True,
        ).loss  # fmt: skip

    return model, loss_of_step


def _by_labels(tower: nn.Module, pictures: Pictures, which: tuple[int, ...]) -> tuple[nn.Module, LossOfStep]:
    heads = nn.ModuleList(nn.Linear(WIDTH, PROPERTIES[i]) for i in which)
    numbers, batch = torch.tensor([scene.numbers for scene in pictures.scenes]), pictures.batches()

    def loss_of_step(_: int) -> torch.Tensor:
        rows = batch()
        features = tower(pictures.pixels[rows]).last_hidden_state.flatten(2).mean(-1)
        wrong = [nn.functional.cross_entropy(head(features), numbers[rows, i]) for head, i in zip(heads, which, strict=True)]
        return torch.stack(wrong).sum()

    return nn.ModuleList([tower, heads]), loss_of_step


def _by_pictures(tower: nn.Module, pictures: Pictures) -> tuple[nn.Module, LossOfStep]:
    restore, batch = nn.Conv2d(WIDTH, 3 * 16 * 16, 1), pictures.batches()
    generator = torch.Generator().manual_seed(pictures.seed)

    def loss_of_step(_: int) -> torch.Tensor:
        pixels = pictures.pixels[batch()]
        kept = (torch.rand(len(pixels), 1, 8, 8, generator=generator) > 0.4).float().repeat_interleave(8, 2)
        features = tower(pixels * kept.repeat_interleave(8, 3)).last_hidden_state
        return nn.functional.mse_loss(nn.functional.pixel_shuffle(restore(features), 16), pixels)

    return nn.ModuleList([tower, restore]), loss_of_step


WAYS: dict[str, Callable[[nn.Module, Pictures], tuple[nn.Module, LossOfStep]] | None] = {
    "language": _by_language,
    "labels": lambda tower, pictures: _by_labels(tower, pictures, (1, 2)),
    "all labels": lambda tower, pictures: _by_labels(tower, pictures, (0, 1, 2, 3)),
    "self-supervised": _by_pictures,
    "random": None,
}


def train_tower_by(way: str, folder: Path, steps: int, pictures: Pictures) -> None:
    """Trains a tower in one of `WAYS` and writes it to `folder`, as a folder that `from_pretrained` loads."""
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown: choose one of {list(WAYS)}.")
    torch.manual_seed(pictures.seed)
    tower, processor = make_tower()
    make = WAYS[way]
    if make is None:
        batch = pictures.batches()
        with torch.no_grad():
            for _ in range(100):  # by then a batch norm has forgotten where its running statistics started
                tower.train()(pictures.pixels[batch()])
    else:
        learner, loss_of_step = make(tower, pictures)
        optimize(learner, steps, RATE, f"tower by {way}", loss_of_step)
        tower = learner.model.vision_tower if way == "language" else tower
    for module in tower.modules():
        module.training = False
    tower.requires_grad_(True).save_pretrained(folder)
    processor.save_pretrained(folder)
