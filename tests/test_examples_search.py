"""examples/search.py: it runs on what it makes itself, and its index finds what exact search finds."""

from pathlib import Path

import pytest

from tests.helpers.scripts import run_example


pytest.importorskip("faiss")


def test_a_short_run_writes_everything_and_its_index_is_exact(tmp_path: Path) -> None:
    import numpy as np
    from datasets import load_from_disk

    few = ["--tower_steps", "1", "--language_model_steps", "1", "--steps", "2", "--batch_size", "8", "--gallery", "12"]
    results = run_example("search", tmp_path, *few)[0]
    assert results["gallery"] == 12 and 0 <= results["text_to_image_recall_at_1"] <= 1
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    rows = load_from_disk(tmp_path / "pictures")
    embeds = np.array(rows["embedding"], dtype=np.float32)
    rows.load_faiss_index("embedding", tmp_path / "pictures.faiss")
    result = rows.search_batch("embedding", embeds[:3], k=5)
    expected = (embeds[:3] @ embeds.T).argsort(axis=1)[:, ::-1][:, :5]
    assert (np.sort(result.total_indices) == np.sort(expected)).all()
    # what it saved is a retrieval model, and it goes on from there
    again = run_example("search", tmp_path / "again", "--model", str(tmp_path / "retrieval_model"), "--gallery", "12")[0]
    assert again == results


@pytest.mark.slow
def test_pictures_and_words_find_each_other(tmp_path: Path) -> None:
    results = run_example("search", tmp_path)[0]
    assert results["text_to_image_recall_at_1"] >= 0.5 and results["image_to_text_recall_at_1"] >= 0.5
    assert results["recommended_of_the_liked_colour"] >= 0.6 > results["chance_of_that"]
