"""Does decoding hide behind the tower? `cache_vision_features` over JPEG files against the tower's bare forward on the same
batches, preprocessed beforehand and held in memory.

    python -m benchmarks.feature_cache --images 256 --rounds 5 --output feature_cache.json

Timed is the whole call, from the files to the store: hashing, starting workers, decoding, preprocessing, the tower, writing.
The tower has random weights, which cost what trained ones cost; the pictures are made on the fly.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from benchmarks import parents
from benchmarks.timing import Report, Timing, add_arguments, alternate
from modeling_frozen import FrozenPrefixProcessor, cache_vision_features


BAR = 0.95  # of the tower's own throughput


def write_pictures(folder: Path, count: int, width: int, height: int) -> list[str]:
    """JPEG files with shapes and grain: as large as photos of that size."""
    paths = []
    for index in range(count):
        random = np.random.default_rng(index)
        shapes = Image.fromarray(random.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
        pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(pixels + random.normal(0, 6, pixels.shape).astype(np.int16), 0, 255).astype(np.uint8)
        paths.append(str(folder / f"{index:06d}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def build(folder: Path, args: argparse.Namespace) -> tuple[Any, Any]:
    """The tower beside a language model that plays no part."""
    sizes = parents.Sizes(
        vision_width=args.width, vision_layers=args.layers, image_size=args.image_size, patch_size=args.patch_size,
        text_width=32, text_layers=1, vocab_size=64, prefix_length=4,
    )  # fmt: skip
    model = parents.join(folder, sizes, vision_dtype=args.tower_dtype)
    return model.to(args.device), FrozenPrefixProcessor.from_model(model)


def main(arguments: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, help="default: that of cache_vision_features")
    parser.add_argument("--width", type=int, default=384, help="of the tower")
    parser.add_argument("--layers", type=int, default=12, help="of the tower")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--tower_dtype", default="float32")
    parser.add_argument("--picture", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"), help="of the files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=360, help="no round begins later than this")
    add_arguments(parser, rounds=5)
    args = parser.parse_args(arguments)

    folder = Path(tempfile.mkdtemp())
    try:
        torch.manual_seed(0)
        model, processor = build(folder, args)
        paths = write_pictures(folder, args.images, *args.picture)
        dataset = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
        batches = [
            processor(images=paths[start : start + args.batch_size], return_tensors="pt")["pixel_values"]
            for start in range(0, args.images, args.batch_size)
        ]
        tower = model.model.vision_tower

        @torch.no_grad()
        def bare() -> None:
            for pixels in batches:
                tower(pixels.to(args.device, tower.dtype))

        def stored() -> None:
            place = tempfile.mkdtemp(dir=folder)
            options = {"batch_size": args.batch_size, "num_workers": args.num_workers, "device": args.device}
            cache_vision_features(dataset, model, processor, cache_dir=place, **options)
            shutil.rmtree(place)

        candidates, start = {"store": stored, "tower": bare}, time.monotonic()
        timings = alternate(candidates, rounds=1, warmup=1)
        while len(timings["store"].rounds) < args.rounds and time.monotonic() - start < args.seconds:
            candidates = dict(reversed(candidates.items()))  # now the one first, now the other
            for name, timing in alternate(candidates, rounds=1, warmup=0).items():
                timings[name].rounds += timing.rounds
    finally:
        shutil.rmtree(folder)
    report = Report("Features of each image once: the whole of cache_vision_features against the tower alone", **vars(args))
    report.compare(f"{args.images} images", timings["store"], timings["tower"], bar=1 / BAR, unit="s", scale=1)
    # Throughputs compare as the inverse of times.
    ratios = [tower / store for store, tower in zip(timings["store"].rounds, timings["tower"].rounds, strict=True)]
    throughput = Timing("throughput", ratios).median
    per_second = args.images / timings["store"].median
    report.print()
    print(f"{per_second:.1f} images a second: {throughput:.3f} of the tower's own throughput (bar: at least {BAR})")
    report.settings |= {"throughput_ratio": throughput, "throughput_ratios": ratios, "images_per_second": per_second}
    report.save(args.output)
    return report


if __name__ == "__main__":
    main()
