"""Datasets, evaluate and accelerate as they are: every way of holding pictures in `datasets` trains a step, a loop by hand
trains under `Accelerator`, and `accelerate launch` starts a script."""

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from modeling_frozen import DataCollatorForFrozenPrefix, FrozenPrefixForConditionalGeneration
from tests.helpers.tiny import join, rows


datasets = pytest.importorskip("datasets")
ROOT = Path(__file__).parents[1]


def encoded(image: Any) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def in_memory(folder: Path) -> Any:
    return datasets.Dataset.from_list(rows(8))


def undecoded(folder: Path) -> Any:
    """Bytes as the file holds them; opened by the collator."""
    return in_memory(folder).cast_column("image", datasets.Image(decode=False))


def plain_bytes(folder: Path) -> Any:
    return datasets.Dataset.from_list([{**row, "image": encoded(row["image"])} for row in rows(8)])


def paths(folder: Path) -> Any:
    data = []
    for i, row in enumerate(rows(8)):
        row["image"].save(folder / f"{i}.png")
        data.append({**row, "image": str(folder / f"{i}.png")})
    return datasets.Dataset.from_list(data)


def paths_as_images(folder: Path) -> Any:
    return paths(folder).cast_column("image", datasets.Image())


def image_folder(folder: Path) -> Any:
    (folder / "pictures").mkdir()
    lines = ["file_name,text"]
    for i, row in enumerate(rows(8)):
        row["image"].save(folder / "pictures" / f"{i}.png")
        lines.append(f"{i}.png,{row['text']}")
    (folder / "pictures" / "metadata.csv").write_text("\n".join(lines))
    return datasets.load_dataset("imagefolder", data_dir=str(folder / "pictures"), split="train", cache_dir=str(folder / "c"))


def parquet(folder: Path) -> Any:
    in_memory(folder).to_parquet(folder / "rows.parquet")
    return datasets.load_dataset(
        "parquet", data_files=str(folder / "rows.parquet"), split="train", cache_dir=str(folder / "c")
    )


def streamed(folder: Path) -> Any:
    in_memory(folder).to_parquet(folder / "rows.parquet")
    return datasets.load_dataset("parquet", data_files=str(folder / "rows.parquet"), split="train", streaming=True)


def shuffled_stream(folder: Path) -> Any:
    return in_memory(folder).to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=4).repeat(3)


def saved(folder: Path) -> Any:
    in_memory(folder).save_to_disk(folder / "saved")
    return datasets.load_from_disk(str(folder / "saved"))


SOURCES = [
    in_memory, undecoded, plain_bytes, paths, paths_as_images, image_folder, parquet, streamed, shuffled_stream, saved,
]  # fmt: skip


def train(folder: Path, model: Any, data: Any, collator: Any, **options: Any) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1, "report_to": "none",
        "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder / "run"), **{**defaults, **options})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    return trainer


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_way_of_holding_pictures_trains(tmp_path: Path, source: Any) -> None:
    model, processor = join(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.model.connector.state_dict().items()}
    data = source(tmp_path)
    collator = DataCollatorForFrozenPrefix(processor)
    if source not in (shuffled_stream, image_folder):
        batch, expected = collator([row for row, _ in zip(data, range(4), strict=False)]), collator(rows(4))
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    trainer = train(tmp_path, model, data, collator)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.model.connector.state_dict().items())


def test_map_with_the_processor(tmp_path: Path) -> None:
    """Everything made beforehand: any collator that stacks will do, and Trainer may drop columns."""
    model, processor = join(tmp_path)

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        made = processor(
            images=batch["image"], text=[f"{text} </s>" for text in batch["text"]], padding="max_length", max_length=16
        )
        return {**made, "labels": made["input_ids"]}

    data = in_memory(tmp_path).map(prepare, batched=True, batch_size=4, remove_columns=["image", "text"])
    assert set(data.column_names) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert len(data[0]["input_ids"]) == 16
    data = data.with_format("torch")
    options = {"remove_unused_columns": True, "max_steps": 30, "learning_rate": 3e-2}
    trainer = train(tmp_path, model, data, default_data_collator, **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_with_transform(tmp_path: Path, streaming: bool) -> None:
    """Rows processed as they are read; the collator finds pictures that are flipped, say, like any other."""
    model, processor = join(tmp_path)

    def flipped(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, "image": [image.transpose(0).convert("L") for image in batch["image"]]}

    data = in_memory(tmp_path)
    data = data.to_iterable_dataset().map(flipped, batched=True) if streaming else data.with_transform(flipped)
    assert next(iter(data))["image"].mode == "L"
    train(tmp_path, model, data, DataCollatorForFrozenPrefix(processor))


def test_rows_made_in_worker_processes(tmp_path: Path) -> None:
    model, processor = join(tmp_path)
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    train(tmp_path, model, in_memory(tmp_path), DataCollatorForFrozenPrefix(processor), **options)


def test_metrics_of_evaluate(tmp_path: Path) -> None:
    """A metric as `evaluate` defines them (its own are fetched from the Hub), on what generate() gives."""
    evaluate = pytest.importorskip("evaluate")

    class Exact(evaluate.Metric):
        def _info(self) -> Any:
            features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
            return {"exact": sum(map(str.__eq__, predictions, references)) / len(references)}

    model, processor = join(tmp_path)
    metric = Exact(cache_dir=str(tmp_path))
    for row in rows(4):
        inputs = processor(images=row["image"], text="a", return_tensors="pt")
        outputs = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        text = processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        metric.add_batch(predictions=text, references=text[:1])
    assert metric.compute() == {"exact": 1.0}


# ------------------------------------------------------------------------------------------------------------ accelerate

LOOP = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from modeling_frozen import DataCollatorForFrozenPrefix
from tests.helpers.tiny import join, rows

def main(folder: str) -> list[float]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, processor = join(Path(folder), connector_type="linear")
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "connector" not in name}
    loader = torch.utils.data.DataLoader(rows(16), batch_size=4, collate_fn=DataCollatorForFrozenPrefix(processor))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(12):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
    accelerator.save_state(f"{folder}/state")
    plain = accelerator.unwrap_model(model)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in frozen.items())
    plain.save_pretrained(
        f"{folder}/eyes", is_main_process=accelerator.is_main_process, save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    trained = plain.model.connector.state_dict()["output.weight"].clone()
    with torch.no_grad():
        plain.model.connector.output.weight.zero_()
    accelerator.load_state(f"{folder}/state")
    assert torch.equal(plain.model.connector.output.weight, trained)
    return losses

if __name__ == "__main__":
    losses = main(sys.argv[1])
    print("LOSSES", losses[0], losses[-1])
"""


def check_run(folder: Path, first: float, last: float) -> None:
    assert last < 0.7 * first
    again = FrozenPrefixForConditionalGeneration.from_pretrained(folder / "eyes")
    assert sum(file.stat().st_size for file in (folder / "eyes").glob("*.safetensors")) < 20_000
    assert again.model.connector.output.weight.any()


def test_a_loop_by_hand_under_accelerator(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script: dict[str, Any] = {"__name__": "loop"}
    exec(LOOP, script)
    losses = script["main"](str(tmp_path))
    check_run(tmp_path, losses[0], losses[-1])


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "loop.py").write_text(LOOP)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "loop.py"), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = (float(one) for one in done.stdout.split("LOSSES", 1)[1].split())
    check_run(tmp_path, first, last)
