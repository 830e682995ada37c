"""Training steps and `generate` beside the code of two peers: nanoVLM's own, and transformers' BLIP-2.

    python -m benchmarks.peers --nanovlm path/to/nanoVLM --output peers.json

Both sides of a row have the same tower (SigLIP's layout, which is nanoVLM's), Llama and connector, bit for bit, and read the
same pictures and texts. So they reach the same loss and gradients and write the same words (all in the table), and what
differs is code:

- nanoVLM, out of a checkout of github.com/huggingface/nanoVLM, run as it is: a linear map of each of the tower's positions.
  Its pixel shuffle is left at 1. Ours has a bias that its projection lacks.
- `Blip2ForConditionalGeneration`: a Q-Former of `--qformer-layers` layers, `--prefix-length` queries. Its tower is replaced by
  the common one.

A step is forward, backward and AdamW of the connector alone, all else frozen: from the pictures, as both peers read them
every time, and, ours only, from stored features. Each picture stands in one row: what ours shares among several captions of
a picture is not in these figures. Theirs write the logits of every position, as they always do; ours those of the labels.
`generate` goes from one picture and a question, and from `--batch-size` of them at once, to `--new-tokens` words, greedy, each
with its own cache. All in float32 and
without autocast, which nanoVLM's `train.py` adds.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    logging,
)

from benchmarks import parents, timing
from benchmarks.training import step_of
from modeling_frozen import FrozenPrefixForConditionalGeneration
from modeling_frozen.losses import IGNORE_INDEX, shift_for_causal_model


# Our names of the tower's, the language model's and the connector's parameters, and what nanoVLM calls them.
NANOVLM_NAMES = (
    ("model.vision_tower.embeddings.patch_embedding.", "vision_encoder.patch_embedding.conv."),
    ("model.vision_tower.embeddings.position_embedding.weight", "vision_encoder.patch_embedding.position_embedding"),
    ("model.vision_tower.encoder.layers.", "vision_encoder.blocks."),
    ("model.vision_tower.post_layernorm.", "vision_encoder.layer_norm."),
    ("model.language_model.model.embed_tokens.", "decoder.token_embedding."),
    ("model.language_model.model.layers.", "decoder.blocks."),
    ("model.language_model.model.norm.", "decoder.norm."),
    ("model.language_model.lm_head.", "decoder.head."),
    ("model.connector.output.", "MP.proj."),
    (".layer_norm1.", ".ln1."),
    (".layer_norm2.", ".ln2."),
    (".input_layernorm.", ".norm1."),
    (".post_attention_layernorm.", ".norm2."),
    (".self_attn.", ".attn."),
    (".attn.o_proj.", ".attn.out_proj."),
)


def join(folder: str, sizes: parents.Sizes, **options: Any) -> FrozenPrefixForConditionalGeneration:
    """Ours, with a tower of SigLIP's layout; `parents.join` takes the one that lies there."""
    tower = Path(folder) / "tower"
    if not tower.exists():
        torch.manual_seed(0)
        clip = parents.vision_config(sizes)
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        config = SiglipVisionConfig(**{name: getattr(clip, name) for name in names}, vision_use_head=False)
        SiglipVisionModel(config).save_pretrained(tower)
    torch.manual_seed(0)
    options["connector_config"] = {"input_norm": False, **options.get("connector_config", {})}  # theirs have none
    return parents.join(folder, sizes, **options)


def nanovlm_code(checkout: str, tokenizer: Any) -> SimpleNamespace:
    """
    `VisionLanguageModel` and `VLMConfig` of a checkout.

    Its models import one name beside torch and safetensors, `data.processors.get_tokenizer`: a stand-in takes its place, and
    gives `tokenizer`, since the true one's module needs torchvision and einops for pictures that are not read here.
    """
    if not (Path(checkout) / "models" / "vision_language_model.py").is_file():
        raise FileNotFoundError(
            f"{checkout!r} holds no models/vision_language_model.py: give a checkout of github.com/huggingface/nanoVLM."
        )
    stand_ins = {"data": ModuleType("data"), "data.processors": ModuleType("data.processors")}
    stand_ins["data.processors"].get_tokenizer = lambda *_: tokenizer

    def taken() -> list[str]:  # its packages have names that others may have too
        return [name for name in sys.modules if name.split(".")[0] in ("data", "models")]

    before = {name: sys.modules.pop(name) for name in taken()}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(checkout))  # its modules import each other by the names that they have from there
    try:
        from models.config import VLMConfig
        from models.vision_language_model import VisionLanguageModel
    finally:
        sys.path.remove(str(checkout))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)
    return SimpleNamespace(VLMConfig=VLMConfig, VisionLanguageModel=VisionLanguageModel)


def nanovlm_model(checkout: str, ours: FrozenPrefixForConditionalGeneration) -> nn.Module:
    """nanoVLM's model of our sizes, with our weights, its projection alone unfrozen."""
    vision, text = ours.config.vision_config, ours.config.text_config
    tokenizer = SimpleNamespace(image_token_id=ours.config.image_token_id, eos_token_id=text.eos_token_id)
    code = nanovlm_code(checkout, tokenizer)
    config = code.VLMConfig(
        vit_hidden_dim=vision.hidden_size,
        vit_inter_dim=vision.intermediate_size,
        vit_patch_size=vision.patch_size,
        vit_img_size=vision.image_size,
        vit_n_heads=vision.num_attention_heads,
        vit_n_blocks=vision.num_hidden_layers,
        vit_ln_eps=vision.layer_norm_eps,
        lm_hidden_dim=text.hidden_size,
        lm_inter_dim=text.intermediate_size,
        lm_rms_eps=text.rms_norm_eps,
        lm_re_base=text.rope_parameters["rope_theta"],
        lm_max_position_embeddings=text.max_position_embeddings,
        lm_base_vocab_size=text.vocab_size,
        extra_token_amount=0,  # the placeholder is one of the vocabulary's
        lm_vocab_size=text.vocab_size,
        lm_n_heads=text.num_attention_heads,
        lm_n_kv_heads=text.num_key_value_heads,
        lm_n_blocks=text.num_hidden_layers,
        lm_tie_weights=text.tie_word_embeddings,
        mp_pixel_shuffle_factor=1,
        mp_image_token_length=ours.config.num_positions,
        vlm_load_backbone_weights=False,
    )
    theirs = code.VisionLanguageModel(config, load_backbone=False)
    weights = {}
    for name, tensor in ours.state_dict().items():
        for our_name, their_name in NANOVLM_NAMES:
            name = name.replace(our_name, their_name)
        weights[name] = tensor[None] if name.endswith("position_embedding") else tensor
    for index in range(vision.num_hidden_layers):
        for kind in ("weight", "bias"):
            stem = f"vision_encoder.blocks.{index}.attn."
            weights[f"{stem}qkv_proj.{kind}"] = torch.cat([weights.pop(f"{stem}{one}_proj.{kind}") for one in "qkv"])
    assert not weights.pop("MP.proj.bias").any(), "their projection has no bias, so ours must start at none"
    result = theirs.load_state_dict(weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["decoder.rotary_embd.inv_freq"], []), result
    theirs.requires_grad_(False)
    theirs.MP.requires_grad_(True)
    return theirs


def blip2_model(words: str, ours: FrozenPrefixForConditionalGeneration) -> Blip2ForConditionalGeneration:
    """transformers' BLIP-2 around the same tower and language model, with our Q-Former's weights, that alone unfrozen."""
    connector = ours.model.connector
    config = Blip2Config(
        vision_config={"hidden_size": ours.config.vision_width, "num_hidden_layers": 1},  # replaced below
        qformer_config=connector.qformer.config.to_dict(),
        text_config=ours.config.text_config.to_dict(),
        num_query_tokens=ours.config.prefix_length,
        image_token_index=ours.config.image_token_id,
    )
    with torch.device("meta"):
        theirs = Blip2ForConditionalGeneration(config)
    theirs.vision_model = SiglipVisionModel.from_pretrained(Path(words).with_name("tower"))
    theirs.language_model = AutoModelForCausalLM.from_pretrained(words)
    theirs.requires_grad_(False)
    theirs.query_tokens = nn.Parameter(connector.queries.detach()[None].clone())
    for module, source in ((theirs.qformer, connector.qformer), (theirs.language_projection, connector.output)):
        module.to_empty(device="cpu").load_state_dict(source.state_dict())
        module.requires_grad_(True)
    return theirs.eval()


def count(model: nn.Module, trained: bool = False) -> int:
    return sum(one.numel() for one in model.parameters() if one.requires_grad or not trained)


def compare(
    peer: str,
    ours: FrozenPrefixForConditionalGeneration,
    theirs: nn.Module,
    output: nn.Parameter,
    calls: dict[str, Callable[..., Any]],
    report: timing.Report,
    sizes: parents.Sizes,
    args: argparse.Namespace,
    more: int = 0,
) -> None:
    """
    The rows of one peer.

    Args:
        output: the peer's weight that writes the prefix, the like of `connector.output.weight` of ours.
        calls: `"loss"` of (pixel_values, input_ids, attention_mask, labels) and `"generate"` of (pixel_values, input_ids), of
            the peer; it returns the new words alone.
        more: parameters that ours has and theirs not.
    """
    ours.to(args.device), theirs.to(args.device)
    for what, trained in (("parameters", False), ("trained parameters", True)):
        numbers = count(ours, trained), count(theirs, trained)
        assert numbers[0] == numbers[1] + more, f"{peer}: {what} {numbers}, and ours should have {more} more"
        report.figure(f"{peer}: {what}", numbers[0], "", limit=numbers[1])

    images = parents.pictures(sizes, args.batch_size, args.device)
    ids = parents.prompt(ours, parents.words(sizes, rows=args.batch_size, device=args.device))
    labels = ids.clone()
    labels[:, : -sizes.text_length] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        stored = ours.model.vision_tower(images).last_hidden_state
    losses = {
        "pictures": lambda: ours(pixel_values=images, **batch).loss,
        "features": lambda: ours(vision_features=stored, **batch).loss,
        "theirs": lambda: calls["loss"](images, **batch),
    }
    models = {"pictures": ours, "features": ours, "theirs": theirs}
    start, slopes = {}, {}
    for name, loss_of in losses.items():
        start[name] = loss_of()
        weight = ours.model.connector.output.weight if models[name] is ours else output
        (slopes[name],) = torch.autograd.grad(start[name], weight)
    limit = start["theirs"].item()
    report.figure(f"{peer}: loss at the start", start["pictures"].item(), "nats", limit=limit, bar=limit + 1e-3)
    for name in ("pictures", "features"):
        apart = (slopes[name] - slopes["theirs"]).norm() / slopes["theirs"].norm()
        report.figure(f"{peer}: how far apart the gradients, from {name}", apart.item(), "of theirs", bar=1e-3)
    del start, slopes

    length = args.new_tokens
    greedy = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    ours.eval(), theirs.eval()
    writing = {}
    for rows in (1, args.batch_size):
        asked, shown = ids[:rows], images[:rows]
        writers = {
            "ours": lambda asked=asked, shown=shown: ours.generate(asked, pixel_values=shown, **greedy)[:, -length:],
            "theirs": lambda asked=asked, shown=shown: calls["generate"](shown, asked),
        }
        with torch.inference_mode():
            written = {name: write() for name, write in writers.items()}
            assert all(one.shape == (rows, length) for one in written.values()), {k: v.shape for k, v in written.items()}
            differ = int((written["ours"] != written["theirs"]).sum())
            report.figure(f"{peer}: words that differ, {_pictures(rows)}", differ, f"of {rows * length}", bar=0)
            writing[rows] = timing.alternate(writers, rounds=args.rounds, clock=args.clock)
    steps = {name: step_of(models[name], loss_of) for name, loss_of in losses.items()}
    step = timing.alternate(steps, rounds=args.rounds, clock=args.clock)
    report.compare(f"{peer}: step from pictures", step["pictures"], step["theirs"])
    report.compare(f"{peer}: step from stored features, to theirs from pictures", step["features"], step["theirs"])
    for rows, write in writing.items():
        report.compare(f"{peer}: {length} words, {_pictures(rows)}", write["ours"], write["theirs"], bar=1.0)


def _pictures(rows: int) -> str:
    return "from a picture" if rows == 1 else f"from each of {rows} pictures"


def compare_nanovlm(folder: str, sizes: parents.Sizes, report: timing.Report, args: argparse.Namespace) -> None:
    ours = join(folder, sizes, connector_type="linear", prefix_length=None)
    theirs = nanovlm_model(args.nanovlm, ours)

    def loss(images: torch.Tensor, labels: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        # As nanoVLM's data sets give them: each at the position before its own, for its loss shifts nothing.
        return theirs(images=images, targets=shift_for_causal_model(labels), **batch)[1]

    def generate(image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return theirs.generate(ids, image, max_new_tokens=args.new_tokens, greedy=True)

    name = f"nanoVLM, prefix {ours.config.num_positions}"
    more = ours.model.connector.output.bias.numel()
    calls = {"loss": loss, "generate": generate}
    compare(name, ours, theirs, theirs.MP.proj.weight, calls, report, sizes, args, more)


def compare_blip2(folder: str, sizes: parents.Sizes, report: timing.Report, args: argparse.Namespace) -> None:
    width, layers = sizes.vision_width, args.qformer_layers
    middle = {"hidden_size": width, "num_layers": layers, "num_heads": max(1, width // 64)}
    ours = join(folder, sizes, connector_type="qformer", connector_config=middle)
    theirs = blip2_model(parents.save_parents(folder, sizes)[1], ours)
    length = args.new_tokens

    def loss(images: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        return theirs(pixel_values=images, use_cache=False, **batch).loss

    def generate(image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        return theirs.generate(pixel_values=image, input_ids=ids, **options)[:, -length:]

    name = f"BLIP-2, prefix {sizes.prefix_length}"
    calls = {"loss": loss, "generate": generate}
    compare(name, ours, theirs, theirs.language_projection.weight, calls, report, sizes, args)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parents.add_arguments(parser)
    parser.add_argument("--nanovlm", help="checkout of github.com/huggingface/nanoVLM; without it BLIP-2 alone is compared")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--qformer-layers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    timing.add_arguments(parser)
    args = parser.parse_args(arguments)
    sizes = parents.sizes_of(args)
    if sizes.dtype != "float32":
        parser.error(f"--dtype {sizes.dtype}: both sides are compared in float32, as nanoVLM holds its weights")
    if args.nanovlm and sizes.text_type != "llama":
        parser.error(f"--text-type {sizes.text_type}: nanoVLM's language model is a Llama; leave --nanovlm or --text-type out")
    report = timing.Report("training steps and generate, against nanoVLM's own code and transformers' BLIP-2", **vars(args))
    for peer in (compare_nanovlm, compare_blip2):
        if peer is compare_nanovlm and args.nanovlm is None:
            print("no --nanovlm: its rows are left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            peer(folder, sizes, report, args)
        report.save(args.output)
    report.print()
    return {"rows": report.rows}


if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    main()
