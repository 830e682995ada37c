"""benchmarks/two_stages.py: what it writes is read and trained on, its answers are those that people gave, and both stages are
asked."""

import json
from pathlib import Path

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from benchmarks import two_stages
from modeling_frozen import load_image_text
from tests.helpers.tiny import join, rows, save_parents


DOG = ["A dog runs on the grass .", "A brown dog runs .", "Two dogs on grass .", "A dog .", "An animal on the lawn ."]
TREE = ["A tree ."] * 5


def lay_out(folder: Path) -> Path:
    columns = {
        "captions/flickr8k_1k": {"captions": [DOG, TREE]},
        "captions/coco_open": {"captions": [DOG, TREE]},
        "vqa/easy_vqa": {"questions": [["is it red?", "what shape?"]], "answers": [["yes", "square"]]},
    }
    for number, (place, texts) in enumerate(columns.items()):
        (folder / place / "data").mkdir(parents=True)
        for split in ("train", "validation", "test"):
            images = [row["image"] for row in rows(4)]
            for index, image in enumerate(images):
                image.putpixel((0, 0), (index, number, 0))
            found = {name: [values[index % len(values)] for index in range(4)] for name, values in texts.items()}
            features = Features({"image": ImageFeature(), **{name: List(Value("string")) for name in texts}})
            made = Dataset.from_dict({"image": images, **found}, features)
            made.to_parquet(folder / place / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_things_are_in_a_photo_where_most_captions_name_them() -> None:
    there, absent = two_stages.present(DOG)
    assert there == ["a dog", "grass"]  # four of five, and three
    assert "a dog" not in absent and "a man" in absent and "grass" not in absent
    assert two_stages.present(TREE) == ([], list(two_stages.THINGS))


def test_instructions_are_written_and_both_stages_are_asked(tmp_path: Path) -> None:
    assets, out = lay_out(tmp_path / "assets"), tmp_path / "out"
    save_parents(tmp_path, text={"max_position_embeddings": 512})
    model, processor = join(tmp_path, connector_type="resampler", prefix_length=2)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "eyes")
    asked = [str(tmp_path / "eyes"), str(assets), "--output_dir", str(out), "--pictures", "3", "--test_pictures", "4"]
    found = two_stages.main([*asked, "--steps", "2", "--batch_size", "2", "--table", str(tmp_path / "table.md")])
    assert found["rows"] == {"train": 4 + 4 + 3, "test_photos": 2 * 2, "test_shapes": 4}
    chats = json.loads((out / "train.json").read_text())
    places = set()
    for chat in chats:
        assert (out / chat["image"]).is_file() and chat["conversations"][0]["value"].startswith("<image>")
        said = [turn["value"] for turn in chat["conversations"]]
        if chat["id"].startswith("shapes"):
            assert sorted(said[1::2]) == ["square", "yes"]
            continue
        said[0] = said[0].removeprefix("<image>")
        pairs = dict(zip(said[::2], said[1::2], strict=True))
        caption = pairs.pop("Describe the photo.")
        places.add(said.index("Describe the photo."))
        assert caption.endswith(".") and " ." not in caption
        dog = any(word in caption.lower() for word in ("dog", "animal"))
        assert sorted(pairs.values()) == (["No.", "No.", "Yes.", "Yes."] if dog else [])
        assert all(answer == ("Yes." if "dog" in asked or "grass" in asked else "No.") for asked, answer in pairs.items())
    assert len(places) > 1  # a description is not always what is asked first
    rows = load_image_text(str(out / "test_photos.json"))
    assert sorted(row["messages"][-1]["content"][0]["text"] for row in rows) == ["No.", "No.", "Yes.", "Yes."]
    assert rows[0]["messages"][0]["content"][1]["text"].startswith("Is there ")

    assert list(found["stages"]) == ["captions alone", "then instructions"]
    assert json.loads((out / "results.json").read_text()) == found
    for scores in found["stages"].values():
        assert set(scores) == {"test_photos", "test_shapes", "captions"}
        assert all(
            0 <= one[kind] and one["interval"][0] <= one["interval"][1]
            for one in scores.values()
            for kind in ("sighted", "blind")
        )
    assert (tmp_path / "table.md").read_text().count("| then instructions |") == 3
    assert json.loads((out / "assistant" / "adapter_config.json").read_text())["r"] == 8
