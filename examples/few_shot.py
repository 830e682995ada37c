"""Naming made-up categories from a few pictures in the prompt: Frozen's open-ended miniImageNet.

    python examples/few_shot.py --output_dir few_shot_output

The protocol of arXiv 2106.13884, section 4.2. An episode binds made-up names ("dax", "blicket") to categories, here shapes, by
`--ways` times `--shots` pictures, each followed by its name and shown `--repeats` times, after a sentence that says what the
task is (task induction); then it asks for the name of one more picture. Scores by shots stand beside the same model *blind*
(the last picture of another category of the episode), *without* the first pictures, and *told* the pictures in words.

Nobody is trained on such episodes with pictures. The connector learns captions and questions of single pictures alone; only
the language model, as in the paper, must be able to learn in context, and so has read episodes in words, the names bound
anew in each. How it bridges the two is what is measured; read the scores against chance, one in `--ways`.

What comes out, honestly: after a short run (250 steps of the language model, 150 of the connector, 50 episodes) 0.40 and
0.58 are named right with 1 and 3 shots, blind 0.40 and 0.50, chance 0.50; told in words it was 0.54 and 0.60. So small and
short-trained, the language model itself hardly binds names, and no connector could do better. Read `told` first: where it is
high (more `--language_model_steps`, or a `--text` of your own that learns in context), the others say something.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import QUESTIONS, SHAPES, Scene, draw, sentence_and_questions, split_scenes
from tiny_world import Arguments, join_parents, parse, train_connector, write_results
from tqdm.auto import tqdm

from modeling_frozen.processors import INTERLEAVED_CHAT_TEMPLATE, few_shot_messages


NAMES = ("dax", "blicket", "wug", "toma", "fep", "zav")
INDUCTION = "answer with {names} . "
QUESTION = " this is a "


@dataclass
class FewShotArguments(Arguments):
    ways: int = field(default=2, metadata={"help": "Categories in an episode."})
    shots: str = field(default="1,3,5", metadata={"help": "Pictures of each category, one score for each number."})
    repeats: int = field(default=1, metadata={"help": "How often the pictures of an episode are shown."})
    episodes: int = field(default=100, metadata={"help": "Episodes for each score."})
    language_model_steps: int = 600


@dataclass
class Episode:
    """Scenes with their made-up names, in the order shown, and one to be named."""

    names: list[str]
    support: list[tuple[Scene, str]]
    query: Scene
    answer: str
    other: Scene  # of another category of the episode


def make_episode(rng: random.Random, scenes: list[Scene], ways: int, shots: int, repeats: int = 1) -> Episode:
    categories, names = rng.sample(SHAPES, ways), rng.sample(NAMES, ways)
    bound = dict(zip(categories, names, strict=True))
    support = []
    for _ in range(shots):  # every shot shows each category once, as in the paper, in any order
        turn = [(rng.choice([one for one in scenes if one.shape == shape]), name) for shape, name in bound.items()]
        support += rng.sample(turn, ways)
    asked, other = rng.sample(categories, 2)
    query, wrong = (rng.choice([one for one in scenes if one.shape == shape]) for shape in (asked, other))
    return Episode(names, support * repeats, query, bound[asked], wrong)


def write(rng: random.Random, scenes: list[Scene]) -> str:
    """What the language model reads: an episode in words, or a sentence with questions."""
    if rng.random() < 0.3:
        return sentence_and_questions(rng, scenes)
    episode = make_episode(rng, scenes, ways=2, shots=rng.randint(1, 3))
    shown = [*episode.support, (episode.query, episode.answer)]
    text = "".join(f"{scene.sentence}{QUESTION}{name} . " for scene, name in shown)
    return INDUCTION.format(names=" or ".join(episode.names)) + text.strip()


def make_rows(scenes: list[Scene], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Single pictures with their sentence, or with a question and its answer. No made-up name is among them."""
    rows = []
    for i in range(count):
        scene, question = rng.choice(scenes), rng.choice(list(QUESTIONS)) if i % 2 else ""
        answer = scene.answer(question) if question else scene.sentence
        rows.append({"images": [draw(scene, rng)], "prompt": question, "answer": answer})
    return rows


@torch.no_grad()
def name_it(model: Any, processor: Any, episode: Episode, rng: random.Random, how: str) -> str:
    """Which of the episode's names the model holds likeliest (open-ended: of all its words) for the last picture."""
    support, query = episode.support, episode.other if how == "blind" else episode.query
    support = [] if how == "without" else support
    if how == "told":  # the same in words, for what the language model itself can do
        pairs = [(scene.sentence, name) for scene, name in support] + [(query.sentence, "")]
        text = "".join(f"{words}{QUESTION}{f'{name} . ' if name else ''}" for words, name in pairs)
        inputs = processor(text=INDUCTION.format(names=" or ".join(episode.names)) + text.strip(), return_tensors="pt")
    else:
        messages = few_shot_messages(
            [(draw(scene, rng), QUESTION, f"{name} . ") for scene, name in support],
            (draw(query, rng), QUESTION),
            instruction=INDUCTION.format(names=" or ".join(episode.names)),
        )
        inputs = processor.apply_chat_template(
            messages, chat_template=INTERLEAVED_CHAT_TEMPLATE, tokenize=True, return_dict=True, return_tensors="pt"
        )
    told = model.generate(**inputs.to(model.device), max_new_tokens=1, do_sample=False)
    return processor.decode(told[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> dict[str, Any]:
    args = parse(FewShotArguments)
    more = [" ".join(NAMES), INDUCTION.format(names="or"), QUESTION]
    model, processor = join_parents(args, write, more, connector_type="mlp")
    known, held_out = split_scenes()
    train_connector(model, processor, make_rows(known, args.steps * args.batch_size // 4, random.Random(args.seed)), args)

    results: dict[str, Any] = {"chance": 1 / args.ways}
    for shots in map(int, args.shots.split(",")):
        rng = random.Random(args.seed + 1)
        episodes = [make_episode(rng, held_out, args.ways, shots, args.repeats) for _ in range(args.episodes)]
        for how in ("sighted", "blind", "without", "told"):
            said = [name_it(model, processor, one, rng, how) for one in tqdm(episodes, desc=f"{shots} shots, {how}")]
            right = [text == one.answer for text, one in zip(said, episodes, strict=True)]
            results[f"{how}_{shots}_shots"] = sum(right) / len(right)
    return write_results(args, results)


if __name__ == "__main__":
    main()
