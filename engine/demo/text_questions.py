"""Questions without a picture: the answer follows from the hint."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from engine.demo.draft import Draft, Kind, choose

NAMES = ("Ann", "Ben", "Eva", "Tom", "Sam", "Mia", "Leo", "Zoe")
TOWNS = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Tokyo", "Bern", "Delhi")
GOODS = (("pen", "cup"), ("hat", "book"), ("ball", "lamp"))
DRINKS = ("tea", "milk", "soup")
ANIMALS = {
    "mammal": ("dog", "cat", "horse"),
    "bird": ("owl", "duck", "eagle"),
    "fish": ("tuna", "shark", "cod"),
    "insect": ("fly", "bee", "wasp"),
}
TENSES = {"past": "{} {}ed to {}.", "present": "{} {}s to {}.", "future": "{} will {} to {}."}
SENTENCES = {"statement": "{} can {} to {}.", "question": "Can {} {} to {}?", "command": "{}, {} to {}!"}
VERBS = ("walk", "sail", "turn", "return", "jump", "march", "row", "travel")

HEAT = Kind(
    subject="natural science", topic="physics", category="Heat", skill="Compare temperatures",
    grades=(3, 8), lecture="More degrees mean warmer.",
)  # fmt: skip
ANIMAL = Kind(
    subject="natural science", topic="biology", category="Animals", skill="Classify animals",
    grades=(1, 6), lecture="Animals come in groups.",
)  # fmt: skip
HOME = Kind(
    subject="social science", topic="geography", category="Towns", skill="Read a text about towns",
    grades=(2, 9), lecture="Read the context.",
)  # fmt: skip
PRICE = Kind(
    subject="social science", topic="economics", category="Prices", skill="Compare prices",
    grades=(5, 12), lecture="Compare the two prices.",
)  # fmt: skip
TENSE = Kind(
    subject="language science", topic="verbs", category="Tenses", skill="Name the tense of a verb",
    grades=(1, 7), lecture="A verb tells when.",
)  # fmt: skip
SENTENCE = Kind(
    subject="language science", topic="grammar", category="Sentences", skill="Name the kind of a sentence",
    grades=(2, 12), lecture="Look at the last sign.",
)  # fmt: skip


def heat(rng: Random) -> Draft:
    things, answer = choose(rng, DRINKS, 2, 3)
    degrees = sorted(rng.sample(range(1, 10), len(things)))
    warm = rng.random() < 0.5
    extreme = degrees.pop(-1 if warm else 0)
    rng.shuffle(degrees)
    degrees.insert(answer, extreme)
    word = "warmest" if warm else "coldest"
    told = ", ".join(f"{thing} at {degree}0 degrees" for thing, degree in zip(things, degrees, strict=True))
    return Draft(
        kind=HEAT, question=f"Which is the {word}?", choices=things, answer=answer,
        hint=f"{rng.choice(NAMES)} has {told}.", solution=f"The {things[answer]} is the {word}.",
    )  # fmt: skip


def animal(rng: Random) -> Draft:
    groups, answer = choose(rng, list(ANIMALS), 2, 4)
    name = rng.choice(ANIMALS[groups[answer]])
    return Draft(
        kind=ANIMAL, question="What kind of animal is it?", choices=groups, answer=answer,
        hint=f"{rng.choice(NAMES)} sees a {name} in {rng.choice(TOWNS)}.",
        solution=f"A {name} is of the kind {groups[answer]}.",
    )  # fmt: skip


def home(rng: Random) -> Draft:
    """Either the towns are the choices or the people are."""
    who = rng.random() < 0.5
    choices, answer = choose(rng, NAMES if who else TOWNS, 2, 4)
    person, town = (choices[answer], rng.choice(TOWNS)) if who else (rng.choice(NAMES), choices[answer])
    verb, thing = rng.choice(("owns", "likes", "sells")), rng.choice([good for pair in GOODS for good in pair])
    return Draft(
        kind=HOME, question=f"Who lives in {town}?" if who else f"Where does {person} live?",
        choices=choices, answer=answer, hint=f"{person} lives in {town} and {verb} a {thing}.",
        solution=f"{person} lives in {town}.",
    )  # fmt: skip


def price(rng: Random) -> Draft:
    goods, answer = choose(rng, rng.choice(GOODS), 2, 2)
    low, high = sorted(rng.sample(range(1, 10), 2))
    most = rng.random() < 0.5
    dollars = [high if (k == answer) == most else low for k in range(2)]
    word = "more" if most else "less"
    told = " and ".join(f"a {thing} for {dollar} dollars" for thing, dollar in zip(goods, dollars, strict=True))
    return Draft(
        kind=PRICE, question=f"Which costs {word}?", choices=goods, answer=answer,
        hint=f"{rng.choice(NAMES)} sees {told}.", solution=f"The {goods[answer]} costs {word}.",
    )  # fmt: skip


def tense(rng: Random) -> Draft:
    choices, answer = choose(rng, list(TENSES), 2, 3)
    return Draft(
        kind=TENSE, question="When does it happen?", choices=choices, answer=answer,
        hint=TENSES[choices[answer]].format(*_words(rng)), solution=f"The verb is in the {choices[answer]}.",
    )  # fmt: skip


def sentence(rng: Random) -> Draft:
    choices, answer = choose(rng, list(SENTENCES), 2, 3)
    return Draft(
        kind=SENTENCE, question="What kind of sentence is it?", choices=choices, answer=answer,
        hint=SENTENCES[choices[answer]].format(*_words(rng)), solution=f"The sentence is a {choices[answer]}.",
    )  # fmt: skip


def _words(rng: Random) -> Sequence[str]:
    return rng.choice(NAMES), rng.choice(VERBS), rng.choice(TOWNS)


TEXT_QUESTIONS = (heat, animal, home, price, tense, sentence)
