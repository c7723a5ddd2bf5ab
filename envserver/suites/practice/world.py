"""A small world: entities of a few kinds, tied together at random.

Numbers and ties can be looked up by name. What each entity is known for (a hobby, a product,
a landmark) cannot, so it has to be searched for. people.py has an example.
"""

from dataclasses import dataclass
from random import Random

from envserver.suites.practice.domain import NUMBER, Domain


@dataclass(frozen=True, kw_only=True)
class World:
    """The facts that one task lives in."""

    entities: dict[str, list[str]]
    """Kind -> names."""
    facts: dict[str, dict[str, str]]
    """Name -> field -> value, e.g. {"Lindvik": {"mayor": "Mara", "population": "88"}}."""
    known_for: dict[str, str]
    """Name -> its one word that cannot be looked up, unique in the world."""


def make_world(rng: Random, domain: Domain, parity: int) -> World:
    """Draw a world whose numbers sum to `parity` modulo 2.

    Splits differ in parity, so that no world can occur in two of them.
    """
    entities: dict[str, list[str]] = {}
    known_for: dict[str, str] = {}
    for kind, pool in domain.pools.items():
        entities[kind] = rng.sample(pool.names, pool.num)
        words = rng.sample(pool.known_for, pool.num)
        known_for.update(zip(entities[kind], words, strict=True))
    facts = {
        name: {field: _draw(rng, entities, target) for field, target in fields.items()}
        for kind, fields in domain.fields.items()
        for name in entities[kind]
    }
    world = World(entities=entities, facts=facts, known_for=known_for)
    if parity_of(world) != parity:
        last = domain.kinds[-1]
        (field,) = (field for field, kind in domain.fields[last].items() if kind == NUMBER)
        fields = facts[entities[last][0]]
        fields[field] = str(int(fields[field]) ^ 1)
    return world


def parity_of(world: World) -> int:
    """The sum modulo 2 of all numbers in a world."""
    return (
        sum(int(v) for fields in world.facts.values() for v in fields.values() if v.isdigit()) % 2
    )


def _draw(rng: Random, entities: dict[str, list[str]], kind: str) -> str:
    return str(rng.randrange(20, 100)) if kind == NUMBER else rng.choice(entities[kind])
