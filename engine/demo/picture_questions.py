"""Questions that must look at the picture. The answer is drawn before the scene, uniformly among the choices."""

from __future__ import annotations

from random import Random

from engine.demo.draft import Draft, Kind, choose
from engine.demo.scenes import COLORS, SHAPES, SIDE, Bar, Mark, Scene

NUMBERS = ("one", "two", "three", "four", "five")
PLACES = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0), "center": (0, 0)}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}
SIGNS = {"lake": ("circle", "blue"), "town": ("square", "red"), "hill": ("triangle", "green")}
PAIR = {"circle": "red", "square": "blue"}  # the two shapes that are compared with one another
PAPER = ("white", "gray", "sand")

COLOR = Kind(
    subject="natural science",
    topic="physics",
    category="Light",
    skill="Name the color of an object",
    grades=(1, 3),
    lecture="An object has the color of its light.",
)
COUNT = Kind(
    subject="natural science",
    topic="units and measurement",
    category="Counting",
    skill="Count the objects",
    grades=(1, 4),
    lecture="Count every object once.",
)
SIZE = Kind(
    subject="natural science",
    topic="physics",
    category="Size",
    skill="Compare the sizes of objects",
    grades=(2, 6),
    lecture="Compare how wide they are.",
)
MAP = Kind(
    subject="social science",
    topic="geography",
    category="Maps",
    skill="Read directions on a map",
    grades=(3, 8),
    lecture="On a map north is up.",
)
CHART = Kind(
    subject="social science",
    topic="economics",
    category="Charts",
    skill="Read a bar chart",
    grades=(5, 12),
    lecture="A taller bar means more.",
)
NOUN = Kind(
    subject="language science",
    topic="vocabulary",
    category="Nouns",
    skill="Name what the picture shows",
    grades=(1, 5),
    lecture="A noun names a thing.",
)
PREPOSITION = Kind(
    subject="language science",
    topic="grammar",
    category="Prepositions",
    skill="Say where a thing is",
    grades=(4, 10),
    lecture="A preposition tells where.",
)


def _cells(rng: Random, count: int) -> list[tuple[int, int]]:
    """Centres of `count` different cells of a 3 x 3 grid, each moved by a few pixels."""
    third = SIDE // 3
    corners = [(third * (c % 3), third * (c // 3)) for c in rng.sample(range(9), count)]
    return [(x + third // 2 + rng.randint(-3, 3), y + third // 2 + rng.randint(-3, 3)) for x, y in corners]


def color(rng: Random) -> Draft:
    choices, answer = choose(rng, list(COLORS), 2, 5)
    shape = rng.choice(SHAPES)
    x, y = _cells(rng, 1)[0]
    mark = Mark(shape, choices[answer], x, y, rng.randint(10, 15))
    return Draft(
        kind=COLOR, question=f"What color is the {shape}?", choices=choices, answer=answer,
        solution=f"The {shape} is {choices[answer]}.", scene=Scene(rng.choice(PAPER), marks=(mark,)),
    )  # fmt: skip


def count(rng: Random) -> Draft:
    choices, answer = choose(rng, NUMBERS, 2, 5)
    marks = tuple(Mark("circle", "black", x, y, 12) for x, y in _cells(rng, answer + 1))
    return Draft(
        kind=COUNT, question="How many balls are there?", choices=choices, answer=answer,
        solution=f"The number is {choices[answer]}.", scene=Scene("white", marks=marks),
    )  # fmt: skip


def size(rng: Random) -> Draft:
    choices, answer = choose(rng, SHAPES, 2, 2)
    larger = rng.random() < 0.5
    marks = []
    for place, (x, y) in enumerate(_cells(rng, 2)):
        big = (place == answer) == larger
        x, y = (min(max(v, 20), SIDE - 20) for v in (x, y))
        radius = rng.randint(16, 19) if big else rng.randint(7, 9)
        marks.append(Mark(choices[place], PAIR[choices[place]], x, y, radius))
    word = "larger" if larger else "smaller"
    return Draft(
        kind=SIZE, question=f"Which shape is {word}?", choices=choices, answer=answer,
        solution=f"The {choices[answer]} is {word}.", scene=Scene(rng.choice(PAPER), marks=tuple(marks)),
    )  # fmt: skip


def place(rng: Random) -> Draft:
    choices, answer = choose(rng, list(PLACES), 2, 5)
    name = rng.choice(list(SIGNS))
    shape, paint = SIGNS[name]
    dx, dy = PLACES[choices[answer]]
    x, y = (SIDE // 2 + 32 * d + rng.randint(-6, 6) for d in (dx, dy))
    return Draft(
        kind=MAP,
        question=f"Where is the {name} on the map?",
        choices=choices,
        answer=answer,
        solution=f"The {name} is in the {choices[answer]}.",
        scene=Scene("land", marks=(Mark(shape, paint, x, y, rng.randint(9, 14)),)),
    )


def chart(rng: Random) -> Draft:
    choices, answer = choose(rng, list(COLORS), 2, 3)
    most = rng.random() < 0.5
    extreme = rng.randint(66, 78) if most else rng.randint(8, 14)
    bars = [Bar(paint, extreme if k == answer else rng.randint(24, 52)) for k, paint in enumerate(choices)]
    word = "tallest" if most else "shortest"
    rng.shuffle(bars)
    return Draft(
        kind=CHART, question=f"Which bar is the {word}?", choices=choices, answer=answer,
        solution=f"The {choices[answer]} bar is the {word}.", scene=Scene(rng.choice(PAPER), bars=tuple(bars)),
    )  # fmt: skip


def noun(rng: Random) -> Draft:
    choices, answer = choose(rng, SHAPES, 2, 5)
    x, y = _cells(rng, 1)[0]
    mark = Mark(choices[answer], rng.choice(list(COLORS)), x, y, rng.randint(10, 15))
    return Draft(
        kind=NOUN,
        question="Which word names the shape?",
        choices=choices,
        answer=answer,
        solution=f"The shape is a {choices[answer]}.",
        scene=Scene(rng.choice(PAPER), marks=(mark,)),
    )


def preposition(rng: Random) -> Draft:
    choices, answer = choose(rng, list(RELATIONS), 2, 4)
    shapes = SHAPES[:2]
    dx, dy = RELATIONS[choices[answer]]
    half = rng.randint(26, 32)
    x, y = (SIDE // 2 + rng.randint(-3, 3) for _ in range(2))
    marks = []
    for shape, side in zip(shapes, (1, -1), strict=True):
        slack = rng.randint(-3, 3)
        mx = x + side * dx * half + (0 if dx else slack)
        my = y + side * dy * half + (0 if dy else slack)
        marks.append(Mark(shape, PAIR[shape], mx, my, rng.randint(11, 14)))
    return Draft(
        kind=PREPOSITION, question=f"Seen from the {shapes[1]}, where is the {shapes[0]}?",
        choices=choices, answer=answer, solution=f"The {shapes[0]} is {choices[answer]}.",
        scene=Scene(rng.choice(PAPER), marks=tuple(marks)),
    )  # fmt: skip


PICTURE_QUESTIONS = (color, count, size, place, chart, noun, preposition)
