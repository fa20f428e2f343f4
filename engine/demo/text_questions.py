"""Questions without a picture: the answer stands in the hint, or is something that the small model knows."""

from __future__ import annotations

from random import Random

from engine.demo.draft import Draft, Kind

NAMES = ("Ann", "Ben", "Eva", "Tom", "Sam", "Mia")
TOWNS = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Tokyo")
GOODS = ("pen", "cup", "hat", "book", "ball", "lamp")
DRINKS = ("tea", "milk", "soup", "juice", "water")
ANIMALS = {
    "mammal": ("dog", "cat", "horse"),
    "bird": ("owl", "duck", "eagle"),
    "fish": ("tuna", "shark", "cod"),
    "insect": ("ant", "bee", "fly"),
}
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"),
    ("wet", "dry"), ("hard", "soft"), ("old", "new"), ("happy", "sad"),
)
WORDS = tuple(sorted({word for words in ANIMALS.values() for word in words} | {word for pair in OPPOSITES for word in pair}))

HEAT = Kind(
    subject="natural science", topic="physics", category="Heat", skill="Compare temperatures",
    grades=(3, 8), lecture="More degrees mean warmer.",
)
ANIMAL = Kind(
    subject="natural science", topic="biology", category="Animals", skill="Classify animals",
    grades=(1, 6), lecture="Animals come in groups.",
)
HOME = Kind(
    subject="social science", topic="geography", category="Towns", skill="Read a text about towns",
    grades=(2, 9), lecture="Read the context.",
)
PRICE = Kind(
    subject="social science", topic="economics", category="Prices", skill="Compare prices",
    grades=(5, 12), lecture="Compare the two prices.",
)
OPPOSITE = Kind(
    subject="language science", topic="vocabulary", category="Opposites", skill="Find the opposite",
    grades=(1, 7), lecture="Opposites mean the reverse.",
)
ORDER = Kind(
    subject="language science", topic="reference skills", category="Dictionary", skill="Order words",
    grades=(2, 12), lecture="Look at the first letter.",
)


def heat(rng: Random) -> Draft:
    things = rng.sample(DRINKS, rng.randint(2, 3))
    degrees = rng.sample(range(1, 10), len(things))
    warm = rng.random() < 0.5
    answer = degrees.index(max(degrees) if warm else min(degrees))
    word = "warmest" if warm else "coldest"
    told = list(zip(things, degrees, strict=True))
    rng.shuffle(told)
    return Draft(
        kind=HEAT, question=f"Which is the {word}?", choices=tuple(things), answer=answer,
        hint=" ".join(f"The {thing} is at {degree}0 degrees." for thing, degree in told),
        solution=f"The {things[answer]} is the {word}.",
    )


def animal(rng: Random) -> Draft:
    group = rng.choice(list(ANIMALS))
    right = rng.choice(ANIMALS[group])
    wrong = [name for other, names in ANIMALS.items() if other != group for name in names]
    choices = [right, *rng.sample(wrong, rng.randint(1, 4))]
    rng.shuffle(choices)
    article = "an" if group == "insect" else "a"
    return Draft(
        kind=ANIMAL, question=f"Which animal is {article} {group}?", choices=tuple(choices), answer=choices.index(right),
        solution=f"The {right} is {article} {group}.",
    )


def home(rng: Random) -> Draft:
    number = rng.randint(2, 3)
    people, towns = rng.sample(NAMES, number), rng.sample(TOWNS, number)
    asked = rng.randrange(number)
    who = rng.random() < 0.5
    right = people[asked] if who else towns[asked]
    choices = people[:] if who else towns[:]
    rng.shuffle(choices)
    return Draft(
        kind=HOME, question=f"Who lives in {towns[asked]}?" if who else f"Where does {people[asked]} live?",
        choices=tuple(choices), answer=choices.index(right),
        hint=" ".join(f"{person} lives in {town}." for person, town in zip(people, towns, strict=True)),
        solution=f"{people[asked]} lives in {towns[asked]}.",
    )


def price(rng: Random) -> Draft:
    goods = rng.sample(GOODS, 2)
    dollars = rng.sample(range(1, 10), 2)
    most = rng.random() < 0.5
    answer = dollars.index(max(dollars) if most else min(dollars))
    word = "more" if most else "less"
    told = list(zip(goods, dollars, strict=True))
    rng.shuffle(told)
    return Draft(
        kind=PRICE, question=f"Which costs {word}?", choices=tuple(goods), answer=answer,
        hint=" ".join(f"A {thing} costs {dollar} dollars." for thing, dollar in told),
        solution=f"The {goods[answer]} costs {word}.",
    )


def opposite(rng: Random) -> Draft:
    pair = rng.sample(rng.choice(OPPOSITES), 2)
    others = [word for other in OPPOSITES for word in other if word not in pair]
    choices = [pair[1], *rng.sample(others, rng.randint(1, 4))]
    rng.shuffle(choices)
    return Draft(
        kind=OPPOSITE, question=f"What is the opposite of {pair[0]}?", choices=tuple(choices),
        answer=choices.index(pair[1]), solution=f"The opposite of {pair[0]} is {pair[1]}.",
    )


def order(rng: Random) -> Draft:
    number = rng.randint(2, 4)
    initials = rng.sample(sorted({word[0] for word in WORDS}), number)
    choices = [rng.choice([word for word in WORDS if word[0] == initial]) for initial in initials]
    answer = initials.index(min(initials))
    return Draft(
        kind=ORDER, question="Which word comes first in the dictionary?", choices=tuple(choices), answer=answer,
        solution=f"The word {choices[answer]} comes first.",
    )


TEXT_QUESTIONS = (heat, animal, home, price, opposite, order)
