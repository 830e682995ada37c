"""The evaluation script: one checkpoint, several, and the card that is made of what it writes."""

import json
from pathlib import Path

import evaluate_checkpoint
import pytest
import torch
from datasets import Dataset, Image

from modeling_frozen.model_card.card import write_model_card
from tests.helpers.processors import saved
from tests.helpers.tiny import captioned_rows, join


def test_scores_go_from_the_script_into_the_card(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    model, processor = join(tmp_path)
    for seed in (0, 1):
        model._reset_connector(model.model.connector)
        model.save_pretrained(tmp_path / f"seed-{seed}")
        processor.save_pretrained(tmp_path / f"seed-{seed}")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{**row, "image": {"bytes": saved(row["image"], "PNG"), "path": None}} for row in captioned_rows(6)]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(data / "test.parquet")
    common = ["--dataset", str(data), "--max_new_tokens", "4", "--output_dir", str(tmp_path / "out")]
    one = evaluate_checkpoint.main(["--model", str(tmp_path / "seed-0"), *common])
    assert one["rows"] == 6 and set(one["sighted"]) >= {"cider", "bleu_4", "rouge_l"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["blind"] == pytest.approx(one["blind"])
    evaluate_checkpoint.main(["--model", str(tmp_path / "seed-0"), *common, "--chat", "--prompt", "what is"])
    asked = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["prompt"]
    assert asked == processor.chat_prompt("what is") == "User: <image>what is\nAssistant:"
    both = evaluate_checkpoint.main(["--model", str(tmp_path / "seed-0"), str(tmp_path / "seed-1"), *common])
    assert both["seeds"][0]["sighted"] == pytest.approx(one["sighted"])
    assert "mean ± standard deviation over 2 checkpoints" in capsys.readouterr().out
    write_model_card(tmp_path / "seed-0", model, metrics=json.loads((tmp_path / "out" / "results.json").read_text()))
    card = (tmp_path / "seed-0" / "README.md").read_text()
    assert f"{both['mean']['sighted']['rouge_l']:.4g}" in card and "blind" in card
