# ruff: noqa: F811 (fixtures are imported by name)
"""The tower runs once per distinct image, what it made is kept and read again by all it depends on, and training from it is
training without it."""

import importlib
import linecache
import pickle
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Siglip2ImageProcessorPil, Trainer, TrainingArguments

from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
)
from modeling_frozen.data.feature_cache import StoredImage, VisionFeatures, store_key
from modeling_frozen.data.feature_store import FeatureStore
from tests.helpers import fresh_python
from tests.helpers.families_vision import TOWERS, tiny_tower, vision_config
from tests.helpers.feature_stores import noise, pair, parents, seen, tower_features  # noqa: F401
from tests.helpers.tiny import join, rows, text_config, tokenizer


PICTURE = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
Model = FrozenPrefixForConditionalGeneration


def captioned(images: int = 4, captions: int = 3) -> datasets.Dataset:
    """Rows (image, caption), each image in several of them, not side by side."""
    texts = [f"a {row['text'].split()[1]} square ." for row in rows(images * captions)]
    return datasets.Dataset.from_list(
        [{"image": noise(index % images), "text": text} for index, text in enumerate(texts)], features=PICTURE
    )


def store(pair: tuple[Any, Any], dataset: Any, folder: Path, **options: Any) -> Any:
    return cache_vision_features(dataset, *pair, cache_dir=folder, **{"num_workers": 0, "dtype": "float32", **options})


# --------------------------------------------------------------------------------------------------- distinct images


def test_each_distinct_image_once_and_read_again(pair: tuple[Any, Any], tmp_path: Path) -> None:
    with seen(pair[0]) as counts:
        first = store(pair, captioned(), tmp_path, batch_size=3)
        assert counts == [3, 1]
        store(pair, captioned(captions=1), tmp_path)  # another dataset, the same pictures
        store(pair, captioned(images=6), tmp_path)
        assert counts == [3, 1, 2]
    assert [row["image"].index for row in first][:8] == [0, 1, 2, 3] * 2
    wanted = tower_features(pair, [noise(seed) for seed in range(4)])
    for row, own in zip(first, [*wanted, *wanted], strict=False):
        features, mask = row["image"].load()
        assert mask is None
        torch.testing.assert_close(features, own)


def test_lists_gaps_paths_and_bytes(pair: tuple[Any, Any], tmp_path: Path) -> None:
    for seed in range(2):
        noise(seed).save(tmp_path / f"{seed}.png")
    paths = [str(tmp_path / f"{seed}.png") for seed in range(2)]
    as_bytes = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    as_paths = [{"bytes": None, "path": path} for path in paths]
    listed = datasets.Features({"images": datasets.Sequence(datasets.Image()), "text": datasets.Value("string")})
    values = [[as_bytes[0], as_paths[1], None], None, [as_paths[0]], []]
    texts = ["<image> a <image> square .", "a square .", "a square .", "is"]
    with seen(pair[0]) as counts:
        out = store(
            pair,
            datasets.Dataset.from_list(
                [{"images": value, "text": text} for value, text in zip(values, texts, strict=True)], features=listed
            ),
            tmp_path / "store",
        )
        strings = store(pair, datasets.Dataset.from_dict({"image": [paths[1], paths[0], None]}), tmp_path / "store")
        assert counts == [2]
    index = [None if row["images"] is None else [one and one.index for one in row["images"]] for row in out]
    assert index == [[0, 1, None], None, [0], []]
    assert [row["image"] and row["image"].index for row in strings] == [1, 0, None]
    batch = DataCollatorForFrozenPrefix(pair[1])(list(out))
    assert batch["vision_features"].shape[0] == 2 and batch["image_index"].tolist() == [0, 1, 0]


def test_names_inside_an_archive_tell_nothing(pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        noise(seed).save(f"{seed}.png")
    values = [{"bytes": Path(f"{seed}.png").read_bytes(), "path": "2.png"} for seed in (0, 1)]
    dataset = datasets.Dataset.from_list(
        [{"image": value} for value in (*values, {"bytes": None, "path": "2.png"})],
        features=datasets.Features({"image": datasets.Image()}),
    )
    noise(2).save("2.png")
    out = store(pair, dataset, tmp_path / "store")
    result = torch.stack([row["image"].load()[0] for row in out])
    torch.testing.assert_close(result, tower_features(pair, [noise(seed) for seed in range(3)]))


def test_images_that_lie_in_no_file_are_known_by_their_pixels(pair: tuple[Any, Any], tmp_path: Path) -> None:
    noise(0).save(tmp_path / "a.png")
    noise(0).save(tmp_path / "b.bmp")  # other bytes
    import base64

    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    with seen(pair[0]) as counts:
        out = store(pair, datasets.Dataset.from_dict({"image": [text, text]}), tmp_path / "store")
    assert counts == [1] and out[0]["image"] == out[1]["image"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, pair: tuple[Any, Any], tmp_path: Path) -> None:
    dataset = captioned(images=12)
    alone = store(pair, dataset, tmp_path / "alone", batch_size=2)
    helped = store(pair, dataset, tmp_path / "helped", batch_size=2, num_workers=workers)
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one["image"].load()[0], other["image"].load()[0]) and one["text"] == other["text"]


def test_many_rows_are_hashed_by_workers(pair: tuple[Any, Any], tmp_path: Path) -> None:
    dataset = captioned(images=3).select([*range(3)] * 400)
    with seen(pair[0]) as counts:
        out = store(pair, dataset, tmp_path, num_workers=2)
    assert counts == [3] and [row["image"].index for row in out] == [0, 1, 2] * 400


# ------------------------------------------------------------------------------------------- what a dataset is still


def test_it_stays_a_dataset(pair: tuple[Any, Any], tmp_path: Path) -> None:
    dataset = captioned()
    out = store(pair, dataset, tmp_path / "store")
    assert isinstance(out, datasets.Dataset) and out["text"][:] == dataset["text"][:]
    place = {row["image"].index: index for index, row in enumerate(out) if index < 4}

    def same(changed: Any, original: Any) -> None:
        for mine, its in zip(changed, original, strict=True):
            assert mine["text"].lower() == its["text"]
            wanted = its["image"].convert("RGB").tobytes()
            assert noise(place[mine["image"].index]).tobytes() == wanted

    same(out.shuffle(seed=3).select(range(5)), dataset.shuffle(seed=3).select(range(5)))
    parts, wanted = (one.train_test_split(0.25, seed=1) for one in (out, dataset))
    same(parts["train"], wanted["train"])
    same(out.map(lambda row: {"text": row["text"].upper()}), dataset)
    same(datasets.concatenate_datasets([out, out]), datasets.concatenate_datasets([dataset, dataset]))
    same(store(pair, dataset.shuffle(seed=2), tmp_path / "store"), dataset.shuffle(seed=2))
    same(pickle.loads(pickle.dumps(out)), dataset)
    same(out.to_iterable_dataset(), dataset)
    out.save_to_disk(tmp_path / "saved")
    same(datasets.load_from_disk(tmp_path / "saved"), dataset)
    splits = store(pair, datasets.DatasetDict(a=dataset, b=dataset.select([1])), tmp_path / "store")
    assert isinstance(splits, datasets.DatasetDict) and splits["b"][0]["image"] == out[1]["image"]
    assert isinstance(splits["a"].features["image"], VisionFeatures)
    same(store(pair, dataset.with_format("torch"), tmp_path / "store"), dataset)
    alone = store(pair, dataset.select_columns("image"), tmp_path / "store")
    assert alone.column_names == ["image"] and len(alone) == len(dataset)


def test_nothing_is_held_in_memory(pair: tuple[Any, Any], tmp_path: Path) -> None:
    out = store(pair, captioned(images=200, captions=1), tmp_path, images_per_shard=50)
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    assert stored > 200 * 4 * 32 * 4
    again = pickle.loads(pickle.dumps(out))
    before = pa.total_allocated_bytes()
    assert torch.stack([row["image"].load()[0] for row in again]).isfinite().all()
    assert pa.total_allocated_bytes() - before < stored / 10
    assert len(pickle.dumps(out)) < stored / 4  # datasets 3 pickles what is in memory, digests and texts, twice
    table = FeatureStore(out[0]["image"].store)._table(0)
    assert isinstance(table, datasets.table.MemoryMappedTable)


@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 2e-2), ("float16", 2e-3), ("float32", 1e-6)])
def test_dtypes(dtype: str, close: float, pair: tuple[Any, Any], tmp_path: Path) -> None:
    out = store(pair, captioned(captions=1), tmp_path, dtype=dtype)
    features = out[2]["image"].load()[0]
    assert features.dtype == getattr(torch, dtype)
    torch.testing.assert_close(features.float(), tower_features(pair, [noise(2)])[0], atol=close, rtol=close)
    data = FeatureStore(out[0]["image"].store)._table(0).column("features").to_pylist()
    assert len(data[0]) == features.numel() * getattr(torch, dtype).itemsize


# ---------------------------------------------------------------------------------------------- views and augmentation


def crop(image: Image.Image) -> Image.Image:
    left, top = int(torch.randint(8, ())), random.randrange(8)
    return image.crop((left, top, left + 10, top + int(np.random.randint(8, 11))))


def test_views_are_drawn_once_and_read_at_random(pair: tuple[Any, Any], tmp_path: Path) -> None:
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    options = {"views": 3, "augment": crop}
    with seen(pair[0]) as counts:
        out = store(pair, captioned(), tmp_path / "a", batch_size=6, **options)
        assert counts == [6, 6]
        again = store(pair, captioned(images=5), tmp_path / "b", batch_size=1, num_workers=2, **options)
        other = store(pair, captioned(), tmp_path / "a", seed=1, **options)
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]

    def views(row: Any) -> torch.Tensor:
        return torch.stack([StoredImage(row["image"].store, row["image"].digest, view).load()[0] for view in range(3)])

    three = views(out[1])
    assert min((three[a] - three[b]).abs().max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3
    torch.testing.assert_close(three, views(again[1]))  # whatever batches, workers and other images
    assert (three - views(other[1])).abs().amax((1, 2)).min() > 1e-3
    torch.manual_seed(5)
    drawn = [out[1]["image"].view for _ in range(60)]
    torch.manual_seed(5)
    assert drawn == [out[1]["image"].view for _ in range(60)] and set(drawn) == {0, 1, 2}
    kept = store(pair, captioned(), tmp_path / "a", plain_view=True, **options)
    torch.testing.assert_close(views(kept[1])[0], tower_features(pair, [noise(1)])[0])
    torch.testing.assert_close(views(kept[1])[1:], three[1:])


def test_an_augmentation_that_was_rewritten_is_another(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for angle in (10, 10, 20):
        (tmp_path / "my_augmentation.py").write_text(f"def turn(image):\n    return image.rotate({angle})\n")
        sys.modules.pop("my_augmentation", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        turn = importlib.import_module("my_augmentation").turn
        keys.append(store_key(*pair, "float32", 2, turn, tower_digest="")["augment"])
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": crop}, "one draw for ever: pass `views=k`"),
        ({"views": 2}, "equal copies"),
        ({"plain_view": True}, "pass `augment`"),
        ({"views": 0}, "views=0"),
        ({"images_per_shard": 0}, "images_per_shard must be"),
        ({"dtype": "int4"}, "'int4': features are stored in one of bfloat16"),
        ({"pool": True}, "'avg_pool' reads, and this model's connector is 'mlp', which reads every position"),
        ({"image_column": "photo"}, "no image column 'photo' .*'image', 'text'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str, pair: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        store(pair, captioned(), tmp_path, **options)


def test_other_refusals(pair: tuple[Any, Any], parents: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`set_transform`"):
        store(pair, captioned().with_transform(lambda row: row), tmp_path)
    with pytest.raises(ValueError, match="type list can't be stored"):
        store(pair, rows(2), tmp_path)
    with pytest.raises(ValueError, match="holds stored features already"):
        store(pair, store(pair, captioned(), tmp_path), tmp_path)
    with pytest.raises(ValueError, match="The vision tower trains"):
        store(join(parents, trainable=("connector", "vision")), captioned(), tmp_path)
    stored, plain = store(pair, captioned(), tmp_path)[0], captioned()[1]
    with pytest.raises(ValueError, match="1 of 2 images are stored"):
        DataCollatorForFrozenPrefix(pair[1])([stored, plain])
    with pytest.raises(ValueError, match="`augment` can't change stored images.*views=k"):
        DataCollatorForFrozenPrefix(pair[1], augment=crop)([stored])
    with pytest.raises(ValueError, match="no store of features at .*Run `cache_vision_features` again"):
        StoredImage(str(tmp_path / "gone"), b"a" * 16).load()


# -------------------------------------------------------------------------------------------------------- the key


def _other_tower(folder: Path) -> str:
    torch.manual_seed(7)
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    from tests.helpers.tiny import vision_config

    CLIPVisionModel(vision_config()).save_pretrained(folder)
    CLIPImageProcessorPil.from_pretrained(folder.parent / "tower").save_pretrained(folder)
    return str(folder)


def _key_parts() -> dict[str, Callable[..., Any]]:
    def config(**values: Any) -> Callable[..., Any]:
        def change(model: Model, processor: Any, options: dict) -> None:
            for name, value in values.items():
                setattr(model.config, name, value)

        return change

    def record(**values: Any) -> Callable[..., Any]:
        return lambda model, processor, options: model.config.vision_base_model.update(values)

    return {
        "layer": config(vision_feature_layer=-2),
        "several layers": config(vision_feature_layer=[-2, -1]),
        "strategy": config(vision_feature_select_strategy="full"),
        "id": record(name_or_path="elsewhere/tower"),
        "commit": record(revision="0" * 40),
        "fingerprint": record(fingerprint="1" * 64),
        "preprocessing": lambda model, processor, options: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
        "stored dtype": lambda model, processor, options: options.update(dtype="float16"),
        "eight bits": lambda model, processor, options: options.update(dtype="int8"),
        "tower's dtype": lambda model, processor, options: model.model.vision_tower.to(torch.bfloat16),
        "weights": lambda model, processor, options: model.model.vision_tower.post_layernorm.weight.data.mul_(2),
        "a deep weight": lambda model, processor, options: next(model.model.vision_tower.encoder.parameters()).data.mul_(2),
        "augmentation": lambda model, processor, options: options.update(augment=crop, views=2),
    }


@pytest.mark.parametrize("part", _key_parts())
def test_a_store_of_another_key_is_never_read(part: str, parents: Path, tmp_path: Path) -> None:
    model, processor = join(parents)
    options: dict[str, Any] = {}
    first = store((model, processor), captioned(), tmp_path)
    _key_parts()[part](model, processor, options)
    with seen(model) as counts:
        second = store((model, processor), captioned(), tmp_path, **options)
        assert sum(counts) == 4 * options.get("views", 1)
        again = store((model, processor), captioned(), tmp_path, **options)
        assert sum(counts) == 4 * options.get("views", 1)
    assert second[0]["image"].store == again[0]["image"].store != first[0]["image"].store


def test_an_image_that_changed_is_another(pair: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    noise(0).save(path)
    dataset = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    first = store(pair, dataset, tmp_path / "store")[0]["image"].load()[0]
    noise(1).save(path)
    second = store(pair, dataset, tmp_path / "store")[0]["image"].load()[0]
    torch.testing.assert_close(torch.stack([first, second]), tower_features(pair, [noise(0), noise(1)]))


def test_a_tower_without_a_home_is_known_by_its_weights(parents: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    keys = []
    for seed in (0, 0, 1):
        tower = CLIPVisionModel.from_pretrained(parents / "tower")
        tower.post_layernorm.weight.data.add_(seed)
        model = Model.from_vision_text_pretrained(tower, str(parents / "words"), connector_type="mlp")
        keys.append(Path(store((model, join(parents)[1]), captioned(), tmp_path)[0]["image"].store).name)
    assert keys[0] == keys[1] != keys[2]


def test_a_key_that_was_changed_by_hand_is_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    folder = Path(store(pair, captioned(), tmp_path)[0]["image"].store)
    (folder / "key.json").write_text((folder / "key.json").read_text().replace('"layer": -1', '"layer": -3'))
    with pytest.raises(ValueError, match="was changed: delete the folder"):
        store(pair, captioned(), tmp_path)


# ------------------------------------------------------------------------------------------- kills, and many processes


RUN = """
import sys, time
from pathlib import Path
import datasets, torch
datasets.disable_progress_bars()
from modeling_frozen import cache_vision_features
from tests.test_feature_cache import captioned
from tests.helpers.tiny import join

if __name__ == "__main__":
    parents, folder, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    model, processor = join(parents)
    def call(module, args, kwargs):
        print(f"tower {len(args[0])}\\n", end="", flush=True)  # in one piece, beside other processes
        time.sleep(pause)
    model.model.vision_tower.register_forward_pre_hook(call, with_kwargs=True)
    options = {"batch_size": 2, "images_per_shard": 2, "num_workers": 1, "dtype": "float32", "cache_dir": folder}
    out = cache_vision_features(captioned(images=20), model, processor, **options)
    stream = cache_vision_features(captioned(images=24).to_iterable_dataset(), model, processor, **options)
    assert [row["image"] for row in stream][:20] == [row["image"] for row in out][:20], "other rows"
    print(f"rows {len(out)} {len(stream)}\\n", end="", flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(*arguments: str, **variables: str) -> fresh_python.Running:
    return fresh_python.start(*arguments, env=fresh_python.environment(ACCELERATE_USE_CPU="true", **variables))


def test_a_killed_run_goes_on_where_it_was(parents: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    running = launch(str(tmp_path / "run.py"), str(parents), str(tmp_path / "store"), "0.3")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("store/*/0*.arrow"))) < 3 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    output, errors = running.communicate()
    assert running.returncode == -signal.SIGKILL, errors
    assert "rows" not in output
    folder = next(path.parent for path in tmp_path.glob("store/*/key.json"))
    done = len(FeatureStore(folder).indices())
    assert 4 <= done < 20
    with seen(pair[0]) as counts:
        out = store(pair, captioned(images=20), tmp_path / "store")
        assert sum(counts) == 20 - done
    assert out[0]["image"].store == str(folder)
    wanted = tower_features(pair, [noise(seed) for seed in range(20)])
    torch.testing.assert_close(torch.stack([out[index]["image"].load()[0] for index in range(20)]), wanted)


def test_an_error_keeps_what_was_done(pair: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    noise(0).save(tmp_path / "good.png")
    paths = [str(tmp_path / "good.png"), str(tmp_path / "bad.png")]
    with pytest.raises(ValueError, match="bad.png"):
        store(pair, datasets.Dataset.from_dict({"image": paths}), tmp_path / "store", batch_size=1)
    with seen(pair[0]) as counts:
        store(pair, datasets.Dataset.from_dict({"image": paths[:1]}), tmp_path / "store")
    assert not counts


@pytest.mark.slow
def test_one_of_two_processes_is_killed(parents: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    """The launcher ends with an error that names it; nothing half-written is read, and what was done is kept."""
    dying = "import os, signal\ncalls = []\n" + RUN.replace(
        "        time.sleep(pause)\n",
        "        calls.append(1)\n"
        "        if len(calls) > 2 and os.environ['RANK'] == '1' and pause:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    (tmp_path / "run.py").write_text(dying)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "run.py"))
    killed = launch(*torchrun, str(parents), str(tmp_path / "store"), "1")
    output, errors = killed.communicate(timeout=120)
    assert killed.returncode and "rows" not in output
    assert "rank      : 1 (local_rank: 1)" in errors and "Signal 9 (SIGKILL)" in errors
    folder = next(path.parent for path in tmp_path.glob("store/*/key.json"))
    done = set(FeatureStore(folder).indices())
    assert 4 <= len(done) < 20
    again = launch(*torchrun, str(parents), str(tmp_path / "store"), "0")
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert output.count("rows 60 72") == 2
    # Each image was seen once in both runs: 20 + 4 of the stream, less what the first one kept.
    assert sum(map(int, re.findall(r"tower (\d+)", output))) == 24 - len(done)
    out = store(pair, captioned(images=20), tmp_path / "store")
    wanted = tower_features(pair, [noise(seed) for seed in range(20)])
    torch.testing.assert_close(torch.stack([out[index]["image"].load()[0] for index in range(20)]), wanted)


def test_two_processes_share_the_work(parents: Path, pair: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    arguments = (str(tmp_path / "run.py"), str(parents), str(tmp_path / "store"), "0")
    # On CPUs `accelerate launch` starts one process without MPI; where there are GPUs it runs torch's launcher, which
    # starts each process with these variables.
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [launch(*arguments, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]
    output = ""
    for running in both:
        said, errors = running.communicate(timeout=120)
        assert running.returncode == 0, errors[-3000:]
        output += said
    assert output.count("rows 60 72") == 2
    assert sum(map(int, re.findall(r"tower (\d+)", output))) == 24
    with seen(pair[0]) as counts:
        out = store(pair, captioned(images=24), tmp_path / "store")
    assert not counts
    wanted = tower_features(pair, [noise(seed) for seed in range(24)])
    torch.testing.assert_close(torch.stack([out[index]["image"].load()[0] for index in range(24)]), wanted)
    assert len(list((tmp_path / "store" / "rows").iterdir())) == 1


def test_writers_side_by_side_never_take_one_number(pair: tuple[Any, Any], tmp_path: Path) -> None:
    shelf = FeatureStore.for_key(tmp_path, store_key(*pair, "float32", tower_digest=""))
    writers = [shelf.writer(2) for _ in range(2)]
    for step in range(6):
        writers[step % 2].add([bytes([step]) * 16], torch.full((1, 4, 32), float(step)), None)
    for writer in writers:
        writer.close()
    assert [shelf.read(bytes([step]) * 16)[0][0, 0].item() for step in range(6)] == [0, 1, 2, 3, 4, 5]
    assert len(set(shelf.indices().values())) == 6 and not list(shelf.folder.glob("writing-*"))


@pytest.mark.real_data
@torch.no_grad()
def test_real_photos_with_five_captions_each(assets: Path, tmp_path: Path) -> None:
    """A convolutional tower; one row per caption; the loss from the store in bf16 is that of the photos."""
    photos = datasets.load_dataset("parquet", data_files=str(assets / "captions/flickr8k_1k/data/test-*.parquet"))["train"]
    photos = photos.select(range(6))
    captions = next(name for name, feature in photos.features.items() if hasattr(feature, "feature"))
    rows_ = [(index, caption) for index, some in enumerate(photos[captions]) for caption in some]
    dataset = photos.select([index for index, _ in rows_]).select_columns("image")
    dataset = dataset.add_column("text", [caption for _, caption in rows_])
    model = Model.from_vision_text_pretrained(
        str(assets / "vision/mobilenet_v2_1.0_224"), str(assets / "lm/tinystories_instruct_3m_chat"), connector_type="mlp"
    )
    processor = FrozenPrefixProcessor.from_model(model)
    collator = DataCollatorForFrozenPrefix(processor)
    with seen(model) as counts:
        out = store((model, processor), dataset, tmp_path, dtype="bfloat16", batch_size=4)
        assert counts == [4, 2] and len(out) == 30
    batch, plain = (collator([one[index] for index in range(0, 30, 4)]) for one in (out, dataset))
    assert batch["vision_features"].shape == (6, 49, 1280) and batch["vision_features"].dtype == torch.bfloat16
    torch.testing.assert_close(model(**batch).loss, model(**plain).loss, atol=5e-3, rtol=1e-3)


# --------------------------------------------------------------------------------------------------------- streams


def test_a_stream_is_passed_over_once(pair: tuple[Any, Any], tmp_path: Path) -> None:
    passed = []

    def generate() -> Iterator[dict[str, Any]]:
        for row in captioned(images=5):
            passed.append(1)
            yield row

    stream = datasets.IterableDataset.from_generator(generate, features=PICTURE)
    with seen(pair[0]) as counts:
        out = store(pair, stream, tmp_path)
        assert sum(counts) == 5 and len(passed) == 15
        rows_, stored = list(out), list(store(pair, captioned(images=5), tmp_path))
        assert len(passed) == 15 and sum(counts) == 5
    assert isinstance(out, datasets.Dataset) and rows_ == stored
    assert (
        store(pair, captioned(images=5).to_iterable_dataset().select_columns("image"), tmp_path)[7]["image"]
        == stored[7]["image"]
    )
    unknown = store(pair, datasets.IterableDataset.from_generator(generate), tmp_path)
    assert [row["text"] for row in unknown] == [row["text"] for row in stored]


# ------------------------------------------------------------------------------------------- positions that vary


def test_masks_come_back_as_they_were(pair: tuple[Any, Any], tmp_path: Path) -> None:
    key = {**store_key(*pair, "bfloat16", tower_digest=""), "views": 2}
    shelf = FeatureStore.for_key(tmp_path, key)
    features = torch.randn(6, 5, 32).bfloat16()  # three images, two views
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5, [0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [1] * 5]).bool()
    with shelf.writer(10) as writer:
        writer.add([b"a" * 16, b"b" * 16, b"c" * 16], features, mask)
        writer.add([b"d" * 16], features[:2, :3], None)
    for number, letter in enumerate([b"a", b"b", b"c"]):
        for view in range(2):
            result, there = shelf.read(letter * 16, view)
            assert torch.equal(there, mask[2 * number + view])
            assert torch.equal(result, features[2 * number + view] * there[:, None])
    assert torch.equal(shelf.read(b"d" * 16, 1)[0], features[1, :3])
    with pytest.raises(ValueError, match='too large for float16: .*"bfloat16"'):
        FeatureStore.for_key(tmp_path, {**key, "dtype": "float16"}).writer(1).add([b"e" * 16], features[:2] * 1e6, None)
    batch = StoredImage.stack([StoredImage(str(shelf.folder), one * 16) for one in (b"d", b"a")])
    assert batch["vision_features"].shape == (2, 5, 32)
    assert batch["vision_features_mask"].tolist() == [[True] * 3 + [False] * 2] * 2
    assert torch.equal(batch["vision_features"][0, :3], features[0, :3])


# ------------------------------------------------------------------------------------------------------- training


def batches(collator: DataCollatorForFrozenPrefix, dataset: Any, order: list[int]) -> dict[str, torch.Tensor]:
    return collator([dataset[index] for index in order])


def test_an_image_of_several_samples_is_processed_once(pair: tuple[Any, Any], parents: Path, tmp_path: Path) -> None:
    model, processor = join(parents)
    shared, plain = (DataCollatorForFrozenPrefix(processor, share_images=flag) for flag in (True, False))
    one, two = noise(0), noise(1)
    one.save(tmp_path / "0.png")
    path = str(tmp_path / "0.png")
    data = Path(path).read_bytes()
    kinds = {
        "object": (one, one),
        "path": (path, str(path)),
        "bytes": (data, bytes(bytearray(data))),
        "mapping": ({"bytes": data, "path": None}, {"bytes": bytes(bytearray(data)), "path": "elsewhere"}),
        "mapped path": ({"bytes": None, "path": path}, {"path": path}),
    }
    for kind, (first, second) in kinds.items():
        examples = [
            {"image": first, "text": "a red square ."},
            {"images": [two, second], "text": "a <image> is <image> blue square ."},
            {"image": first, "text": "is a square"},
        ]
        short, long = shared(examples), plain(examples)
        assert len(short["pixel_values"]) == 2 and short["image_index"].tolist() == [0, 1, 0, 0], kind
        assert len(long["pixel_values"]) == 4 and "image_index" not in long
        results = []
        for batch in (short, long):
            model.zero_grad()
            output = model.train()(**batch, skip_logits=False)
            output.loss.backward()
            gradients = [p.grad for p in model.model.connector.parameters()]
            results.append([output.loss.detach(), output.logits.detach(), *gradients])
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    augmented = DataCollatorForFrozenPrefix(processor, augment=crop)(examples)
    assert "image_index" not in augmented and not torch.equal(*augmented["pixel_values"][[0, 3]])  # each use by itself
    different = shared([{"image": noise(seed), "text": "a"} for seed in (0, 1)])
    assert "image_index" not in different
    with seen(model) as counts:
        model(**short)
    assert counts == [2]


def train(folder: Path, model: Model, processor: Any, dataset: Any, **options: Any) -> tuple[list[float], dict]:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, seed=1,
        report_to=[], remove_unused_columns=False, disable_tqdm=True, use_cpu=True, save_strategy="no", **options,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=DataCollatorForFrozenPrefix(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_from_the_store_is_training_without_it(dropout: float, parents: Path, tmp_path: Path) -> None:
    results = []
    for stored in (False, True):
        torch.manual_seed(0)
        model, processor = join(parents, connector_config={"hidden_size": 16, "dropout": dropout})
        dataset = captioned(images=3, captions=4)
        if stored:
            dataset = store((model, processor), dataset, tmp_path / "store")
            model.unload_base_model("vision")
        options = {"dataloader_num_workers": 1} if stored and not dropout else {}
        results.append(train(tmp_path / f"run{stored}", model, processor, dataset, **options))
    assert results[0][0][0] > results[0][0][-1] + 0.1
    np.testing.assert_allclose(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-5, rtol=1e-4)
    again = Model.from_pretrained(tmp_path / "runTrue")
    assert again.model.vision_tower is not None


def _pick(media: list[Any], at: Any) -> Any:
    return [_pick(media, one) for one in at] if isinstance(at, list) else media[at]


def test_the_processor_takes_stored_images_where_it_takes_images(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = pair
    out = [row["image"] for row in store(pair, captioned(captions=1), tmp_path)]
    images = [noise(index) for index in range(4)]
    for chosen, text in (
        ([0, 1], ["a square", "the"]),
        (2, "a square"),
        ([[3, 0], []], ["a <image> the <image>", "a square"]),
    ):
        made = processor(images=_pick(out, chosen), text=text, padding=True, return_tensors="pt")
        plain = processor(images=_pick(images, chosen), text=text, padding=True, return_tensors="pt")
        assert "pixel_values" not in made and torch.equal(made["input_ids"], plain["input_ids"])
        options = {"do_sample": False, "max_new_tokens": 4}
        assert torch.equal(model.generate(**made, **options), model.generate(**plain, **options))
        torch.testing.assert_close(model(**made).logits, model(**plain).logits)
        if isinstance(chosen, int):
            turns = [
                {"role": "user", "content": [{"type": "image", "image": media[chosen]}, {"type": "text", "text": text}]}
                for media in (out, images)
            ]
            made, plain = (processor.apply_chat_template([one], tokenize=True, return_dict=True) for one in turns)
            assert "pixel_values" not in made and made["input_ids"] == plain["input_ids"]
            assert torch.equal(made["vision_features"], out[chosen].load()[0][None])
    for both in ([out[0], images[1]], [images[0], out[1]]):
        with pytest.raises(ValueError, match="1 of 2 images are stored features, the others images"):
            processor(images=both, text=["a", "a"])
        with pytest.raises(ValueError, match="1 of 2 images are stored features, the others images"):
            DataCollatorForFrozenPrefix(processor)([{"image": one, "text": "a"} for one in both])


# -------------------------------------------------------------------------------------- a model without its tower


@torch.no_grad()
def test_the_tower_can_go_and_come_back(parents: Path, tmp_path: Path) -> None:
    model, processor = join(parents)
    inputs = processor(images=noise(0), text="a square", return_tensors="pt")
    whole = model(**inputs).logits
    out = store((model, processor), captioned(), tmp_path / "store")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.generation_config.max_new_tokens = 7
    model.unload_base_model()
    model.unload_base_model("vision")
    assert not [name for name in model.state_dict() if "vision_tower" in name]
    assert model.generation_config.max_new_tokens == 7
    with pytest.raises(ValueError, match=r'load_base_model\("vision"\)'):
        model(**inputs)
    with pytest.raises(ValueError, match=r'load_base_model\("vision"\)'):
        model.generate(**inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    features = out[0]["image"].load()[0][None]
    torch.testing.assert_close(model(**text, vision_features=features).logits, whole)
    assert torch.equal(model.generate(**text, vision_features=features, max_new_tokens=3)[:, :4], inputs["input_ids"][:, :4])
    model.save_pretrained(tmp_path / "small")
    assert all("connector" in name for name in load_file(tmp_path / "small" / "model.safetensors"))
    torch.testing.assert_close(Model.from_pretrained(tmp_path / "small")(**inputs).logits, whole)
    with pytest.raises(ValueError, match="include_base_models=True.*load_base_model"):
        model.save_pretrained(tmp_path / "large", include_base_models=True)
    assert store((model, processor), captioned(), tmp_path / "store")[0] == out[0]  # all are there
    with pytest.raises(ValueError, match="2 of 6 images are not in the store.*load_base_model"):
        store((model, processor), captioned(images=6), tmp_path / "store")
    model.load_base_model()
    model.load_base_model("vision")
    assert torch.equal(model(**inputs).logits, whole)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert not any(module.training for module in model.train().model.vision_tower.modules())
    model.save_pretrained(tmp_path / "small")
    assert all("connector" in name for name in load_file(tmp_path / "small" / "model.safetensors"))


@torch.no_grad()
def test_built_and_loaded_without_the_tower(parents: Path, tmp_path: Path) -> None:
    whole, processor = join(parents)
    stored = store((whole, processor), captioned(), tmp_path / "store")
    torch.manual_seed(0)
    model = Model.from_vision_text_pretrained(
        str(parents / "tower"), str(parents / "words"), connector_type="mlp", load_vision_tower=False
    )
    assert model.model.vision_tower is None and not any(p.is_meta for p in model.parameters())
    assert model.config.to_dict() == whole.config.to_dict()
    assert store((model, FrozenPrefixProcessor.from_model(model)), captioned(), tmp_path / "store")[0] == stored[0]
    model.save_pretrained(tmp_path / "saved")
    light = Model.from_pretrained(tmp_path / "saved", load_vision_tower=False)
    heavy = Model.from_pretrained(tmp_path / "saved")
    assert light.model.vision_tower is None
    light.save_pretrained(tmp_path / "again")
    inputs = processor(images=noise(0), text="a square", return_tensors="pt")
    light.load_base_model("vision")
    assert torch.equal(light(**inputs).logits, heavy(**inputs).logits)
    assert torch.equal(Model.from_pretrained(tmp_path / "again")(**inputs).logits, heavy(**inputs).logits)


def test_a_tower_that_could_not_come_back_stays(parents: Path, tmp_path: Path) -> None:
    model = join(parents)[0]
    model.model.vision_tower.post_layernorm.weight.data.mul_(2)
    with pytest.raises(ValueError, match="was trained or changed, so it would be lost"):
        model.unload_base_model("vision")
    model = join(parents, trainable=("connector", "vision"))[0]
    with pytest.raises(ValueError, match="was trained or changed"):
        model.unload_base_model("vision")
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="holds the vision tower itself"):
        Model.from_pretrained(tmp_path / "trained", load_vision_tower=False)
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(parents / "tower")
    with pytest.raises(ValueError, match="has no repository or folder"):
        Model.from_vision_text_pretrained(tower, str(parents / "words")).unload_base_model("vision")
    with pytest.raises(ValueError, match="name its repository or folder; got a loaded CLIPVisionModel"):
        Model.from_vision_text_pretrained(tower, str(parents / "words"), load_vision_tower=False)
    with pytest.raises(ValueError, match="part='text': of"):
        model.unload_base_model("text")
    with pytest.raises(ValueError, match="has no audio tower"):
        model.unload_base_model("audio")


def test_another_tower_in_the_old_ones_place_is_refused(tmp_path: Path) -> None:
    model = join(tmp_path)[0]
    model.unload_base_model("vision")
    _other_tower(tmp_path / "other")
    (tmp_path / "tower" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="has fingerprint"):
        model.load_base_model("vision")
    assert model.model.vision_tower is None


def test_grids_of_their_own_are_stored(tmp_path: Path) -> None:
    """What each image's own grid is goes with its features, so that connectors that read grids train from the store."""
    tower = TOWERS["siglip2_naflex"]
    patch = vision_config(tower).patch_size
    processor = Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=16)
    torch.manual_seed(0)
    model = Model.from_vision_text_pretrained(
        tiny_tower(tower), LlamaForCausalLM(text_config()), connector_type="avg_pool", prefix_length=1, image_token_id=17
    ).eval()
    assert model.config.vision_grid == "variable"
    sizes = [(4 * patch, 4 * patch), (8 * patch, 2 * patch), (3 * patch, 2 * patch)]
    images = [noise(number).resize(size) for number, size in enumerate(sizes)]
    joined = FrozenPrefixProcessor(image_processor=processor, tokenizer=tokenizer(), prefix_length=1)
    dataset = datasets.Dataset.from_list([{"image": image, "text": "a square ."} for image in images])
    out = store((model, joined), dataset, tmp_path, batch_size=3)
    inputs = processor(images=images, return_tensors="pt")
    assert [row["image"].grid() for row in out] == [tuple(one) for one in inputs["spatial_shapes"].tolist()]
    assert len({row["image"].grid() for row in out}) > 1
    batch = DataCollatorForFrozenPrefix(joined)(list(out))
    assert torch.equal(batch["spatial_shapes"], inputs["spatial_shapes"])
    names = ("vision_features", "vision_features_mask", "spatial_shapes", "image_index")
    stored = model.get_image_features(**{name: batch[name] for name in names if name in batch}).pooler_output
    fresh = model.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(torch.stack(stored), torch.stack(fresh), atol=1e-5, rtol=1e-4)


def test_eight_bits_with_a_scale_for_each_position(pair: tuple[Any, Any], tmp_path: Path) -> None:
    out = store(pair, captioned(images=3, captions=1), tmp_path, dtype="int8")
    wanted = tower_features(pair, [noise(seed) for seed in range(3)])
    positions, width = wanted[0].shape
    for row, own in zip(out, wanted, strict=True):
        features, mask = row["image"].load()
        assert mask is None and features.dtype == torch.float32
        step = own.abs().amax(dim=-1, keepdim=True) / 127
        assert ((features - own).abs() <= step / 2 * 1.001).all()
        assert (features - own).abs().max() > 0
    shards = sum(path.stat().st_size for path in Path(out[0]["image"].store).glob("*.arrow"))
    plain = store(pair, captioned(images=3, captions=1), tmp_path, dtype="float32")
    assert Path(plain[0]["image"].store) != Path(out[0]["image"].store)
    in_full = sum(path.stat().st_size for path in Path(plain[0]["image"].store).glob("*.arrow"))
    assert in_full - shards >= 3 * positions * (3 * width - 4) - 3 * 8  # Arrow pads to eight bytes


def test_means_alone_are_stored_for_a_connector_that_reads_no_more(tmp_path: Path) -> None:
    model, processor = join(tmp_path, connector_type="avg_pool", prefix_length=1)
    dataset = captioned(images=3, captions=1)
    pooled, whole = (store((model, processor), dataset, tmp_path / "store", pool=pool) for pool in (True, False))
    assert [len(row["image"].load()[0]) for row in (pooled[0], whole[0])] == [1, 4]
    collator = DataCollatorForFrozenPrefix(processor)
    losses = [model(**collator(list(rows))).loss for rows in (pooled, whole)]
    torch.testing.assert_close(*losses)
    for row, other in zip(pooled, whole, strict=True):
        torch.testing.assert_close(row["image"].load()[0][0], other["image"].load()[0].mean(dim=0))
    wider, its_processor = join(tmp_path, connector_type="avg_pool", connector_config={"output_size": [1, 2]})
    again = store((wider, its_processor), dataset, tmp_path / "store", pool=True)
    assert again[0]["image"].store != pooled[0]["image"].store
    with pytest.raises(ValueError, match="gave 1 positions where this connector reads a grid of 2 rows and 2 columns"):
        wider.get_image_features(vision_features=pooled[0]["image"].load()[0][None])
