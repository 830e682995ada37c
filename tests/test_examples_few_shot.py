"""examples/few_shot.py, story.py and describe_video.py: tiny runs write what they say; their worlds are what they claim."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = ["--tower_steps", "2", "--language_model_steps", "2", "--steps", "2", "--held_out", "16", "--batch_size", "2"]


def run(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / script), "--output_dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    assert all(name in done.stdout for name in results)
    return results


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_few_shot(tmp_path: Path) -> None:
    results = run("few_shot.py", tmp_path, *FEW, "--shots", "1,2", "--episodes", "3", "--repeats", "2")
    names = {f"{how}_{shots}_shots" for how in ("sighted", "blind", "without", "told") for shots in (1, 2)}
    assert set(results) == names | {"chance", "seconds"} and results["chance"] == 0.5


def test_story(tmp_path: Path) -> None:
    results = run("story.py", tmp_path, *FEW)
    assert {"exact_match", "blind_exact_match", "turned_round_exact_match", "cider", "blind_cider"} < set(results)


def test_describe_video(tmp_path: Path) -> None:
    results = run("describe_video.py", tmp_path, *FEW)
    assert {"exact_match", "blind_exact_match", "backwards_exact_match", "where_from", "blind_where_to"} < set(results)


def test_an_episode_names_what_it_shows(examples: None) -> None:
    from few_shot import NAMES, make_episode
    from shapes import split_scenes

    known, held_out = split_scenes()
    for seed in range(50):
        episode = make_episode(random.Random(seed), held_out, ways=3, shots=2, repeats=2)
        bound = {scene.shape: name for scene, name in episode.support}
        assert len(episode.support) == 12 and len(bound) == 3 and set(bound.values()) == set(episode.names) <= set(NAMES)
        assert all(bound[scene.shape] == name for scene, name in episode.support)
        assert bound[episode.query.shape] == episode.answer != bound[episode.other.shape]
        assert not {scene for scene, _ in episode.support} & set(known)


def test_a_story_told_backwards(examples: None) -> None:
    from shapes import split_scenes
    from story import reversed_story, story

    scenes = split_scenes()[0][:3]
    assert " ".join(reversed_story(story(scenes))) == story(scenes[::-1])


def test_a_film_run_backwards_answers_the_other_way_round(examples: None) -> None:
    from describe_video import backwards, make_rows
    from shapes import split_scenes

    for row in make_rows(split_scenes()[1], 16, random.Random(0)):
        turned = backwards(row)
        assert turned["video"] == row["video"][::-1] and backwards(turned)["answer"] == row["answer"]
        asked = row["prompt"]
        assert (turned["answer"] == row["answer"]) == (asked in ("what colour ?", "what shape ?"))
