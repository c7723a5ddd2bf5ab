"""The four tools of the transfer suite: what the policy sees of them, and what they do.

A result repeats what was asked for, and ends with what was found: `Ellmere | depth | 17`.
"""

from collections.abc import Callable, Sequence

from envserver.environment import ToolSpec
from envserver.suites.practice.attachment import Attachment
from envserver.suites.practice.tools import TaskTools, read_cell
from envserver.suites.practice.world import World
from envserver.suites.transfer.waters import MODES, SEPARATOR, WATERS
from envserver.tools.tool import describe

MAX_MAGNITUDE = 10**12


TOOLS: Sequence[ToolSpec] = (
    describe(
        "atlas",
        "Consult the atlas about a property of a river, lake or peak.",
        category="river, lake or peak",
        subject="What it is called",
        property="source, mouth or length of a river; outlet, lookout or depth of a lake; torrent"
        " or height of a peak",
    ),
    describe(
        "sightings",
        "Say where this animal, plant or mineral was seen.",
        sign="The animal, plant or mineral",
    ),
    describe(
        "gauge",
        "Take a reading from the sheet accompanying this question.",
        sheet="What the sheet is called",
        hour="Hour of the reading",
        reading="rainfall or wind",
    ),
    describe(
        "combine",
        "Add or subtract integers.",
        integers={"left": "Left integer", "right": "Right integer"},
        mode="add or subtract",
    ),
)


class Instruments(TaskTools):
    """The tools, bound to a task's world and sheet."""

    def __init__(self, world: World, sheet: Attachment | None) -> None:
        self._world = world
        self._sheet = sheet
        self._places = {clue: name for name, clue in world.known_for.items()}
        functions: dict[str, Callable[..., str]] = {
            "atlas": self._atlas,
            "sightings": self._sightings,
            "gauge": self._gauge,
            "combine": combine,
        }
        super().__init__(TOOLS, functions)

    def _atlas(self, category: str, subject: str, property: str) -> str:
        subjects = self._world.entities.get(category.strip().lower())
        if subjects is None:
            raise ValueError(f"Unknown category; use {', '.join(WATERS.kinds)}.")
        if subject not in subjects:
            raise ValueError("Unknown subject of this category; check sightings.")
        facts = self._world.facts[subject]
        if property not in facts:
            raise ValueError(f"Unknown property; use {', '.join(facts)}.")
        return SEPARATOR.join((subject, property, facts[property]))

    def _sightings(self, sign: str) -> str:
        seen = sign.strip().lower()
        if seen not in self._places:
            raise ValueError("Never seen; try one plural noun.")
        return SEPARATOR.join((seen, self._places[seen]))

    def _gauge(self, **cell: str) -> str:
        value = read_cell(self._sheet, WATERS.columns, **cell)
        return SEPARATOR.join((cell["hour"], cell["reading"], value))


def combine(mode: str, left: int, right: int) -> str:
    """The sum or difference. Raises ValueError, with a remedy, for what is neither."""
    if mode not in MODES.values():
        raise ValueError(f"Unknown mode; use {' or '.join(MODES.values())}.")
    if max(abs(left), abs(right)) > MAX_MAGNITUDE:
        raise ValueError("Too large an integer.")
    return SEPARATOR.join((mode, str(left + right if mode == "add" else left - right)))
