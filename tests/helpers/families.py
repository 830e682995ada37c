"""What works with which family: the tables that the README prints, by running every cell.

`python -m tests.helpers.families --table` builds each tiny language model of `families_text` (and each tower of
`families_vision`) into this package's model and into transformers' own composites, with random weights, and asks the
same of all: does it build, run with an image, hold the projector's vectors where the placeholders are, leave text-only
logits alone, change its logits with the image, send a gradient to every parameter of the projector, and generate the
same with a cache as without? `outcome()` is one cell, for the tests.
"""

import argparse
import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.utils import logging

from .families_text import BOS, DECODERS, ENCODER_DECODERS, VOCAB_SIZE, language_model, text_config
from .families_vision import TOWERS, full_config, image_inputs, reason_to_skip, tiny_tower


IMAGE_SIZE, PATCHES = 30, 4
# the peers' placeholder must lie inside the vocabulary; no word of the checks is this one
PEER_IMAGE_TOKEN = VOCAB_SIZE - 1
WORDS = torch.tensor([[BOS, 17, 5, 88, 42, 23, 61]])
TARGET = torch.tensor([[BOS, 9, 31, 77]])
RESAMPLER = {"num_layers": 1, "num_heads": 2, "hidden_size": 16}
# far above rounding, which is 2e-6 at most here, and far below what any fault was seen to change
TOLERANCE = 1e-5

# one batch, as keyword arguments of a model
Picture = dict[str, torch.Tensor]


def vision_config() -> CLIPVisionConfig:
    """A tiny CLIP tower, wider than the language models, so that every composite needs its projector."""
    return CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=15,
        initializer_range=0.1,
        initializer_factor=5.0,
    )


@dataclass
class Composite:
    """A model of some class around a tiny tower and a tiny language model, and where its parts are."""

    model: PreTrainedModel
    # None where both widths agree and the composite needs none
    projector: nn.Module | None
    # with placeholders; the picture is added by the checks
    inputs: dict[str, torch.Tensor]
    # None where the composite has a tower class of its own
    tower: nn.Module | None = None
    # the module whose first positions' embeddings must be what the projector wrote; None where there is no prefix
    reader: nn.Module | None = None
    placeholder: int | None = None
    # copies a whole parent's weights in
    adopt: Callable[[PreTrainedModel], None] | None = None
    # without picture and placeholders; empty where the composite can't run so
    text_inputs: dict[str, torch.Tensor] = field(default_factory=dict)


def _inputs(placeholder: int, count: int, is_encoder_decoder: bool) -> tuple[dict, dict]:
    text = {"decoder_input_ids": TARGET} if is_encoder_decoder else {}
    ids = torch.cat([WORDS[:, :1], torch.full((1, count), placeholder), WORDS[:, 1:]], dim=1)
    return {"input_ids": ids, **text}, {"input_ids": WORDS, **text}


def frozen_prefix(
    text: PreTrainedConfig, vision: PreTrainedConfig | list, picture: Picture, length: int | None = None, **options: Any
) -> Composite:
    """`length`: placeholders of one image, where they are fewer than the connector's own length."""
    from modeling_frozen.configuration_frozen_prefix import FrozenPrefixConfig
    from modeling_frozen.modeling_frozen_prefix import FrozenPrefixForConditionalGeneration

    # one connector for all towers: it reads any number of positions
    options = {"connector_type": "resampler", "prefix_length": PATCHES, "connector_config": RESAMPLER, **options}
    config = FrozenPrefixConfig.from_vision_text_configs(vision, text, **options)
    model = FrozenPrefixForConditionalGeneration(config)
    count = len(picture["pixel_values"]) * (length or config.prefix_length)
    inputs, text_inputs = _inputs(config.image_token_id, count, config.is_encoder_decoder)
    parent = model.model.language_model
    return Composite(
        model=model,
        projector=model.model.connector,
        inputs=inputs,
        tower=model.model.vision_tower,
        reader=parent,
        placeholder=config.image_token_id,
        adopt=lambda other: parent.load_state_dict(other.state_dict()),
        text_inputs=text_inputs,
    )


def llava(text: PreTrainedConfig, vision: PreTrainedConfig, picture: Picture) -> Composite:
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=PEER_IMAGE_TOKEN)
    model = LlavaForConditionalGeneration(config)
    count = PATCHES
    with contextlib.suppress(Exception), torch.no_grad():  # what fails here fails in the forward as well, and is reported
        count = sum(vectors[..., 0].numel() for vectors in model.eval().get_image_features(**picture).pooler_output)
    inputs, text_inputs = _inputs(PEER_IMAGE_TOKEN, count, False)

    def adopt(other: PreTrainedModel) -> None:
        model.model.language_model.load_state_dict(other.base_model.state_dict())
        model.lm_head.weight.data.copy_(other.get_output_embeddings().weight)

    return Composite(
        model=model,
        projector=model.model.multi_modal_projector,
        inputs=inputs,
        tower=model.model.vision_tower,
        reader=model.model.language_model,
        placeholder=PEER_IMAGE_TOKEN,
        adopt=adopt,
        text_inputs=text_inputs,
    )


def blip2(text: PreTrainedConfig, vision: PreTrainedConfig, picture: Picture) -> Composite:
    if isinstance(vision, CLIPVisionConfig):
        # the same tower under BLIP-2's own name
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
        vision = Blip2VisionConfig(**{name: getattr(vision, name) for name in (*names, "patch_size")})
        vision.initializer_range = 0.1
    qformer = Blip2QFormerConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=PATCHES,
        image_token_index=PEER_IMAGE_TOKEN,
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)
    inputs, _ = _inputs(PEER_IMAGE_TOKEN, PATCHES, config.is_encoder_decoder)
    return Composite(
        model=model,
        projector=model.language_projection,
        inputs=inputs,
        reader=model.language_model,
        placeholder=PEER_IMAGE_TOKEN,
        adopt=lambda other: model.language_model.load_state_dict(other.state_dict()),
    )


def vision_encoder_decoder(text: PreTrainedConfig, vision: PreTrainedConfig, picture: Picture) -> Composite:
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    model = VisionEncoderDecoderModel(config=config)
    return Composite(
        model=model,
        projector=getattr(model, "enc_to_dec_proj", None),
        inputs={"decoder_input_ids": WORDS},
        tower=model.encoder,
    )


# column's title: how it is built
COLUMNS: dict[str, Callable[[PreTrainedConfig, PreTrainedConfig, Picture], Composite]] = {
    "frozen-prefix": frozen_prefix,
    "Llava": llava,
    "Blip2": blip2,
    "VisionEncoderDecoder": vision_encoder_decoder,
}


CONVOLUTIONS = {"hidden_size": 16, "num_layers": 1}
# The vision side's other kinds, of our model alone: its options, and what is read beside one image of one tower.
KINDS: dict[str, dict[str, Any]] = {
    "avg_pool": {"connector_type": "avg_pool", "connector_config": {}},
    "pixel_shuffle": {"connector_type": "pixel_shuffle", "connector_config": {}, "prefix_length": None},
    "c_abstractor": {"connector_type": "c_abstractor", "connector_config": CONVOLUTIONS},
    "shorter prefix": {"prefix_lengths": [2, PATCHES], "length": 2},
    "tiles, separator": {"connector_config": {**RESAMPLER, "separator": True}, "tiles": 3},
    "two towers": {"towers": 2},
}


def kind_of(kind: str, text: PreTrainedConfig, vision: PreTrainedConfig, picture: Picture) -> Composite:
    options = {name: value for name, value in KINDS[kind].items() if name not in ("tiles", "towers")}
    towers = [vision, vision_config()] if "towers" in KINDS[kind] else vision
    return frozen_prefix(text, towers, picture, **options)


def kind_pictures(kind: str) -> tuple[Picture, ...]:
    """Two batches of one image each, in as many tiles and for as many towers as the kind has."""
    generator, shape = torch.Generator().manual_seed(0), (KINDS[kind].get("tiles", 1), 3, IMAGE_SIZE, IMAGE_SIZE)
    names = ["pixel_values", "pixel_values_2"][: KINDS[kind].get("towers", 1)]
    return tuple({name: torch.randn(shape, generator=generator) for name in names} for _ in range(2))


# Blip2 has a tower of its own and takes no other
TOWER_COLUMNS = tuple(column for column in COLUMNS if column != "Blip2")


class Wrong(Exception):
    """A composite ran, but not as a user would think; the word says where."""


@contextlib.contextmanager
def _recorded(module: nn.Module, store: list[torch.Tensor], *, inputs: bool) -> Iterator[None]:
    """Keeps a module's output, or the embeddings that it took."""
    if inputs:

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if kwargs.get("inputs_embeds") is not None:
                store.append(kwargs["inputs_embeds"].detach().clone())

        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda module, args, output: store.append(output.detach().clone()))
    try:
        yield
    finally:
        handle.remove()


def _check_prefix(composite: Composite, picture: Picture) -> None:
    """Each placeholder must hold one vector of the projector, whole and in order."""
    if composite.reader is None:
        composite.model(**composite.inputs, **picture)
        return
    written: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    with torch.no_grad(), _recorded(composite.projector, written, inputs=False):
        with _recorded(composite.reader, read, inputs=True):
            composite.model(**composite.inputs, **picture)
    vectors = written[-1].flatten(0, -2)
    held = read[-1][composite.inputs["input_ids"] == composite.placeholder]
    if vectors.shape != held.shape or not torch.allclose(vectors.to(held.dtype), held, atol=TOLERANCE):
        raise Wrong("prefix")


def _check_text(composite: Composite, family: str | None) -> None:
    """The parent's weights must fit, and without a picture the logits must be those of the parent by itself."""
    if composite.adopt is None or family is None:
        return
    parent = language_model(family, seed=1)
    head = parent.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    try:
        composite.adopt(parent)
    except RuntimeError as error:
        raise Wrong("parent") from error
    if not composite.text_inputs:
        return
    with torch.no_grad():
        ours = composite.model(**composite.text_inputs).logits
        theirs = parent(**composite.text_inputs).logits
    if not torch.allclose(ours, theirs, atol=TOLERANCE):
        raise Wrong("text")


def _check_sight(composite: Composite, pictures: tuple[Picture, ...]) -> None:
    with torch.no_grad():
        one, again, other = (composite.model(**composite.inputs, **picture).logits for picture in (pictures[0], *pictures))
    if (one - again).abs().max() > TOLERANCE:
        raise Wrong("random")
    if (one - other).abs().max() <= TOLERANCE:
        raise Wrong("blind")


def _check_gradient(composite: Composite, picture: Picture) -> None:
    if composite.projector is None:
        return
    model = composite.model.requires_grad_(False)
    composite.projector.requires_grad_(True)
    model(**composite.inputs, **picture).logits.square().mean().backward()
    for parameter in composite.projector.parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any():
            raise Wrong("gradient")


def _check_generation(composite: Composite, picture: Picture) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = {name: value for name, value in composite.inputs.items() if name == "input_ids"}
    if composite.placeholder is not None:
        # a random model may well write the placeholder itself
        options["suppress_tokens"] = [PEER_IMAGE_TOKEN]
    if composite.reader is None:
        options["decoder_start_token_id"] = BOS
    with_cache, without = (
        composite.model.generate(**inputs, **picture, **options, use_cache=use_cache) for use_cache in (True, False)
    )
    if not torch.equal(with_cache, without):
        raise Wrong("generate")


def random_pictures(*shape: int) -> tuple[Picture, ...]:
    """Two batches of one picture each."""
    generator = torch.Generator().manual_seed(0)
    return tuple({"pixel_values": torch.randn(1, *shape, generator=generator)} for _ in range(2))


def outcome(
    column: str,
    text: PreTrainedConfig,
    vision: PreTrainedConfig,
    pictures: tuple[Picture, ...],
    family: str | None = None,
    tower: PreTrainedModel | None = None,
) -> str:
    """
    One cell: `"sees"`, `"blind"`, `"wrong: <what>"`, or the step that raised and the class of its error.

    Args:
        column: key of `COLUMNS`, or of `KINDS`.
        text, vision: configurations of the two parents; they are not kept unchanged.
        pictures: two different ones, as keyword arguments.
        family: row of the text tables; with it text-only logits are compared to the bare parent's.
        tower: its weights are copied in. Fresh ones let the signal of a deep convolutional tower die out.
    """
    step = "build"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            build = COLUMNS.get(column) or functools.partial(kind_of, column)
            composite = build(text, vision, pictures[0])
            composite.model.eval()
            if tower is not None and composite.tower is not None:
                composite.tower.load_state_dict(tower.state_dict(), strict=False)
            step = "text"
            _check_text(composite, family)
            step = "forward"
            _check_prefix(composite, pictures[0])
            _check_sight(composite, pictures)
            step = "gradient"
            _check_gradient(composite, pictures[0])
            step = "generate"
            _check_generation(composite, pictures[0])
        except Wrong as wrong:
            return "blind" if str(wrong) == "blind" else f"wrong: {wrong}"
        except Exception as error:
            return f"{step}: {type(error).__name__}"
    return "sees"


def text_row(family: str) -> dict[str, str]:
    """All cells of a language-model family, with the tiny CLIP tower."""
    pictures = random_pictures(3, IMAGE_SIZE, IMAGE_SIZE)
    return {column: outcome(column, text_config(family), vision_config(), pictures, family) for column in COLUMNS}


def kind_row(family: str, kinds: Iterable[str] = KINDS) -> dict[str, str]:
    """A language-model family with each kind of our vision side."""
    return {kind: outcome(kind, text_config(family), vision_config(), kind_pictures(kind), family) for kind in kinds}


def tower_row(name: str) -> dict[str, str]:
    """All cells of a tower, with the one language model (XGLM) that every column takes."""
    row = TOWERS[name]
    if reason_to_skip(row) is not None:
        return dict.fromkeys(TOWER_COLUMNS, f"needs {row.requires}")
    tower = tiny_tower(row)
    pictures = tuple(image_inputs(row, images=1, seed=seed) for seed in (1, 2))

    def cell(column: str) -> str:
        vision = full_config(row)
        if row.dual and column != "frozen-prefix":
            vision = vision.vision_config  # the peers don't look for it themselves
        return outcome(column, text_config("xglm"), vision, pictures, tower=tower)

    return {column: cell(column) for column in TOWER_COLUMNS}


def markdown(title: str, rows: dict[str, dict[str, str]]) -> str:
    """Rows of cells as a markdown table, with a last row of how many see."""
    columns = list(next(iter(rows.values())))
    sums = {column: f"{sum(row[column] == 'sees' for row in rows.values())} of {len(rows)}" for column in columns}
    lines = [[title, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(row[column] for column in columns)] for name, row in rows.items()]
    lines += [["**sees**", *sums.values()]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LEGEND = """\
* *sees*: it builds, runs with an image, holds what its projector wrote where the placeholders are, gives the parent's
  own logits for text alone, changes its logits with the image, sends a gradient to every parameter of the projector,
  and generates the same with a cache as without.
* *blind*: it runs, but another image changes nothing.
* *wrong: prefix*: the language model does not read what the projector wrote. Blip2 writes vectors as wide as
  `hidden_size` where the embeddings have another width (OPT-350m's layout): they are filled in end to end, so
  placeholders hold pieces of vectors, and the last vectors are lost.
* *wrong: text*: logits for text alone are not those of the parent. Llava puts a bare linear layer where the parent's
  head has a bias, a scale or a soft cap.
* *wrong: parent*: another model than the parent was built. Blip2 takes the BARTs for decoders and drops their
  encoders.
* *wrong: random*: the same image twice gives different logits. ViT-MAE's tower hides three quarters of the image
  at random unless it is told not to.
* *step: Error*: the step that raised, and the class of its error."""


def table() -> str:
    """The tables of the README, and how to read them."""
    parts = [
        markdown("decoder", {family: text_row(family) for family in DECODERS}),
        markdown("encoder-decoder", {family: text_row(family) for family in ENCODER_DECODERS}),
        markdown("tower", {name: tower_row(name) for name in TOWERS}),
        markdown("language model", {family: kind_row(family) for family in (*DECODERS, *ENCODER_DECODERS)}),
        LEGEND,
    ]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.families", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--table", action="store_true", help="print the tables as markdown")
    options: Any = parser.parse_args(arguments)
    if not options.table:
        parser.print_help()
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.set_verbosity(logging.CRITICAL)
    print(table())


if __name__ == "__main__":
    main()
