"""A small world: people, companies and cities, tied together at random.

Numbers and ties can be looked up by name. What each entity is known for (a hobby, a product,
a landmark) stands only in its document, so it has to be searched for:

    Mara    person   employer=Novacorp hometown=Lindvik age=42        "Mara likes chess. ..."
    Novacorp company headquarters=Lindvik founder=Hugo staff=17       "Novacorp makes boats. ..."
    Lindvik city     mayor=Mara population=88                         "Lindvik has a castle. ..."
"""

from dataclasses import dataclass
from random import Random

from envserver.suites.practice import names

PERSON, COMPANY, CITY, NUMBER = "person", "company", "city", "number"
KINDS = (PERSON, COMPANY, CITY)

FIELDS: dict[str, dict[str, str]] = {
    PERSON: {"employer": COMPANY, "hometown": CITY, "age": NUMBER},
    COMPANY: {"headquarters": CITY, "founder": PERSON, "staff": NUMBER},
    CITY: {"mayor": PERSON, "population": NUMBER},
}
"""Kind of entity -> its fields -> the kind of each field's value."""

_POOLS = {
    PERSON: (names.PEOPLE, names.HOBBIES, 12),
    COMPANY: (names.COMPANIES, names.PRODUCTS, 6),
    CITY: (names.CITIES, names.LANDMARKS, 6),
}
"""Kind -> pool of names, pool of what they are known for, how many a world has."""

_SENTENCES = {
    PERSON: "{0} likes {known_for}. {0} works for {employer}. {0} lives in {hometown}.",
    COMPANY: "{0} makes {known_for}. {0} is based in {headquarters}. {0} was founded by {founder}.",
    CITY: "{0} has a {known_for}. {0} is led by mayor {mayor}.",
}


@dataclass(frozen=True, kw_only=True)
class World:
    """The facts that one task lives in."""

    entities: dict[str, list[str]]
    """Kind -> names."""
    facts: dict[str, dict[str, str]]
    """Name -> field -> value, e.g. {"Lindvik": {"mayor": "Mara", "population": "88"}}."""
    known_for: dict[str, str]
    """Name -> its one word that only its document holds, unique in the world."""

    def documents(self) -> list[str]:
        """One short document per entity; each of its sentences begins with the entity's name."""
        return [
            _SENTENCES[kind].format(name, known_for=self.known_for[name], **self.facts[name])
            for kind in KINDS
            for name in self.entities[kind]
        ]


def make_world(rng: Random, parity: int) -> World:
    """Draw a world whose numbers sum to `parity` modulo 2.

    Splits differ in parity, so that no world can occur in two of them.
    """
    entities: dict[str, list[str]] = {}
    known_for: dict[str, str] = {}
    for kind, (pool, words, num) in _POOLS.items():
        entities[kind] = rng.sample(pool, num)
        known_for.update(zip(entities[kind], rng.sample(words, num), strict=True))
    facts = {
        name: {field: _draw(rng, entities, target) for field, target in FIELDS[kind].items()}
        for kind in KINDS
        for name in entities[kind]
    }
    world = World(entities=entities, facts=facts, known_for=known_for)
    if parity_of(world) != parity:
        city = facts[entities[CITY][0]]
        city["population"] = str(int(city["population"]) ^ 1)
    return world


def parity_of(world: World) -> int:
    """The sum modulo 2 of all numbers in a world."""
    return (
        sum(int(v) for fields in world.facts.values() for v in fields.values() if v.isdigit()) % 2
    )


def _draw(rng: Random, entities: dict[str, list[str]], kind: str) -> str:
    return str(rng.randrange(20, 100)) if kind == NUMBER else rng.choice(entities[kind])
