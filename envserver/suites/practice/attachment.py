"""The CSV file that some tasks come with; it exists in memory only."""

import csv
import io
from dataclasses import dataclass
from random import Random

from envserver.suites.practice import names

COLUMNS = ("quantity", "price")
NUM_ROWS = 5


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A CSV file: a header line, then rows named by their first column."""

    file_name: str
    text: str
    """E.g. `item,quantity,price`, then `lamps,12,30` and so on."""

    def table(self) -> dict[str, dict[str, str]]:
        """Row name -> column -> cell, as the csv module reads the text."""
        rows = csv.DictReader(io.StringIO(self.text))
        return {row["item"]: {column: row[column] for column in COLUMNS} for row in rows}


def make_attachment(rng: Random) -> Attachment:
    """Draw a file name, items and their numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("item", *COLUMNS))
    for item in rng.sample(names.ITEMS, NUM_ROWS):
        writer.writerow((item, *(rng.randrange(20, 100) for _ in COLUMNS)))
    return Attachment(file_name=rng.choice(names.FILES), text=text.getvalue())
