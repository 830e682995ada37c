"""examples/train_captioning.py on pictures of coloured squares with tiny parents: it learns, scores and writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import train_captioning as example
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from safetensors.torch import load_file, save_file

from modeling_frozen import FrozenPrefixForConditionalGeneration
from modeling_frozen.evaluation.evaluator import KINDS
from tests.helpers import fresh_python
from tests.helpers.scripts import run_example
from tests.helpers.tiny import rows, save_parents


pytest.importorskip("pycocoevalcap")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("squares")
    squares = [{"image": row["image"], "captions": [row["text"], row["text"].capitalize()]} for row in rows(8)]
    empty = {**squares[0], "captions": []}
    features = Features({"image": Image(), "captions": Sequence(Value("string"))})
    splits = {"train": squares * 2 + [empty], "validation": squares[:4], "test": squares[:6]}
    for name, split in DatasetDict({k: Dataset.from_list(v, features=features) for k, v in splits.items()}).items():
        split.to_parquet(folder / f"{name}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def run(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    vision, text = save_parents(tmp_path_factory.mktemp("parents"))
    folder = tmp_path_factory.mktemp("run") / "out"
    options = {"vision": vision, "text": text, "dataset": dataset, "show": dataset, "output_dir": str(folder)}
    options |= {"prefix_length": 4, "num_train_epochs": 16, "per_device_train_batch_size": 8, "learning_rate": 3e-2}
    options |= {"connector_config": json.dumps({"hidden_size": 16}), "max_new_tokens": 8, "num_beams": 2}
    options |= {"prompt": " is", "no_repeat_ngram_size": 0, "disable_tqdm": True, "use_cpu": True}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return example.main([*arguments, "--seeds", "0", "1"]), folder


def test_the_sighted_model_beats_both_baselines(run: tuple[dict, Path]) -> None:
    for one in run[0]["seeds"]:
        cider = {kind: one[kind]["cider"] for kind in KINDS}
        assert cider["sighted"] > 2 * max(cider["blind"], cider["random_connector"], cider["language_model"], 0.1), cider
    assert [one["seed"] for one in run[0]["seeds"]] == [0, 1]


def test_what_is_written(run: tuple[dict, Path]) -> None:
    summary, folder = run
    assert json.loads((folder / "results.json").read_text()) == summary
    assert summary["training_arguments"]["learning_rate"] == 3e-2 and summary["training_arguments"]["weight_decay"] == 0.1
    for seed in (0, 1):
        lines = [json.loads(line) for line in (folder / f"seed-{seed}" / "predictions.jsonl").read_text().splitlines()]
        by_kind = {kind: {line["row"]: line["prediction"] for line in lines if line["kind"] == kind} for kind in KINDS}
        assert all(sorted(said) == list(range(6)) for said in by_kind.values())
        assert by_kind["blind"] != by_kind["sighted"]
    for name in ("training.png", "sightedness.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "sheet.png").read_bytes().startswith(b"\x89PNG")
    shown = [json.loads(line)["cider"] for line in (folder / "sheet.jsonl").read_text().splitlines()]
    assert len(shown) == 6 and shown == sorted(shown, reverse=True)


def test_the_checkpoint_is_the_connector_and_loads(run: tuple[dict, Path]) -> None:
    folder = run[1] / "seed-1"
    assert all("connector" in name for name in load_file(folder / "model.safetensors"))
    FrozenPrefixForConditionalGeneration.from_pretrained(folder)


def test_features_are_those_of_the_model(dataset: str, run: tuple[dict, Path], tmp_path: Path) -> None:
    args = example.Arguments(**{**run[0]["arguments"]})
    model, processor = example.build(args)
    photos, _ = example.read([dataset], args, "train", "test")["test"]
    stored = example.store_features(model, processor, photos, tmp_path)
    features = torch.stack([row["image"].load()[0] for row in stored])
    pixels = processor(images=photos["image"][:], return_tensors="pt")["pixel_values"]
    whole = model.get_image_features(pixels).pooler_output
    for mine, its in zip(model.model.write_prefix(features), whole, strict=True):
        torch.testing.assert_close(mine, its)
    cropped = example.store_features(model, processor, photos, tmp_path, crops=3)
    assert {cropped[0]["image"].view for _ in range(60)} == {0, 1, 2, 3}
    assert example.store_features(model, processor, photos, run[1] / "features")[0]["image"].store.startswith(str(run[1]))


ZERO = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"}
TWO = ("--nproc_per_node", "2")


def launchers() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """What stands before the script, and after its own arguments."""
    accelerate = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    return {
        "torchrun": (("-m", "torch.distributed.run", "--standalone", *TWO), ()),
        "accelerate": (("-m", "accelerate.commands.launch", *accelerate, "--dynamo_backend", "no"), ()),
        "deepspeed": (
            ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--master_port", "29517"),
            ("--deepspeed", json.dumps(ZERO)),
        ),
        "ray": ((str(fresh_python.ROOT / "examples" / "on_ray.py"), "--num_workers", "2"), ()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", launchers())
def test_every_launcher_starts_the_same_script(launcher: str, dataset: str, tmp_path: Path) -> None:
    """Without a changed line; two processes learn what one does with batches of both, but for rounding."""
    if launcher in ("deepspeed", "ray"):
        pytest.importorskip(launcher, reason=f"needs the extra `{launcher}`")
    vision, text = save_parents(tmp_path)
    options: dict[str, Any] = {"vision": vision, "text": text, "dataset": dataset, "prefix_length": 4, "max_steps": 6}
    options |= {"connector_config": json.dumps({"hidden_size": 16}), "max_new_tokens": 4, "num_beams": 1, "views": 0}
    options |= {"prompt": " is", "no_repeat_ngram_size": 0, "disable_tqdm": True, "use_cpu": True}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    variables = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    results = {}
    for name, (before, after) in {"python": ((), ()), launcher: launchers()[launcher]}.items():
        size = ("--per_device_train_batch_size", "8" if name == "python" else "4")
        results[name], _ = run_example(
            "train_captioning", tmp_path / name, *arguments, *size, *after, launcher=before, variables=variables
        )
    one, two = (load_file(tmp_path / name / "seed-0" / "model.safetensors") for name in ("python", launcher))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)
    assert results[launcher]["seeds"][0]["sighted"] == pytest.approx(results["python"]["seeds"][0]["sighted"], abs=1e-6)


def test_the_prefix_starts_as_words(run: tuple[dict, Path]) -> None:
    model, processor = example.build(example.Arguments(**run[0]["arguments"]))
    example.start_as_words(model, processor, [["A red square ."], ["a blue square"]])
    words = model.get_input_embeddings().weight
    start = model.model.connector.output.bias.view(4, -1)
    distance = torch.cdist(start, words)
    assert distance.min(dim=1).values.max() < 1e-5


def test_a_folder_of_captions_without_splits_is_read(tmp_path: Path) -> None:
    for number in range(12):
        PIL.Image.new("RGB", (20, 18), (20 * number, 90, 30)).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,that is {number} ." for number in range(12)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    args = example.Arguments(vision="", text="", dataset=[str(tmp_path)])
    data = example.read(args.dataset, args, "train", "validation", "test")
    assert [len(photos) for photos, _ in data.values()] == [10, 1, 1]
    captions = [one for _, some in data.values() for (one,) in some]
    assert sorted(captions) == sorted(line.partition(",")[2] for line in lines)
    photos, ((caption,), *_) = data["train"]
    assert photos[0]["image"].getpixel((0, 0))[0] == 20 * int(caption.split()[2])


def test_tidy() -> None:
    assert example.tidy("A dog , running .") == " a dog, running."
    assert example.tidy("Two  men") == " two men."


def test_a_stopped_run_goes_on_from_its_checkpoint(dataset: str, tmp_path: Path) -> None:
    vision, text = save_parents(tmp_path)

    def run_in(name: str, *more: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        options = {"vision": vision, "text": text, "dataset": dataset, "output_dir": str(folder), "views": 0}
        options |= {"prefix_length": 4, "num_train_epochs": 2, "per_device_train_batch_size": 8, "save_total_limit": 9}
        options |= {"connector_config": json.dumps({"hidden_size": 16}), "max_new_tokens": 2, "num_beams": 1}
        options |= {"load_best_model_at_end": False, "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
        arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        example.main([*arguments, *more])
        return load_file(folder / "seed-0" / "model.safetensors")

    whole = run_in("whole")
    last, first = sorted((tmp_path / "whole" / "seed-0").glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))
    for name, change in (("stopped", 0.0), ("changed", 5.0)):
        copy = tmp_path / name / "seed-0" / first.name
        shutil.copytree(first, copy)
        weights = {key: value + change for key, value in load_file(copy / "model.safetensors").items()}
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
    resumed = run_in("stopped", "--resume_from_checkpoint", str(tmp_path / "stopped"))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    resumed = run_in("changed", "--resume_from_checkpoint", str(tmp_path / "changed" / "seed-0" / first.name))
    assert all((resumed[key] - value).abs().mean() > 1 for key, value in whole.items())
    with pytest.raises(ValueError, match="nowhere.*no checkpoint of this run"):
        run_in("stopped", "--resume_from_checkpoint", str(tmp_path / "nowhere"))
