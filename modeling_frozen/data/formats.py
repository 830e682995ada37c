"""Image-text data in the formats that people have it in, as rows that collator, `evaluate`, feature store and TRL read alike:
[`load_image_text`]; and honest splits.

`rows.py` reads a row of each format; here are the files, folders and datasets that hold them. Rows are kept in Arrow, their
images unopened. Whatever `datasets` reads is read by it, except JSON, whose types it has no room for (a path or, in the next
row, a list of them), and tars, whose samples it wants to have the same files each.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from . import columns
from .image_reading import Hashing, Images, inner_feature, unopened
from .rows import KEPT, MEDIA, ROW_FORMATS, HeldImage, RowError, count_unplaced, encoded, kind_of, name_of_row
from .sources import HeldRows, Lines, ListedRows, Parquet, Source, StreamedRows, Tars, tar_rows, with_json


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .streaming import RowStream

logger = logging.get_logger(__name__)

# What a file or folder is known by; their rows then are of a format in `rows.ROW_FORMATS`.
FILE_FORMATS = ("coco", "karpathy", "vqav2", "imagefolder", "webdataset")
FORMATS = (*ROW_FORMATS, *FILE_FORMATS)
_JSON = (".json", ".jsonl", ".ndjson")
_TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_TARS = (".tar", ".tgz", ".tar.gz")
_SPLIT = re.compile(r"(?:^|[-._])(train|validation|valid|val|dev|test)(?:[-._]|$)")  # in a file's name
_CHUNK = 1000  # rows that become Arrow at a time


# ------------------------------------------------------------------------------------------------------------- sources
class SplitError(ValueError):
    """A split that must be named, or is not there; `splits` are those that are."""

    def __init__(self, message: str, splits: Sequence[str] = ()):
        super().__init__(message)
        self.splits = list(splits)


def open_source(
    source: Any,
    format: str = "auto",
    image_root: str | Path | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> Source:
    """
    Finds out what a source is.

    Args:
        source, format, image_root, split, streaming: as [`load_image_text`] takes them.

    Raises:
        ValueError: a format that is unknown, or can't be found; a split that isn't there, or must be named.
        FileNotFoundError: a file that isn't there.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown: choose 'auto' or one of {list(FORMATS)}. [errors.md#source]")
    root = None if image_root is None else Path(image_root)
    if hasattr(source, "column_names"):
        return _of_dataset(source, f"the {type(source).__name__}", format, root or Path(), split, streaming)
    if isinstance(source, Sequence) and not isinstance(source, str) and source and isinstance(source[0], Mapping):
        return Source("the list", ListedRows(source), root or Path(), format)
    several = [source] if isinstance(source, str | Path) else list(source)
    if not several or not all(isinstance(one, str | Path) for one in several):
        raise ValueError(
            f"A source is a file, a folder, a Hub id, a dataset or rows, or several files; got {source!r:.80}."
            " [errors.md#source]"
        )
    paths = [Path(one) for name in several for one in _expand(str(name))]
    name = str(source) if len(several) == 1 else ", ".join(map(str, several))
    if not all(path.exists() for path in paths):
        missing = next(path for path in paths if not path.exists())
        is_file = len(several) > 1 or missing.suffix.lower() in (*_JSON, *_TABLES, *_TARS) or len(missing.parts) != 2
        if is_file or missing.is_absolute() or has_magic(str(missing)):
            raise FileNotFoundError(f"{missing} is not there. A Hub id is owner/name. [errors.md#source]")
        return _of_hub(str(source), (str(source),), {"streaming": streaming}, format, root or Path(), split)
    if len(paths) == 1 and paths[0].is_dir():
        return _of_folder(paths[0], format, root, split, streaming)
    suffixes = {
        next((one for one in (*_JSON, *_TABLES, *_TARS) if path.name.lower().endswith(one)), path.suffix) for path in paths
    }
    root = root or paths[0].parent
    if suffixes <= set(_JSON):
        return _of_json(paths, name, format, root, split)
    if suffixes <= set(_TARS):
        row_format = "" if format in ("auto", "webdataset") else format
        return Source(name, Tars(paths), root, "webdataset", row_format)
    if streaming and suffixes == {".parquet"} and split in (None, "train"):  # as `datasets` calls what has no splits
        return Source(name, Parquet(paths), root, format, "" if format in ("auto", *FILE_FORMATS) else format)
    if len(suffixes) == 1 and (builder := _TABLES.get(next(iter(suffixes)))):
        options: dict[str, Any] = {"delimiter": "\t"} if suffixes == {".tsv"} else {}
        options |= {"data_files": list(map(str, paths)), "streaming": streaming}
        return _of_hub(name, (builder,), options, format, root, split)
    raise ValueError(
        f"{name}: files of {sorted(suffixes)} can't be read together: {sorted({*_JSON, *_TABLES, *_TARS})} are read."
        " [errors.md#source]"
    )


def _expand(name: str) -> list[str]:
    if not has_magic(name) or Path(name).exists():
        return [name]
    paths = sorted(glob(name, recursive=True))
    if not paths:
        raise FileNotFoundError(f"No file matches {name!r}. [errors.md#source]")
    return paths


def _of_hub(
    name: str, arguments: tuple[str, ...], options: dict[str, Any], format: str, root: Path, split: str | None
) -> Source:
    from datasets import load_dataset

    loaded = load_dataset(*arguments, **options)
    return _of_dataset(loaded, name, format, root, split, options["streaming"])


def _of_folder(folder: Path, format: str, root: Path | None, split: str | None, streaming: bool) -> Source:
    from datasets import load_dataset, load_from_disk

    if any(folder.glob("rows/part-*-of-*")):
        from .stored_rows import open_stored_rows

        if not streaming:
            raise ValueError(
                f"{folder} holds rows that `store_rows` wrote, which are read as a stream: give streaming=True."
                " [errors.md#source]"
            )
        return open_stored_rows(folder)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _of_dataset(load_from_disk(str(folder)), str(folder), format, root or folder, split, streaming)
    metadata = [path for suffix in ("csv", "jsonl", "parquet") for path in folder.rglob(f"metadata.{suffix}")]
    if metadata or format == "imagefolder":
        if not metadata:
            near = sorted(path.name for path in folder.glob("metadata*"))
            raise ValueError(
                f"{folder} has no metadata.csv, metadata.jsonl or metadata.parquet, exactly so called (near: {near})."
                " [errors.md#source]"
            )
        loaded = load_dataset("imagefolder", data_dir=str(folder), drop_labels=True)
        return _of_dataset(loaded, str(folder), "imagefolder", root or folder, split, streaming)
    for suffixes in (_TARS, tuple(_TABLES), _JSON):
        # Where repositories of the Hub have their rows; a table beside that folder is about them (licences, credits).
        places = (place for place in (folder / "data", folder) if place.is_dir())
        found = (sorted(str(one) for one in place.iterdir() if _ends(one, suffixes)) for place in places)
        files = next(filter(None, found), [])
        if suffixes == _JSON:
            files = [one for one in files if Path(one).name != "dataset_info.json"]  # LLaMA-Factory's list of files
        if files and (splits := _by_split(files)):
            files, split = splits[_the_split(list(splits), split, str(folder))], None
        if suffixes == _JSON and len(files) > 1:
            raise ValueError(f"{folder} has several JSON files: name those to be read, {files[:8]}. [errors.md#source]")
        if files:
            return open_source(files, format, root or folder, split, streaming)
    if any(folder.rglob("*.parquet")):  # as repositories of the Hub are laid out, whose splits `datasets` knows
        return _of_hub(str(folder), (str(folder),), {"streaming": streaming}, format, root or folder, split)
    raise ValueError(
        f"{folder} holds no metadata.csv or .jsonl beside its images, and no tars, parquet or JSON files. [errors.md#source]"
    )


def _ends(path: Path, suffixes: Sequence[str]) -> bool:
    return path.name.lower().endswith(tuple(suffixes))


def _by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by the split that their names say; none where one of them says none."""
    splits: dict[str, list[str]] = {}
    for file in files:
        said = _SPLIT.search(Path(file).name.lower())
        if said is None:
            return {}
        name = "validation" if said[1] in ("val", "valid", "dev") else said[1]
        splits.setdefault(name, []).append(file)
    return splits


def _of_dataset(
    loaded: Any, name: str, format: str, root: Path, split: str | None, streaming: bool, row_format: str = ""
) -> Source:
    """Of a `Dataset`, or one of several splits."""
    if isinstance(loaded, Mapping):
        loaded = loaded[_the_split(list(loaded), split, name)]
    column = columns.find_column(loaded.column_names or [])
    row_format = row_format or ("" if format in ("auto", *FILE_FORMATS) else format)
    features, has_length = loaded.features, hasattr(loaded, "__len__")
    if has_length and not streaming and column is not None:
        if _is_images(features[column]):
            return Source(name, HeldRows(loaded, column), root, format, row_format)
        if (image := _image_of_bytes(features[column])) and _all_bytes(loaded, column):
            return Source(name, HeldRows(loaded.cast_column(column, image), column), root, format, row_format)
    unread = None if features is None else type(features)(unopened(features))
    loaded = loaded if features == unread else loaded.cast(unread)
    return Source(name, ListedRows(loaded) if has_length else StreamedRows(loaded), root, format, row_format)


def _is_images(feature: Any) -> bool:
    from datasets import Image

    return isinstance(inner_feature(feature), Image)


def _image_of_bytes(feature: Any) -> Any:
    """What a column of encoded images is called by files without the metadata of `datasets` (a struct of bytes and path, or
    bytes alone; one or a list), as a feature of images; `None` for other columns. Named so, they need not be copied."""
    from datasets import Image, Value

    paths = (Value("string"), Value("null"))  # "null" where no image has one

    def is_encoded(one: Any) -> bool:
        if not isinstance(one, Mapping):
            return one == Value("binary")
        return set(one) == {"bytes", "path"} and one["bytes"] == Value("binary") and one["path"] in paths

    if is_encoded(feature):
        return Image()
    return [Image()] if is_encoded(feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)) else None


def _all_bytes(dataset: Any, column: str) -> bool:
    """Whether no image of a column is named by its path alone, which is looked for below the source's folder."""
    import pyarrow as pa
    import pyarrow.compute as pc

    dataset = dataset.select_columns([column]).with_format("arrow")
    for start in range(0, len(dataset), _CHUNK):
        values = dataset[start : start + _CHUNK].column(column)
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = pc.list_flatten(values)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values.filter(pc.is_valid(values)), "bytes")
        if values.null_count:
            return False
    return True


def _the_split(names: Sequence[str], split: str | None, name: str) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        asked = "name one by `split=`" if split is None else f"{split!r} is none of them"
        raise SplitError(f"{name} has the splits {list(names)}: {asked}. [errors.md#source]", names)
    return split


# --------------------------------------------------------------------------------------------------------- JSON, tars
def _of_json(paths: list[Path], name: str, format: str, root: Path, split: str | None) -> Source:
    if all(path.suffix.lower() != ".json" for path in paths):
        if split is not None:
            raise SplitError(f"{name} has no splits, so split={split!r} can't be had of it. [errors.md#source]")
        return Source(name, Lines(paths), root, format)
    contents = [list(Lines([path]).all()) if path.suffix.lower() != ".json" else _parse(path) for path in paths]
    if all(isinstance(content, list) for content in contents):
        rows = [row for content in contents for row in content]
        first = rows[0] if rows else None
        if isinstance(first, Mapping) and "image_id" in first and "caption" in first and columns.find_column(first) is None:
            return Source(name, ListedRows(list(_clipcap_rows(rows, root))), root, "coco", "captions")
        detected, made = format, rows
    else:
        whole: dict[str, Any] = {}
        for path, content in zip(paths, contents, strict=True):
            if not isinstance(content, Mapping):
                raise ValueError(
                    f"{path} holds a {type(content).__name__}, and the files beside it objects: is it another kind of file?"
                    " [errors.md#row]"
                )
            whole |= content
        detected, made = _annotated(whole, name, format, root, split)
        split = None
    if split is not None:
        raise SplitError(f"{name} has no splits, so split={split!r} can't be had of it. [errors.md#source]")
    row_format = {"coco": "captions", "karpathy": "captions", "vqav2": "question_answer"}.get(detected, "")
    return Source(name, ListedRows(made), root, detected, row_format)


def _annotated(content: Mapping[str, Any], name: str, format: str, root: Path, split: str | None) -> tuple[str, list[Any]]:
    """Rows of the files that are one JSON object, and their format."""
    images = content.get("images")
    if format in ("auto", "vqav2") and "questions" in content:
        return "vqav2", _vqa_rows(content, name, root)
    if format in ("auto", "karpathy") and images and isinstance(images[0], Mapping) and "sentences" in images[0]:
        return "karpathy", _karpathy_rows(images, name, root, split)
    if format in ("auto", "coco") and "images" in content and "annotations" in content:
        return "coco", _coco_rows(content, name)
    lists = [value for value in content.values() if isinstance(value, list)]
    if format in ("auto", *ROW_FORMATS) and len(lists) == 1 and len(content) == 1:
        return format, lists[0]
    raise ValueError(
        f"{name} is an object with {sorted(content)[:8]}, not of a known format: is it another kind of file?"
        " [errors.md#source]"
    )


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # an object on each line, whatever the file is called
            return list(Lines([path]).all())
        raise ValueError(f"{path} is not JSON: {error}. [errors.md#source]") from error


def _needed(content: Any, names: tuple[str, ...], path: Any) -> None:
    if missing := [name for name in names if name not in content]:
        raise ValueError(
            f"{path} lacks {missing} (it has {sorted(content)[:8]}): is it another kind of file? [errors.md#source]"
        )


def _coco_rows(content: Mapping[str, Any], name: Any) -> list[dict[str, Any]]:
    """A row for each image that has captions."""
    _needed(content, ("images", "annotations"), name)
    files = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[Any, list[str]] = {}
    for entry in content["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    if unknown := [index for index in captions if index not in files]:
        raise ValueError(f"{name} has captions of images that it does not list: {unknown[:5]}. [errors.md#source]")
    return [{"image": files[index], "captions": captions[index], "image_id": index} for index in files if index in captions]


def _karpathy_rows(images: list[Mapping[str, Any]], name: str, root: Path, split: str | None) -> list[dict[str, Any]]:
    """Rows of a split; COCO's `restval` is a part of train, as everybody has it who compares with others (1612.00563)."""
    of = {"restval": "train"}
    names = list(dict.fromkeys(of.get(one["split"], one["split"]) for one in images))
    split = _the_split(names, split, name)
    rows = []
    for one in images:
        if of.get(one["split"], one["split"]) == split:
            file = _first_there(root, f"{one.get('filepath', '')}/{one['filename']}".lstrip("/"), one["filename"])
            own = one.get("cocoid", one.get("imgid"))
            rows.append({"image": file, "sentences": one["sentences"], "image_id": own})
    return rows


def _vqa_rows(content: Mapping[str, Any], name: Any, root: Path, file_name: str | None = None) -> list[dict[str, Any]]:
    """A row for each question, joined on `question_id`: the two files need not be in one order."""
    _needed(content, ("questions",), name)
    answered = {one["question_id"]: one for one in content.get("annotations", ())}
    missing = [one["question_id"] for one in content["questions"] if one["question_id"] not in answered]
    if answered and missing or "annotations" in content and missing:
        raise ValueError(f"{name} has no answers to {len(missing)} questions, the first {missing[:5]}. [errors.md#source]")
    rows = []
    for one in content["questions"]:
        image = (
            _coco_file(root, one["image_id"], content.get("data_subtype")) if file_name is None else file_name.format(**one)
        )
        row = {"image": image, "question": one["question"]}
        if answered:
            entry = answered[one["question_id"]]
            row |= {"multiple_choice_answer": entry.get("multiple_choice_answer"), "answers": entry.get("answers")}
        rows.append({**row, "question_id": one["question_id"], "image_id": one["image_id"]})
    return rows


def _clipcap_rows(rows: list[Any], root: Path) -> Iterator[Any]:
    """Of a flat list with COCO's ids, which says no files."""
    for row in rows:
        yield {**row, "image": _coco_file(root, row["image_id"])} if isinstance(row, Mapping) and "image_id" in row else row


def _coco_file(root: Path, index: Any, subset: str | None = None) -> str:
    """COCO's name for an image: with its subset in 2014, without in 2017."""
    if not str(index).isdigit():
        return str(index)
    subsets = [subset] if subset else ["train2014", "val2014"]
    names = [f"COCO_{one}_{int(index):012d}" for one in subsets] + [f"{int(index):012d}", str(index)]
    return _first_there(root, *(f"{folder}{one}.jpg" for one in names for folder in ("", *(f"{own}/" for own in subsets))))


def _first_there(root: Path, *names: str) -> str:
    return next((name for name in names if (root / name).is_file()), names[0])


def _on_disk(source: Source, paths: list[Path]) -> Source:
    """Samples of tars, in the cache of `datasets`: their images are too many for memory."""
    from datasets import Dataset, Features, Image, Value

    text = Value("string")
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]  # told apart by, in the cache
    features = Features({"__key__": text, "images": [Image(decode=False)], "text": text, "json": text})
    written = Dataset.from_generator(_stamped_rows, features=features, gen_kwargs={"stamps": stamps})
    return Source(source.name, HeldRows(written, "images", with_json), source.root, source.format, source.row_format)


def _stamped_rows(stamps: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    for path, _, _ in stamps:
        for row in tar_rows(Path(path)):
            yield {"images": [], "text": None, "json": None, **row}


# ------------------------------------------------------------------------------------------------------------- loading
def load_image_text(
    source: Any,
    *,
    format: str = "auto",
    image_root: str | Path | None = None,
    split: str | None = None,
    on_error: str = "raise",
    streaming: bool = False,
    buffer_size: int = 1000,
    seed: int = 0,
) -> "Dataset | RowStream":
    """
    Image-text data of any of the field's formats, in one canonical form ([`rows`]); images stay unopened.

    Args:
        source: a file (JSON, JSON lines, parquet, csv, tar), several files (VQA v2's questions and annotations, parts of one
            set), a glob of tars, a folder (`imagefolder` with metadata, `save_to_disk`, tars, parquet), what `store_rows`
            wrote (with `streaming=True`), a Hub id, a dataset of `datasets`, or a list of rows.
        format (`str`): of `FORMATS`; "auto" finds it by the fields of the first row. It is logged, and stands in
            `info.description`.
        image_root (`str` or `Path`, *optional*): the folder of relative paths. Defaults to the file's own folder.
        split (`str`, *optional*): of a source with several.
        on_error (`str`): "raise" at the first row that can't be read, with its number and field; "skip" leaves such rows out,
            and says how many and which were the first. In a stream a row whose image can't be opened is one of them, and
            [`StreamCallback`] says it.
        streaming (`bool`): a stream, whose rows are read, and their images opened, as they are asked for. Each process and
            each worker of a data loader reads its own files, or, where there are fewer files than readers, its own rows of
            one; each row comes once in an epoch. Files are JSON lines, parquet, tars, or those of a Hub id; of what is read
            whole (JSON, a dataset with a length, a list) rows are dealt out alike.
        buffer_size (`int`): of a stream, rows that are held undecoded and shuffled among themselves, in each worker, anew in
            each epoch, as are the files; 0 leaves rows and files in their order.
        seed (`int`): of that shuffle.

    Returns:
        `Dataset` with `images` (and `videos`, `audios`, where the source has such) and `messages`, `prompt` and `completion`,
        or `text`. A dataset's own column of images stays as it is, `image` or `images`. With `streaming` a [`RowStream`], an
        `IterableDataset` of such rows, images opened.

    Raises:
        ValueError: an unknown format; a row that can't be read: another type, an image that is not there, more or fewer
            `<image>` than images; a source without any image; a negative `buffer_size`.
        FileNotFoundError: a source that is not there.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} must be 'raise' or 'skip'. [errors.md#source]")
    opened = open_source(source, format, image_root, split, streaming)
    logger.info(f"{opened.name}: read as {opened.described}.")
    if streaming:
        from .streaming import RowStream

        return RowStream(opened, buffer_size, seed, on_error)
    if isinstance(opened.shards, Tars):
        opened = _on_disk(opened, opened.shards.paths)
    table = _Table()
    kept: list[int] = []
    skipped: list[str] = []
    unplaced = media = 0
    for index, read, row in opened.read():
        if isinstance(read, RowError):
            message = f"{name_of_row(opened.name, index, row)}: {read}"
            if on_error == "raise":
                raise ValueError(f"{message}. [errors.md#row]") from read
            skipped.append(message)
            continue
        for one in read:
            table.add(one, name_of_row(opened.name, index, row))
            kept.append(index)
            media += sum(len(one[name]) for name in MEDIA.values() if name in one)
        unplaced += count_unplaced(read)
    if skipped:
        first = "".join(f"\n  {message}" for message in skipped[:5])
        logger.warning(f"{opened.name}: {len(skipped)} rows were left out, the first of them:{first}")
    if not kept:
        raise ValueError(
            f"{opened.name} has no rows{' that can be read: ' + skipped[0] if skipped else ''}. [errors.md#source]"
        )
    if not media:
        raise ValueError(
            f"No row of {opened.name} has an image: they are looked for in the columns {list(columns.COLUMNS['image'])} "
            f"(videos and audio in {[name for one in ('video', 'audio') for name in columns.COLUMNS[one]]}), and in the turns."
            " [errors.md#source]"
        )
    if unplaced:
        logger.warning(
            f"{opened.name}: {unplaced} rows have an image and no <image> that says where it stands; the processor puts it in "
            "the first user turn."
        )
    return table.dataset(opened, kept)


class _Table:
    """Canonical rows on their way to Arrow, a chunk at a time."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.tables: list[Any] = []
        self.facts: dict[str, list[Any]] = {name: [] for name in KEPT}
        self.schema: Any = None
        self.kind = ""
        self.has_loss = self.has_answers = False
        # Of videos and audio, whether any came.
        self.others: dict[str, bool] = dict.fromkeys((name for name in MEDIA.values() if name != "images"), False)

    def add(self, row: dict[str, Any], row_name: str) -> None:
        self.kind = self.kind or kind_of(row)
        for name, values in self.facts.items():
            values.append(row.get(name))
        self.has_loss |= any("loss" in turn for turn in row.get("messages", ()))
        self.has_answers |= "answers" in row
        row = {**row, "images": list(map(encoded, row["images"]))}
        for column in set(row).intersection(self.others):
            self.others[column] = True
            if any(not isinstance(one, Mapping) or "array" in one for one in row[column]):
                raise ValueError(
                    f"{row_name}: field {column!r} holds frames or a waveform, which would be copied: give files or bytes, a "
                    "stream (streaming=True), or the rows to the collator as they are. [errors.md#row]"
                )
        if self.kind != "messages":
            row = {**row, self.kind: columns.as_list(row[self.kind])}
        self.rows.append(row)
        if len(self.rows) == _CHUNK:
            self._flush()

    def _features(self) -> dict[str, Any]:
        from datasets import Image, Value

        text = Value("string")
        turn = {"role": text, "content": [{"type": text, "text": text}], "loss": Value("bool")}
        kinds = {
            "messages": {"messages": [turn]},
            "completion": {"prompt": text, "completion": [text], "answers": [text]},
            "text": {"text": [text]},
        }
        file = {"bytes": Value("binary"), "path": text}
        return {"images": [Image(decode=False)], **{name: [file] for name in self.others}, **kinds[self.kind]}

    def _flush(self) -> None:
        import pyarrow as pa
        from datasets import Features

        if self.rows:
            schema = Features(self._features()).arrow_schema
            held = [name for name in schema.names if name != "images" or not isinstance(self._first_image(), HeldImage)]
            self.tables.append(pa.Table.from_pylist(self.rows, schema=pa.schema([schema.field(name) for name in held])))
            self.rows = []

    def _first_image(self) -> Any:
        return next((image for row in self.rows for image in row["images"]), None)

    def dataset(self, source: Source, kept: list[int]) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc
        from datasets import Dataset, DatasetInfo, Features, Value, concatenate_datasets

        self._flush()
        features = self._features()
        held = source.held
        names = [name for name in features if not (held and name == "images")]
        table = pa.concat_tables([one.select(names) for one in self.tables])
        features = {name: features[name] for name in names}
        if self.kind != "messages" and pc.max(pc.list_value_length(table[self.kind])).as_py() == 1:  # one text each
            table = table.set_column(table.schema.get_field_index(self.kind), self.kind, pc.list_flatten(table[self.kind]))
            features[self.kind] = Value("string")
        unused = [name for name, used in self.others.items() if not used]
        for name in [*unused, *(["answers"] if "answers" in features and not self.has_answers else [])]:
            table, _ = table.drop_columns([name]), features.pop(name)
        for name, values in self.facts.items():
            if any(value is not None for value in values):
                whole = all(value is None or isinstance(value, int) for value in values)
                column = pa.array(values if whole else [None if value is None else str(value) for value in values])
                table, features[name] = table.append_column(name, column), Value("int64" if whole else "string")
        if self.kind == "messages" and not self.has_loss:
            turn = dict(inner_feature(features["messages"]))
            del turn["loss"]
            features["messages"] = [turn]
            table = table.set_column(table.schema.get_field_index("messages"), "messages", _without_loss(table["messages"]))
        info = DatasetInfo(description=f"{source.name}, read as {source.described}", features=Features(features))
        rows = Dataset(table.cast(Features(features).arrow_schema), info=info)
        if held is None:
            return rows
        images = held.dataset.select_columns([held.column]).with_format(None)
        if kept != list(range(len(images))):
            images = images.select(kept)
        joined = concatenate_datasets([images, rows], axis=1)
        info.features = Features(unopened(joined.features))
        return Dataset(joined.data, info=info)


def _without_loss(messages: Any) -> Any:
    """A column of turns, less that field."""
    import pyarrow as pa

    chunks = []
    for chunk in messages.chunks:
        turns = chunk.flatten()
        kept = pa.StructArray.from_arrays([turns.field(name) for name in ("role", "content")], names=["role", "content"])
        chunks.append(pa.ListArray.from_arrays(chunk.offsets, kept))
    return pa.chunked_array(chunks)


def load_coco_captions(annotations: str | Path, image_folder: str | Path) -> "Dataset":
    """
    Captions in COCO's JSON (Lin et al. 2014, arXiv 1405.0312; `captions_*.json`), with decoded images; [`load_image_text`]
    reads the same file.

    Args:
        annotations: the JSON file: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`.
        image_folder: where the images lie.

    Returns:
        `Dataset` with a row per image that has captions: `image`, `captions` (a list), `image_id`.

    Raises:
        ValueError: annotations of unknown images, or image files that aren't there.
    """
    return _with_images(_coco_rows(_parse(Path(annotations)), annotations), ("captions", "image_id"), image_folder)


def load_vqa(
    questions: str | Path, annotations: str | Path | None, image_folder: str | Path, file_name: str = "{image_id}.jpg"
) -> "Dataset":
    """
    Questions and answers in the JSON of VQA v2 (Goyal et al. 2017, arXiv 1612.00837), with decoded images; [`load_image_text`]
    reads the same files.

    Args:
        questions: JSON with `questions`: `question_id`, `image_id`, `question`.
        annotations: JSON with `annotations`: `question_id`, `answers` (`{"answer": …}` of ten people) and
            `multiple_choice_answer`; `None` for a split without answers.
        image_folder: where the images lie.
        file_name: how an image's file is called, for example `"COCO_val2014_{image_id:012d}.jpg"`.

    Returns:
        `Dataset` with a row per question: `image`, `prompt`, `answers` (a list of strings), `answer` (the one that most
        gave), `question_id`, `image_id`.

    Raises:
        ValueError: questions without answers, or image files that aren't there.
    """
    content = dict(_parse(Path(questions)))
    if annotations is not None:
        answers = _parse(Path(annotations))
        _needed(answers, ("annotations",), annotations)
        content["annotations"] = answers["annotations"]
    rows = _vqa_rows(content, questions if annotations is None else annotations, Path(image_folder), file_name)
    for row in rows:
        row["prompt"] = row.pop("question")
        if annotations is not None:
            row["answer"], row["answers"] = row.pop("multiple_choice_answer"), [one["answer"] for one in row["answers"]]
    answered = () if annotations is None else ("answers", "answer")
    return _with_images(rows, ("prompt", *answered, "question_id", "image_id"), image_folder)


def _with_images(rows: list[dict[str, Any]], names: tuple[str, ...], folder: str | Path) -> "Dataset":
    from datasets import Dataset, Image

    paths = [Path(folder) / row["image"] for row in rows]
    if missing := sorted({str(path) for path in paths if not path.is_file()}):
        raise ValueError(
            f"{len(missing)} image files are not there, the first {missing[0]}: check `image_folder`. [errors.md#source]"
        )
    content = {"image": list(map(str, paths)), **{name: [row[name] for row in rows] for name in names}}
    return Dataset.from_dict(content).cast_column("image", Image())


# -------------------------------------------------------------------------------------------------------------- splits
def split_by_image(
    dataset: "Dataset",
    *,
    validation: float = 0.1,
    test: float = 0.1,
    image_column: str | None = None,
    key_column: str | None = None,
    seed: int = 0,
) -> "DatasetDict":
    """
    Train, validation and test splits in which no image's rows fall on two sides: five captions of one photo in five rows stay
    together, and so do copies of a photo under several names.

    Args:
        dataset: rows with an image (or a list of images, which tie their row to every other with one of them).
        validation, test (`float`): shares of the images; 0 for no such split.
        image_column (`str`, *optional*): images are told apart by their content. Defaults to `image`, else `images`.
        key_column (`str`, *optional*): a column that names the image (`image_id`), quicker than reading the images.
        seed (`int`): of the shuffle. Rows keep their order within a split.

    Returns:
        `DatasetDict` with "train" and, where their share is not 0, "validation" and "test".

    Raises:
        ValueError: shares that leave nothing to train on, or too few images for them; no image column.
    """
    from datasets import DatasetDict

    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(
            f"validation={validation} and test={test} must be at least 0, and together below 1. [errors.md#source]"
        )
    groups = _groups(dataset, image_column, key_column)
    names = sorted(set(groups))
    random.Random(seed).shuffle(names)
    sizes = {"validation": round(validation * len(names)), "test": round(test * len(names))}
    asked = {"validation": validation, "test": test}
    if empty := [name for name, size in sizes.items() if asked[name] and not size]:
        raise ValueError(
            f"{len(names)} different images are too few for a share of {asked[empty[0]]} ({empty[0]}). [errors.md#source]"
        )
    side = dict.fromkeys(names, "train")
    side.update(dict.fromkeys(names[: sizes["validation"]], "validation"))
    side.update(dict.fromkeys(names[sizes["validation"] : sizes["validation"] + sizes["test"]], "test"))
    rows: dict[str, list[int]] = {"train": [], **{name: [] for name, size in sizes.items() if size}}
    for index, group in enumerate(groups):
        rows[side[group]].append(index)
    return DatasetDict({name: dataset.select(indices) for name, indices in rows.items()})


def _groups(dataset: "Dataset", image_column: str | None, key_column: str | None) -> list[int]:
    """For each row the number of its group: rows that share an image, directly or over others."""
    keys: list[Any]
    if key_column is not None:
        keys = list(dataset[key_column])
    else:
        hashing = Hashing(Images(dataset, columns.image_column(dataset.column_names, image_column)))
        keys = [one for chunk in range(len(hashing)) for one in hashing[chunk]]
    first: dict[Any, int] = {}
    group = list(range(len(keys)))

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    for index, own in enumerate(keys):
        for key in own if isinstance(own, list) else [own]:
            if key is not None:
                group[root(index)] = root(first.setdefault(key, index))
    return [root(index) for index in range(len(keys))]


__all__ = ["FORMATS", "SplitError", "load_coco_captions", "load_image_text", "load_vqa", "open_source", "split_by_image"]
