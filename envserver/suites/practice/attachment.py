"""The table that some tasks come with, as a file; it exists in memory only."""

import csv
import io
from dataclasses import dataclass
from random import Random

from envserver.suites.practice.domain import Domain

NUM_ROWS = 5


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A file of values: a header line, then rows named by their first column."""

    file_name: str
    text: str
    """E.g. `item,quantity,price`, then `lamps,12,30` and so on."""

    def table(self) -> dict[str, dict[str, str]]:
        """Row name -> column -> cell, as the csv module reads the text."""
        header, *rows = csv.reader(io.StringIO(self.text), delimiter=_delimiter(self.file_name))
        return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def make_attachment(rng: Random, domain: Domain) -> Attachment:
    """Draw a file name, items and their numbers."""
    items = rng.sample(domain.items, NUM_ROWS)
    rows = [(item, *(rng.randrange(20, 100) for _ in domain.columns)) for item in items]
    file_name = rng.choice(domain.files)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", delimiter=_delimiter(file_name))
    writer.writerow((domain.item_column, *domain.columns))
    writer.writerows(rows)
    return Attachment(file_name=file_name, text=text.getvalue())


def _delimiter(file_name: str) -> str:
    return "\t" if file_name.endswith(".tsv") else ","
