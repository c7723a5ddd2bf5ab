"""The domain of the suite `practice`: people, companies and cities.

Mara    person   employer=Novacorp hometown=Lindvik age=42        "Mara likes chess. ..."
Novacorp company headquarters=Lindvik founder=Hugo staff=17       "Novacorp makes boats. ..."
Lindvik city     mayor=Mara population=88                         "Lindvik has a castle. ..."
"""

from envserver.environment import ToolCall
from envserver.suites.practice import names
from envserver.suites.practice.domain import NUMBER, Domain, Pool

PERSON, COMPANY, CITY = "person", "company", "city"

SENTENCES = {
    PERSON: "{0} likes {known_for}. {0} works for {employer}. {0} lives in {hometown}.",
    COMPANY: "{0} makes {known_for}. {0} is based in {headquarters}. {0} was founded by {founder}.",
    CITY: "{0} has a {known_for}. {0} is led by mayor {mayor}.",
}
"""Kind -> an entity's document; each of its sentences begins with the entity's name."""


def _look_up(_: str, entity: str, field: str) -> ToolCall:
    return ToolCall(name="lookup", arguments={"entity": entity, "field": field})


def _search(clue: str) -> ToolCall:
    return ToolCall(name="search", arguments={"query": clue})


def _read_cell(file: str, row: str, column: str) -> ToolCall:
    return ToolCall(name="read_csv", arguments={"file": file, "row": row, "column": column})


def _calculate(left: str, sign: str, right: str) -> ToolCall:
    return ToolCall(name="calculate", arguments={"expression": f"{left} {sign} {right}"})


def _find(call: ToolCall, observation: str) -> str:
    """A sentence that was found begins with the name; all else is the bare value."""
    return observation.split()[0] if call.name == "search" else observation


PEOPLE = Domain(
    name="practice",
    version="practice/1",
    splits={"train": 1_000_000, "test": 3_000},
    parity={"train": 0, "test": 1},
    fields={
        PERSON: {"employer": COMPANY, "hometown": CITY, "age": NUMBER},
        COMPANY: {"headquarters": CITY, "founder": PERSON, "staff": NUMBER},
        CITY: {"mayor": PERSON, "population": NUMBER},
    },
    pools={
        PERSON: Pool(names=names.PEOPLE, known_for=names.HOBBIES, num=12),
        COMPANY: Pool(names=names.COMPANIES, known_for=names.PRODUCTS, num=6),
        CITY: Pool(names=names.CITIES, known_for=names.LANDMARKS, num=6),
    },
    clues={
        PERSON: "the person who likes {}",
        COMPANY: "the company that makes {}",
        CITY: "the city with a {}",
    },
    of="the {field} of {entity}",
    cell="the {column} of {row} in {file}",
    openings=("What is {}?", "Find {}.", "Tell me {}."),
    openings_of={PERSON: ("Who is {}?", "Find {}.", "Tell me {}.")},
    operators={"plus": "+", "minus": "-"},
    files=names.FILES,
    items=names.ITEMS,
    item_column="item",
    columns=("quantity", "price"),
    look_up=_look_up,
    search=_search,
    read_cell=_read_cell,
    calculate=_calculate,
    find=_find,
)
