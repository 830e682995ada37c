"""benchmarks/shapes: tiny runs of the experiments write what they say; their worlds are what they claim."""

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.scripts import run_benchmark


FEW = ["--tower_steps", "2", "--language_model_steps", "2", "--steps", "2", "--held_out", "16", "--batch_size", "2"]


def run(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    results, printed = run_benchmark(f"shapes.{name}", folder, *FEW, *arguments)
    assert all(name in printed for name in results)
    return results


def test_few_shot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--shots", "1,2", "--episodes", "3", "--repeats", "1,2", "--ways", "2,3"]
    results = run("few_shot", tmp_path, *options)
    cases = [f"{case}{ways}" for ways in ("", "_3_ways") for case in ("1_shots", "2_shots", "1_shots_2_repeats")]
    names = {f"{how}_{case}" for how in ("sighted", "blind", "swapped", "without", "new", "in_words") for case in cases}
    assert set(results) == names | {"chance", "chance_3_ways", "seconds"}
    assert results["chance"] == 0.5 and results["chance_3_ways"] == 1 / 3
    with Image.open(tmp_path / "shots.png") as image:
        assert image.width > 500


def test_story(tmp_path: Path) -> None:
    results = run("stories", tmp_path)
    assert {"exact_match", "blind_exact_match", "turned_round_exact_match", "cider", "blind_cider"} < set(results)


def test_describe_video(tmp_path: Path) -> None:
    results = run("films", tmp_path)
    assert {"exact_match", "blind_exact_match", "backwards_exact_match", "where_from", "blind_where_to"} < set(results)


def test_an_episode_names_what_it_shows() -> None:
    from benchmarks.shapes.few_shot import NAMES, is_new, make_episode, split, words
    from modeling_frozen.shapes.scenes import split_scenes

    learnt, others = split()
    assert set(split_scenes()[1]) < set(others) and not set(learnt) & set(others)
    assert not any(is_new(scene) for scene in learnt)
    for seed in range(50):
        new = seed % 2 == 1
        episode = make_episode(random.Random(seed), others, ways=3, shots=2, repeats=2, new=new)
        bound = {scene.shape: name for scene, name in episode.support}
        assert len(episode.support) == 12 and len(bound) == 3 and set(bound.values()) == set(episode.names) <= set(NAMES)
        assert all(bound[scene.shape] == name for scene, name in episode.support)
        assert episode.support[:6] == episode.support[6:]
        assert bound[episode.query.shape] == episode.answer != bound[episode.other.shape]
        assert not {scene for scene, _ in episode.support} & set(learnt)
        if new:
            assert is_new(episode.query) and words(episode.query) not in {words(scene) for scene, _ in episode.support}


def test_the_connector_meets_single_pictures_and_no_made_up_name() -> None:
    from benchmarks.shapes.few_shot import NAMES, is_new, make_rows, split, write
    from modeling_frozen.shapes.scenes import Scene

    learnt, others = split()
    rows = make_rows(learnt, 60, random.Random(0))
    texts = [f"{row['prompt']} {row['answer']}" for row in rows]
    assert all(len(row["images"]) == 1 and row["prompt"].count("<image>") == 1 for row in rows)
    assert not set(NAMES) & {word for text in texts for word in text.split()}
    # Nor do the words of a new pair stand anywhere in what the connector learns.
    read = [write(random.Random(seed), learnt + others) for seed in range(60)]
    assert sum(bool(set(NAMES) & set(text.split())) for text in read) > 20
    new = {f" {scene.colour} {scene.shape} " for scene in others if is_new(scene)}
    assert len(new) == 8 and isinstance(others[0], Scene)
    assert not any(pair in f" {text} " for pair in new for text in texts)


def test_words_and_pictures_of_an_episode_stand_in_the_same_order() -> None:
    """In words and sighted differ in the descriptions alone: what is read around them is the same."""
    from benchmarks.shapes.few_shot import in_words, induction, make_episode, split, words
    from modeling_frozen.processors import few_shot_messages

    episode = make_episode(random.Random(0), split()[1], ways=2, shots=2)
    text = induction(episode.names) + "".join(in_words(*shown) for shown in episode.support) + in_words(episode.query)
    messages = few_shot_messages(
        [(words(scene), f" {name} . ") for scene, name in episode.support],
        words(episode.query),
        instruction=induction(episode.names),
    )
    parts = [part.get("text") or part["image"] for message in messages for part in message["content"]]
    assert "".join(parts).split() == text.split() and text.count(episode.answer) == 3


def test_a_story_backwards() -> None:
    from benchmarks.shapes.stories import reversed_story, story
    from modeling_frozen.shapes.scenes import split_scenes

    scenes = split_scenes()[0][:3]
    assert " ".join(reversed_story(story(scenes))) == story(scenes[::-1])


def test_a_film_run_backwards_answers_the_other_way_round() -> None:
    from benchmarks.shapes.films import backwards, make_rows
    from modeling_frozen.shapes.scenes import split_scenes

    for row in make_rows(split_scenes()[1], 16, random.Random(0)):
        turned = backwards(row)
        assert turned["video"] == row["video"][::-1] and backwards(turned)["answer"] == row["answer"]
        asked = row["prompt"]
        assert (turned["answer"] == row["answer"]) == (asked in ("what colour ?", "what shape ?"))
