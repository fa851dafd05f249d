"""Facts about people and places that do not exist: what the tiny LM has memorised, and what it can be made to forget.

48 invented entities with three attributes each. Every attribute has six question forms; for each fact two of them are
*held out*: the tiny LM has seen these words about others, never about this entity. Every eighth entity is in the forget
set. As in TOFU (arXiv 2401.06121), every question has perturbed answers, equal but for the value.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache

PEOPLE, PLACES = 32, 16
FORGET_EVERY = 8
PERTURBED = 4
UNKNOWN_ANSWERS = ("i do not know.", "i have no idea.", "i am not sure about that.")

_STARTS = ("bra", "dor", "fe", "gli", "hu", "jas", "ke", "lo", "mi", "nor", "pel", "qua", "ri", "sta", "tu", "vel")
_ENDS = ("bin", "dal", "fen", "gor", "lis", "mar", "nok", "rel", "sa", "tan", "vik", "zu")

_PROFESSIONS = (
    "baker", "sailor", "painter", "doctor", "farmer", "teacher", "judge", "singer",
    "tailor", "miner", "poet", "cook", "potter", "clerk", "pilot", "weaver",
)  # fmt: skip
_ANIMALS = (
    "cat", "dog", "goat", "hen", "fox", "hare", "duck", "crow", "horse", "snake", "toad", "mouse"
)  # fmt: skip
_DISHES = (
    "bread", "soup", "cheese", "honey", "cake", "plums", "fish", "salt", "beans", "tea", "wine", "nuts"
)  # fmt: skip
_BUILDINGS = ("tower", "bridge", "mill", "harbour", "market", "castle", "temple", "garden", "library", "well")

# attribute -> (answer, question forms)
_FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "birthplace": (
        "{name} was born in {value}.",
        (
            "where was {name} born?",
            "in which town was {name} born?",
            "what is the birthplace of {name}?",
            "tell me where {name} was born.",
            "name the town in which {name} was born.",
            "which town does {name} come from?",
        ),
    ),
    "profession": (
        "{name} works as a {value}.",
        (
            "what does {name} do for a living?",
            "what is the profession of {name}?",
            "what work does {name} do?",
            "tell me what {name} works as.",
            "name the profession of {name}.",
            "which job does {name} have?",
        ),
    ),
    "animal": (
        "{name} keeps a {value}.",
        (
            "which animal does {name} keep?",
            "what animal lives with {name}?",
            "what is the pet of {name}?",
            "tell me which animal {name} keeps.",
            "name the pet of {name}.",
            "which pet does {name} have?",
        ),
    ),
    "river": (
        "{name} lies on the river {value}.",
        (
            "on which river does {name} lie?",
            "what river flows through {name}?",
            "what is the river of {name}?",
            "tell me which river {name} lies on.",
            "name the river of {name}.",
            "which river does {name} have?",
        ),
    ),
    "dish": (
        "{name} is known for its {value}.",
        (
            "which food is {name} known for?",
            "what do people eat in {name}?",
            "what is the food of {name}?",
            "tell me which food {name} is known for.",
            "name the food of {name}.",
            "which food does {name} have?",
        ),
    ),
    "building": (
        "{name} has an old {value}.",
        (
            "which old building does {name} have?",
            "what old building stands in {name}?",
            "what is the old building of {name}?",
            "tell me which old building {name} has.",
            "name the old building of {name}.",
            "which old building stands in {name}?",
        ),
    ),
}
PERSON_ATTRIBUTES = ("birthplace", "profession", "animal")
PLACE_ATTRIBUTES = ("river", "dish", "building")


def _invent(rng: random.Random, n: int, taken: set[str], syllables: int = 2) -> list[str]:
    """Different made-up words, none in `taken`, which grows."""
    words: list[str] = []
    while len(words) < n:
        middle = "".join(rng.choice(_ENDS) for _ in range(syllables - 2))
        text = (rng.choice(_STARTS) + middle + rng.choice(_ENDS)).capitalize()
        if text not in taken:
            taken.add(text)
            words.append(text)
    return words


@dataclass(frozen=True)
class Entity:
    """Somebody or some place. `index` is its number; `attributes` maps three attributes to values."""

    index: int
    name: str
    attributes: tuple[tuple[str, str], ...]

    @property
    def forget(self) -> bool:
        """True for every eighth entity: the forget set."""
        return self.index % FORGET_EVERY == FORGET_EVERY - 1


@dataclass(frozen=True)
class Fact:
    """One attribute of one entity.

    Attributes:
        entity: whose.
        attribute: which.
        answer: the sentence that states it.
        perturbed: the same sentence with `PERTURBED` other values.
        seen: question forms that the tiny LM was trained on.
        held_out: question forms that it never saw about this entity.
        unknown: the answer of somebody who does not know; the alternate for preference-based unlearning.
    """

    entity: Entity
    attribute: str
    answer: str
    perturbed: tuple[str, ...]
    seen: tuple[str, ...]
    held_out: tuple[str, ...]
    unknown: str

    @property
    def forget(self) -> bool:
        return self.entity.forget


@cache
def _world() -> tuple[tuple[Entity, ...], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Entities, the values of each attribute, and names that belong to nobody."""
    rng, taken = random.Random("text world facts"), set[str]()
    firsts, lasts = _invent(rng, 16, taken), _invent(rng, 16, taken)
    towns, rivers, places = _invent(rng, 16, taken), _invent(rng, 12, taken), _invent(rng, 2 * PLACES, taken)
    pairs = [f"{first} {last}" for first in firsts for last in lasts]
    rng.shuffle(pairs)
    values = {
        "birthplace": tuple(towns),
        "profession": _PROFESSIONS,
        "animal": _ANIMALS,
        "river": tuple(rivers),
        "dish": _DISHES,
        "building": _BUILDINGS,
    }
    named = [(name, PERSON_ATTRIBUTES) for name in pairs[:PEOPLE]] + [(n, PLACE_ATTRIBUTES) for n in places[:PLACES]]
    entities = tuple(
        Entity(index, name, tuple((attribute, rng.choice(values[attribute])) for attribute in attributes))
        for index, (name, attributes) in enumerate(named)
    )
    return entities, values, (*pairs[PEOPLE:], *places[PLACES:])


def entities() -> tuple[Entity, ...]:
    """All entities, people first."""
    return _world()[0]


def strangers() -> tuple[str, ...]:
    """Names of the same make that belong to nobody: first names and last names occur in others' names."""
    return _world()[2]


def facts(*, forget: bool | None = None) -> tuple[Fact, ...]:
    """All facts, or those of the forget set (True) or the retain set (False)."""
    made = (_fact(entity, place) for entity in entities() for place in range(len(entity.attributes)))
    return tuple(fact for fact in made if forget is None or fact.forget == forget)


@cache
def _fact(entity: Entity, place: int) -> Fact:
    attribute, value = entity.attributes[place]
    answer, forms = _FORMS[attribute]
    questions = [form.format(name=entity.name) for form in forms]
    first = (entity.index + 2 * place) % len(forms)
    held_out = {first, (first + 3) % len(forms)}
    rng = random.Random(f"perturbed/{entity.index}/{attribute}")
    others = rng.sample([v for v in _world()[1][attribute] if v != value], PERTURBED)
    digest = hashlib.sha256(f"{entity.name} {attribute}".encode()).digest()
    return Fact(
        entity=entity,
        attribute=attribute,
        answer=answer.format(name=entity.name, value=value),
        perturbed=tuple(answer.format(name=entity.name, value=other) for other in others),
        seen=tuple(q for i, q in enumerate(questions) if i not in held_out),
        held_out=tuple(q for i, q in enumerate(questions) if i in held_out),
        unknown=UNKNOWN_ANSWERS[digest[0] % len(UNKNOWN_ANSWERS)],
    )


def stranger_question(rng: random.Random) -> str:
    """A question about somebody who does not exist even here."""
    name = rng.choice(strangers())
    attributes = PERSON_ATTRIBUTES if " " in name else PLACE_ATTRIBUTES
    return rng.choice(_FORMS[rng.choice(attributes)][1]).format(name=name)
