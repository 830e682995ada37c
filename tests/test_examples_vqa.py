"""The question-answering script: a few steps on tiny parents, with LoRA, and on two processes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from modeling_frozen.shapes.folders import write_data
from tests.helpers.formats import lay_out
from tests.helpers.scripts import run_example
from tests.helpers.tiny import save_parents


def run(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> dict:
    tower, words = save_parents(folder / "parents")
    few = ["--rows", "24", "--test_rows", "8", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    few += ["--gradient_accumulation_steps", "1", "--max_new_tokens", "4"]
    parents = ["--vision", tower, "--text", words]
    if "--dataset" not in options:
        write_data(folder, pictures=12, test_pictures=4)
        parents += ["--dataset", str(folder / "questions")]
    results, printed = run_example("train_vqa", folder / "out", *parents, *few, *options, launcher=launcher)
    # Rows of an epoch over those of two steps tell the number of processes.
    processes = 2 if launcher else 1
    if "--dataset" not in options:
        assert f"'epoch': '{round(2 * 4 * processes / 24, 4)}'" in printed, printed[-2000:]
    return results


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_trains_saves_and_scores(tmp_path: Path, rank: int) -> None:
    if rank:
        pytest.importorskip("peft")
    results = run(tmp_path, "--lora_rank", str(rank))
    assert results["rows"] == 8 and set(results) >= {"sighted", "blind", "random_connector", "language_model"}
    saved = {file.name for file in (tmp_path / "out" / "eyes").iterdir()}
    assert ("adapter_model.safetensors" if rank else "model.safetensors") in saved
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 32 and json.loads(lines[0])["references"]


@pytest.mark.slow
def test_on_two_processes(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert run(tmp_path, launcher=launcher)["rows"] == 8


@pytest.mark.parametrize("own", ["llava.json", "vqav2"])
def test_it_takes_data_in_any_form(own: str, tmp_path: Path) -> None:
    """Without splits: a tenth of the images is held out, so there are two."""
    folder = lay_out(tmp_path / "data")
    for number in range(24):
        Image.new("RGB", (20, 18), (10 * number, 90, 30)).save(folder / "images" / f"{number}.png")
    if own == "llava.json":
        rows = json.loads((folder / own).read_text())
        chats = [{**rows[0], "id": number, "image": f"images/{number}.png"} for number in range(24)]
        (folder / own).write_text(json.dumps([*chats, rows[2], {**rows[0], "image": "images/gone.png"}]))
        source = [str(folder / own)]
    else:
        asked = [{"question_id": number, "image_id": number, "question": "what ?"} for number in range(24)]
        said = [{"question_id": number, "multiple_choice_answer": "red"} for number in range(24)]
        (folder / "q.json").write_text(json.dumps({"questions": asked}))
        (folder / "a.json").write_text(json.dumps({"annotations": said[::-1]}))
        for number in range(24):
            (folder / "images" / f"{number}.png").rename(folder / f"{number:012d}.jpg")
        source = [str(folder / "q.json"), str(folder / "a.json")]
    results = run(tmp_path, "--dataset", *source)
    assert results["rows"] == 2
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["references"] == (["a square ."] if own == "llava.json" else ["red"])
