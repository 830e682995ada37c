"""lmms-eval's own command on tasks of local data: the real tool, which loads the model by its plugin hook."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image

from tests.helpers.tiny import COLOURS, join, rows


pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

TASK = """
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
task: squares_{kind}
output_type: {kind}
doc_to_visual: !function squares.image
doc_to_text: "what colour ?"
{rest}
"""
CHOICE = """
doc_to_choice: !function squares.choices
doc_to_target: !function squares.right
target_delimiter: " "
metric_list:
  - metric: acc
"""
GENERATE = """
doc_to_target: "colour"
generation_kwargs:
  max_new_tokens: 1
  until: ["."]
process_results: !function squares.score
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = f"""
COLOURS = {list(COLOURS)!r}
def image(doc): return [doc["image"].convert("RGB")]
def choices(doc): return COLOURS
def right(doc): return COLOURS.index(doc["colour"])
def score(doc, results): return {{"exact": float(results[0] == doc["colour"])}}
"""


def test_tasks_of_both_kinds_score_as_by_hand(tmp_path: Path) -> None:
    if not any(entry.name == "frozen_prefix" for entry in entry_points(group="lmms_eval.models")):
        pytest.skip("needs the package installed, for its entry point")
    torch.manual_seed(0)
    model, processor = join(tmp_path)
    with torch.no_grad():
        model.model.connector.output.weight.mul_(4)
    model.save_pretrained(tmp_path / "eyes")
    processor.save_pretrained(tmp_path / "eyes")
    pictures, colours = [row["image"] for row in rows(8)], [list(COLOURS)[i % 4] for i in range(8)]
    data = Dataset.from_dict({"image": pictures, "colour": colours}).cast_column("image", Image())
    data.to_parquet(tmp_path / "squares.parquet")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for kind, rest in (("multiple_choice", CHOICE), ("generate_until", GENERATE)):
        (tasks / f"{kind}.yaml").write_text(TASK.format(data=tmp_path / "squares.parquet", kind=kind, rest=rest))
    (tasks / "squares.py").write_text(FUNCTIONS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "frozen_prefix", "--include_path", str(tasks)]
    command += ["--model_args", f"pretrained={tmp_path / 'eyes'}", "--tasks", "squares_multiple_choice,squares_generate_until"]
    command += ["--batch_size", "3", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "LMMS_EVAL_HOME": str(tmp_path / "home")}
    env |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text())["results"]

    chosen = written = 0
    for picture, colour in zip(pictures, colours, strict=True):
        inputs = processor(images=picture, text="what colour ?", return_tensors="pt")
        options = [f" {name}" for name in COLOURS]
        scores = model.score(options, tokenizer=processor.tokenizer, **inputs)[0]
        chosen += list(COLOURS)[scores.argmax()] == colour
        ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        written += processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == colour
    assert results["squares_multiple_choice"]["acc,none"] == pytest.approx(chosen / 8)
    assert results["squares_generate_until"]["exact,none"] == pytest.approx(written / 8)
    assert chosen != 0
