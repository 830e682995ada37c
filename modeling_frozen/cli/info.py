"""`frozen-prefix info`: what a checkpoint is made of, without loading a weight."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_Header = dict[str, tuple[Sequence[int], Sequence[int]]]  # of each tensor its shape, and where its bytes begin and end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub id")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> None:
    import json

    facts = describe(args.model)
    print(json.dumps(facts, indent=1) if args.json else as_text(facts))


def describe(name: str) -> dict[str, Any]:
    """Facts of a checkpoint: its connector, its parents, what trained, what lies in it, and versions. Of an adapter: its own,
    and those of the checkpoint that it was trained on, where it names one.

    Raises: ValueError for a checkpoint of another kind. OSError where there is none.
    """
    adapter, tensors = _adapter(name), _tensors(name, *WEIGHTS)
    if adapter is None or tensors:
        facts = _of_checkpoint(name, tensors)
    elif adapter["of"] is None:
        facts = {"model": name}
    else:
        facts = {**_of_checkpoint(adapter["of"], _tensors(adapter["of"], *WEIGHTS)), "model": name}
    return facts if adapter is None else {**facts, "adapter": adapter}


def _of_checkpoint(name: str, tensors: dict[str, tuple[int, int]]) -> dict[str, Any]:
    from transformers import AutoConfig

    from .. import __version__

    config = AutoConfig.from_pretrained(name)
    if config.model_type != "frozen-prefix":
        raise ValueError(f"{name} is a checkpoint of {config.model_type!r}, not of frozen-prefix. [errors.md#command]")
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


def _adapter(name: str) -> dict[str, Any] | None:
    """What an adapter is, of PEFT's or of transformers' own saving; None where there is none."""
    import json

    from transformers.utils import find_adapter_config_file

    path = find_adapter_config_file(name)
    if path is None:
        return None
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    tensors = _tensors(name, "adapter_model.safetensors")
    return {
        "type": config["peft_type"], "rank": config.get("r"), "of": config.get("base_model_name_or_path") or None,
        "with": config.get("modules_to_save") or [], "parameters": sum(count for count, _ in tensors.values()),
        "bytes": sum(size for _, size in tensors.values()),
    }  # fmt: skip


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _parents(config: Any, kind: str) -> dict[str, dict[str, Any]]:
    """Where each is, and its parameters, counted without weights."""
    import torch

    import modeling_frozen

    from ..parts import PARTS

    with torch.device("meta"):
        skeleton = getattr(modeling_frozen, kind)(config)
    facts = {}
    for part, module in skeleton.backbones.items():
        record = getattr(config, f"{part}_base_model") or {}
        kept = {
            key: record[key] for key in ("name_or_path", "revision", "dtype", "gguf_file", "quantization") if record.get(key)
        }
        if config_of_weights := getattr(module.config, "quantization_config", None):  # in the repository they are quantised
            kept["quantization"] = config_of_weights
        facts[part] = {
            "part": PARTS[part].description,
            "type": module.config.model_type,
            **kept,
            "parameters": module.num_parameters(),
        }
    return facts


def _tensors(name: str, weights: str, index: str | None = None) -> dict[str, tuple[int, int]]:
    """Values and bytes of each tensor in a file of weights, or in the shards of an index, from the files' headers. Of a
    repository headers alone are fetched; without a network what was fetched before is read."""
    import math

    headers = _headers_on_the_hub if not Path(name).is_dir() else _headers_of_files
    tensors = {}
    for header in headers(name, weights, index):
        for key, (shape, (start, end)) in header.items():
            tensors[key] = (math.prod(shape), end - start)
    return tensors


def _headers_of_files(name: str, weights: str, index: str | None) -> Iterator[_Header]:
    """Of a folder, or of what was fetched of a repository."""
    import json
    import struct

    from huggingface_hub import try_to_load_from_cache

    def find(file: str) -> Path | None:
        if Path(name).is_dir():
            return Path(name) / file if (Path(name) / file).is_file() else None
        path = try_to_load_from_cache(name, file)
        return Path(path) if isinstance(path, str) else None

    for file in _files(weights, index, find):
        with file.open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
        header.pop("__metadata__", None)
        yield {key: (one["shape"], one["data_offsets"]) for key, one in header.items()}


def _headers_on_the_hub(name: str, weights: str, index: str | None) -> Iterator[_Header]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        there = api.list_repo_files(name)
    except HfHubHTTPError:
        raise
    except Exception:  # offline by choice, or out of reach, which each HTTP client says in its own way
        yield from _headers_of_files(name, weights, index)
        return

    def find(file: str) -> Path | None:
        if file not in there:
            return None
        return Path(hf_hub_download(name, file)) if file == index else Path(file)

    for file in _files(weights, index, find):
        tensors = api.parse_safetensors_file_metadata(name, file.name).tensors
        yield {key: (one.shape, one.data_offsets) for key, one in tensors.items()}


def _files(weights: str, index: str | None, find: Callable[[str], Path | None]) -> list[Path]:
    """The one file, or the shards, as `from_pretrained` chooses between them."""
    import json

    alone = find(weights)
    if alone is not None or index is None:
        return [] if alone is None else [alone]
    listed = find(index)
    if listed is None:
        return []
    shards = sorted(set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for path in map(find, shards) if path is not None]


def as_text(facts: dict[str, Any]) -> str:
    lines = [facts["model"] + (f": {facts['class']}" if "class" in facts else "")]

    def say(title: str, what: str) -> None:
        lines.append(f"{title:<14}  {what}")

    if "adapter" in facts:
        one = facts["adapter"]
        what = [f"{one['type']} of rank {one['rank']}" if one["rank"] else one["type"]]
        what += [f"with {', '.join(one['with'])}"] if one["with"] else []
        say("adapter", ", ".join([*what, f"{one['parameters']:,} parameters", f"{one['bytes']:,} bytes"]))
        say("on", one["of"] or "a checkpoint that it does not name")
    if "class" not in facts:
        return "\n".join(lines)
    for parent in facts["parents"].values():
        where = parent.get("name_or_path", "in the checkpoint itself")
        commit = f" at {parent['revision'][:7]}" if parent.get("revision") else ""
        how = ", ".join(str(parent[key]) for key in ("dtype", "gguf_file") if key in parent)
        how += ", quantised" if "quantization" in parent else ""
        about = f"{parent['type']}, {parent['parameters']:,} parameters" + (f", {how}" if how else "")
        say(parent["part"], f"{where}{commit} ({about})")
    one = facts["connector"]
    options = ", ".join(f"{key}={value}" for key, value in (one["options"] or {}).items())
    say("connector", f"{one['type']}{f' ({options})' if options else ''}, {one['parameters']:,} parameters")
    say("prefix", f"{one['vectors']} vectors an image, {one['width']} wide; fusion: {one['fusion']}")
    say("trained", ", ".join(facts["trained"]))
    saved = ", ".join(facts["parts in it"])
    say("weights", f"{facts['bytes of weights']:,} bytes" + (f", with {saved}" if saved else ", the connector's alone"))
    for title in ("saved with", "here"):
        say(title, ", ".join(f"{name} {version or '?'}" for name, version in facts[title].items()))
    return "\n".join(lines)


__all__ = ["add_arguments", "as_text", "describe", "run"]
