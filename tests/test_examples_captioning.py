"""examples/train_captioning.py on pictures of coloured squares with tiny parents: it learns, scores and writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_captioning as example
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from safetensors.torch import load_file, save_file

from modeling_frozen import FrozenPrefixForConditionalGeneration
from modeling_frozen.data.splits import load_questions
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
    options = {"vision": vision, "text": text, "dataset": dataset, "output_dir": str(folder)}
    options |= {"prefix_length": 4, "num_train_epochs": 16, "per_device_train_batch_size": 8, "learning_rate": 3e-2}
    options |= {"connector_config": json.dumps({"hidden_size": 16}), "max_new_tokens": 8, "num_beams": 2}
    options |= {"prompt": " is", "no_repeat_ngram_size": 0, "disable_tqdm": True, "use_cpu": True}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return example.main(arguments), folder


def test_the_sighted_model_beats_both_baselines(run: tuple[dict, Path]) -> None:
    cider = {kind: run[0][kind]["cider"] for kind in KINDS}
    assert cider["sighted"] > 2 * max(cider["blind"], cider["random_connector"], cider["language_model"], 0.1), cider


def test_what_is_written(run: tuple[dict, Path]) -> None:
    summary, folder = run
    written = json.loads((folder / "results.json").read_text())
    assert all(written[kind] == summary[kind] for kind in KINDS) and written["rows"] == 6
    trained = torch.load(folder / "training_args.bin", weights_only=False)
    assert (trained.learning_rate, trained.weight_decay, trained.num_train_epochs) == (3e-2, 0.1, 16)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    by_kind = {kind: {line["row"]: line["prediction"] for line in lines if line["kind"] == kind} for kind in KINDS}
    assert all(sorted(said) == list(range(6)) for said in by_kind.values())
    assert by_kind["blind"] != by_kind["sighted"]
    for name in ("training.png", "sheet.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_is_the_connector_and_loads(run: tuple[dict, Path]) -> None:
    assert all("connector" in name for name in load_file(run[1] / "model.safetensors"))
    FrozenPrefixForConditionalGeneration.from_pretrained(run[1])


def test_each_caption_of_a_photo_is_a_row(dataset: str) -> None:
    photos = load_questions(dataset, ("train", "test"))["test"]
    captioned = example.one_caption_a_row(photos, " is")
    assert len(captioned) == 12 and set(captioned["prompt"]) == {" is"}
    assert captioned[0]["answer"] == captioned[1]["answer"] == " a red square."
    assert captioned[0]["image"].tobytes() == captioned[1]["image"].tobytes() == photos[0]["image"].tobytes()


ZERO = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"}
TWO = ("--nproc_per_node", "2")
FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
FSDP |= {"state_dict_type": "FULL_STATE_DICT"}


def launchers() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """What stands before the script, and after its own arguments."""
    accelerate = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    return {
        "torchrun": (("-m", "torch.distributed.run", "--standalone", *TWO), ()),
        "fsdp": (
            ("-m", "torch.distributed.run", "--standalone", *TWO, "-m", "tests.helpers.fsdp_on_cpus"),
            ("--fsdp", "--fsdp_config", json.dumps(FSDP)),
        ),
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
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("python", launcher))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)
    assert results[launcher]["sighted"] == pytest.approx(results["python"]["sighted"], abs=1e-6)


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
        return load_file(folder / "model.safetensors")

    whole = run_in("whole")
    last, first = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))
    for name, change in (("stopped", 0.0), ("changed", 5.0)):
        copy = tmp_path / name / first.name
        shutil.copytree(first, copy)
        weights = {key: value + change for key, value in load_file(copy / "model.safetensors").items()}
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
    resumed = run_in("stopped", "--resume")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    resumed = run_in("changed", "--resume_from_checkpoint", str(tmp_path / "changed" / first.name))
    assert all((resumed[key] - value).abs().mean() > 1 for key, value in whole.items())
