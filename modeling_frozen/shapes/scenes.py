"""The scenes: what is in a picture, its sentence, its questions with answers, and the picture itself."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw


COLOURS = {
    "red": (214, 40, 40), "green": (48, 160, 70), "blue": (40, 80, 210), "yellow": (240, 200, 40),
    "purple": (140, 60, 170), "orange": (240, 130, 30), "white": (245, 245, 245), "brown": (125, 80, 45),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
SIZES = {"small": 7, "large": 12}
PLACES = {
    "at the top left": (15, 15), "at the top right": (49, 15), "in the middle": (32, 32),
    "at the bottom left": (15, 49), "at the bottom right": (49, 49),
}  # fmt: skip
SIDE = 64
QUESTIONS = {"what colour ?": "colour", "what shape ?": "shape", "what size ?": "size", "where ?": "place"}


@dataclass(frozen=True)
class Scene:
    """What is in a picture."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def sentence(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place} ."

    @property
    def numbers(self) -> tuple[int, ...]:
        """The same without words, as labels for the tower."""
        kinds: tuple[Iterable[str], ...] = (SIZES, COLOURS, SHAPES, PLACES)
        return tuple(list(names).index(value) for names, value in zip(kinds, vars(self).values(), strict=True))

    def answer(self, question: str) -> str:
        return f"{getattr(self, QUESTIONS[question])} ."


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """All scenes, a fifth of them held out: of such a scene each property is known, and each two of them together, but
    not the four."""
    scenes = [Scene(*values) for values in product(SIZES, COLOURS, SHAPES, PLACES)]
    random.Random(0).shuffle(scenes)
    return scenes[len(scenes) // 5 :], scenes[: len(scenes) // 5]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture of a scene; place, size, shade and background vary a little, so that no two are the same."""
    shade = rng.randint(60, 110)
    image = Image.new("RGB", (SIDE, SIDE), tuple(shade + rng.randint(-8, 8) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    x, y = (at + rng.randint(-3, 3) for at in PLACES[scene.place])
    r = SIZES[scene.size] + rng.randint(-1, 1)
    colour = tuple(max(0, min(255, value + rng.randint(-12, 12))) for value in COLOURS[scene.colour])
    box, thin = (x - r, y - r, x + r, y + r), max(2, r // 3)
    if scene.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif scene.shape == "ring":
        pen.ellipse(box, outline=colour, width=thin)
    elif scene.shape == "square":
        pen.rectangle(box, fill=colour)
    elif scene.shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    elif scene.shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=colour)
    else:
        pen.rectangle((x - r, y - thin, x + r, y + thin), fill=colour)
        pen.rectangle((x - thin, y - r, x + thin, y + r), fill=colour)
    return image


def sentence_and_questions(rng: random.Random, scenes: list[Scene]) -> str:
    """A sentence and the four questions about it, in any order, with their answers."""
    scene = rng.choice(scenes)
    asked = rng.sample(list(QUESTIONS), len(QUESTIONS))
    return " ".join([scene.sentence, *(f"{question} {scene.answer(question)}" for question in asked)])
