"""The domain of the suite `practice-transfer`: rivers, lakes and peaks.

    Aldern   river  source=Graukopf mouth=Ellmere length=42     shelters otters
    Ellmere  lake   outlet=Aldern lookout=Graukopf depth=17     grows reeds
    Graukopf peak   torrent=Aldern height=88                    yields quartz

No name, field, tool, argument or other word of it that carries meaning occurs in `practice`.
"""

from envserver.environment import ToolCall
from envserver.suites.practice.domain import NUMBER, Domain, Pool

RIVER, LAKE, PEAK = "river", "lake", "peak"
MODES = {"+": "add", "-": "subtract"}
"""Sign -> what the tool `combine` calls it."""
SEPARATOR = " | "
"""Stands before what a result says; what was asked for stands before it."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_RIVERS = _words(
    """
    Aldern Brisca Corvel Drishna Elmora Fennick Galdra Hespa Ilvane Jorrin Kelva Lorsk Morva
    Nethys Orrin Pravla Quillan Rethel Sorva Tamsel Ulver Vessna Wendrel Yarrow
    """
)
_LAKES = _words(
    """
    Ambermere Bascowater Coldmere Duskwater Ellmere Foxmere Greywater Hollowmere Ironmere
    Juniperwater Kingmere Longwater Mossmere Nightwater Oxmere Palewater
    """
)
_PEAKS = _words(
    """
    Altspitz Breithorn Cairnfell Dornkogel Eiskogel Felsberg Graukopf Hochnadel Isenfell
    Jochspitz Kahlfell Lochnadel Mittelhorn Nebelkopf Ostnadel Piznair
    """
)
_ANIMALS = _words(
    """
    otters herons beavers salmon dippers crayfish trout kingfishers newts frogs turtles eels
    swans minnows cranes perch
    """
)
_PLANTS = _words("reeds lilies rushes sedges willows cress irises alders")
_MINERALS = _words("quartz granite slate basalt marble copper garnet zinc")


def _look_up(kind: str, entity: str, field: str) -> ToolCall:
    arguments = {"category": kind, "subject": entity, "property": field}
    return ToolCall(name="atlas", arguments=arguments)


def _search(clue: str) -> ToolCall:
    return ToolCall(name="sightings", arguments={"sign": clue})


def _read_cell(file: str, row: str, column: str) -> ToolCall:
    return ToolCall(name="gauge", arguments={"sheet": file, "hour": row, "reading": column})


def _calculate(left: str, sign: str, right: str) -> ToolCall:
    arguments = {"mode": MODES[sign], "left": int(left), "right": int(right)}
    return ToolCall(name="combine", arguments=arguments)


def _find(_: ToolCall, observation: str) -> str:
    return observation.rpartition(SEPARATOR)[2]


WATERS = Domain(
    name="practice-transfer",
    version="practice-transfer/1",
    splits={"test": 3_000},
    parity={"test": 1},
    fields={
        RIVER: {"source": PEAK, "mouth": LAKE, "length": NUMBER},
        LAKE: {"outlet": RIVER, "lookout": PEAK, "depth": NUMBER},
        PEAK: {"torrent": RIVER, "height": NUMBER},
    },
    pools={
        RIVER: Pool(names=_RIVERS, known_for=_ANIMALS, num=12),
        LAKE: Pool(names=_LAKES, known_for=_PLANTS, num=6),
        PEAK: Pool(names=_PEAKS, known_for=_MINERALS, num=6),
    },
    clues={
        RIVER: "whichever river shelters {}",
        LAKE: "whichever lake grows {}",
        PEAK: "whichever peak yields {}",
    },
    of="the {field} belonging to {entity}",
    cell="the {column} at {row} according to {file}",
    openings=("Report {}.", "Determine {}.", "How much is {}?"),
    openings_of=dict.fromkeys((RIVER, LAKE, PEAK), ("Report {}.", "Determine {}.", "State {}.")),
    operators={"increased by": "+", "reduced by": "-"},
    files=("buoy.tsv", "weir.tsv", "dam.tsv"),
    items=_words("dawn sunrise forenoon noon teatime sunset dusk midnight"),
    item_column="hour",
    columns=("rainfall", "wind"),
    look_up=_look_up,
    search=_search,
    read_cell=_read_cell,
    calculate=_calculate,
    find=_find,
)
