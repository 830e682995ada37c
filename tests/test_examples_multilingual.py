"""The four languages: sentences that agree with their shapes' gender, and the script on tiny parents."""

from pathlib import Path

import train_multilingual
from datasets import Dataset, Image, load_dataset

from benchmarks.shapes import languages
from modeling_frozen.shapes.parents import make_tokenizer
from modeling_frozen.shapes.scenes import Scene, split_scenes
from tests.helpers.scripts import run_example
from tests.helpers.tiny import rows, save_parents


def test_sentences_of_each_language() -> None:
    cross = Scene("large", "green", "cross", "in the middle")
    assert languages.tell(cross, "English") == "a large green cross in the middle ."
    assert languages.tell(cross, "German") == "ein großes grünes Kreuz in der Mitte ."
    assert languages.tell(cross, "French") == "une grande croix verte au milieu ."
    assert languages.tell(cross, "Czech") == "velký zelený kříž uprostřed ."
    assert languages.tell(cross, "French", hide_colour=True) == "une grande croix [?] au milieu ."
    tokenizer = make_tokenizer(languages.words())
    for half in split_scenes():
        for scene in half:
            for language in languages.LANGUAGES:
                ids = tokenizer(languages.tell(scene, language), add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids


def run(folder: Path, *options: str) -> dict:
    tower, words = save_parents(folder / "parents")
    few = ["--max_steps", "2", "--pictures", "4", "--test_pictures", "3", "--max_new_tokens", "4", "--use_cpu", "true"]
    few += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    parents = ["--vision", tower, "--text", words]
    return run_example("train_multilingual", folder / "out", *parents, *few, *options)[0]


def test_it_trains_and_scores_each_language_beside_blind(tmp_path: Path) -> None:
    steps = ["--tower_steps", "1", "--language_model_steps", "1", "--pictures", "4", "--test_pictures", "3"]
    languages.main(["--output_dir", str(tmp_path / "made"), *steps])
    table = load_dataset(str(tmp_path / "made" / "texts"), split="test")[0]
    assert "[?]" in table["de_masked"] and "[?]" not in table["de"]
    rows = train_multilingual.read(train_multilingual.parse(["--dataset", str(tmp_path / "made" / "texts")])[0], "test", 3, 0)
    assert len(rows) == 3 * 4 * 2
    for row in rows:
        hidden = "[?]" in row["prompt"]
        assert hidden == (row["task"] == "translation") and row["prompt"].endswith(f"{row['language']} :")
    results = run(tmp_path, "--dataset", str(tmp_path / "made" / "texts"))
    assert set(results) == {f"{t} {n}" for t in ("caption", "translation") for n in ("English", "German", "French", "Czech")}
    assert all(set(scores) == {"sighted", "blind"} and "bleu_4" in scores["blind"] for scores in results.values())


def test_texts_and_photos_from_two_datasets(tmp_path: Path) -> None:
    texts = [{"en": f"a {i} .", "de": f"ein {i} .", "photo": f"{i}.jpg" if i % 2 else None} for i in range(8)]
    for split in ("train", "test"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        Dataset.from_list(texts).to_parquet(tmp_path / "texts" / f"{split}.parquet")
    photos = Dataset.from_dict({"image": [row["image"] for row in rows(8)], "image_id": [f"{i}.jpg" for i in range(8)]})
    (tmp_path / "photos").mkdir()
    photos.cast_column("image", Image()).to_parquet(tmp_path / "photos" / "train.parquet")
    options = [
        "--dataset",
        str(tmp_path / "texts"),
        "--languages",
        "English=en",
        "German=de",
        "--images",
        str(tmp_path / "photos"),
    ]
    results = run(tmp_path, *options, "--image_key", "photo")
    assert set(results) == {f"{t} {n}" for t in ("caption", "translation") for n in ("English", "German")}
