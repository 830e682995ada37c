"""A story from a series of pictures: one sentence each, in their order, by a frozen language model that never saw one.

    python -m benchmarks.shapes.stories --output_dir story_output

The language model has read stories, as words; the connector learns from series of pictures what to read in them. Told are
series of scenes that nobody met in training. Beside the score stand those of the same model with another series (*blind*)
and with the series turned round, which must give the other story: order is seen, not guessed.
"""

import random
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from benchmarks.shapes.tasks import Arguments, blinded, exact_match, join_parents, parse, tell, train_connector, write_results
from modeling_frozen.metrics import caption_metrics
from modeling_frozen.shapes.scenes import Scene, draw, split_scenes


@dataclass
class StoryArguments(Arguments):
    steps: int = 1000


OPENINGS = ("once there was", "then came", "in the end there was")


def story(scenes: list[Scene]) -> str:
    """One sentence for each scene."""
    return " ".join(f"{opening} {scene.sentence}" for opening, scene in zip(OPENINGS, scenes, strict=True))


def write(rng: random.Random, scenes: list[Scene]) -> str:
    """What the language model reads: three sentences as they come, and the story of them."""
    chosen = [rng.choice(scenes) for _ in OPENINGS]
    return " ".join([*(scene.sentence for scene in chosen), story(chosen)])


def make_rows(scenes: list[Scene], count: int, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for _ in range(count):
        chosen = [rng.choice(scenes) for _ in OPENINGS]
        rows.append({"images": [draw(scene, rng) for scene in chosen], "prompt": "", "answer": story(chosen)})
    return rows


def main() -> dict[str, Any]:
    args = parse(StoryArguments)
    model, processor = join_parents(args, write, list(OPENINGS), connector_type="mlp")
    known, held_out = split_scenes()
    train_connector(model, processor, make_rows(known, args.steps * args.batch_size // 4, random.Random(args.seed)), args)

    rows = make_rows(held_out, args.held_out, random.Random(args.seed + 1))
    said = tell(model, processor, rows, "telling held-out series")
    blind = tell(model, processor, blinded(rows), "blind")
    turned = [{**row, "images": row["images"][::-1], "answer": " ".join(reversed_story(row["answer"]))} for row in rows]
    turned_said = tell(model, processor, turned, "turned round")
    truth = [[row["answer"]] for row in rows]
    print(f"\nfor example\n  {said[0]}\nwhere right is\n  {rows[0]['answer']}\n")
    return write_results(
        args,
        {
            "exact_match": exact_match(said, rows),
            "blind_exact_match": exact_match(blind, rows),
            "turned_round_exact_match": exact_match(turned_said, turned),
            "sentences_right": sentences_right(said, rows),
            "blind_sentences_right": sentences_right(blind, rows),
            "turned_round_sentences_right": sentences_right(turned_said, turned),
            "cider": caption_metrics(said, truth)["cider"],
            "blind_cider": caption_metrics(blind, truth)["cider"],
        },
    )


def sentences_right(said: list[str], rows: list[dict[str, Any]]) -> float:
    """Share of all sentences that are right, word for word, in their place."""
    right = [
        said_one.strip() == true.strip()
        for text, row in zip(said, rows, strict=True)
        for said_one, true in zip_longest(
            text.split(".")[: len(OPENINGS)], row["answer"].split(".")[: len(OPENINGS)], fillvalue=""
        )
    ]
    return sum(right) / len(right)


def reversed_story(text: str) -> list[str]:
    """The sentences of a story backwards, each under its new opening."""
    sentences = [one.strip() + " ." for one in text.split(".") if one.strip()]
    bare = [sentence.removeprefix(opening).strip() for opening, sentence in zip(OPENINGS, sentences, strict=True)]
    return [f"{opening} {sentence}" for opening, sentence in zip(OPENINGS, reversed(bare), strict=True)]


if __name__ == "__main__":
    main()
