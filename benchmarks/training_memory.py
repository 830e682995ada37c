"""Memory of training a connector over a frozen language model, by its size: computed from shapes, and measured beside that.

    python -m benchmarks.training_memory             # the table, and a language model of 135 M measured on this machine
    python -m benchmarks.training_memory --rows 16   # of another batch
    python -m benchmarks.training_memory --model HuggingFaceTB/SmolLM2-135M   # measured on that, id or folder

Computed: weights in bfloat16, in 8 bits (a scale for each output) and in 4 bits (NF4, a scale for each 64 weights); of what
is quantised, word embeddings, head and norms stay in bfloat16. Activations are what torch keeps for the way back, counted by
running transformers' own code on tensors without storage; with activation checkpointing the input of each layer, and one
layer's own. The head's logits come in chunks (`modeling_frozen.losses`), three tensors of a chunk at a time. Of the
connector (a resampler) weight, gradient and Adam's two moments, in float32. Not in it: the tower (train from stored
features), what the allocator and the device's libraries hold, and, where the language model is quantised, one unpacked
matrix at a time.

Measured: what a step of the whole model keeps, counted on the tensors themselves, in float32 on the CPU, which is what is
computed beside it; and the peak of the process's memory in that step above what it held before (Linux counts it; the
allocator's own habits are in it), each in a Python of its own. Without `--model` its weights are random, of the shapes of
SmolLM2. With it, its weights as they are held in bfloat16 and, where bitsandbytes is installed, in 8 and 4 bits, beside what
is computed.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, CLIPVisionConfig, LlamaConfig

from benchmarks.loss_memory import peak_above
from modeling_frozen import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration
from modeling_frozen.losses import CHUNK_BYTES, labels_per_chunk


GB, MIB = 1e9, 2**20
KINDS = ("bfloat16", "8 bits", "4 bits")
TOWER_WIDTH, POSITIONS = 768, 196  # CLIP's and SigLIP's base towers, 224 pixels


def llama(width: int, layers: int, middle: int, heads: int, key_heads: int, words: int, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=middle, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=words, tie_word_embeddings=tied, max_position_embeddings=4096,
    )  # fmt: skip


SHAPES = {  # of the models that they are named by
    "135 M (SmolLM2)": llama(576, 30, 1536, 9, 3, 49_152, tied=True),
    "1 B (Llama 3.2)": llama(2048, 16, 8192, 32, 8, 128_256, tied=True),
    "7 B (Llama 2)": llama(4096, 32, 11_008, 32, 32, 32_000),
    "70 B (Llama 3)": llama(8192, 80, 28_672, 64, 8, 128_256),
}


def joined_config(words: LlamaConfig, prefix: int) -> FrozenPrefixConfig:
    tower = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12, image_size=224,
        patch_size=16,
    )  # fmt: skip
    return FrozenPrefixConfig.from_vision_text_configs(tower, words, connector_type="resampler", prefix_length=prefix)


def weight_bytes(language_model: torch.nn.Module, kind: str, size: int = 2) -> int:
    """Of a language model, on whatever device; `size`: bytes of a value that is not quantised."""
    total = 0
    quantised: set[int] = set()
    if kind != "bfloat16":
        for name, module in language_model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                outputs, inputs = module.weight.shape
                values = outputs * inputs
                total += values + 4 * outputs if kind == "8 bits" else values // 2 + values // 64 * 4
                quantised.add(id(module.weight))
    return total + sum(size * one.numel() for one in language_model.parameters() if id(one) not in quantised)


@contextlib.contextmanager
def kept_for_the_way_back(without: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes of the tensors that autograd keeps, each storage once, without the weights of a module; filled at the end."""
    weights = {one.untyped_storage()._cdata for one in without.parameters()}
    sizes: dict[int, int] = {}
    held, total = [], [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            held.append(tensor)  # or its storage's place would be another's next
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total[0] = sum(sizes.values())


def activation_bytes(words: LlamaConfig, rows: int, positions: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of a step, kept whole and with activation checkpointing."""
    kept = {}
    for layers in (1, 2):  # each layer keeps as much
        config = LlamaConfig(**{**words.to_dict(), "num_hidden_layers": layers, "vocab_size": 8})
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval().model
            embeds = torch.zeros(rows, positions, config.hidden_size, dtype=dtype, requires_grad=True)
            with kept_for_the_way_back(model) as total:
                model(inputs_embeds=embeds, use_cache=False)
        kept[layers] = total[0]
    a_layer = kept[2] - kept[1]
    around = kept[1] - a_layer
    inputs = rows * positions * words.hidden_size * dtype.itemsize
    return around + words.num_hidden_layers * a_layer, around + words.num_hidden_layers * inputs + a_layer


def head_bytes(words: LlamaConfig, labels: int) -> int:
    return 3 * 4 * labels_per_chunk(labels, words.vocab_size) * words.vocab_size


def connector_bytes(words: LlamaConfig, prefix: int) -> int:
    shallow = LlamaConfig(**{**words.to_dict(), "num_hidden_layers": 1})
    with torch.device("meta"):
        model = FrozenPrefixForConditionalGeneration(joined_config(shallow, prefix))
    return 16 * sum(one.numel() for one in model.model.connector.parameters())


def table(rows: int, prefix: int, text: int) -> None:
    print(f"Computed, in GB; {rows} rows of {prefix} vectors and {text} tokens, logits {CHUNK_BYTES // MIB} MiB at a time:\n")
    head = ("", *(f"weights, {kind}" for kind in KINDS), "activations", "checkpointed", "head", "connector")
    lines = [(*head, *(f"all, {kind}" for kind in KINDS))]
    for name, words in SHAPES.items():
        with torch.device("meta"):
            language_model = AutoModelForCausalLM.from_config(words)
            language_model.tie_weights()
        weights = [weight_bytes(language_model, kind) for kind in KINDS]
        whole, checkpointed = activation_bytes(words, rows, prefix + text, torch.bfloat16)
        rest = (head_bytes(words, rows * text), connector_bytes(words, prefix))
        alls = [one + checkpointed + sum(rest) for one in weights]
        lines.append((name, *(f"{value / GB:.2f}" for value in (*weights, whole, checkpointed, *rest, *alls))))
    print_table(lines)


def print_table(lines: list[tuple[str, ...]]) -> None:
    for number, line in enumerate(lines):
        print("| " + " | ".join(line) + " |")
        if not number:
            print("|---" * len(line) + "|")


def shapes_of(model: str | None) -> tuple[str, LlamaConfig]:
    if model is None:
        return next(iter(SHAPES.items()))
    return Path(model).name, AutoConfig.from_pretrained(model, dtype=torch.float32)


def one(rows: int, prefix: int, text: int, recompute: bool, place: str | None) -> dict[str, float]:
    """A step, measured; a process of its own."""
    torch.set_num_threads(1)
    _, words = shapes_of(place)
    torch.manual_seed(0)
    model = FrozenPrefixForConditionalGeneration(joined_config(words, prefix))
    if place is not None:
        trained = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        model.model.language_model.load_state_dict(trained.state_dict())
        del trained
    model.model.vision_tower = None
    if recompute:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.model.connector.parameters(), lr=1e-5)
    model.train()

    def batch(rows: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 40_000, (rows, prefix + text))
        ids[:, :prefix] = model.config.image_token_id
        labels = ids.masked_fill(torch.arange(prefix + text) < prefix, -100)
        return {"vision_features": torch.randn(rows, POSITIONS, TOWER_WIDTH), "input_ids": ids, "labels": labels}

    def step(data: dict[str, torch.Tensor]) -> None:
        model(**data).loss.backward()
        optimizer.step()

    step(batch(1))  # everything is imported, and the optimizer's moments and the gradients are there
    data = batch(rows)
    peak, _ = peak_above(lambda: step(data))
    with kept_for_the_way_back(model) as total:
        model(**data)
    return {"kept": total[0], "peak": peak}


def load_as(place: str, kind: str) -> torch.nn.Module:
    """A language model with its weights as one of [`KINDS`]."""
    config = None
    if kind != "bfloat16":
        config = BitsAndBytesConfig(load_in_8bit=kind == "8 bits", load_in_4bit=kind == "4 bits", bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, quantization_config=config)


def held_bytes(model: torch.nn.Module) -> int:
    tensors = {one.data_ptr(): one for one in model.state_dict().values() if torch.is_tensor(one)}  # tied ones once
    return sum(one.nbytes for one in tensors.values())


def measured_weights(place: str) -> None:
    lines = [(f"weights of {Path(place).name}; MB", "computed", "held")]
    plain = load_as(place, "bfloat16")
    for kind in KINDS:
        if kind != "bfloat16" and importlib.util.find_spec("bitsandbytes") is None:
            print(f"{kind} are not measured, for bitsandbytes is not installed")
            continue
        held = held_bytes(load_as(place, kind))
        lines.append((kind, f"{weight_bytes(plain, kind) / 1e6:.1f}", f"{held / 1e6:.1f}"))
    print_table(lines)


def measured(rows: int, prefix: int, text: int, place: str | None) -> None:
    name, words = shapes_of(place)
    computed = activation_bytes(words, rows, prefix + text, torch.float32)
    title = f"{name}, float32, a step of {rows} rows; MiB"
    lines = [(title, "kept, computed", "kept, measured", "measured / computed", "peak of the process")]
    for recompute, bytes_ in zip((False, True), computed, strict=True):
        sizes = map(str, (rows, prefix, text, int(recompute)))
        command = [sys.executable, "-m", "benchmarks.training_memory", "--one", *sizes]
        command += [] if place is None else ["--model", place]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        what = "with activation checkpointing" if recompute else "all activations kept"
        kept, peak = found["kept"], found["peak"]
        lines.append((what, *(f"{one / MIB:.0f}" for one in (bytes_, kept)), f"{kept / bytes_:.2f}", f"{peak / MIB:.0f}"))
    print_table(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="of a batch (default: %(default)s)")
    parser.add_argument("--prefix", type=int, default=32, help="vectors of an image (default: %(default)s)")
    parser.add_argument("--text", type=int, default=96, help="tokens of a row, all of them labels (default: %(default)s)")
    parser.add_argument("--model", help="id or folder of a language model that is measured (default: random weights of 135 M)")
    parser.add_argument("--table", type=Path, help="Markdown file that is written with what is printed")
    parser.add_argument("--skip-measuring", action="store_true", help="only what is computed")
    parser.add_argument("--one", nargs=4, type=int, help=argparse.SUPPRESS)
    options: Any = parser.parse_args(arguments)
    if options.one:
        rows, prefix, text, recompute = options.one
        print(json.dumps(one(rows, prefix, text, bool(recompute), options.model)))
        return
    written = io.StringIO()
    with contextlib.redirect_stdout(written) if options.table else contextlib.nullcontext():
        table(options.rows, options.prefix, options.text)
        if not options.skip_measuring:
            print()
            measured(options.rows, options.prefix, options.text, options.model)
            if options.model:
                print()
                measured_weights(options.model)
    if options.table:
        options.table.write_text(written.getvalue(), encoding="utf-8")
        print(written.getvalue())


if __name__ == "__main__":
    main()
