"""examples/search.py: it writes what it says, its index finds what exact search finds, and (slow) it finds."""

from pathlib import Path

import pytest

from modeling_frozen.shapes.folders import write_data, write_parents
from tests.helpers.scripts import run_example


pytest.importorskip("faiss")


def offline(folder: Path, steps: int) -> list[str]:
    """Tiny parents, trained for so many steps, and captioned pictures."""
    write_parents(folder, tower_steps=steps, language_model_steps=max(1, steps // 10))
    write_data(folder, pictures=1500 if steps > 1 else 40)
    names = {"vision": "tower", "text": "language_model", "dataset": "captions"}
    return [word for flag, name in names.items() for word in (f"--{flag}", str(folder / name))]


def test_a_short_run_writes_everything_and_its_index_is_exact(tmp_path: Path) -> None:
    import numpy as np
    from datasets import load_from_disk

    own, few = offline(tmp_path / "shapes", 1), ["--max_steps", "2", "--per_device_train_batch_size", "8", "--gallery", "12"]
    results = run_example("search", tmp_path, *own, *few)[0]
    assert results["gallery"] == 12 and 0 <= results["text_to_image_recall_at_1"] <= 1
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    rows = load_from_disk(tmp_path / "pictures")
    embeds = np.array(rows["embedding"], dtype=np.float32)
    rows.load_faiss_index("embedding", tmp_path / "pictures.faiss")
    result = rows.search_batch("embedding", embeds[:3], k=5)
    expected = (embeds[:3] @ embeds.T).argsort(axis=1)[:, ::-1][:, :5]
    assert (np.sort(result.total_indices) == np.sort(expected)).all()
    # what it saved is a retrieval model, and it goes on from there
    again = run_example("search", tmp_path / "again", *own[4:], "--model", str(tmp_path / "retrieval_model"), *few)[0]
    assert again == results


@pytest.mark.slow
def test_pictures_and_words_find_each_other(tmp_path: Path) -> None:
    results = run_example("search", tmp_path, *offline(tmp_path / "shapes", 1000), "--learning_rate", "1e-3")[0]
    assert results["gallery"] == 96
    assert results["text_to_image_recall_at_1"] >= 0.5 and results["image_to_text_recall_at_1"] >= 0.5
