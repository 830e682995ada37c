"""The card of a repository: what it was made of and how, filled into `model_card.md`.

The parents and their licences come first, then the text, with what `results` tells of training and scores, then
the writing, which leaves a person's words alone by the rules of `card_edits`.
"""

import importlib
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import yaml_dump
from transformers.utils import logging

from ..backbones import fingerprint
from ..checkpoints import parts_to_save
from ..connectors import CONNECTORS
from ..parts import PARTS, VISION_PARTS
from .edits import (
    add_essentials,
    is_automatic,
    key_digest,
    make_marker,
    merge,
    merge_automatic,
    read_marker,
    section,
    split_card,
)
from .results import (
    base_name,
    dataset_facts,
    eval_results,
    evaluation_text,
    hub_id,
    over_seeds,
    training_text,
)
from .usage import card_usage, connector_rows, media_inputs, media_written, use_block


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).parents[1] / "model_card.md"
if not TEMPLATE.is_file():  # in a checkout it lies at the top
    TEMPLATE = Path(__file__).parents[2] / "model_card.md"
TAGS = ("frozen-prefix", "visual-prefix")

_PARENT_TITLES = {part: PARTS[part].description for part in (*VISION_PARTS, "audio", "text")}
# From the freest to the strictest; a work under two of them can be shared under the later one.
_PERMISSIVE = (
    "cc0-1.0", "unlicense", "wtfpl", "zlib", "mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "ncsa", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "apache-2.0",
)  # fmt: skip

# --- Facts: the parents and their licences ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parent:
    part: str
    title: str
    name: str
    repo_id: str | None
    link: str
    commit: str
    parameters: str
    dtype: str
    licence: str
    licence_text: str
    licence_keys: dict[str, Any]


def _card_metadata(file: str | Path) -> dict[str, Any]:
    metadata, _ = split_card(Path(file).read_text(encoding="utf-8-sig"))
    return metadata or {}


_licences_asked: dict[tuple[str, str | None], dict[str, Any]] = {}


def _licence_metadata(name: str, repo_id: str | None, revision: str | None) -> dict[str, Any]:
    """The licence keys of a parent's card, as they stand on the Hub, else in the cache or the folder; never raises."""
    if (name, revision) in _licences_asked:
        return _licences_asked[name, revision]
    keys: Mapping[str, Any] = {}
    try:
        if repo_id is None:
            keys = _card_metadata(Path(name) / CARD_NAME)
        else:
            info = HfApi().model_info(repo_id, revision=revision, timeout=5)
            tags = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
            keys = {"license": tags[0]} if tags else {}
            keys |= info.card_data.to_dict() if info.card_data is not None else {}
            _licences_asked[name, revision] = {key: keys[key] for key in keys if key.startswith("license")}
    except Exception as error:  # no network, no such repository, no card, or one that can't be read
        logger.debug(f"No licence of `{name}` from its home: {error}")
        try:
            cached = try_to_load_from_cache(repo_id, CARD_NAME, revision=revision) if repo_id else None
            keys = _card_metadata(cached) if isinstance(cached, str) else {}
        except Exception as error:
            logger.debug(f"No licence of `{name}` from the cache: {error}")
    return {key: keys[key] for key in ("license", "license_name", "license_link") if keys.get(key)}


def _describe_parent(part: str, model: Any) -> _Parent | None:
    module = model.backbones.get(part)
    if module is None:
        return None
    record = getattr(model.config, f"{part}_base_model") or {}
    path = record.get("name_or_path")
    revision = record.get("revision")
    repo_id = hub_id(path) if path else None
    name = repo_id or (base_name(path) if path else f"{module.config.model_type} without a repository")
    keys = _licence_metadata(path, repo_id, revision) if path else {}
    licence = keys.get("license", "unknown")
    licence = ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)
    shown = str(keys.get("license_name") or licence)
    link = keys.get("license_link")
    if link and repo_id and "://" not in str(link):  # beside the parent's weights, not beside ours
        link = f"https://huggingface.co/{repo_id}/blob/main/{link}"
    if link and "://" in str(link):
        keys["license_link"] = str(link)
        shown = f"[{shown}]({link})"
    else:
        keys.pop("license_link", None)
    commit = "–"
    if repo_id and revision:
        commit = f"[`{revision[:7]}`](https://huggingface.co/{repo_id}/tree/{revision})"
    return _Parent(
        part=part,
        title=_PARENT_TITLES[part],
        name=name,
        repo_id=repo_id,
        link=f"[{repo_id}](https://huggingface.co/{repo_id})" if repo_id else f"{name} (local)" if path else name,
        commit=commit,
        parameters=f"{module.num_parameters():,}",
        dtype=str(record.get("dtype") or module.dtype).removeprefix("torch."),
        licence=licence,
        licence_text=shown,
        licence_keys=keys,
    )


def _own_licence(parents: Sequence[_Parent]) -> tuple[dict[str, Any], str]:
    """The licence that suits both parents, and a sentence that says how it was chosen."""
    names = [parent.licence for parent in parents]
    if "unknown" in names or not names:
        missing = " and ".join(parent.title for parent in parents if parent.licence == "unknown")
        note = f"No licence is known of the {missing}: check there before you share or use this one."
        return {"license": "unknown"}, note
    strict = [parent for parent in parents if parent.licence not in _PERMISSIVE]
    if not strict:
        chosen = max(names, key=_PERMISSIVE.index)
        return {"license": chosen}, f"This repository is under `{chosen}`, the stricter of its parents' licences."
    first = strict[0]
    if all(parent.licence_text == first.licence_text for parent in strict) and "," not in first.licence:
        note = f"This repository is under {first.licence_text}, the stricter of its parents' licences."
        return {"license": first.licence, **first.licence_keys}, note
    note = "Its parents' licences differ, and each binds what was learnt with them: keep to both."
    return {"license": "other", "license_name": "both-parents"}, note


# --- The text --------------------------------------------------------------------------------------------------------


def _connector_source(connector_type: str) -> str:
    """What the connector's own docstring says first, its papers as links (by which the Hub finds them)."""
    documented = (CONNECTORS[connector_type].__doc__ or "").split("Args:")[0]
    text = " ".join(documented.split()) or connector_type
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _bytes_text(folder: Path, model: Any) -> str:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    about = ""
    if not size:  # not saved yet: what the tensors weigh
        left_out = model._keys_to_ignore_on_save
        size = sum(t.numel() * t.element_size() for key, t in model.state_dict().items() if key not in left_out)
        about = "about "
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    human = next((f" ({size / factor:.1f} {unit})" for factor, unit in units if size >= factor), "")
    return f"{about}{size:,} bytes{human}"


def _title(folder: Path, repo_id: str | None) -> str:
    return base_name(repo_id) if repo_id else folder.resolve().name


def _versions() -> str:
    own = importlib.import_module(__package__.partition(".")[0]).__version__
    modules = ("transformers", "torch", "tokenizers", "huggingface_hub", "datasets", "peft")
    lines = [f"- frozen-prefix {own}", f"- Python {platform.python_version()}"]
    return "\n".join(lines + [f"- {name} {sys.modules[name].__version__}" for name in modules if name in sys.modules])


def frozen_prefix_model(model: Any) -> Any:
    """The model itself, out of what PEFT or parallel training wrap around it. Raises TypeError for another kind."""
    inner = model
    # By name: the class may have come with a repository's own code. PEFT's wrappers answer for any attribute.
    while not any(klass.__name__ == "FrozenPrefixPreTrainedModel" for klass in type(inner).__mro__):
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else getattr(inner, "module", None)
        if inner is None:
            raise TypeError(
                f"A card is written for a frozen-prefix model, not for a {type(model).__name__}. [errors.md#cards]"
            )
    return inner


def _generate(
    folder: Path,
    model: Any,
    *,
    repo_id: str | None,
    training: Any,
    metrics: Mapping[str, Any] | None,
    dataset: Any,
    kept: Mapping[str, str],
    chosen: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """Metadata and text of a fresh card. `kept` are sections of an older one, for what the caller does not know;
    `chosen` are metadata that are a person's choice."""
    inner = frozen_prefix_model(model)
    config = inner.config
    parents = [parent for part in _PARENT_TITLES if (parent := _describe_parent(part, inner)) is not None]
    licence, licence_note = _own_licence(parents)
    if chosen.get("license"):
        licence = {key: value for key, value in chosen.items() if key.startswith("license")}
        licence_note = f"This repository is under `{chosen.get('license_name') or chosen['license']}`."
    usage = card_usage(inner)

    title = _title(folder, repo_id)
    trained_on = dataset_facts(dataset)
    measured = dataset_facts((metrics or {}).get("dataset")) or trained_on
    results = eval_results(metrics, measured, usage.task_type, usage.task_name, usage.medium)
    ids = list(dict.fromkeys(facts["id"] for facts in (trained_on, measured) if facts.get("id")))
    data = ModelCardData(
        **licence,
        language=chosen.get("language"),
        library_name="transformers",  # what loads it: the Hub's own snippets are of it
        pipeline_tag=usage.pipeline_tag,
        base_model=[parent.repo_id for parent in parents if parent.repo_id] or None,
        base_model_relation=None,
        datasets=chosen.get("datasets") or ids or None,
        metrics=list(dict.fromkeys(r.metric_type for r in results)) or None,
        tags=[*TAGS, *(tag for tag in chosen.get("tags") or [] if tag not in TAGS)],
        model_name=title if results else None,
        eval_results=results or None,
    )
    unlocked = getattr(config, "unlocked_layers", None) or {}
    trained = [part for part in ("connector", *_PARENT_TITLES) if part in config.trainable or unlocked.get(part)]
    own = "connector and head" if usage.head else "connector"
    titles = {
        part: f"{title} (last {unlocked[part]} layers)" if unlocked.get(part) else title
        for part, title in _PARENT_TITLES.items()
    }
    trained_parts = [own if part == "connector" else titles[part] for part in trained]
    if data.base_model:
        data["base_model_relation"] = "adapter" if set(trained) <= {"connector"} else "finetune"
    idle = {id(p) for name, p in inner.named_parameters() if ".idle_connectors." in f".{name}"}  # not saved
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in idle)
    total = inner.num_parameters() - sum(p.numel() for p in inner.parameters() if id(p) in idle)
    saved = set(parts_to_save(inner)) | set(trained)
    fetched = [p for p in parents if p.part not in saved and getattr(config, f"{p.part}_base_model") is not None]
    gated = config.fusion == "cross_attention"
    gates = ", ".join(f"`{key}={value!r}`" for key, value in (config.cross_attention_config or {}).items())
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        source=repo_id or "path/to/this/folder",
        model_class=type(inner).__name__,
        usage=usage,
        inputs=media_inputs(config).capitalize(),
        use=lambda first, last: use_block(inner, usage, repo_id or "path/to/this/folder", first, last),
        written=" and each ".join(f"{medium} is written as {prefix}" for medium, prefix in media_written(config)),
        frozen=set(trained) <= {"connector"},
        fetched=[parent.title for parent in fetched],
        parents=parents,
        local_parents=[parent for parent in fetched if parent.repo_id is None],
        licence_note=licence_note,
        connectors=connector_rows(config, _connector_source),
        gated=gated,
        gate_options=gates or "defaults",
        trained_parts=trained_parts,
        trainable_parameters=f"{trainable:,}",
        all_parameters=f"{total:,}",
        checkpoint_bytes=_bytes_text(folder, inner),
        evaluation=kept.get("Evaluation") or evaluation_text(metrics, measured, usage.medium),
        training=kept.get("Training") or training_text(training, trained_on),
        versions=_versions(),
    )
    metadata, body = split_card(card.content)
    return metadata or {}, body


# --- Writing ---------------------------------------------------------------------------------------------------------


def _write(path: Path, content: str) -> None:
    if path.exists() and path.read_bytes() == content.encode():
        return
    # All at once: an upload may be reading the folder. Trainer never pushes names with a leading underscore.
    draft = path.with_name(f"_{path.name}")
    draft.write_text(content, encoding="utf-8", newline="")
    os.replace(draft, path)


def keep_own_card(folder: str | os.PathLike, own: bytes) -> None:
    """Puts back the card that lay in a folder before it was pushed, unless the one in its place was written or edited by a
    person, on the Hub."""
    path = Path(folder) / CARD_NAME
    try:
        _, body = split_card(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError):
        return
    if read_marker(body) is not None or is_automatic(body):
        path.write_bytes(own)


def write_model_card(
    folder: str | os.PathLike,
    model: Any,
    *,
    repo_id: str | None = None,
    training: Any = None,
    metrics: Mapping[str, Any] | None = None,
    dataset: Any = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """
    Writes `README.md` into the folder of a saved model: its parts, how to use it, its training and its scores.

    A card that this package or transformers or PEFT generated is replaced. Of one that a person edited, the text and every
    metadata key stay; only missing keys by which the Hub files a repository are added.

    Args:
        folder: where the checkpoint lies; the card that is there, if any, is the older one.
        model: a frozen-prefix model, also inside PEFT's or parallel training's wrappers.
        repo_id: id on the Hub, for the title and the block on how to use it.
        training: a `Trainer` (hyperparameters, data, losses), `TrainingArguments`, or a dict of hyperparameters.
        metrics: scores, `{"sighted": {"cider": 0.61}, "blind": {"cider": 0.12}, "random_connector": {…}}`, as the
            examples write them. A score is a number, a list of them (one per seed) or `{"mean": …, "std": …}`.
            Further keys: `"dataset"`, as below; other conditions; notes (plain values); or `"seeds"`, a list of such
            dicts.
        dataset: what it was trained (and, unless `metrics` says otherwise, measured) on: an id on the Hub, a name, or
            a dict of `id`, `name`, `config`, `split`, `revision`, `rows`, `description`.
        metadata: `license`, `language`, `tags`, `datasets` of your own choice.

    Without `training` and `metrics`, those sections of an unedited older card are kept if it was written for the
    same weights.

    Returns:
        `Path`: the card.

    Raises:
        TypeError: if `model` is not a frozen-prefix model.
    """
    folder = Path(folder)
    path = folder / CARD_NAME
    metrics = None if metrics is None else over_seeds(metrics)
    chosen = {key: value for key, value in (metadata or {}).items() if value}
    weights = fingerprint(str(folder)) if any(folder.glob("*.safetensors")) else None
    try:
        content = path.read_bytes().decode("utf-8-sig") if path.exists() else ""
        old, body = split_card(content)
    except ValueError as error:
        logger.warning(f"The model card in `{folder}` can't be read ({error}), so it is left as it is.")
        return path
    old = old or {}
    record, automatic = read_marker(body), bool(body.strip()) and is_automatic(body)
    digests = record["metadata"] if record else {}

    kept, kept_keys = {}, []
    same_weights = record is not None and weights is not None and record.get("weights") == weights
    if training is None and dataset is None:
        if same_weights:
            kept["Training"], kept_keys = section(body, "Training"), ["datasets"]
        elif automatic:  # Trainer's tables are worth more than nothing
            titles = ("Training hyperparameters", "Training results")
            tables = [(title, text) for title in titles if (text := section(body, title, level=3))]
            kept["Training"] = "\n\n".join(f"### {title}\n\n{text}" for title, text in tables)
    if metrics is None and same_weights:
        kept["Evaluation"], kept_keys = section(body, "Evaluation"), [*kept_keys, "metrics", "model-index"]
    if "license" not in chosen and old.get("license") and digests.get("license") != key_digest(old["license"]):
        chosen |= {key: old[key] for key in ("license", "license_name", "license_link") if key in old}  # a person did

    new, text = _generate(
        folder, model, repo_id=repo_id, training=training, metrics=metrics, dataset=dataset,
        kept={key: value for key, value in kept.items() if value}, chosen=chosen,
    )  # fmt: skip
    new |= {key: old[key] for key in kept_keys if key in old and digests.get(key) == key_digest(old[key])}
    if "model-index" in kept_keys and "model-index" in new:
        new["model-index"] = [{**entry, "name": _title(folder, repo_id)} for entry in new["model-index"]]
    if body.strip() and record is None and not automatic:
        _write(path, add_essentials(content, old, new))
        return path

    merged = merge_automatic(old, new) if automatic else merge(old, digests, new, set(chosen))
    merged = dict(sorted(merged.items(), key=lambda item: (item[0] == "model-index", item[0])))  # as transformers does
    text = text.strip()
    # What the caller chose counts as a person's choice from now on: it has no digest.
    digests = {key: key_digest(value) for key, value in new.items() if key not in chosen}
    marker = make_marker(text, digests, weights)
    _write(path, f"---\n{yaml_dump(merged, sort_keys=False).strip()}\n---\n\n{text}\n\n{marker}\n")
    return path


__all__ = ["frozen_prefix_model", "write_model_card"]
