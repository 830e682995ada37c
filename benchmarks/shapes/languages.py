"""The little world of shapes described in English, German, French and Czech, and a language model of all four.

The model reads the same scene in several languages after one another, so it can translate, but it never meets a picture. In
some of its texts the first sentence lacks the colour: then it can only guess the colour of the next.

    python -m benchmarks.shapes.languages --output_dir languages
    python examples/train_multilingual.py --vision languages/tower --text languages/language_model --dataset languages/texts

The table in `texts` has the columns that the example reads: an image, a sentence in each language, and the same without the
colour, from which translations start.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from modeling_frozen.shapes.folders import write_split
from modeling_frozen.shapes.parents import train_language_model, train_tower
from modeling_frozen.shapes.scenes import Scene, draw, split_scenes


LANGUAGES = {"English": "en", "German": "de", "French": "fr", "Czech": "cs"}  # and their columns
HIDDEN = "[?]"  # stands for a colour that a sentence doesn't tell

# Words that agree with the shape's gender: German by masculine, neuter, feminine; French by masculine, feminine.
_GERMAN = {
    "small": ("ein kleiner", "ein kleines", "eine kleine"), "large": ("ein großer", "ein großes", "eine große"),
    "red": ("roter", "rotes", "rote"), "green": ("grüner", "grünes", "grüne"), "blue": ("blauer", "blaues", "blaue"),
    "yellow": ("gelber", "gelbes", "gelbe"), "purple": ("lilafarbener", "lilafarbenes", "lilafarbene"),
    "orange": ("oranger", "oranges", "orange"), "white": ("weißer", "weißes", "weiße"),
    "brown": ("brauner", "braunes", "braune"),
    "circle": ("Kreis", 0), "square": ("Quadrat", 1), "triangle": ("Dreieck", 1), "cross": ("Kreuz", 1),
    "diamond": ("Raute", 2), "ring": ("Ring", 0),
    "at the top left": "oben links", "at the top right": "oben rechts", "in the middle": "in der Mitte",
    "at the bottom left": "unten links", "at the bottom right": "unten rechts",
}  # fmt: skip
_FRENCH = {
    "small": ("un petit", "une petite"), "large": ("un grand", "une grande"),
    "red": ("rouge", "rouge"), "green": ("vert", "verte"), "blue": ("bleu", "bleue"), "yellow": ("jaune", "jaune"),
    "purple": ("violet", "violette"), "orange": ("orange", "orange"), "white": ("blanc", "blanche"),
    "brown": ("brun", "brune"),
    "circle": ("cercle", 0), "square": ("carré", 0), "triangle": ("triangle", 0), "cross": ("croix", 1),
    "diamond": ("losange", 0), "ring": ("anneau", 0),
    "at the top left": "en haut à gauche", "at the top right": "en haut à droite", "in the middle": "au milieu",
    "at the bottom left": "en bas à gauche", "at the bottom right": "en bas à droite",
}  # fmt: skip
_CZECH = {  # all shapes are masculine
    "small": "malý", "large": "velký", "red": "červený", "green": "zelený", "blue": "modrý", "yellow": "žlutý",
    "purple": "fialový", "orange": "oranžový", "white": "bílý", "brown": "hnědý", "circle": "kruh", "square": "čtverec",
    "triangle": "trojúhelník", "cross": "kříž", "diamond": "kosočtverec", "ring": "prstenec",
    "at the top left": "vlevo nahoře", "at the top right": "vpravo nahoře", "in the middle": "uprostřed",
    "at the bottom left": "vlevo dole", "at the bottom right": "vpravo dole",
}  # fmt: skip


def tell(scene: Scene, language: str, hide_colour: bool = False) -> str:
    """The scene as a sentence of the language; words stand apart."""
    if language == "English":
        size, colour, shape, place = f"a {scene.size}", scene.colour, scene.shape, scene.place
    elif language == "Czech":
        size, colour, shape, place = (_CZECH[one] for one in (scene.size, scene.colour, scene.shape, scene.place))
    else:
        words = _GERMAN if language == "German" else _FRENCH
        shape, gender = words[scene.shape]
        size, colour, place = words[scene.size][gender], words[scene.colour][gender], words[scene.place]
    colour = HIDDEN if hide_colour else colour
    order = (size, shape, colour, place) if language == "French" else (size, colour, shape, place)
    return " ".join([*order, "."])


def words() -> list[str]:
    """All sentences of all four languages, and what stands between them."""
    sentences = [tell(scene, one) for half in split_scenes() for scene in half for one in LANGUAGES]
    return [*LANGUAGES, ":", HIDDEN, *sentences]


def write(rng: random.Random, scenes: list[Scene]) -> str:
    """A text for the language model: one scene in two languages."""
    scene, (first, second) = rng.choice(scenes), rng.sample(list(LANGUAGES), 2)
    start = tell(scene, first, hide_colour=rng.random() < 0.3)
    return f"{first} : {start} {second} : {tell(scene, second)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("languages"))
    parser.add_argument("--pictures", type=int, default=1200, help="to train on")
    parser.add_argument("--test_pictures", type=int, default=100, help="of held-out scenes")
    parser.add_argument("--tower_steps", type=int, default=1000)
    parser.add_argument("--language_model_steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    train_tower(args.output_dir / "tower", args.tower_steps, args.seed)
    train_language_model(args.output_dir / "language_model", args.language_model_steps, args.seed, write, words())
    for number, (split, count) in enumerate({"train": args.pictures, "test": args.test_pictures}.items()):
        rng, rows = random.Random(args.seed + number), []
        for _ in range(count):
            scene = rng.choice(split_scenes()[number])
            told = {column: tell(scene, one) for one, column in LANGUAGES.items()}
            masked = {f"{column}_masked": tell(scene, one, hide_colour=True) for one, column in LANGUAGES.items()}
            rows.append({"image": draw(scene, rng), **told, **masked})
        write_split(args.output_dir / "texts", split, rows)


if __name__ == "__main__":
    main()
