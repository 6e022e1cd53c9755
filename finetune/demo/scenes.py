"""Scenes of the demo: one or two coloured shapes in a 2 x 2 grid, as words, as a picture, as questions with answers.

Invariant: given the text of a question, all its answers are equally likely (`QuestionBank` picks the question first,
then the answer, then a scene that has it), so nobody who has not seen the scene does better than chance.

    train, held_out = split_scenes(seed=0)
    bank = QuestionBank(held_out)
    sample = bank.sample("colour", np.random.default_rng(0))
    sample.question, sample.answer  # "What colour is the circle?", "red"
    image = render(sample.scene, np.random.default_rng(0))
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (208, 44, 40), "green": (44, 160, 60), "blue": (44, 80, 208), "yellow": (228, 200, 44)}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")  # in reading order; one word, so one token each
COUNTS = ("one", "two")
NUM_ANSWERS = {"colour": len(COLOURS), "shape": len(SHAPES), "place": len(PLACES), "count": len(COUNTS), "yes_no": 2}
KINDS = tuple(NUM_ANSWERS)

IMAGE_SIZE = 48
PATCH_SIZE = 12
GRID = 2  # cells per side
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
CELL_OF_PATCH = tuple(
    (row * GRID // PATCHES_PER_SIDE) * GRID + column * GRID // PATCHES_PER_SIDE
    for row, column in product(range(PATCHES_PER_SIDE), repeat=2)
)
EMPTY = "empty"
CELL_LABELS = (EMPTY, *(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)))
DESCRIBE = "Describe the picture."


@dataclass(frozen=True, order=True)
class Item:
    """One coloured shape in one cell."""

    cell: int
    colour: str
    shape: str

    @property
    def place(self) -> str:
        """The name of its cell."""
        return PLACES[self.cell]

    @property
    def name(self) -> str:
        """Colour and shape, which is also its label among `CELL_LABELS`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, order=True)
class Scene:
    """One or two items in different cells, in reading order: two scenes are equal when their items are."""

    items: tuple[Item, ...]

    def at(self, cell: int) -> Item | None:
        """Returns the item in a cell, if there is one."""
        return next((item for item in self.items if item.cell == cell), None)


@dataclass(frozen=True)
class Question:
    """A question on one scene, with its answer; its kind is one of `KINDS`."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A question together with the scene it is asked about."""

    scene: Scene
    kind: str
    question: str
    answer: str


def all_scenes() -> list[Scene]:
    """Lists every scene of one item, then every scene of two."""
    kinds = list(product(COLOURS, SHAPES))
    single = [Scene((Item(cell, *kind),)) for cell in range(len(PLACES)) for kind in kinds]
    double = [
        Scene((Item(first, *kind), Item(second, *other)))
        for first, second in combinations(range(len(PLACES)), 2)
        for kind, other in product(kinds, kinds)
    ]
    return single + double


def split_scenes(seed: int, held_out_share: float = 0.25) -> tuple[list[Scene], list[Scene]]:
    """Splits all scenes into disjoint (train, held-out) lists, with the same share of one-item scenes in both."""
    if not 0.0 < held_out_share < 1.0:
        raise ValueError(
            f"held_out_share is {held_out_share}, expected a share between 0 and 1. Give 0.25 to hold out a quarter."
        )
    rng = np.random.default_rng(seed)
    train: list[Scene] = []
    held_out: list[Scene] = []
    for num_items in (1, 2):
        scenes = [scene for scene in all_scenes() if len(scene.items) == num_items]
        order = rng.permutation(len(scenes))
        num_held_out = round(held_out_share * len(scenes))
        held_out += [scenes[i] for i in order[:num_held_out]]
        train += [scenes[i] for i in order[num_held_out:]]
    return train, held_out


def _is_shared(scene: Scene, attribute: str) -> bool:
    """Says whether two items have the same value, so that an answer would be right by the wrong item too."""
    values = [getattr(item, attribute) for item in scene.items]
    return len(set(values)) < len(values)


def _item_questions(scene: Scene) -> Iterator[Question]:
    """Colour, shape and place: each names one item by what is not asked; the other item's answer would be wrong."""
    for item in scene.items:
        if not _is_shared(scene, "colour"):
            yield Question("colour", f"What colour is the shape at the {item.place}?", item.colour)
            yield Question("shape", f"What shape is the {item.colour} one?", item.shape)
            yield Question("place", f"Where is the {item.colour} one?", item.place)
        if not _is_shared(scene, "shape"):
            yield Question("shape", f"What shape is at the {item.place}?", item.shape)
            yield Question("colour", f"What colour is the {item.shape}?", item.colour)
            yield Question("place", f"Where is the {item.shape}?", item.place)


def _count_questions(scene: Scene) -> Iterator[Question]:
    yield Question("count", "How many shapes are there?", COUNTS[len(scene.items) - 1])


def _yes_no_questions(scene: Scene) -> Iterator[Question]:
    for attribute, values, form in (
        ("colour", COLOURS, "Is there a {} shape?"),
        ("shape", SHAPES, "Is there a {}?"),
        ("place", PLACES, "Is there a shape at the {}?"),
    ):
        for value in values:
            is_there = any(getattr(item, attribute) == value for item in scene.items)
            yield Question("yes_no", form.format(value), "yes" if is_there else "no")


def questions_about(scene: Scene) -> list[Question]:
    """Lists every question that has one right answer in the scene."""
    return [*_item_questions(scene), *_count_questions(scene), *_yes_no_questions(scene)]


class QuestionBank:
    """All questions on a list of scenes, drawn so that the question's text says nothing about its answer."""

    def __init__(self, scenes: list[Scene]):
        """Groups the questions of the scenes by kind, text and answer.

        Args:
            scenes: The scenes to ask about, from `split_scenes`.
        """
        pools: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for scene in scenes:
            for question in questions_about(scene):
                pools[question.kind][question.text][question.answer].append(scene)
        self._pools: dict[str, dict[str, dict[str, list[Scene]]]] = pools
        for kind in KINDS:
            for text, by_answer in pools[kind].items():
                self._check_answers(kind, text, by_answer)

    def _check_answers(self, kind: str, text: str, by_answer: dict[str, list[Scene]]) -> None:
        """Checks that a question has a scene for each of its answers: otherwise its text would give answers away."""
        if len(by_answer) < NUM_ANSWERS[kind]:
            raise ValueError(
                f"{text!r} has only the answers {sorted(by_answer)} in these scenes, expected {NUM_ANSWERS[kind]}. "
                "Give more scenes, or another seed or share to split_scenes."
            )

    def _draw(self, kind: str, text: str, answer: str, rng: np.random.Generator) -> Sample:
        pool = self._pools[kind][text][answer]
        return Sample(pool[rng.integers(len(pool))], kind, text, answer)

    def sample(self, kind: str, rng: np.random.Generator) -> Sample:
        """Draws a question of this kind, then one of its answers, then a scene that has it."""
        texts = list(self._pools[kind])
        text = texts[rng.integers(len(texts))]
        answers = list(self._pools[kind][text])
        return self._draw(kind, text, answers[rng.integers(len(answers))], rng)

    def balanced(self, num_samples: int, rng: np.random.Generator) -> list[Sample]:
        """Draws samples in random order, the kinds equally often and, within each kind, the answers too."""
        samples = []
        for index, kind in enumerate(KINDS):
            num_of_kind = num_samples // len(KINDS) + (index < num_samples % len(KINDS))
            texts = list(self._pools[kind])
            num_answers = NUM_ANSWERS[kind]
            order = [texts[i] for i in rng.permutation(len(texts))]
            for i in range(num_of_kind):  # a question takes all its answers in turn before the next question comes
                text = order[i // num_answers % len(order)]
                answer = list(self._pools[kind][text])[i % num_answers]
                samples.append(self._draw(kind, text, answer, rng))
        return [samples[i] for i in rng.permutation(len(samples))]


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Says the scene in a sentence, in reading order, or in random order when a generator is given."""
    items = list(scene.items)
    if rng is not None:
        items = [items[i] for i in rng.permutation(len(items))]
    return " and ".join(f"a {item.name} at the {item.place}" for item in items)


def _word(scene: Scene, cell: int) -> str:
    item = scene.at(cell)
    return f"{PLACES[cell]} {item.name if item else EMPTY}".replace(" ", "-")


def cell_words(scene: Scene, cells: Sequence[int] = range(len(PLACES))) -> str:
    """Says the scene in one word per cell: where the cell is and what is in it.

    With `CELL_OF_PATCH` as the cells, this is the scene as a vision tower sees it, one word per patch.

    Args:
        scene: The scene to say.
        cells: Indices of the cells to say, in order.
    """
    return "".join(f" {_word(scene, cell)}" for cell in cells)


def cell_labels(scene: Scene) -> list[int]:
    """Returns, for each cell in reading order, the index of its content in `CELL_LABELS`."""
    return [CELL_LABELS.index(item.name) if (item := scene.at(cell)) else 0 for cell in range(len(PLACES))]


def patch_labels(scene: Scene) -> list[int]:
    """Returns, for each patch in reading order, the label of the cell it lies in."""
    labels = cell_labels(scene)
    return [labels[cell] for cell in CELL_OF_PATCH]


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Returns the corners of a square or a triangle; of a circle, the corners of its box."""
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
    if shape == "square":
        radius *= 0.88  # about the area of the circle: size must not tell the shape
    return [(x - radius, y - radius), (x + radius, y + radius)]


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws a scene; size, offset, tint, background and noise come from the generator."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(int(v) for v in rng.integers(200, 245, 3)))
    draw = ImageDraw.Draw(image)
    cell_size = IMAGE_SIZE / GRID
    for item in scene.items:
        radius = rng.uniform(7.0, 9.5)
        x, y = ((item.cell % GRID, item.cell // GRID) + rng.uniform(0.42, 0.58, 2)) * cell_size
        colour = tuple(int(v) for v in np.clip(np.array(COLOURS[item.colour]) + rng.integers(-20, 21, 3), 0, 255))
        outline = _outline(item.shape, x, y, radius)
        {"circle": draw.ellipse, "square": draw.rectangle, "triangle": draw.polygon}[item.shape](outline, fill=colour)
    noise = rng.normal(0.0, 6.0, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
