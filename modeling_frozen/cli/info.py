"""`frozen-prefix info`: what a checkpoint is made of, without loading a weight."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub id")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> None:
    import json

    facts = describe(args.model)
    print(json.dumps(facts, indent=1) if args.json else as_text(facts))


def describe(name: str) -> dict[str, Any]:
    """Facts of a checkpoint: its connector, its parents, what trained, what lies in it, and versions.

    Raises: ValueError for a checkpoint of another kind. OSError where there is none.
    """
    from transformers import AutoConfig

    from .. import __version__

    config = AutoConfig.from_pretrained(name)
    if config.model_type != "frozen-prefix":
        raise ValueError(f"{name} is a checkpoint of {config.model_type!r}, not of frozen-prefix.")
    tensors = _tensors(name)
    kind = (config.architectures or ["FrozenPrefixForConditionalGeneration"])[0]
    facts: dict[str, Any] = {"model": name, "class": kind}
    facts["trained"] = [
        *config.trainable,
        *(f"last {n} layers of {part}" for part, n in (config.unlocked_layers or {}).items()),
    ]
    facts["parents"] = _parents(config, kind)
    facts["connector"] = {
        "type": config.connector_type, "options": config.connector_config, "fusion": config.fusion,
        "vectors": config.prefix_lengths or config.prefix_length, "width": config.embedding_dim,
        "parameters": sum(count for key, (count, _) in tensors.items() if "connector" in key),
    }  # fmt: skip
    saved = facts["parents"] if config.saved_parts is None else config.saved_parts
    facts["parts in it"] = [part for part in facts["parents"] if part in saved]
    facts["bytes of weights"] = sum(size for _, size in tensors.values())
    facts["saved with"] = {"frozen-prefix": config.frozen_prefix_version, "transformers": config.transformers_version}
    facts["here"] = {"frozen-prefix": __version__, **{one: _version(one) for one in ("transformers", "torch")}}
    return facts


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _parents(config: Any, kind: str) -> dict[str, dict[str, Any]]:
    """Where each is, and its parameters, counted without weights."""
    import torch

    import modeling_frozen

    with torch.device("meta"):
        skeleton = getattr(modeling_frozen, kind)(config)
    facts = {}
    for part, module in skeleton.backbones.items():
        record = getattr(config, f"{part}_base_model") or {}
        kept = {
            key: record[key] for key in ("name_or_path", "revision", "dtype", "gguf_file", "quantization") if record.get(key)
        }
        facts[part] = {"type": module.config.model_type, **kept, "parameters": module.num_parameters()}
    return facts


def _tensors(name: str) -> dict[str, tuple[int, int]]:
    """Values and bytes of each tensor of a checkpoint, from the files' headers."""
    import json
    import math
    import struct

    from transformers.utils import cached_file

    folder = Path(name)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
    else:
        file = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        files = [] if file is None else [Path(file)]
    tensors = {}
    for path in files:
        with path.open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
        header.pop("__metadata__", None)
        for key, one in header.items():
            start, end = one["data_offsets"]
            tensors[key] = (math.prod(one["shape"]), end - start)
    return tensors


def as_text(facts: dict[str, Any]) -> str:
    titles = {"vision": "vision tower", "audio": "audio tower", "text": "language model"}
    lines = [f"{facts['model']}: {facts['class']}"]
    for part, parent in facts["parents"].items():
        where = parent.get("name_or_path", "in the checkpoint itself")
        commit = f" at {parent['revision'][:7]}" if parent.get("revision") else ""
        how = ", ".join(str(parent[key]) for key in ("dtype", "gguf_file") if key in parent)
        how += ", quantised" if "quantization" in parent else ""
        about = f"{parent['type']}, {parent['parameters']:,} parameters" + (f", {how}" if how else "")
        lines.append(f"{titles[part]:<16}{where}{commit} ({about})")
    one = facts["connector"]
    options = ", ".join(f"{key}={value}" for key, value in (one["options"] or {}).items())
    lines.append(f"{'connector':<16}{one['type']}{f' ({options})' if options else ''}, {one['parameters']:,} parameters")
    lines.append(f"{'prefix':<16}{one['vectors']} vectors an image, {one['width']} wide; fusion: {one['fusion']}")
    lines.append(f"{'trained':<16}{', '.join(facts['trained'])}")
    saved = ", ".join(facts["parts in it"])
    lines.append(
        f"{'weights':<16}{facts['bytes of weights']:,} bytes" + (f", with {saved}" if saved else ", the connector's alone")
    )
    for title in ("saved with", "here"):
        lines.append(f"{title:<16}" + ", ".join(f"{name} {version or '?'}" for name, version in facts[title].items()))
    return "\n".join(lines)


__all__ = ["add_arguments", "as_text", "describe", "run"]
