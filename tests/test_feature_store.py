# ruff: noqa: F811 (fixtures are imported by name)
"""What a store of features gives is of the image that is asked for, whole, and of the tower that is at hand; or it is refused
with the image, the row or the file, and the way out."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_frozen import DataCollatorForFrozenPrefix, cache_vision_features
from modeling_frozen.data.feature_store import StoredImage
from tests.helpers import fresh_python
from tests.helpers.feature_stores import noise, pair, parents, tower_features  # noqa: F401
from tests.helpers.tiny import join


def images(*seeds: int) -> datasets.Dataset:
    content = {"image": [noise(seed) for seed in seeds], "text": ["a square ."] * len(seeds)}
    return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())


def store(pair: tuple[Any, Any], dataset: Any, folder: Path, **options: Any) -> Any:
    options = {"num_workers": 0, "dtype": "float32", "images_per_shard": 2, "batch_size": 2, **options}
    return cache_vision_features(dataset, *pair, cache_dir=folder, **options)


def loaded(rows: Any) -> torch.Tensor:
    return torch.stack([row["image"].load()[0] for row in rows])


def shards(rows: Any) -> list[Path]:
    return sorted(Path(rows[0]["image"].store).glob("*.arrow"))


# ---------------------------------------------------------------------------------------- rows that outlive their store


def remade(pair: tuple[Any, Any], folder: Path, rows: Any) -> None:
    shutil.rmtree(folder)
    store(pair, images(7, 3, 1, 2, 0), folder)


def one_shard_gone(pair: tuple[Any, Any], folder: Path, rows: Any) -> None:
    shards(rows)[0].unlink()
    store(pair, images(8, 9, 1, 0), folder)


@pytest.mark.parametrize("change", [remade, one_shard_gone])
def test_saved_rows_read_their_own_images_after_the_store_was_made_anew(
    change: Callable[..., None], pair: tuple[Any, Any], tmp_path: Path
) -> None:
    rows = store(pair, images(0, 1, 2, 3), tmp_path / "store")
    rows.save_to_disk(tmp_path / "rows")
    change(pair, tmp_path / "store", rows)
    wanted = tower_features(pair, [noise(seed) for seed in range(4)])
    torch.testing.assert_close(loaded(datasets.load_from_disk(tmp_path / "rows")), wanted)


def test_an_image_that_is_no_longer_there_is_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    rows = store(pair, images(0, 1), tmp_path)
    rows = list(rows)
    shutil.rmtree(tmp_path)
    store(pair, images(5, 1, 6), tmp_path)
    with pytest.raises(
        ValueError, match=rf"Image 0 of the batch: Image {rows[0]['image'].digest.hex()} is not in the store .*Run"
    ):
        DataCollatorForFrozenPrefix(pair[1])([rows[0]])
    torch.testing.assert_close(loaded([rows[1]]), tower_features(pair, [noise(1)]))
    with pytest.raises(ValueError, match="View 1 of image|is not in the store"):
        StoredImage(rows[1]["image"].store, rows[1]["image"].digest, view=1).load()


def test_rows_that_an_earlier_version_saved_are_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    feature = store(pair, images(0), tmp_path).features["image"]
    with pytest.raises(ValueError, match="made by an earlier version.*cache_vision_features"):
        feature.decode_example(0)


# ---------------------------------------------------------------------------------------------------- damaged files


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The disk is full, as far as this process can tell."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [100, 1500, 3000])
def test_a_shard_that_could_not_be_written_is_dropped(size: int, pair: tuple[Any, Any], tmp_path: Path) -> None:
    with largest_file(size), pytest.raises(OSError, match="could not be written.* run `cache_vision_features` again"):
        store(pair, images(*range(6)), tmp_path, images_per_shard=6)
    assert not list(tmp_path.glob("*/writing-*"))
    rows = store(pair, images(*range(6)), tmp_path, images_per_shard=6)
    torch.testing.assert_close(loaded(rows), tower_features(pair, [noise(seed) for seed in range(6)]))


READ_DAMAGED = """
import sys
import numpy as np
from pathlib import Path
from modeling_frozen.data.feature_store import FeatureStore

path, seed = Path(sys.argv[1]), int(sys.argv[2])
whole = path.read_bytes()
store = FeatureStore(path.parent)
digests = list(store.indices())
wanted = {digest: store.read(digest)[0] for digest in digests}
rng, counts = np.random.default_rng(seed), {"right": 0, "refused": 0}
lengths = [0, 1, 8, *rng.integers(9, len(whole), 30)]
damaged = [whole[:length] for length in lengths]
for place in rng.integers(0, len(whole), 300):
    copy = bytearray(whole)
    copy[place] ^= 1 << int(rng.integers(8))
    damaged.append(bytes(copy))
for place in range(0, 900):  # lengths and offsets stand at the start of each message
    copy = bytearray(whole)
    copy[place] ^= 0x40
    damaged.append(bytes(copy))
for content in damaged:
    path.unlink()
    path.write_bytes(content)
    for index in (0, -1):
        for digest in digests:
            try:
                found = FeatureStore(path.parent).read(digest, index=index)[0]
            except ValueError as error:
                counts["refused"] += 1
                assert str(path) in str(error) or "is not in the store" in str(error), error
                assert "cache_vision_features" in str(error), error
            else:
                counts["right"] += 1
                assert (found == wanted[digest]).all()
print(counts)
"""


def test_damaged_shards_give_the_right_features_or_are_named(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """Cut at any length, or with one bit turned, and read by another process, which must not die of it."""
    rows = store(pair, images(0, 1), tmp_path / "store")
    (tmp_path / "read.py").write_text(READ_DAMAGED)
    done = fresh_python.run(str(tmp_path / "read.py"), str(shards(rows)[0]), "0", env=fresh_python.environment())
    assert done.returncode == 0, done.stderr[-2000:]
    counts = eval(done.stdout)
    assert counts["right"] > 300 and counts["refused"] > 300


def test_a_damaged_shard_is_deleted_and_made_anew(pair: tuple[Any, Any], tmp_path: Path) -> None:
    rows = store(pair, images(0, 1, 2, 3), tmp_path)
    path = shards(rows)[0]
    content = bytearray(path.read_bytes())
    content[content.index(rows[1]["image"].load()[0].numpy().tobytes()) + 5] ^= 1
    path.unlink()
    path.write_bytes(content)
    store(pair, images(0), tmp_path)  # opens it anew
    with pytest.raises(ValueError, match=rf"Image 1 of the batch: `{path}` is damaged .*: delete this file"):
        DataCollatorForFrozenPrefix(pair[1])([rows[0], rows[1]])
    path.unlink()
    again = store(pair, images(0, 1, 2, 3), tmp_path)
    wanted = tower_features(pair, [noise(seed) for seed in range(4)])
    for one in (again, rows):
        torch.testing.assert_close(loaded(one), wanted)


def test_what_dead_processes_left_is_removed(pair: tuple[Any, Any], tmp_path: Path) -> None:
    folder = Path(store(pair, images(0), tmp_path)[0]["image"].store)
    begun = (
        "import sys; from pathlib import Path; from modeling_frozen.data.whole_files import temporary_path;"
        "temporary_path(Path(sys.argv[1])).write_bytes(b'half')"
    )
    assert subprocess.run([sys.executable, "-c", begun, str(folder)], cwd=Path(__file__).parents[1]).returncode == 0
    alive = subprocess.Popen([sys.executable, "-c", f"{begun}; input()", str(folder)], stdin=subprocess.PIPE)
    try:
        while len(list(folder.glob("writing-*"))) < 2:
            assert alive.poll() is None
        store(pair, images(0), tmp_path)
        assert [int(path.name.split("-")[-2]) for path in folder.glob("writing-*")] == [alive.pid]
    finally:
        alive.communicate(b"\n")


# ---------------------------------------------------------------------------------------------------------- the tower


def merge_lora(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=r".*vision_tower.*q_proj", init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()
    model.model.vision_tower.to(torch.bfloat16)


def edit_one_value(model: Any) -> None:
    model.model.vision_tower.encoder.layers[1].mlp.fc2.weight.data[5, 9] += 1


def edit_one_value_and_cast(model: Any) -> None:
    edit_one_value(model)
    model.model.vision_tower.half().float()


@pytest.mark.parametrize("change", [merge_lora, edit_one_value, edit_one_value_and_cast])
def test_a_changed_tower_never_reads_what_the_old_one_made(
    change: Callable[[Any], None], parents: Path, tmp_path: Path
) -> None:
    model, processor = join(parents)
    store((model, processor), images(0, 1), tmp_path)
    change(model)
    rows = store((model, processor), images(0, 1), tmp_path)
    torch.testing.assert_close(loaded(rows), tower_features((model, processor), [noise(0), noise(1)]))


def test_without_its_tower_a_model_has_the_key_of_the_unchanged_one(parents: Path, tmp_path: Path) -> None:
    model, processor = join(parents)
    edit_one_value(model)
    store((model, processor), images(0), tmp_path)
    plain = join(parents)[0]
    plain.unload_base_model("vision")
    with pytest.raises(ValueError, match=r"1 of 1 images are not in the store .*image 0 of row 0.*load_base_model"):
        store((plain, processor), images(0), tmp_path)
    assert plain.model.vision_tower is None
    plain.load_base_model("vision")
    wanted = store((plain, processor), images(0), tmp_path)
    plain.unload_base_model("vision")
    assert store((plain, processor), images(0), tmp_path)[0]["image"] == wanted[0]["image"]


def test_features_that_are_not_finite_are_refused(parents: Path, tmp_path: Path) -> None:
    model, processor = join(parents)
    tower = model.model.vision_tower
    bright = Image.new("RGB", (20, 20), (255, 255, 255))
    dataset = datasets.Dataset.from_dict({"image": [noise(0), noise(1), bright]}).cast_column("image", datasets.Image())

    def overflow(module: Any, inputs: Any, output: Any) -> None:
        output.last_hidden_state[inputs[0].amin((1, 2, 3)) > 1] = float("nan")

    tower.register_forward_hook(overflow)
    for dtype in ("float32", "bfloat16", "float16"):
        with pytest.raises(ValueError, match="NaN or infinity for image 0 of row 2"):
            store((model, processor), dataset, tmp_path, dtype=dtype, batch_size=3)
    tower.encoder.layers[1].mlp.fc2.weight.data.mul_(1e8)
    with pytest.raises(ValueError, match='image 0 of row 0 are too large for float16: .*"bfloat16"'):
        store((model, processor), dataset.select([0]), tmp_path, dtype="float16")


# ---------------------------------------------------------------------------------------------------------- the images


def test_an_image_that_is_replaced_meanwhile_is_refused(parents: Path, tmp_path: Path) -> None:
    model, processor = join(parents)
    paths = [str(tmp_path / f"{seed}.png") for seed in range(2)]
    for seed, path in enumerate(paths):
        noise(seed).save(path)
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: noise(9).save(paths[1]))
    dataset = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="Image 0 of row 1 is another than a moment ago.*again"):
        store((model, processor), dataset, tmp_path / "store", batch_size=1)
    hook.remove()
    rows = store((model, processor), dataset, tmp_path / "store", batch_size=1)
    torch.testing.assert_close(loaded(rows), tower_features((model, processor), [noise(0), noise(9)]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["paths", "images", "lists", "bytes", "stream", "gone"])
def test_an_image_that_can_not_be_opened_is_named_with_its_row(
    kind: str, workers: int, pair: tuple[Any, Any], tmp_path: Path
) -> None:
    noise(0).save(tmp_path / "good.png")
    good, bad = str(tmp_path / "good.png"), str(tmp_path / "bad.png")
    if kind != "gone":
        Path(bad).write_bytes((tmp_path / "good.png").read_bytes()[:60])
    values: list[Any] = [good] * 5 + [bad] + [good]
    place = 0
    if kind == "lists":
        values, place = [[good, value] for value in values], 1
    if kind == "bytes":
        values = [Path(value).read_bytes() for value in values]
    dataset = datasets.Dataset.from_dict({"image": values})
    if kind in ("images", "stream"):
        dataset = dataset.cast_column("image", datasets.Image())
    if kind == "stream":
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=rf"image {place} of row 5{'' if kind == 'bytes' else '.*bad.png'}"):
        store(pair, dataset, tmp_path / "store", num_workers=workers, batch_size=1)


def test_an_image_is_decoded_as_the_processor_does_it(pair: tuple[Any, Any], tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (18, 20)).astype(np.uint16)
    palette = noise(1).quantize(16)
    palette.info["transparency"] = 3
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "deep.png": (Image.fromarray(deep), {}),
        "palette.png": (palette, {"transparency": 3}),
        "alpha.png": (noise(2).convert("RGBA"), {}),
        "grey.jpg": (noise(3).convert("L"), {}),
        "turned.jpg": (noise(4), {"exif": turned}),
        "cmyk.tif": (noise(5).convert("CMYK"), {}),
        "float.tif": (Image.fromarray(np.linspace(0, 1, 360, dtype=np.float32).reshape(18, 20)), {}),
    }
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
    paths = [str(tmp_path / name) for name in kinds]
    wanted = tower_features(pair, paths)
    raw = datasets.Dataset.from_dict({"image": paths})
    for dataset in (raw, raw.cast_column("image", datasets.Image())):
        torch.testing.assert_close(loaded(store(pair, dataset, tmp_path / f"store{len(dataset.features)}")), wanted)
    grey = raw.cast_column("image", datasets.Image(mode="L"))
    torch.testing.assert_close(
        loaded(store(pair, grey, tmp_path / "grey")), tower_features(pair, [row["image"] for row in grey])
    )
