# SPDX-License-Identifier: Apache-2.0
"""What a repository on the Hub needs beside weights and config: the code that loads them for people without this package.

transformers copies custom code on every save. Here it is written only where it is needed, into folders that leave this
machine, so that checkpoints on disk stay as small as what they learnt.
"""

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .parts import PARTS


logger = logging.get_logger(__name__)

# Auto class -> file and class that serve it. The one table of them: from it the Auto classes learn the model type, and
# `auto_map` in config.json, by which transformers finds the code beside it, is a part of it.
AUTO_MAP = {
    "AutoConfig": "configuration_frozen_prefix.FrozenPrefixConfig",
    "AutoModel": "modeling_frozen_prefix.FrozenPrefixModel",
    "AutoModelForImageTextToText": "modeling_frozen_prefix.FrozenPrefixForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_frozen_prefix.FrozenPrefixForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_frozen_prefix_classification.FrozenPrefixForSequenceClassification",
    "AutoModelForImageClassification": "modeling_frozen_prefix_classification.FrozenPrefixForSequenceClassification",
    "AutoModelForZeroShotImageClassification": "modeling_frozen_prefix_retrieval.FrozenPrefixForImageTextRetrieval",
    "AutoModelForPreTraining": "modeling_frozen_prefix.FrozenPrefixForConditionalGeneration",
    "AutoProcessor": "processing_frozen_prefix.FrozenPrefixProcessor",
}

_HERE = Path(__file__).parent


def _source(module: str) -> Path | None:
    # Flat on the Hub; here the processor has a folder of its own, which in a checkout lies beside the package.
    folders = (_HERE, _HERE / "processors", _HERE.parent / "processors")
    return next((path for folder in folders if (path := folder / f"{module}.py").is_file()), None)


def auto_map_of(model: Any) -> dict[str, str]:
    """The part of `AUTO_MAP` that a model's repository serves: its own class, what that is built on, and the processor."""
    names = {klass.__name__ for klass in type(model).__mro__}  # FSDP puts a class of its own before ours
    modules = {"configuration_frozen_prefix", "modeling_frozen_prefix", "processing_frozen_prefix"}
    targets = [target.split(".") for target in AUTO_MAP.values()]
    modules |= {module for module, class_name in targets if class_name in names}
    return {auto: target for auto, target in AUTO_MAP.items() if target.split(".")[0] in modules}


def write_code(folder: str | Path, auto_map: dict[str, str] | None = None) -> list[Path]:
    """
    Copies the files that `auto_map` names, and what they import, flat into `folder`. By default it is the one in the
    `config.json` there, and the processor's.

    A push may be reading the folder at this very moment (`Trainer` pushes in the background), so a file that is there
    already is never written into: it is left alone or replaced as a whole. A `.gitignore` keeps Trainer's arguments out.

    Returns:
        `list[Path]`: the files that lie there now.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if auto_map is None:
        config = folder / "config.json"
        named = json.loads(config.read_text(encoding="utf-8")).get("auto_map", {}) if config.is_file() else {}
        auto_map = {**named, "AutoProcessor": AUTO_MAP["AutoProcessor"]}
    sources: dict[str, Path] = {}
    for module in {target.split(".")[0] for target in auto_map.values()}:
        source = _source(module)
        if source is not None:
            for file in (source, *map(Path, get_relative_import_files(source))):
                sources[file.name] = file
    written = []
    for name, source in sorted(sources.items()):
        target = folder / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            whole = folder / f"_{os.getpid()}_{name}"  # pushes leave out "_*"
            whole.write_bytes(source.read_bytes())
            whole.replace(target)
        written.append(target)
    ignore_training_arguments(folder)
    return written


def ignore_training_arguments(folder: str | Path) -> None:
    """Keeps Trainer's pickle of its arguments, which may hold the Hub's token and which nobody needs, out of pushes."""
    ignore = Path(folder) / ".gitignore"
    lines = ignore.read_text(encoding="utf-8").splitlines() if ignore.exists() else []
    if "training_args.bin" not in lines:
        ignore.write_text("\n".join([*lines, "training_args.bin", ""]), encoding="utf-8")


def prepare_for_pushes(folder: str | Path) -> None:
    """What a folder with a saved model needs before `Trainer` pushes it, of which nothing is told to a model: it pushes its
    output folder, or copies weights and config there from a checkpoint."""
    folder = Path(folder)
    ignore_training_arguments(folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder)
    if get_token() is not None:  # others can't push
        warn_of_local_paths(folder)


def warn_of_local_paths(folder: str | Path) -> None:
    """Names the paths of this machine that a push of the folder publishes, and where nobody else finds what lies there."""
    configs = {name: Path(folder) / name for name in ("config.json", "adapter_config.json")}
    read = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in configs.items() if file.is_file()}
    config, places = read.get("config.json", {}), {}
    for part in PARTS:
        if part not in (config.get("saved_parts") or ()):
            places[PARTS[part].description] = (config.get(f"{part}_base_model") or {}).get("name_or_path")
    places["model of the adapter"] = read.get("adapter_config.json", {}).get("base_model_name_or_path")
    for what, path in places.items():
        if path and (os.path.isabs(path) or os.path.exists(path)):
            logger.warning_once(
                f"The config names the {what} by a path of this machine, {path}, which a push publishes and where nobody else "
                "finds it. Push that model to the Hub and load it from there, or upload a copy that holds it, of "
                "save_pretrained(folder, include_base_models=True)."
            )


def complete_copy(folder: str | Path, model: Any) -> None:
    """Adds to a folder with a whole model, parents included, what makes it self-contained: code, and where none lies there
    yet a processor. That is the one of the model's recorded parents, as long as they can be reached; save your own
    processor into the folder, before or after, where you changed it."""
    write_code(folder)
    if (Path(folder) / "processor_config.json").is_file():
        return
    try:
        # Where this file runs from the Hub there is no such folder, and the processor's own code may not be loaded.
        processor = importlib.import_module(".processors", __package__).FrozenPrefixProcessor.from_model(model)
    except (ImportError, ValueError) as error:
        logger.warning(f"{folder} has no processor yet: save yours into it, processor.save_pretrained(folder). {error}")
    else:
        processor.save_pretrained(folder)


def complete_repository(
    folder: str | Path, model: Any, repo_id: str | None = None, own_card: bytes | None = None
) -> list[Path]:
    """Adds to a folder with a saved model what makes it a repository: code, and a card. `own_card` is what lay there before a
    push, in whose place transformers puts that of the repository, or a template. Returns these files."""
    files = write_code(folder)
    warn_of_local_paths(folder)
    try:
        # By name: the card's template is no code, and stays behind where this file runs from the Hub itself.
        card = importlib.import_module(".model_card.card", __package__)
    except ImportError:
        return files
    if own_card is not None:
        card.keep_own_card(folder, own_card)
    return [*files, card.write_model_card(folder, model, repo_id=repo_id)]
