"""What a run did, for people: `report.html` in its folder and a table for the terminal.

    result.json, metrics.jsonl, warmup.jsonl, samples.jsonl  ->  RunFiles
    RunFiles  ->  scores, plots (of charts), chats  ->  page

The page is one file without scripts and without anything from elsewhere, and it is written from
whatever there is: a run that was interrupted has a report that says what is missing.
"""

from launch.report.page import write_report
from launch.report.scores import format_table

__all__ = ["format_table", "write_report"]
